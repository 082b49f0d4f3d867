"""8-bit attention forward on Hopper: launcher of csrc/attention_fp8_sm90.cu."""

from __future__ import annotations

from torch import Tensor

from .attention import run_forward

LINEAR_RUNS = (8, 4, 0, 4)
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
    return run_forward("attention_fp8", qkv, segments, scale, variant)
