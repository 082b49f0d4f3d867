"""Linear layers in e4m3 step by step in PyTorch: their roundings, not their speed."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_fp8 import E4M3, LARGEST, power_of_two

SAMPLES = 64
"""Rows, spread evenly, whose mean stands for that of all rows."""


class Rows8(NamedTuple):
    """Rows in e4m3: `scale[..., None] * values`; a scale of None is one throughout."""

    values: Tensor  # [..., C] float8_e4m3fn
    scale: Tensor | None  # [...] float32

    def wide(self) -> Tensor:
        """[..., C] float32."""
        found = self.values.float()
        return found if self.scale is None else found * self.scale[..., None]


def to_e4m3(x: Tensor) -> Tensor:
    """`x` rounded to the nearest e4m3 number, saturating; [...] float8_e4m3fn."""
    return x.float().clamp(-LARGEST, LARGEST).to(E4M3)


def quantize_rows(x: Tensor) -> Rows8:
    """[..., C] in e4m3 with a power of two for every row: the smallest that keeps its largest value within 448."""
    wide = x.float()
    scale = power_of_two(wide.abs().amax(-1))
    return Rows8(to_e4m3(wide / scale[..., None]), scale)


def sampled_mean(x: Rows8) -> Tensor:
    """[C] float32: mean of `SAMPLES` rows of [rows, C]."""
    rows = x.values.shape[0]
    index = torch.arange(SAMPLES, device=x.values.device) * rows // SAMPLES
    return Rows8(x.values[index], None if x.scale is None else x.scale[index]).wide().mean(0)


def correct_bias(x: Rows8, lost: Rows8, bias: Tensor | None) -> Tensor:
    """[N] float32: bias + lost @ the mean row of `x`; rows of `lost` [N, K] are what the weight lost in rounding."""
    wide = lost.wide()
    if not x.values.shape[0]:
        return wide.new_zeros(wide.shape[0]) if bias is None else bias.float()
    found = wide @ sampled_mean(x)
    return found if bias is None else found + bias.float()


def linear_fp8(
    x: Rows8,  # [rows, K]
    weight: Rows8,  # [N, K]
    bias: Tensor | None = None,  # [N]
    *,
    inverse: Tensor | None = None,  # [N]
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """x weight^T + bias in `out_dtype`; with `inverse`, e4m3 of gelu(x weight^T + bias) * inverse. Float32 sums."""
    found = F.linear(x.wide(), weight.wide(), None if bias is None else bias.float())
    return found.to(out_dtype) if inverse is None else to_e4m3(F.gelu(found) * inverse)
