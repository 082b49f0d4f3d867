"""Attention forward in 8 bits: e4m3 queries, keys, values and probabilities. For inference, where it is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..reference.attention import Segments
from ..reference.attention_fp8 import attention_fp8 as reference_attention_fp8
from ._library import define, launchers, own_dtypes
from .attention import _check, _cuda_reasons, attention_scale

__all__ = ["attention_fp8"]


def _forward_impl(qkv: Tensor, segments: list[int], scale: float, backend: str) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor]
    if backend == backends.EAGER:
        start, length, count, stride, groups, group_stride = segments
        with own_dtypes(qkv):
            found = reference_attention_fp8(qkv, Segments(length, count, stride, groups, group_stride, start), scale)
    else:
        found = launchers("attention_fp8", backend).forward(qkv, segments, scale)
    return found


def _forward_fake(qkv: Tensor, segments: list[int], scale: float, backend: str) -> tuple[Tensor, Tensor]:
    rows, _, heads, head_dim = qkv.shape
    return qkv.new_empty((rows, heads, head_dim)), qkv.new_empty((heads, rows), dtype=torch.float32)


_forward = define(
    "attention_fp8_forward",
    "(Tensor qkv, SymInt[] segments, float scale, str backend) -> (Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
)

backends.register("attention_fp8", cuda=_cuda_reasons)


def attention_fp8(
    qkv: Tensor,
    *,
    segments: Segments,
    scale: float | None = None,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ops.attention` with 8-bit products: about 5% off the exact output for normal inputs, where bfloat16 is 0.3% off.

    Queries, keys, values and probabilities are rounded to e4m3 (3 bits of mantissa). The error of the output relative
    to its norm is about 0.0265 * sqrt(2 s^2 + 2.3) for scores with a standard deviation of s and values without a
    common part; what all values of a segment have in common is kept better. What all keys have in common does no harm.

    Args:
        qkv: [rows, 3, heads, head_dim] bfloat16, float16 (other floating-point dtypes: eager only). Any strides but the
            last.
        segments: which rows attend to which. Rows in no segment are neither read nor attended to: their output and
            log-sum-exp are exactly zero.
        scale: factor on q k^T; head_dim**-0.5 by default. See `attention_scale`.
        backend: "cuda" (Hopper, head dim 64, 16 bit), "eager" (the same roundings in PyTorch, slow), or None for
            automatic choice.
        return_lse: also return the log-sum-exp of the scaled scores.

    Returns:
        out [rows, heads, head_dim] in qkv's dtype; with `return_lse` also lse [heads, rows] float32, natural
        logarithm. Bitwise equal from run to run.

    Raises:
        RuntimeError: qkv requires a gradient and gradients are enabled.
        ValueError: wrong rank, shape, dtype or strides, or segments that leave the buffer.
        BackendError: the backend asked for cannot run this call.
    """
    _check(qkv, segments, scale)
    if torch.is_grad_enabled() and qkv.requires_grad:
        raise RuntimeError(
            "attention_fp8: expected a call without gradients, got a qkv that requires them; this op has no backward: "
            "call it under torch.no_grad(), or train with ops.attention"
        )
    if scale is None:
        scale = attention_scale(qkv.shape[3], segments.length)
    name = backends.select("attention_fp8", backend, qkv, segments=segments, return_lse=return_lse)
    out, lse = _forward(qkv, segments.as_list(), scale, name)
    return (out, lse) if return_lse else out
