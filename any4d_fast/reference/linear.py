"""A linear layer in plain PyTorch: oracle and eager fallback."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None = None,  # [N]
) -> Tensor:
    """x weight^T + bias; [..., N] in x's dtype, the parameters rounded to it."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
