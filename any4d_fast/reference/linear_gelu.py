"""Linear layers with what follows them, in plain PyTorch: oracle and eager fallback."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .linear import linear
from .residual_norm import residual_norm


def linear_gelu(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None = None,  # [N]
) -> Tensor:
    """gelu(x weight^T + bias) with the exact (erf) GELU; [..., N] in x's dtype."""
    return F.gelu(linear(x, weight, bias))


def linear_residual(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    residual: Tensor,  # [..., N]
    gamma: Tensor | None = None,  # [N]
    *,
    row_scale: Tensor | None = None,  # [rows / rows_per_scale]
    rows_per_scale: int = 1,
) -> Tensor:
    """residual + row_scale gamma (x weight^T + bias); [..., N] in the residual's dtype."""
    branch = linear(x, weight, bias)
    scale: dict[str, Any] = {"row_scale": row_scale, "rows_per_scale": rows_per_scale}
    return residual_norm(residual, branch, gamma, normalize=False, **scale)[0]
