"""The training losses of Any4D (arXiv 2512.10935; the geometric ones are MapAnything's, arXiv 2509.13414).

A hat marks the ground truth, a tilde the prediction before the metric scale m; f(x) = x / |x| log(1 + |x|). z is the
mean distance of a sample's world points from the origin, over all pixels of all views whose depth is known: z^ of the
ground truth, z~ of the prediction. Views are i = 1..V; every mean runs over a sample's supervised pixels or views:

| term | equation | needs |
|---|---|---|
| rays | mean \\|R_i - R^_i\\|_1 | `has_rays` |
| rotation | mean min(\\|Q_i - Q^_i\\|, \\|Q_i + Q^_i\\|) | `has_poses` |
| translation | mean \\|T~_i / z~ - T^_i / z^\\| | `has_poses`, some known depth |
| depth | mean \\|f(D~_i / z~) - f(D^_i / z^)\\| | `depth_mask` |
| points | mean \\|f(X~_i / z~) - f(X^_i / z^)\\| | `depth_mask`, `has_rays`, `has_poses` |
| flow | mean w \\|f(F~_i / z~) - f(F^_i / z^)\\|, w = 10 on dynamic pixels, else 1 | `flow_mask`, some known depth |
| scale | \\|f(m stopgrad(z~)) - f(z^)\\| | `is_metric`, some known depth |
| mask | binary cross-entropy with `surface_mask` | `has_surface` |

Rays and quaternions have no unit. Translation, depth, points and flow are in multiples of z (all but translation in log
space); the scale's loss is a difference of logarithms of metres. A sample without rays or poses has no world points:
depth along the ray is its distance. A term is the mean over the samples of the batch that have what it needs, so that a
sparsely annotated sample counts as much as a dense one. What a sample lacks adds exactly zero to the loss and to every
gradient, and is never read: it may be NaN.

**Gradients of the metric scale.** The model's outputs are multiplied by m. Dividing by z~, the mean distance of the
same outputs, takes m out again: all terms but the scale's are the same for every m > 0, so their gradients with respect
to m cancel (to rounding), and only the scale's loss trains the scale. There, z~ is the outputs' mean distance divided
by m and detached, so that it trains nothing but the scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..geometry import pose_to_quats_trans
from ..ops._stacking import stack_views
from ..reference.map_losses import EPS, TERMS, penalty
from .batch import Batch

__all__ = ["LossConfig", "Losses", "compute_losses", "rotation_loss", "scale_loss", "translation_loss"]

Outputs = dict[str, Tensor]
Robust = tuple[float, float]


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"LossConfig.{name}: expected {expected}, got {value!r}")


@dataclass(frozen=True)
class LossConfig:
    """Weights and options of `compute_losses`.

    Attributes:
        rays, rotation, translation, depth, points, flow, scale, mask: weight of each term; 0 leaves it out of the total
            (it is still reported). 0.3 for the mask is MapAnything's.
        dynamic_weight: of moving pixels in the flow's loss.
        confidence: weight the points' loss by the predicted confidence: conf * loss - confidence_alpha * log(conf).
        confidence_alpha: 0.2 in MapAnything.
        robust: replace every norm by Barron's general robust loss (arXiv 1701.03077) of the residual, as MapAnything.
        robust_alpha, robust_scale: its shape, 0 < alpha < 2, and its scale c; 0.5 and 0.05 in MapAnything.
        backend: of the per-pixel losses: "triton", "eager" or None (automatic).

    Raises:
        ValueError: a value outside what is possible; the message names it.
    """

    rays: float = 1.0
    rotation: float = 1.0
    translation: float = 1.0
    depth: float = 1.0
    points: float = 1.0
    flow: float = 1.0
    scale: float = 1.0
    mask: float = 0.3
    dynamic_weight: float = 10.0
    confidence: bool = False
    confidence_alpha: float = 0.2
    robust: bool = False
    robust_alpha: float = 0.5
    robust_scale: float = 0.05
    backend: str | None = None

    def __post_init__(self) -> None:
        for name, value in (*self.weights().items(), ("dynamic_weight", self.dynamic_weight)):
            _require(0 <= value < math.inf, name, value, "a weight, 0 or more")
        _require(0 <= self.confidence_alpha < math.inf, "confidence_alpha", self.confidence_alpha, "0 or more")
        _require(0 < self.robust_alpha < 2, "robust_alpha", self.robust_alpha, "a number above 0 and below 2")
        _require(0 < self.robust_scale < math.inf, "robust_scale", self.robust_scale, "a number above 0")
        _require(self.backend in (None, "triton", "eager"), "backend", self.backend, '"triton", "eager" or None')

    def weights(self) -> dict[str, float]:
        """Weight of every term, by name."""
        names = ("rays", "rotation", "translation", "depth", "points", "flow", "scale", "mask")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Losses:
    """What `compute_losses` returns.

    Attributes:
        total: [] weighted sum of the terms.
        terms: [] each, unweighted; 0 where no sample of the batch has what the term needs.
        samples: [] int64 each: samples of the batch that a term is the mean of.
    """

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    samples: dict[str, Tensor] = field(default_factory=dict)


def rotation_loss(quats: Tensor, target: Tensor, robust: Robust | None = None) -> Tensor:
    """L_rot of each sample: mean over views of min(|Q - Q^|, |Q + Q^|); q and -q are one rotation.

    Args:
        quats, target: [B, V, 4] unit quaternions (x, y, z, w), camera-to-world.
        robust: (alpha, c) of the robust loss that replaces the norm.

    Returns:
        [B], no unit, at most sqrt(2) with the norm.
    """
    return torch.minimum(penalty(quats - target, robust), penalty(quats + target, robust)).mean(1)


def translation_loss(
    trans: Tensor, target: Tensor, pred_distance: Tensor, distance: Tensor, robust: Robust | None = None
) -> Tensor:
    """L_trans of each sample: mean over views of |T~ / z~ - T^ / z^|.

    Args:
        trans, target: [B, V, 3] camera centres, world = view 0's camera.
        pred_distance, distance: [B] z~ (in the unit of `trans`; gradients flow) and z^ (in that of `target`).
        robust: (alpha, c) of the robust loss that replaces the norm.

    Returns:
        [B], in multiples of the mean distance.
    """
    scaled = trans / pred_distance.clamp(min=EPS)[:, None, None]
    return penalty(scaled - target / distance.clamp(min=EPS)[:, None, None], robust).mean(1)


def scale_loss(scale: Tensor, pred_distance: Tensor, distance: Tensor, robust: Robust | None = None) -> Tensor:
    """L_scale of each sample: |log(1 + m stopgrad(z~)) - log(1 + z^)|.

    Zero at m = z^ / z~: the factor that makes the up-to-scale prediction as large as the ground truth.

    Args:
        scale: [B] predicted metres a unit, m.
        pred_distance: [B] metres, mean distance of the outputs, m z~; no gradient flows.
        distance: [B] metres, mean distance of the ground truth, z^.
        robust: (alpha, c) of the robust loss that replaces the norm.

    Returns:
        [B], difference of logarithms of metres.
    """
    up_to_scale = (pred_distance / scale.clamp(min=EPS)).detach()
    residual = torch.log1p(scale * up_to_scale) - torch.log1p(distance)
    return penalty(residual[:, None], robust, l1=True)


def target_maps(batch: Batch) -> ops.TargetMaps:
    """What the per-pixel losses compare with."""
    return ops.TargetMaps(*(getattr(batch, name) for name in ops.TargetMaps._fields))


def compute_losses(outputs: Sequence[Outputs], batch: Batch, config: LossConfig | None = None) -> Losses:
    """All losses of the model's outputs on a batch.

    Args:
        outputs: V dictionaries as `Any4D.forward` returns them; keys that the model's scene representation lacks leave
            their terms out. The maps of all views should be slices of one tensor, as the model's are: gradients then go
            to that tensor without a copy (`ops.map_losses`).
        batch: B samples of V views.
        config: weights and options.

    Returns:
        Losses, float32.

    Raises:
        ValueError: another number of views than the batch's, `pts3d` or `scene_flow` is missing, or confidence is asked
            for and the model has none.
    """
    config = config or LossConfig()
    if len(outputs) != batch.num_views:
        raise ValueError(f"outputs: expected one dictionary for each of {batch.num_views} views, got {len(outputs)}")
    wanted = ["pts3d", "scene_flow", *(["conf"] if config.confidence else [])]
    missing = [key for key in wanted if key not in outputs[0]]
    if missing:
        raise ValueError(f"outputs: expected {', '.join(wanted)} in every view, {', '.join(missing)} missing")
    robust = (config.robust_alpha, config.robust_scale) if config.robust else None

    def stacked(key: str) -> Tensor | None:
        return stack_views([output[key] for output in outputs]) if key in outputs[0] else None

    maps = ops.PredictedMaps(
        stack_views([output["pts3d"] for output in outputs]),
        stack_views([output["scene_flow"] for output in outputs]),
        stacked("depth_along_ray"),
        stacked("ray_directions"),
        stacked("non_ambiguous_mask_logits"),
        stacked("conf") if config.confidence else None,
    )
    found = ops.map_losses(
        maps,
        target_maps(batch),
        dynamic_weight=config.dynamic_weight,
        conf_alpha=config.confidence_alpha,
        robust=robust,
        backend=config.backend,
    )
    terms = {name: (found.terms[:, i], found.counts[:, i] > 0) for i, name in enumerate(TERMS)}
    terms |= _pose_and_scale(outputs[0], stacked("cam_quats"), stacked("cam_trans"), found, batch, robust)
    return _total(terms, config)


def _pose_and_scale(
    first: Outputs,
    quats: Tensor | None,
    trans: Tensor | None,
    found: ops.MapLosses,
    batch: Batch,
    robust: Robust | None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Terms that need no pixels: [B] losses, and [B] bool whether a sample has the supervision."""
    has_distance = found.counts[:, TERMS.index("depth")] + found.counts[:, TERMS.index("points")] > 0
    terms = {}
    dtype, one = found.terms.dtype, torch.ones_like(found.distance)
    known = batch.has_poses[:, None, None]
    # Unknown values are replaced before any arithmetic: a NaN times zero would still be NaN.
    identity = torch.eye(4, dtype=batch.camera_poses.dtype, device=batch.camera_poses.device)
    target_quats, target_trans = pose_to_quats_trans(torch.where(known[..., None], batch.camera_poses, identity))
    if quats is not None:
        pred = torch.where(known, quats.transpose(0, 1).to(dtype), target_quats)
        terms["rotation"] = rotation_loss(pred, target_quats, robust), batch.has_poses
    if trans is not None:
        both = batch.has_poses & has_distance
        pred_distance, distance = (torch.where(both, d, one) for d in (found.pred_distance, found.distance))
        pred = torch.where(both[:, None, None], trans.transpose(0, 1).to(dtype), target_trans)
        terms["translation"] = translation_loss(pred, target_trans, pred_distance, distance, robust), both
    if "metric_scaling_factor" in first:
        both = batch.is_metric & has_distance
        scale = torch.where(both, first["metric_scaling_factor"][:, 0].to(dtype), one)
        pred_distance, distance = (torch.where(both, d, one) for d in (found.pred_distance, found.distance))
        terms["scale"] = scale_loss(scale, pred_distance, distance, robust), both
    return terms


def _total(terms: dict[str, tuple[Tensor, Tensor]], config: LossConfig) -> Losses:
    """Means over the samples that have a term, and their weighted sum."""
    means, samples = {}, {}
    total = next(iter(terms.values()))[0].new_zeros(())
    for name, weight in config.weights().items():
        if name not in terms:
            continue
        values, has = terms[name]
        samples[name] = has.sum()
        means[name] = torch.where(has, values, torch.zeros_like(values)).sum() / samples[name].clamp(min=1)
        if weight != 0:
            total = total + weight * means[name]
    return Losses(total, means, samples)
