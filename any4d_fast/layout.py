"""Addresses and strides of maps and rows, as the kernels of every backend want them."""

from __future__ import annotations

import torch
from torch import Tensor


def copy_engine_reads(x: Tensor) -> bool:
    """Whether Hopper's copy engine can read `x`: its address and all strides but the last are multiples of 16 bytes."""
    return x.data_ptr() % 16 == 0 and all(s * x.element_size() % 16 == 0 for s in x.stride()[:-1])


def evenly_spaced(maps: Tensor) -> Tensor:
    """The map [N, H, W, C] itself if one stride walks its pixels in row-major order, else a copy that one does.

    The copy lies as `like_map` does: a kernel may write a gradient in the order of channels that it reads.
    """
    _, height, width, _ = maps.shape
    _, down, across, _ = maps.stride()
    return maps if height == 1 or width == 1 or down == width * across else like_map(maps).copy_(maps)


def map_strides(maps: Tensor) -> tuple[int, int, int]:
    """Row, pixel and channel strides of an evenly spaced map [N, H, W, C]."""
    row, down, across, channel = maps.stride()
    return row, (across if maps.shape[2] > 1 else down), channel


def packed(rows: Tensor) -> Tensor:
    """Rows [N, C] whose last dimension is contiguous."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def packed_matrices(matrices: Tensor) -> Tensor:
    """Matrices [N, R, C] whose entries are contiguous; the N may be apart, or all the same."""
    _, down, across = matrices.stride()
    return matrices if (down, across) == (matrices.shape[2], 1) else matrices.contiguous()


def like_map(maps: Tensor) -> Tensor:
    """An uninitialised gradient of the map's dtype: channels last if the map's are contiguous, else channels first."""
    n, height, width, channels = maps.shape
    if maps.stride(3) == 1:
        return torch.empty((n, height, width, channels), dtype=maps.dtype, device=maps.device)
    return torch.empty((n, channels, height, width), dtype=maps.dtype, device=maps.device).permute(0, 2, 3, 1)


def zero_uncovered(x: Tensor, segments: list[int]) -> None:
    """Zero the rows (dimension 0 of `x`) that are in no segment: gaps, head and tail of the buffer."""
    start, length, count, stride, groups, group_stride = segments
    if groups * count * length == 0:
        x.zero_()
        return
    span = (count - 1) * stride + length
    end = start + (groups - 1) * group_stride + span
    row, tail = x.stride(0), x.stride()[1:]
    rest = x.shape[1:]
    if start:
        x[:start].zero_()
    if groups > 1 and group_stride > span:
        gap = x[start + span :]
        size = (groups - 1, group_stride - span, *rest)
        gap.as_strided(size, (group_stride * row, row, *tail), gap.storage_offset()).zero_()
    if count > 1 and stride > length:
        gap = x[start + length :]
        size = (groups, count - 1, stride - length, *rest)
        gap.as_strided(size, (group_stride * row, stride * row, row, *tail), gap.storage_offset()).zero_()
    if end < x.shape[0]:
        x[end:].zero_()
