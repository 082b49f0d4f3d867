"""Pinhole intrinsics from ray directions, by least squares, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .compose_factors import compute_dtype

_SAMPLES = 50
"""Rows and columns of the sampled grid, about; upstream samples as densely."""

_GRAZING = 1e-6
"""Rays whose z is below this part of their length have no useful ratio: they never meet the image plane."""

_SPREAD = 1e-12
"""Smallest variance of the ratios that still determines a focal length: a field of view of about 1e-6 rad."""


def recover_intrinsics(rays: Tensor) -> Tensor:
    """Plain PyTorch implementation of `any4d_fast.ops.recover_intrinsics`; see there."""
    rays = rays.to(compute_dtype(rays))
    height, width = rays.shape[-3:-1]
    rows = torch.arange(0, height, max(1, height // _SAMPLES), device=rays.device)
    columns = torch.arange(0, width, max(1, width // _SAMPLES), device=rays.device)
    sampled = rays[..., rows[:, None], columns[None, :], :]  # [..., R, C, 3]
    z = sampled[..., 2]
    forward = z > _GRAZING * torch.linalg.vector_norm(sampled, dim=-1)
    # The replaced z keeps the unused branch finite, in the forward pass and in the derivative.
    ratios = sampled[..., :2] / torch.where(forward, z, torch.ones_like(z))[..., None]
    u, v = torch.broadcast_tensors(columns[None, :], rows[:, None])
    focal_x, centre_x = _fit_line(ratios[..., 0], u.to(z), forward, (width - 1) / 2)
    focal_y, centre_y = _fit_line(ratios[..., 1], v.to(z), forward, (height - 1) / 2)
    zero, one = torch.zeros_like(focal_x), torch.ones_like(focal_x)
    matrix = torch.stack([focal_x, zero, centre_x, zero, focal_y, centre_y, zero, zero, one], dim=-1)
    return matrix.unflatten(-1, (3, 3))


def _fit_line(ratios: Tensor, pixels: Tensor, valid: Tensor, middle: float) -> tuple[Tensor, Tensor]:
    """Slope and offset of pixel = offset + slope * ratio, [..., R, C] -> [...]; slope 0 where nothing determines it.

    Centred before the products are formed: the squares of the means would otherwise cancel in float32.
    """
    weights = valid.to(ratios)
    count = _total(weights).clamp(min=1)

    def centred(values: Tensor) -> tuple[Tensor, Tensor]:
        mean = _total(weights * values) / count
        return weights * (values - mean[..., None, None]), mean

    ratios_centred, ratio_mean = centred(ratios)
    pixels_centred, pixel_mean = centred(pixels)
    variance = _total(ratios_centred * ratios_centred)
    determined = variance > _SPREAD * count
    covariance = _total(ratios_centred * pixels_centred)
    slope = covariance / torch.where(determined, variance, torch.ones_like(variance))
    slope = torch.where(determined, slope, torch.zeros_like(slope))
    offset = torch.where(determined, pixel_mean - slope * ratio_mean, torch.full_like(slope, middle))
    return slope, offset


def _total(values: Tensor) -> Tensor:
    """[..., R, C] -> [...]. Added in float64: how many maps are fitted at once decides the order, and must not show."""
    return values.sum((-2, -1), dtype=torch.float64).to(values)
