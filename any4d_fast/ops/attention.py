"""Dense self-attention over packed QKV rows read in place, over segments of one buffer (DESIGN section 2)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..layout import copy_engine_reads
from ..reference.attention import Segments
from ..reference.attention import attention as reference_attention
from . import _attention_libraries
from ._library import define, launchers, own_dtypes

__all__ = ["Segments", "attention", "attention_scale"]

HEAD_DIMS = (32, 48, 64, 80, 96, 128)
"""Head dims of the Triton kernels; the other backends take more."""

LONG = 16_384
"""Segment length from which on automatic choice differs. Measured at 7,105 and 36,409 rows: without the CUDA kernels
the longer ones train faster in cuDNN than in Triton; only there do the CUDA kernels win a deterministic backward."""

_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _forward_impl(qkv: Tensor, segments: list[int], scale: float, backend: str) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = launchers("attention", backend).forward(qkv, segments, scale)
    return found


def _forward_fake(qkv: Tensor, segments: list[int], scale: float, backend: str) -> tuple[Tensor, Tensor]:
    rows, _, heads, head_dim = qkv.shape
    return qkv.new_empty((rows, heads, head_dim)), qkv.new_empty((heads, rows), dtype=torch.float32)


def _backward_impl(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: list[int],
    scale: float,
    deterministic: bool,
    backend: str,
) -> Tensor:
    kernels = launchers("attention_backward", backend)
    found: Tensor = kernels.backward(grad_out, grad_lse, qkv, out, lse, segments, scale, deterministic)
    return found


def _backward_fake(grad_out: Tensor, grad_lse: Tensor | None, qkv: Tensor, *rest: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


_forward = define(
    "attention_forward",
    "(Tensor qkv, SymInt[] segments, float scale, str backend) -> (Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
)
_backward = define(
    "attention_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor qkv, Tensor out, Tensor lse, SymInt[] segments, float scale, "
    "bool deterministic, str backend) -> Tensor",
    _backward_impl,
    _backward_fake,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, scale: float, deterministic: bool, forward: str, backward: str, *segments: int
    ) -> tuple[Tensor, Tensor]:
        out, lse = _forward(qkv, list(segments), scale, forward)
        ctx.save_for_backward(qkv, out, lse)
        ctx.segments, ctx.scale, ctx.deterministic, ctx.backend = segments, scale, deterministic, backward
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (4 + len(ctx.segments))
        if not ctx.needs_input_grad[0] or (grad_out is None and grad_lse is None):
            return None, *nothing
        qkv, out, lse = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        segments = list(ctx.segments)
        settings = (segments, ctx.scale, ctx.deterministic, ctx.backend)
        grad = _backward(grad_out, grad_lse, qkv, out, lse, *settings)
        return grad, *nothing


def _cuda_reasons(qkv: Tensor, **request: Any) -> list[str]:
    why_not = backends.cuda_reasons(qkv, minimum=(9, 0), architecture="90a")
    if why_not:
        return why_not
    if qkv.dtype not in (torch.bfloat16, torch.float16):
        why_not.append(f"dtype {qkv.dtype} is not bfloat16 or float16")
    if qkv.shape[3] != 64:
        why_not.append(f"head_dim {qkv.shape[3]} is not 64")
    if not torch.compiler.is_compiling() and not copy_engine_reads(qkv):
        why_not.append("addresses and strides are not multiples of 16 bytes")
    return why_not


def _triton_reasons(qkv: Tensor, **request: Any) -> list[str]:
    why_not = backends.triton_reasons(qkv)
    if qkv.dtype not in _KERNEL_DTYPES:
        why_not.append(f"dtype {qkv.dtype} is not bfloat16, float16 or float32")
    if qkv.shape[3] not in HEAD_DIMS:
        why_not.append(f"head_dim {qkv.shape[3]} is not one of {', '.join(map(str, HEAD_DIMS))}")
    return why_not


backends.register(
    "attention",
    cuda=_cuda_reasons,
    triton=_triton_reasons,
    **_attention_libraries.REASONS,
)


def attention_scale(
    head_dim: int,
    length: int,
    scalable_softmax: bool = False,
    entropy_scaling: bool = False,
    base_token_count: int = 444,
    growth_factor: float = 1.4,
) -> float:
    """Factor on q k^T: head_dim**-0.5 with upstream's optional corrections for long sequences.

    Scalable softmax (arXiv 2501.19399) multiplies the queries by log(length); entropy scaling (arXiv 2502.07785)
    by sqrt(growth_factor * log(length) / log(base_token_count)). Both are constant over a segment, so they are
    part of the scale.

    Args:
        head_dim: channels of one head.
        length: rows of one segment.
        scalable_softmax: multiply by log(length).
        entropy_scaling: multiply by the square root above.
        base_token_count: tokens at which entropy scaling with a growth factor of 1 is the identity.
        growth_factor: how fast the logits grow with length under entropy scaling.

    Raises:
        ValueError: a correction is asked for and `length` is below 1 or `base_token_count` below 2.
    """
    scale = head_dim**-0.5
    if (scalable_softmax or entropy_scaling) and length < 1:
        raise ValueError(f"length: expected at least 1 row to scale by its logarithm, got {length}")
    if scalable_softmax:
        scale *= math.log(length)
    if entropy_scaling:
        if base_token_count < 2:
            raise ValueError(f"base_token_count: expected at least 2, got {base_token_count}")
        scale *= math.sqrt(growth_factor * math.log(length) / math.log(base_token_count))
    return scale


def _check(qkv: Tensor, segments: Segments, scale: float | None) -> None:
    got = f"got {list(qkv.shape)} {str(qkv.dtype).removeprefix('torch.')}"
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv: expected [rows, 3, heads, head_dim], {got}; view the projection's rows as 3 x heads")
    if not qkv.dtype.is_floating_point:
        raise ValueError(f"qkv: expected a floating-point dtype, {got}; cast it to bfloat16, float16 or float32")
    if qkv.shape[2] == 0 or qkv.shape[3] == 0:
        raise ValueError(f"qkv: expected at least one head and one channel, {got}")
    if qkv.stride(3) != 1 and qkv.shape[3] > 1:
        raise ValueError(
            f"qkv: expected a contiguous last dimension, got strides {qkv.stride()}; call .contiguous() on it"
        )
    if segments.end > qkv.shape[0]:
        raise ValueError(
            f"segments: expected to end within qkv's {qkv.shape[0]} rows, got {segments}, "
            f"whose last row is {segments.end - 1}"
        )
    if scale is not None and not 0 <= scale < math.inf:
        raise ValueError(f"scale: expected a finite factor of 0 or more, got {scale}")


def attention(
    qkv: Tensor,
    *,
    segments: Segments,
    scale: float | None = None,
    backend: str | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v within every segment; not causal, no dropout.

    Queries, keys and values are read where the projection wrote them, through qkv's strides. Upstream's global blocks
    are `Segments.global_`, its frame blocks `Segments.frame`, its image encoder `Segments.batched`.

    Args:
        qkv: [rows, 3, heads, head_dim] bfloat16, float16, float32 (float64: eager only). Any strides but the last.
        segments: which rows attend to which. Rows in no segment are neither read nor attended to: their output,
            log-sum-exp and gradient are exactly zero.
        scale: factor on q k^T; head_dim**-0.5 by default. See `attention_scale`.
        backend: "cuda" (Hopper, head dim 64, 16 bit), "triton", "cudnn", "flash", "flash_attn", "flash_attn_4",
            "eager", or None for automatic choice.
        deterministic: gradients bitwise equal from run to run. The CUDA backward then adds the queries' gradients in
            the order of the keys, at a third of its speed on short segments and two thirds on long ones; the Triton
            backward always is. `torch.use_deterministic_algorithms` implies it. The forward is always deterministic.
        return_lse: also return the log-sum-exp of the scaled scores; it is differentiable.

    Returns:
        out [rows, heads, head_dim] in qkv's dtype; with `return_lse` also lse [heads, rows] float32, natural
        logarithm (float64 for float64 inputs).

    Raises:
        ValueError: wrong rank, shape, dtype or strides, or segments that leave the buffer.
        BackendError: the backend asked for cannot run this call.
    """
    _check(qkv, segments, scale)
    if scale is None:
        scale = attention_scale(qkv.shape[3], segments.length)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    trained = torch.is_grad_enabled() and qkv.requires_grad
    name = backends.select(
        "attention",
        backend,
        qkv,
        segments=segments,
        deterministic=deterministic,
        return_lse=return_lse,
        first=("cuda", "cudnn") if trained and qkv.is_cuda and segments.length >= LONG else (),
    )
    if name == "eager":
        with own_dtypes(qkv):
            return reference_attention(qkv, segments, scale, return_lse)
    if name not in ("triton", "cuda"):
        return _attention_libraries.attention(qkv, segments, scale, name, deterministic)
    ordered = "triton" if name == "cuda" and backend is None and segments.length < LONG else name
    names = (name, ordered if deterministic else name)
    out, lse = _Attention.apply(qkv, scale, deterministic, *names, *segments.as_list())
    return (out, lse) if return_lse else out
