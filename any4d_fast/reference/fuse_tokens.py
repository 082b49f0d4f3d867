"""Sum of the given modalities and LayerNorm in plain PyTorch, in the multi-view transformer's row order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _given(values: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Values in `dtype`, exactly zero where the mask is false (a product would turn NaN into NaN)."""
    values = values.to(dtype)
    if mask is None:
        return values
    return torch.where(mask.reshape(-1, *([1] * (values.ndim - 1))), values, torch.zeros_like(values))


def fuse_tokens(
    image_tokens: Tensor,
    dense: Sequence[Tensor],
    vectors: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    dense_masks: Sequence[Tensor | None] | None = None,
    vector_masks: Sequence[Tensor | None] | None = None,
    scale_token: Tensor | None = None,
    batch: int = 1,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows [B, V * T (+ 1), C]; see `any4d_fast.ops.fuse_tokens`."""
    rows, tokens, channels = image_tokens.shape
    exact = torch.promote_types(image_tokens.dtype, torch.float32)
    total = image_tokens.to(exact)
    for features, mask in zip(dense, dense_masks or [None] * len(dense), strict=True):
        total = total + _given(features.reshape(rows, tokens, channels), mask, exact)
    for vector, mask in zip(vectors, vector_masks or [None] * len(vectors), strict=True):
        total = total + _given(vector, mask, exact)[:, None]
    fused = F.layer_norm(total, (channels,), weight.to(exact), bias.to(exact), eps)
    views = rows // batch
    fused = fused.unflatten(0, (views, batch)).transpose(0, 1).reshape(batch, views * tokens, channels).to(out_dtype)
    if scale_token is None:
        return fused
    last = scale_token.reshape(1, 1, channels).to(out_dtype).expand(batch, 1, channels)
    return torch.cat([fused, last], dim=1)
