"""Bilinear resize, 3x3 convolution, ReLU and 1x1 convolution in plain PyTorch, channels-last in and out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_conv(
    x: Tensor,
    size: tuple[int, int],
    weight3: Tensor,
    bias3: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """[N, h, w, C] to [N, H, W, Cout]; see `any4d_fast.ops.resize_conv`."""
    n, (height, width), dtype = x.shape[0], size, x.dtype
    cout, hidden = weight1.shape[:2]
    if n == 0:
        # Convolutions refuse empty batches of some layouts; the sums keep every input in the graph.
        zero = x.sum() + weight3.sum() + bias3.sum() + weight1.sum() + bias1.sum()
        return x.new_zeros(0, height, width, cout, dtype=out_dtype) + zero.to(out_dtype or dtype)
    # A map that is already of this size is left as it is: its source coordinates are whole numbers.
    resized = F.interpolate(x.permute(0, 3, 1, 2), size=(height, width), mode="bilinear", align_corners=True)
    features = F.relu(F.conv2d(resized, weight3.to(dtype), bias3.to(dtype), padding=1))
    # Converted before the last sums, not after: those are what `out_dtype` should hold.
    last = out_dtype or dtype
    kernel = weight1.to(dtype).to(last).reshape(cout, hidden, 1, 1)
    out = F.conv2d(features.to(last), kernel, bias1.to(dtype).to(last))
    return out.permute(0, 2, 3, 1)
