"""LayerNorm over the last dimension in plain PyTorch: the oracle in float64 and the eager fallback."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """dtype in which statistics are taken: float32, or float64 when the input is."""
    return torch.promote_types(x.dtype, torch.float32)


def layer_norm(
    x: Tensor,  # [..., C]
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    eps: float = 1e-6,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension, in float32 or float64; [..., C]."""
    dtype = compute_dtype(x)
    gain = None if weight is None else weight.to(dtype)
    shift = None if bias is None else bias.to(dtype)
    return F.layer_norm(x.to(dtype), x.shape[-1:], gain, shift, eps).to(out_dtype or x.dtype)
