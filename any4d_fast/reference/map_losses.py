"""Per-pixel training losses in plain PyTorch: oracle in float64, and eager backend of `any4d_fast.ops.map_losses`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .compose_factors import compute_dtype, rotate_map

EPS = 1e-8
"""Smallest mean distance that is divided by; MapAnything clamps at the same value."""

TERMS = ("rays", "depth", "points", "flow", "mask")


class PredictedMaps(NamedTuple):
    """What the model predicts, views first: view v of sample b is [v, b]. None: it has no such output.

    The metric scale may be part of them or not: it cancels.
    """

    pts3d: Tensor
    """[V, B, H, W, 3] world points (world = view 0's camera)."""
    scene_flow: Tensor
    """[V, B, H, W, 3] motion of view 0's points to time v, on view 0's pixels, world axes."""
    depth_along_ray: Tensor | None = None
    """[V, B, H, W, 1] distance from the view's camera."""
    ray_directions: Tensor | None = None
    """[V, B, H, W, 3], the view's own camera."""
    mask_logits: Tensor | None = None
    """[V, B, H, W] logit of the non-ambiguous mask."""
    conf: Tensor | None = None
    """[V, B, H, W], positive. Given: the points' loss is weighted by it."""


class TargetMaps(NamedTuple):
    """Ground truth, samples first. What a flag or mask denies is never read, and may be NaN."""

    ray_directions: Tensor
    """[B, V, H, W, 3] unit vectors, the view's own camera."""
    depth_along_ray: Tensor
    """[B, V, H, W, 1] distance from the view's camera."""
    camera_poses: Tensor
    """[B, V, 4, 4] camera-to-world."""
    scene_flow: Tensor
    """[B, V, H, W, 3] as the prediction's."""
    depth_mask: Tensor
    """[B, V, H, W] bool."""
    flow_mask: Tensor
    """[B, V, H, W] bool, on view 0's pixels."""
    dynamic_mask: Tensor
    """[B, V, H, W] bool, on view 0's pixels."""
    surface_mask: Tensor
    """[B, V, H, W] bool."""
    has_rays: Tensor
    """[B] bool."""
    has_poses: Tensor
    """[B] bool."""
    has_surface: Tensor
    """[B] bool."""


class MapLosses(NamedTuple):
    """Losses of every sample, and what normalised them. K = 5 terms, in the order of `TERMS`."""

    terms: Tensor
    """[B, K] means over a sample's supervised pixels of all views; 0 where it has none."""
    pred_distance: Tensor
    """[B] mean distance of the prediction, in its own unit; 0 without depth. Differentiable."""
    distance: Tensor
    """[B] mean distance of the target, likewise."""
    counts: Tensor
    """[B, K] int64: supervised pixels."""


def squash(x: Tensor) -> Tensor:
    """x / |x| log(1 + |x|) along the last dimension; the identity near 0."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    positive = length > 0
    safe = torch.where(positive, length, torch.ones_like(length))
    return x * torch.where(positive, safe.log1p() / safe, torch.ones_like(length))


def penalty(residual: Tensor, robust: tuple[float, float] | None, *, l1: bool = False) -> Tensor:
    """Penalty of residuals [..., C] -> [...]: |r|, or the sum of |r_i|, or Barron's general robust loss.

    Args:
        residual: prediction minus target.
        robust: (alpha, c) with 0 < alpha < 2: |alpha - 2| / alpha ((|r / c|^2 / |alpha - 2| + 1)^(alpha / 2) - 1)
            (arXiv 1701.03077, equation 1). None for the norm.
        l1: sum of absolute values where `robust` is None.
    """
    if robust is None:
        return residual.abs().sum(-1) if l1 else torch.linalg.vector_norm(residual, dim=-1)
    alpha, c = robust
    squares = (residual / c).square().sum(-1)
    # expm1 and log1p keep the digits of small residuals, which the power minus one would lose.
    return (2 - alpha) / alpha * torch.expm1(alpha / 2 * torch.log1p(squares / (2 - alpha)))


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over [V, B, H, W] where `mask`, a sample; 0 where there is nothing. `values` are finite everywhere."""
    total = torch.where(mask, values, torch.zeros_like(values)).sum((0, 2, 3))
    return total / mask.sum((0, 2, 3)).clamp(min=1)


def _known(maps: Tensor | None, mask: Tensor, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
    """A map where its mask holds, `fill` elsewhere, so that nothing unknown (NaN) enters any arithmetic."""
    assert maps is not None
    mask = mask if maps.ndim == mask.ndim else mask[..., None]
    return torch.where(mask, maps.to(dtype), torch.full((), fill, dtype=dtype, device=maps.device))


def map_losses(
    maps: PredictedMaps,
    targets: TargetMaps,
    *,
    dynamic_weight: float = 10.0,
    conf_alpha: float = 0.2,
    robust: tuple[float, float] | None = None,
) -> MapLosses:
    """Plain PyTorch twin of `any4d_fast.ops.map_losses`; see there for the equations."""
    dtype = compute_dtype(*maps, *(t for t in targets if t.is_floating_point()))
    # From here on all maps are [V, B, H, W, ...], and all flags [1, B, 1, 1].
    gt = TargetMaps(*(t.transpose(0, 1) if t.ndim > 1 else t[None, :, None, None] for t in targets))
    shape = maps.pts3d.shape[:-1]
    has_world = gt.has_rays & gt.has_poses
    points_mask = gt.depth_mask & has_world
    # Without depth of its own the model has distances only where it has points to compare.
    depth_mask = gt.depth_mask if maps.depth_along_ray is not None else points_mask
    rays_mask = gt.has_rays.expand(shape)

    rays = _known(gt.ray_directions, rays_mask, dtype)
    depth = _known(gt.depth_along_ray, depth_mask, dtype)
    pose = torch.where(has_world, gt.camera_poses.to(dtype), torch.eye(4, dtype=dtype, device=depth.device))
    points = rotate_map(pose[..., :3, :3], rays * depth) + pose[..., None, None, :3, 3]
    pred_points = _known(maps.pts3d, points_mask, dtype)
    norms = [torch.linalg.vector_norm(_known(x, points_mask, dtype), dim=-1) for x in (points, pred_points)]
    if maps.depth_along_ray is not None:
        pred_depth = _known(maps.depth_along_ray, depth_mask, dtype)
        pairs = zip(norms, (depth, pred_depth), strict=True)
        norms = [torch.where(has_world, norm, along[..., 0].abs()) for norm, along in pairs]
    distance, pred_distance = (_masked_mean(norm, depth_mask) for norm in norms)
    unit, pred_unit = (d.clamp(min=EPS)[None, :, None, None, None] for d in (distance, pred_distance))

    flow_mask = gt.flow_mask & depth_mask.any(0).flatten(1).any(1)[None, :, None, None]
    flow, pred_flow = (_known(x, flow_mask, dtype) for x in (gt.scene_flow, maps.scene_flow))
    weight = 1 + (dynamic_weight - 1) * (gt.dynamic_mask & flow_mask).to(dtype)
    flow_loss = weight * penalty(squash(pred_flow / pred_unit) - squash(flow / unit), robust)
    points_loss = penalty(squash(pred_points / pred_unit) - squash(points / unit), robust)
    if maps.conf is not None:
        conf = _known(maps.conf, points_mask, dtype, 1.0)
        points_loss = conf * points_loss - conf_alpha * conf.log()

    found = {"points": (points_loss, points_mask), "flow": (flow_loss, flow_mask)}
    if maps.depth_along_ray is not None:
        residual = squash(pred_depth / pred_unit) - squash(depth / unit)
        found["depth"] = penalty(residual, robust, l1=True), depth_mask
    if maps.ray_directions is not None:
        residual = _known(maps.ray_directions, rays_mask, dtype) - rays
        found["rays"] = penalty(residual, robust, l1=True), rays_mask
    if maps.mask_logits is not None:
        surface_known = gt.has_surface.expand(shape)
        logits = _known(maps.mask_logits, surface_known, dtype)
        seen = (gt.surface_mask & surface_known).to(dtype)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, seen, reduction="none")
        found["mask"] = loss, surface_known
    nothing = torch.zeros_like(distance), torch.zeros_like(distance, dtype=torch.int64)
    means = [_masked_mean(*found[k]) if k in found else nothing[0] for k in TERMS]
    counts = [found[k][1].sum((0, 2, 3)) if k in found else nothing[1] for k in TERMS]
    return MapLosses(torch.stack(means, 1), pred_distance, distance, torch.stack(counts, 1))
