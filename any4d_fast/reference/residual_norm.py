"""Residual stream + LayerScale x branch and the LayerNorm of the sum in plain PyTorch: oracle and eager fallback."""

from __future__ import annotations

import torch
from torch import Tensor

from .layer_norm import compute_dtype, layer_norm


def residual_norm(
    residual: Tensor,  # [..., C]
    branch: Tensor,  # [..., C]
    gamma: Tensor | None = None,  # [C]
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    eps: float = 1e-6,
    *,
    row_scale: Tensor | None = None,  # [rows / rows_per_scale]
    rows_per_scale: int = 1,
    normalize: bool = True,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """residual + row_scale gamma branch in the residual's dtype, and its LayerNorm (None without `normalize`)."""
    dtype = compute_dtype(residual)
    update = branch.to(dtype)
    if row_scale is not None:
        scale = row_scale.repeat_interleave(rows_per_scale).reshape(*residual.shape[:-1], 1).to(dtype)
        # A dropped row's branch may hold anything, NaN included: it is cut off before any arithmetic.
        update = update.masked_fill(scale == 0, 0.0) * scale
    if gamma is not None:
        update = update * gamma.to(dtype)
    new = (residual.to(dtype) + update).to(residual.dtype)
    if not normalize:
        return new, None
    return new, layer_norm(new, weight, bias, eps, out_dtype=out_dtype or branch.dtype)
