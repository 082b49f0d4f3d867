"""Masked normalisation and logarithmic scaling of depth maps in plain PyTorch, without host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-8
"""Smallest mean depth and smallest magnitude that are divided by, as upstream has them."""


def normalize_depth(depth: Tensor) -> tuple[Tensor, Tensor]:
    """(log-scaled normalised depth [N, H, W, 1], log factor [N]); see `any4d_fast.ops.normalize_depth`."""
    exact = depth.to(torch.promote_types(depth.dtype, torch.float32))
    positive = exact > 0
    total = torch.where(positive, exact, torch.zeros_like(exact)).sum(dim=(1, 2, 3))
    factor = (total / (positive.sum(dim=(1, 2, 3)) + FLOOR)).clip(min=FLOOR)
    normalized = exact / factor[:, None, None, None]
    magnitude = normalized.norm(dim=-1, keepdim=True)
    scaled = normalized / magnitude.clip(min=FLOOR) * torch.log1p(magnitude)
    return scaled.to(depth.dtype), torch.log(factor + FLOOR)
