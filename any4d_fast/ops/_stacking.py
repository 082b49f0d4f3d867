"""One tensor out of a list of views, without copying where the views are slices of one tensor already."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stack_views(views: Sequence[Tensor]) -> Tensor:
    """V tensors [B, ...] as one [V, B, ...].

    Consecutive slices of one tensor, as the model returns them, come back as a view of that tensor: nothing is copied,
    and gradients go to it directly (not through the slices: hooks on those do not run). Anything else is stacked.

    Raises:
        ValueError: no view, or views whose shapes, dtypes or devices differ.
    """
    if not views:
        raise ValueError("views: expected at least one tensor, got none")
    kinds = {(tuple(v.shape), v.dtype, v.device) for v in views}
    if len(kinds) > 1:
        raise ValueError(f"views: expected tensors of one shape, dtype and device, got {sorted(map(str, kinds))}")
    whole = None if torch.compiler.is_compiling() else _whole(views)
    return torch.stack(list(views)) if whole is None else whole.unflatten(0, (len(views), views[0].shape[0]))


def _whole(views: Sequence[Tensor]) -> Tensor | None:
    """The tensor [V * B, ...] that the views are slices of, or None."""
    first = views[0]
    if first.numel() == 0 or first.is_leaf and first.requires_grad:
        return None
    base = first._base
    if base is None or base.requires_grad != first.requires_grad or any(v._base is not base for v in views):
        return None
    step = first.shape[0] * first.stride(0)
    if any(v.stride() != first.stride() for v in views):
        return None
    if any(v.storage_offset() != first.storage_offset() + i * step for i, v in enumerate(views)):
        return None
    return _select(base, (len(views) * first.shape[0], *first.shape[1:]), first.stride(), int(first.storage_offset()))


def _select(base: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Tensor | None:
    """`base`, or one channel of it, if that has the given shape, strides and offset."""
    if (tuple(base.shape), base.stride(), base.storage_offset()) == (shape, strides, offset):
        return base
    for dim in range(base.ndim if base.ndim == len(shape) + 1 else 0):
        index, rest = divmod(offset - int(base.storage_offset()), max(base.stride(dim), 1))
        others = [d for d in range(base.ndim) if d != dim]
        layout = tuple(base.shape[d] for d in others), tuple(base.stride(d) for d in others)
        if layout == (shape, strides) and rest == 0 and 0 <= index < base.shape[dim]:
            return base.select(dim, index)
    return None
