"""Attention forward on Hopper: launcher of csrc/attention_sm90.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _ext
from ..layout import copy_engine_reads
from . import dtype_code, pointer, stream

HEAD_DIM = 64


def check_rows(name: str, x: Tensor) -> None:
    """What the copy engine needs of packed rows [rows, 3, heads, 64] or [rows, heads, 64].

    Raises:
        ValueError: another head dim, an inner stride other than 1, or addresses that are no multiples of 16 bytes.
    """
    if x.shape[-1] != HEAD_DIM or x.stride(-1) != 1:
        raise ValueError(
            f"{name}: expected a contiguous last dimension of {HEAD_DIM} channels, got {list(x.shape)} with strides "
            f"{x.stride()}; use backend='triton' for other head dims"
        )
    if not copy_engine_reads(x):
        raise ValueError(
            f"{name}: expected its address and strides to be multiples of 16 bytes, got address {x.data_ptr():#x} and "
            f"strides {x.stride()} of {x.element_size()} bytes; call .contiguous() on it"
        )


def forward(qkv: Tensor, segments: list[int], scale: float, variant: int | None = None) -> tuple[Tensor, Tensor]:
    """Run the forward.

    Args:
        qkv: [rows, 3, heads, 64] bfloat16 or float16 on a GPU of compute capability 9.0.
        segments: [start, length, count, stride, groups, group_stride] as in `Segments.as_list`.
        scale: factor on q k^T, 0 or more.
        variant: configuration to run instead of the table's (for tuning).

    Returns:
        out [rows, heads, 64] contiguous; lse [heads, rows] float32, natural logarithm; zero in rows of no segment.

    Raises:
        ValueError: `check_rows`' reasons.
    """
    return run_forward("attention_forward", qkv, segments, scale, variant)


def run_forward(
    kernel: str, qkv: Tensor, segments: list[int], scale: float, variant: int | None
) -> tuple[Tensor, Tensor]:
    """`forward` by the extension's function `kernel`: the arithmetic differs, the call does not."""
    rows, _, heads, _ = qkv.shape
    out = torch.empty((rows, heads, HEAD_DIM), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((heads, rows), dtype=torch.float32, device=qkv.device)
    _, length, count, _, groups, _ = segments
    if groups * count * length == 0:
        return out.zero_(), lse.zero_()
    check_rows("qkv", qkv)
    q, k, v = qkv.unbind(1)
    extension = _ext.module()
    device = qkv.device.index
    size = getattr(extension, f"{kernel}_workspace")(heads=heads, segments=segments, device=device)
    workspace = torch.empty(size, dtype=torch.uint8, device=qkv.device) if size else None
    getattr(extension, kernel)(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        dtype=dtype_code("qkv", qkv, torch.bfloat16, torch.float16),
        row_stride=qkv.stride(0),
        head_stride=qkv.stride(2),
        rows=rows,
        heads=heads,
        segments=segments,
        scale=scale,
        variant=0 if variant is None else variant,
        workspace=pointer(workspace),
        device=device,
        stream=stream(qkv.device),
    )
    return out, lse
