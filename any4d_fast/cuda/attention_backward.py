"""Attention backward on Hopper: launcher of csrc/attention_backward_sm90.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _ext
from ..layout import zero_uncovered
from . import dtype_code, pointer, stream
from .attention import check_rows

DEFAULT_VARIANT = 0


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: list[int],
    scale: float,
    deterministic: bool,
    variant: int | None = None,
) -> Tensor:
    """Run the backward.

    Args:
        grad_out: [rows, heads, 64] gradient of `out`; copied unless contiguous and of qkv's dtype.
        grad_lse: [heads, rows] gradient of `lse`, or None.
        qkv: [rows, 3, heads, 64] bfloat16 or float16 on a GPU of compute capability 9.0, as the forward had it.
        out, lse: what the forward returned.
        segments: [start, length, count, stride, groups, group_stride] as in `Segments.as_list`.
        scale: factor on q k^T, 0 or more.
        deterministic: bitwise equal from run to run: sums of dQ grow in a fixed order.
        variant: configuration to run instead of the default (for tuning).

    Returns:
        [rows, 3, heads, 64] contiguous gradient of qkv; zero in rows of no segment.

    Raises:
        ValueError: `check_rows`' reasons, or a variant that does not exist.
        TypeError: another dtype.
    """
    grad = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    zero_uncovered(grad, segments)
    _, length, count, _, groups, _ = segments
    if groups * count * length == 0:
        return grad
    check_rows("qkv", qkv)
    dtype = dtype_code("qkv", qkv, torch.bfloat16, torch.float16)
    module = _ext.module()
    variant = DEFAULT_VARIANT if variant is None else variant
    if not 0 <= variant < module.attention_backward_variants():
        raise ValueError(f"variant: expected 0 to {module.attention_backward_variants() - 1}, got {variant}")
    rows, _, heads, _ = qkv.shape
    grad_out, out, lse = _contiguous(grad_out.to(qkv.dtype)), _contiguous(out), lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
    plan = {
        "processors": torch.cuda.get_device_properties(qkv.device).multi_processor_count,
        "deterministic": deterministic,
        "variant": variant,
    }
    elements = module.attention_backward_workspace(length=length, units=groups * count * heads, **plan)
    workspace = torch.empty(elements, dtype=torch.float32, device=qkv.device)
    q, k, v = qkv.unbind(1)
    module.attention_backward(
        grad_out=grad_out.data_ptr(),
        grad_lse=pointer(grad_lse),
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        grad=grad.data_ptr(),
        workspace=workspace.data_ptr(),
        dtype=dtype,
        row_stride=qkv.stride(0),
        head_stride=qkv.stride(2),
        rows=rows,
        heads=heads,
        segments=segments,
        scale=scale,
        device=qkv.device.index,
        stream=stream(qkv.device),
        **plan,
    )
    return grad


def _contiguous(x: Tensor) -> Tensor:
    """`x` contiguous and at an address that 16-byte vectors and the copy engine can read."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
