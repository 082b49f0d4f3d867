"""Attention by other libraries: cuDNN and FlashAttention-2 through PyTorch, and two packages of FlashAttention.

flash-attn and flash-attn-4 are optional: looked up once (`backends.PACKAGES`), imported when a call first asks for one.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import backends
from ..reference.attention import Segments, merge_segments, split_segments
from ._library import own_dtypes

Reasons = Callable[..., list[str]]

_ALIGNMENT = 16
"""Bytes that the packages' kernels load at once."""


def attention(qkv: Tensor, segments: Segments, scale: float, name: str, deterministic: bool) -> Tensor:
    """softmax(scale * q k^T) v within every segment by the library `name`, which differentiates it too.

    Args:
        qkv: [rows, 3, heads, head_dim] that the library's reasons let pass.
        segments: which rows attend to which; at least one row.
        scale: factor on q k^T.
        name: one of `REASONS`.
        deterministic: gradients bitwise equal from run to run.

    Returns:
        out [rows, heads, head_dim], zero in rows of no segment.
    """
    # Views of qkv, [segments, length, 3, heads, head_dim]: only frame attention of several samples is copied.
    windows = split_segments(qkv, segments).flatten(0, 1)
    found = _RUN[name](windows, scale, deterministic)
    return merge_segments(found.unflatten(0, (segments.groups, segments.count)), segments, qkv.shape[0])


def _sdpa(windows: Tensor, scale: float, name: str) -> Tensor:
    """PyTorch's scaled_dot_product_attention, forced onto one library."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernel = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[name]
    q, k, v = windows.permute(2, 0, 3, 1, 4).unbind(0)  # [segments, heads, length, head_dim]
    with own_dtypes(q, uniform=True), sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _cudnn(windows: Tensor, scale: float, deterministic: bool) -> Tensor:
    return _sdpa(windows, scale, "cudnn")


def _flash(windows: Tensor, scale: float, deterministic: bool) -> Tensor:
    return _sdpa(windows, scale, "flash")


def _flash_attn(windows: Tensor, scale: float, deterministic: bool) -> Tensor:
    """flash-attn, which takes packed QKV as it is and writes one packed gradient."""
    from flash_attn import flash_attn_qkvpacked_func

    found: Tensor = flash_attn_qkvpacked_func(windows, softmax_scale=scale, deterministic=deterministic)
    return found


def _flash_attn_4(windows: Tensor, scale: float, deterministic: bool) -> Tensor:
    """flash-attn-4, which launches on the current device, not on its arguments'."""
    from flash_attn.cute import flash_attn_func

    q, k, v = windows.unbind(2)  # [segments, length, heads, head_dim]
    with torch.cuda.device_of(windows):
        # The log-sum-exp comes second, computed or not.
        found: Tensor = flash_attn_func(q, k, v, softmax_scale=scale, deterministic=deterministic)[0]
    return found


_RUN: dict[str, Callable[[Tensor, float, bool], Tensor]] = {
    "cudnn": _cudnn,
    "flash": _flash,
    "flash_attn": _flash_attn,
    "flash_attn_4": _flash_attn_4,
}


@dataclass(frozen=True)
class _Package:
    """A library that is installed apart from PyTorch.

    Attributes:
        distribution: its name for pip.
        module, function: what a call needs of it.
        max_head_dim: the largest head dim of every architecture.
        minimum: the oldest compute capability with a forward and a backward.
        deterministic: architectures (major) whose backward can be deterministic; None for all.
        compiles: whether torch.compile can trace a call.
    """

    distribution: str
    module: str
    function: str
    max_head_dim: int
    minimum: tuple[int, int]
    deterministic: tuple[int, ...] | None = None
    compiles: bool = True


_PACKAGES = {
    "flash_attn": _Package("flash-attn", "flash_attn", "flash_attn_qkvpacked_func", 256, (8, 0)),
    # Its calls compile kernels from Python, which torch.compile cannot see. No backward for compute capability 8,
    # no deterministic one for 12.
    "flash_attn_4": _Package("flash-attn-4", "flash_attn.cute", "flash_attn_func", 128, (9, 0), (9, 10, 11), False),
}


@torch.compiler.assume_constant_result
def _broken(name: str) -> str | None:
    """Why an installed package cannot be imported, or None."""
    return _try_import(name)


@functools.cache
def _try_import(name: str) -> str | None:
    package = _PACKAGES[name]
    try:
        getattr(importlib.import_module(package.module), package.function)
    except Exception as error:  # a package built for another PyTorch fails in many ways
        return f"{package.distribution} is installed and cannot be imported: {type(error).__name__}: {error}"
    return None


def _of_the_call(qkv: Tensor, segments: Segments, max_head_dim: int) -> list[str]:
    """What every library asks of dtype, head dim and rows."""
    why_not = []
    if qkv.dtype not in (torch.bfloat16, torch.float16):
        why_not.append(f"dtype {qkv.dtype} is not bfloat16 or float16")
    if qkv.shape[3] % 8 or qkv.shape[3] > max_head_dim:
        why_not.append(f"head_dim {qkv.shape[3]} is not a multiple of 8 up to {max_head_dim}")
    if segments.end == 0:
        why_not.append("there is no row to attend")
    return why_not


def _sdpa_reasons(name: str, max_head_dim: int) -> Reasons:
    def reasons(qkv: Tensor, *, segments: Segments, deterministic: bool, return_lse: bool) -> list[str]:
        elsewhere = backends.not_on_cuda(f"{name} runs", qkv)
        if elsewhere:
            return elsewhere
        why_not = backends.too_old(qkv)
        if name == "cudnn" and not torch.backends.cudnn.is_available():
            why_not.append("this PyTorch has no cuDNN")
        why_not += _of_the_call(qkv, segments, max_head_dim)
        if return_lse:
            why_not.append("scaled_dot_product_attention does not return the log-sum-exp")
        if deterministic:
            why_not.append("scaled_dot_product_attention does not promise a deterministic backward")
        return why_not

    return reasons


def _package_reasons(name: str) -> Reasons:
    package = _PACKAGES[name]

    def reasons(qkv: Tensor, *, segments: Segments, deterministic: bool, return_lse: bool) -> list[str]:
        missing = backends.PACKAGES[name]
        if missing is not None:
            return [missing]
        elsewhere = backends.not_on_cuda(f"{package.distribution} runs", qkv)
        if elsewhere:
            return elsewhere
        why_not = _of_the_device(package, qkv, deterministic) + _of_the_call(qkv, segments, package.max_head_dim)
        if return_lse:
            why_not.append(f"the log-sum-exp is not asked of {package.distribution}")
        if _misaligned(qkv):
            why_not.append(f"qkv's rows and heads do not start at multiples of {_ALIGNMENT} bytes")
        if why_not:
            return why_not
        broken = _broken(name)
        return [] if broken is None else [broken]

    return reasons


def _of_the_device(package: _Package, qkv: Tensor, deterministic: bool) -> list[str]:
    if torch.compiler.is_compiling():  # which cannot trace the look-up of the capability
        return [] if package.compiles else [f"torch.compile cannot trace {package.distribution}"]
    own = backends.capability(qkv.device.index or 0)
    why_not = []
    if own < package.minimum:
        why_not.append(f"compute capability {own[0]}.{own[1]} is older than {package.minimum[0]}.{package.minimum[1]}")
    if deterministic and package.deterministic is not None and own[0] not in package.deterministic:
        why_not.append(f"{package.distribution} has no deterministic backward for compute capability {own[0]}")
    return why_not


def _misaligned(qkv: Tensor) -> bool:
    """Whether a vector load would be; fake tensors have no address."""
    if torch.compiler.is_compiling():
        return False
    size = qkv.element_size()
    strides = [qkv.stride(dim) for dim in range(3) if qkv.shape[dim] > 1]
    return qkv.data_ptr() % _ALIGNMENT != 0 or any(stride * size % _ALIGNMENT for stride in strides)


REASONS: dict[str, Reasons] = {
    "cudnn": _sdpa_reasons("cudnn", 128),
    "flash": _sdpa_reasons("flash", 256),
    **{name: _package_reasons(name) for name in _PACKAGES},
}
"""Why a library cannot run a call: PyTorch's own first, by recorded measurement, then the packages."""
