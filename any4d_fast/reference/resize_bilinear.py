"""Bilinear resize with aligned corners in plain PyTorch, channels-last in and out."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def resize_bilinear(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[N, h, w, C] to [N, H, W, C]; see `any4d_fast.ops.resize_bilinear`."""
    resized = F.interpolate(x.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=True)
    return resized.permute(0, 2, 3, 1)
