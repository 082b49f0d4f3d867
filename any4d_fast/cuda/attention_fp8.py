"""8-bit attention forward on Hopper: launcher of csrc/attention_fp8_sm90.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _ext
from . import dtype_code, stream
from .attention import HEAD_DIM, check_rows

LINEAR_RUNS = (4, 4, 0, 8)
"""What `linear_runs` of the reference is in each configuration of the kernel."""


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
        ValueError: the rows do not lie as the kernel reads them.
    """
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
    size = extension.attention_fp8_workspace(heads=heads, segments=segments, device=device)
    workspace = torch.empty(size, dtype=torch.uint8, device=qkv.device)
    extension.attention_fp8(
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
        workspace=workspace.data_ptr(),
        device=device,
        stream=stream(qkv.device),
    )
    return out, lse
