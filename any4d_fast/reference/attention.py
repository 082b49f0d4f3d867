"""Dense self-attention over packed QKV rows, in plain PyTorch: the oracle in float64 and the eager backend.

DESIGN section 2: frame and global attention are two index ranges over one buffer; `Segments` describes the ranges.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Runs of rows of one buffer, each of which attends only to itself.

    `groups` groups of `count` segments of `length` rows; segment (g, i) starts at row
    `start + g * group_stride + i * stride`. Segments never overlap; rows in no segment are left out.

    Raises:
        ValueError: a negative field, or strides that make segments overlap.
    """

    length: int
    count: int = 1
    stride: int = 0
    groups: int = 1
    group_stride: int = 0
    start: int = 0

    def __post_init__(self) -> None:
        for name in ("length", "count", "stride", "groups", "group_stride", "start"):
            if getattr(self, name) < 0:
                raise ValueError(f"segments.{name}: expected 0 or more, got {getattr(self, name)}")
        if self.count > 1 and self.stride < self.length:
            raise ValueError(
                f"segments.stride: expected at least the length {self.length}, got {self.stride}; "
                "segments must not overlap"
            )
        if self.groups > 1 and self.group_stride < self.span:
            raise ValueError(
                f"segments.group_stride: expected at least {self.span}, the rows from a group's first to its last, "
                f"got {self.group_stride}; segments must not overlap"
            )

    @staticmethod
    def global_(batch: int, rows: int) -> Segments:
        """One segment a sample: `batch` consecutive runs of `rows` rows (V*T+1, the scale token last)."""
        return Segments(length=rows, groups=batch, group_stride=rows)

    @staticmethod
    def frame(batch: int, views: int, tokens: int, extra: int = 1) -> Segments:
        """One segment a view: `views` runs of `tokens` rows a sample, skipping the `extra` rows at its end."""
        return Segments(length=tokens, count=views, stride=tokens, groups=batch, group_stride=views * tokens + extra)

    @staticmethod
    def batched(count: int, length: int) -> Segments:
        """`count` consecutive runs of `length` rows (the image encoder's images)."""
        return Segments(length=length, count=count, stride=length)

    @property
    def total(self) -> int:
        """Number of segments."""
        return self.groups * self.count

    @property
    def span(self) -> int:
        """Rows from the first row of a group to its last."""
        return (self.count - 1) * self.stride + self.length

    @property
    def end(self) -> int:
        """One past the last row of the last segment; 0 when there is none."""
        if self.total == 0 or self.length == 0:
            return 0
        return self.start + (self.groups - 1) * self.group_stride + self.span

    def as_list(self) -> list[int]:
        """[start, length, count, stride, groups, group_stride], as the registered operators take it."""
        return [self.start, self.length, self.count, self.stride, self.groups, self.group_stride]


def _pad(x: Tensor, dim: int, rows: int) -> Tensor:
    """`x` with zero rows added at the end of `dim`."""
    return F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, rows])


def _split(x: Tensor, dim: int, count: int, stride: int, length: int) -> Tensor:
    """Windows of `length` rows every `stride` rows of `dim`: a view, unless the last window's gap is cut off."""
    stride = stride if count > 1 else max(stride, length)
    size = count * stride
    if x.shape[dim] < size:
        x = _pad(x, dim, size - x.shape[dim])
    return x.narrow(dim, 0, size).unflatten(dim, (count, stride)).narrow(dim + 1, 0, length)


def _merge(x: Tensor, dim: int, count: int, stride: int, size: int) -> Tensor:
    """Inverse of `_split`: windows back to `size` rows, with zeros in the gaps."""
    length = x.shape[dim + 1]
    gap = (stride if count > 1 else max(stride, length)) - length
    if gap:
        x = _pad(x, dim + 1, gap)
    x = x.flatten(dim, dim + 1)
    if x.shape[dim] > size:
        return x.narrow(dim, 0, size)
    return _pad(x, dim, size - x.shape[dim]) if x.shape[dim] < size else x


def split_segments(x: Tensor, segments: Segments) -> Tensor:
    """Rows of `x` [rows, ...] by segment: [groups, count, length, ...], a view for the model's layouts."""
    x = x.narrow(0, segments.start, x.shape[0] - segments.start)
    x = _split(x, 0, segments.groups, segments.group_stride, segments.span)
    return _split(x, 1, segments.count, segments.stride, segments.length)


def merge_segments(x: Tensor, segments: Segments, rows: int) -> Tensor:
    """Inverse of `split_segments`: [groups, count, length, ...] to [rows, ...], zeros in rows of no segment."""
    x = _merge(x, 1, segments.count, segments.stride, segments.span)
    x = _merge(x, 0, segments.groups, segments.group_stride, rows - segments.start)
    if segments.start:
        x = F.pad(x, [0, 0] * (x.dim() - 1) + [segments.start, 0])
    return x


def attention(
    qkv: Tensor, segments: Segments, scale: float, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v within every segment.

    The whole score matrix exists in float64 and with `return_lse`; otherwise PyTorch's fused attention is used.

    Args:
        qkv: [rows, 3, heads, head_dim] queries, keys and values.
        segments: which rows attend to which.
        scale: factor on q k^T.
        return_lse: also return the log-sum-exp of every row's scaled scores.

    Returns:
        out [rows, heads, head_dim], zero in rows of no segment; with `return_lse` also lse [heads, rows] (natural
        logarithm, float32, or float64 for float64 inputs), zero in rows of no segment.
    """
    rows, _, heads, head_dim = qkv.shape
    exact = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    if segments.end == 0:
        out = _pad(qkv[:0, 0], 0, rows)
        return (out, _pad(qkv[:0, 0, :, 0], 0, rows).t().to(exact)) if return_lse else out
    windows = split_segments(qkv, segments)
    q, k, v = windows.flatten(0, 1).permute(2, 0, 3, 1, 4).unbind(0)  # each [segments, heads, length, head_dim]
    if not return_lse and qkv.dtype != torch.float64:
        found = F.scaled_dot_product_attention(q, k, v, scale=scale)
    else:
        scores = (q.to(exact) @ k.to(exact).transpose(-1, -2)) * scale
        lse = scores.logsumexp(-1)
        found = (torch.exp(scores - lse[..., None]) @ v.to(exact)).to(qkv.dtype)
    shape = (segments.groups, segments.count)
    out = merge_segments(found.transpose(1, 2).unflatten(0, shape), segments, rows)
    if not return_lse:
        return out
    return out, merge_segments(lse.transpose(1, 2).unflatten(0, shape), segments, rows).t()
