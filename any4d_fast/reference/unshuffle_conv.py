"""PixelUnshuffle and a 3x3 convolution in plain PyTorch, channels-last in and out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unshuffle(x: Tensor, patch: int) -> Tensor:
    """[N, H, W, C] to [N, C * P * P, H / P, W / P], channels as `torch.nn.PixelUnshuffle` has them (N may be 0)."""
    n, height, width, channels = x.shape
    grid = x.reshape(n, height // patch, patch, width // patch, patch, channels).permute(0, 5, 2, 4, 1, 3)
    return grid.reshape(n, channels * patch * patch, height // patch, width // patch)


def unshuffle_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, patch_size: int, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """[N, H, W, Cin] to [N, H / patch, W / patch, Cout]; see `any4d_fast.ops.unshuffle_conv`."""
    offset = None if bias is None else bias.to(weight.dtype)
    features = F.conv2d(unshuffle(x.to(weight.dtype), patch_size), weight, offset, padding=1)
    return features.permute(0, 2, 3, 1).contiguous().to(out_dtype or weight.dtype)
