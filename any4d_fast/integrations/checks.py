"""What the swapped modules rely on: looked at when a model is accelerated, and again, where it may change, in calls."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.plain import plain, unhooked
from ..ops.attention import HEAD_DIMS
from ..ops.layer_norm import MAX_CHANNELS
from .swap import Swap, owner, qualified

_TIMM_LAYER_NORM = "timm.layers.norm.LayerNorm"


LAUNCH_BOUND = 16_384
"""Rows of tokens below which Python takes longer to launch our kernels than the GPU to run them.

On an H200 UniCeption's transformer took 7.4 ms as it was and 15.6 with ours at 7,104 patches, 78.9 and 55.1 at 36,408.
"""


def launch_bound(x: Tensor) -> bool:
    """Whether a transformer module had better run as it was, because launches would take the time.

    In a CUDA graph and in a compiled function they take none.
    """
    if not x.is_cuda or x.numel() >= LAUNCH_BOUND * x.shape[-1]:
        return False
    return not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()


def norm_reasons(module: nn.Module, name: str) -> list[str]:
    """Why a module cannot be computed as a LayerNorm over the last dimension."""
    cls = module.original if isinstance(module, Swap) else type(module)
    if cls is not nn.LayerNorm and qualified(cls) != _TIMM_LAYER_NORM:
        return [f"{name} is {cls.__name__}, not LayerNorm"]
    assert isinstance(module, nn.LayerNorm)
    if len(module.normalized_shape) != 1 or module.normalized_shape[0] > MAX_CHANNELS:
        shape = tuple(module.normalized_shape)
        return [f"{name} is over {shape}, not over one dimension of at most {MAX_CHANNELS}"]
    if getattr(module, "_fast_norm", False):
        return [f"{name} normalises in 16 bits (timm's fast norm), ours in float32"]
    if "forward" in module.__dict__:
        return [f"the forward of {name} was replaced on the instance"]
    return []


def plain_norm(module: nn.Module) -> bool:
    """Whether a LayerNorm may be computed from its parameters in this call."""
    return (
        not norm_reasons(module, "") and unhooked(module) and plain(module.weight, module.bias)  # type: ignore[arg-type]
    )


def missing(module: nn.Module, *names: str) -> list[str]:
    """Attributes that a module of this name should have and has not."""
    absent = [name for name in names if not hasattr(module, name)]
    return [f"it has no {', '.join(absent)}"] if absent else []


def argument_reasons(module: nn.Module, known: Collection[str]) -> list[str]:
    """Why a module's forward may do what this file does not know of: an argument with another name."""
    names = inspect.signature(owner(type(module)).forward).parameters  # type: ignore[attr-defined]
    more = [name for name in names if name not in ("self", *known)]
    return [f"its forward takes {', '.join(more)}, which is not known here"] if more else []


def attention_reasons(module: nn.Module, known: Collection[str]) -> list[str]:
    """Why a module is not self-attention with one projection for queries, keys and values."""
    absent = missing(module, "qkv", "proj", "proj_drop", "num_heads", "attn_drop", "scale")
    if absent:
        return absent
    given: Any = module
    reasons = argument_reasons(module, known)
    width = getattr(given.qkv, "out_features", 0)
    head_dim = width // (3 * given.num_heads)
    if not width or width != 3 * given.num_heads * head_dim:
        reasons.append(f"qkv has {width} outputs, which are not 3 x {given.num_heads} heads")
    elif head_dim not in HEAD_DIMS:
        reasons.append(f"head_dim {head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}")
    elif not isinstance(given.scale, float):
        reasons.append(f"scale is a {type(given.scale).__name__}, not head_dim ** -0.5")
    elif abs(given.scale * head_dim**0.5 - 1) > 1e-6:
        reasons.append(f"scale is {given.scale:g}, not head_dim ** -0.5")
    return reasons


def erf_gelu(module: nn.Module) -> bool:
    """Whether an activation is the GELU that the kernels have."""
    return type(module) is nn.GELU and module.approximate == "none"


def mlp_reasons(module: nn.Module) -> list[str]:
    """Why a module is not Linear, erf GELU, Linear."""
    absent = missing(module, "fc1", "act", "fc2")
    if absent:
        return absent
    given: Any = module
    reasons = argument_reasons(module, ("x",))
    if type(given.fc1) is not nn.Linear:
        reasons.append(f"fc1 is {type(given.fc1).__name__}, not Linear")
    if not erf_gelu(given.act):
        reasons.append(f"the activation is {given.act!r}, not GELU()")
    if not isinstance(getattr(given, "norm", nn.Identity()), nn.Identity):
        reasons.append(f"it normalises its hidden layer ({type(given.norm).__name__})")
    return reasons


def block_reasons(module: nn.Module, known: Collection[str]) -> list[str]:
    """Why a module is not a pre-norm block of attention and MLP with LayerScale and stochastic depth per sample."""
    absent = missing(module, "norm1", "attn", "norm2", "mlp")
    if absent:
        return absent
    given: Any = module
    reasons = argument_reasons(module, known)
    reasons += norm_reasons(given.norm1, "norm1") + norm_reasons(given.norm2, "norm2")
    for name in ("ls1", "ls2"):
        scale = getattr(given, name, None)
        if not isinstance(scale, nn.Identity | None) and not layer_scale(scale):
            reasons.append(f"{name} is {type(scale).__name__}, not LayerScale with one gamma a channel")
    for name in ("drop_path1", "drop_path2"):
        path = getattr(given, name, None)
        if not isinstance(path, nn.Identity | None) and not drop_path(path):
            reasons.append(f"{name} is {type(path).__name__}, not DropPath")
    return reasons


def layer_scale(module: nn.Module) -> bool:
    """Whether a module multiplies each channel by its gamma."""
    gamma = getattr(module, "gamma", None)
    return type(module).__name__ == "LayerScale" and isinstance(gamma, Tensor) and gamma.ndim == 1


def drop_path(module: nn.Module) -> bool:
    """Whether a module is stochastic depth that drops whole samples."""
    return type(module).__name__ == "DropPath"


def conv_reasons(module: nn.Module, name: str, kernel: int, stride: int = 1, padding: int = 0) -> list[str]:
    """Why a module is not a plain square convolution of this size."""
    fits = type(module) is nn.Conv2d and (module.kernel_size, module.stride) == ((kernel,) * 2, (stride,) * 2)
    if fits and isinstance(module, nn.Conv2d):
        rest = (module.padding, module.dilation, module.groups, module.padding_mode)
        fits = rest == ((padding, padding), (1, 1), 1, "zeros")
    return [] if fits else [f"{name} is no plain {kernel}x{kernel} convolution"]


def norm_dtype(x: Tensor) -> torch.dtype:
    """What `F.layer_norm` returns: autocast runs it in float32 on a GPU."""
    widened = x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype != torch.float64
    return torch.float32 if widened else x.dtype


def matmul_dtype(x: Tensor) -> torch.dtype:
    """What `F.linear` computes in: autocast's dtype where it is on, which leaves float64 alone."""
    kind = x.device.type  # autocast does not know of "meta", on which models are counted and planned
    rounded = kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if rounded else x.dtype
