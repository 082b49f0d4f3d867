"""What the paper (arXiv 2512.10935, experiments) measures, for every sample of a batch.

`evaluate` gives one number a sample and metric, NaN where the sample lacks the ground truth; `Accumulator` averages
over a data set. `flow` is scene flow, `track` the point that it moves to (`pts3d[0] + scene_flow[i]`); views 1 to V - 1
count, because view 0's own flow is zero. `_dynamic` and `_static`: on moving and resting pixels of view 0 only.

- `flow_epe`, `track_epe`: end-point error, the mean distance between prediction and ground truth;
  `flow_epe_dynamic_zero` is that of predicting that nothing moves, the baseline.
- `flow_apd`, `track_apd`: the fraction of points nearer than a threshold, averaged over 0.1, 0.3, 0.5 and 1 m.
- `flow_inlier_0_1m`, `track_inlier_0_1m`: the fraction of points nearer than 0.1 m.
- `depth_abs_rel`, `depth_delta_1_25`: mean |d - d^| / d^, and the fraction with max(d / d^, d^ / d) < 1.25, after
  scaling the prediction by the ratio of the sample's median depths; with `_metric` without scaling.
- `points_abs_rel`: mean distance of scaled world points over the ground truth's distance from the origin.
- `rotation_degrees`: median over views 1 to V - 1 of the angle between predicted and true rotation.
- `translation_error`: mean over views 1 to V - 1 of the distance between predicted and true camera centre. Both with
  `_zero` are those of predicting that the camera stands still, the baseline.
- `pose_auc_5`, `_15`, `_30`: area under the accuracy curve of pairs of views up to so many degrees (`pose_auc`).
- `scale_error`: |z / z^ - 1|, z the mean distance of the sample's world points from the origin.

Units are the ground truth's: metres, where `is_metric`. There flow, tracks and translation count as predicted: an error
of the scale is an error. In other samples, and everywhere in the names with `_scaled` (which the paper's tables
report), the prediction is first multiplied by z^ / z. Thresholds in metres mean nothing without metres: NaN there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..geometry import invert_pose, quats_trans_to_pose
from .batch import Batch

__all__ = ["THRESHOLDS", "Accumulator", "evaluate"]

Outputs = dict[str, Tensor]

THRESHOLDS = (0.1, 0.3, 0.5, 1.0)
"""Metres, of the average of points within a distance (APD); the first is the inliers'."""
_AUC = (5, 15, 30)
_NAN = math.nan
_READ = ("pts3d", "depth_along_ray", "scene_flow", "cam_quats", "cam_trans")
_FRACTIONS = ("_apd", "_inlier", "_delta", "_auc")
"""Parts of the names of what is better the larger it is."""


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over all but the first dimension where `mask` holds, [B]; NaN where it never does."""
    mask = mask.expand_as(values)
    total = torch.where(mask, values, torch.zeros_like(values)).double().flatten(1).sum(1)
    return (total / mask.flatten(1).sum(1)).to(values.dtype)


def masked_median(values: Tensor, mask: Tensor) -> Tensor:
    """Median (the lower of two) over all but the first dimension where `mask` holds, [B]; NaN where it never does."""
    if values[0].numel() == 0:
        return values.new_full((values.shape[0],), _NAN)
    return torch.where(mask.expand_as(values), values, _NAN).flatten(1).nanmedian(1).values


def depth_errors(pred: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """AbsRel and the fraction within a factor of 1.25 of depths [B, ...], [B] each, where `mask` and `target` > 0."""
    mask = mask & (target > 0)
    safe = torch.where(mask, target, torch.ones_like(target))
    ratio = pred / safe
    within = (ratio < 1.25) & (ratio > 1 / 1.25)
    return masked_mean((ratio - 1).abs(), mask), masked_mean(within.to(pred.dtype), mask)


def point_errors(error: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """EPE, APD and inlier ratio of distances [B, ...] in metres where `mask` holds, [B] each."""
    within = [masked_mean((error < threshold).to(error.dtype), mask) for threshold in THRESHOLDS]
    return masked_mean(error, mask), torch.stack(within).mean(0), within[0]


def rotation_angle(first: Tensor, second: Tensor) -> Tensor:
    """Angle in degrees between rotations [..., 3, 3]."""
    # |A - B| = 2 sqrt(2) sin(angle / 2) keeps the digits of small angles, which the arc cosine of a trace loses.
    chord = torch.linalg.matrix_norm(first.double() - second.double()) / (2 * math.sqrt(2))
    return torch.rad2deg(2 * torch.asin(chord.clamp(max=1))).to(first.dtype)


def direction_angle(first: Tensor, second: Tensor) -> Tensor:
    """Angle in degrees, 0 to 90, between the lines along vectors [..., 3]; 0 if both are zero, 90 if one is."""
    first, second = first.double(), second.double()
    sine = torch.linalg.vector_norm(torch.linalg.cross(first, second), dim=-1)
    angle = torch.rad2deg(torch.atan2(sine, (first * second).sum(-1).abs()))
    zero, also = (torch.linalg.vector_norm(x, dim=-1) < 1e-6 for x in (first, second))
    return torch.where(zero & also, 0.0, torch.where(zero | also, 90.0, angle))


def pose_auc(pred: Tensor, target: Tensor, thresholds: Sequence[int] = _AUC) -> list[Tensor]:
    """Area under the accuracy curve of relative poses, for every threshold in degrees, [B] from 0 to 1.

    As VGGT and MapAnything define it: a pair's error is the larger of its relative rotation's angle and of the angle
    between the lines of its relative translations (opposite directions are the same line), and the accuracy is averaged
    over the thresholds of 1, 2, .. degrees.

    Args:
        pred, target: [B, V, 4, 4] camera-to-world; NaN for fewer than two views.
        thresholds: degrees.
    """
    batch, views = pred.shape[:2]
    if views < 2:
        return [pred.new_full((batch,), _NAN) for _ in thresholds]
    i, j = torch.triu_indices(views, views, 1, device=pred.device)
    # In double precision: no TF32 rounds these products.
    relative = [invert_pose(x[:, i].double()) @ x[:, j].double() for x in (pred, target)]
    angles = rotation_angle(relative[0][..., :3, :3], relative[1][..., :3, :3])
    worst = torch.maximum(angles, direction_angle(relative[0][..., :3, 3], relative[1][..., :3, 3]))  # [B, pairs]
    edges = torch.arange(1, max(thresholds) + 1, device=pred.device)
    accuracy = (worst[..., None] < edges).double().mean(1)  # [B, degrees]
    return [accuracy[:, :threshold].mean(1).to(pred.dtype) for threshold in thresholds]


@torch.no_grad()
def evaluate(outputs: Sequence[Outputs], batch: Batch) -> dict[str, Tensor]:
    """Every metric of the model's outputs on a batch.

    Args:
        outputs: V dictionaries as `Any4D.forward` returns them.
        batch: B samples of V views.

    Returns:
        [B] float32 each, NaN where a sample lacks the ground truth or the model the output. A prediction that is not
        finite has infinite errors and fractions of 0.

    Raises:
        ValueError: another number of views than the batch's.
    """
    if len(outputs) != batch.num_views:
        raise ValueError(f"outputs: expected one dictionary for each of {batch.num_views} views, got {len(outputs)}")
    results = _evaluate(outputs, batch)
    finite = [{key: torch.nan_to_num(x, 1.0, 1.0, 1.0) for key, x in o.items() if key in _READ} for o in outputs]
    if any(not torch.equal(x, o[key]) for o, known in zip(outputs, finite, strict=True) for key, x in known.items()):
        # What a finite prediction has a number for is not undefined: it must not drop out of an average.
        for name, value in _evaluate(finite, batch).items():
            worst = 0.0 if any(part in name for part in _FRACTIONS) else math.inf
            results[name] = torch.where(results[name].isnan() & ~value.isnan(), worst, results[name])
    return results


def _evaluate(outputs: Sequence[Outputs], batch: Batch) -> dict[str, Tensor]:
    def stacked(key: str) -> Tensor | None:
        return torch.stack([output[key].float() for output in outputs], 1) if key in outputs[0] else None

    points, depth = stacked("pts3d"), stacked("depth_along_ray")
    results: dict[str, Tensor] = {}
    if depth is not None:
        results |= _depth(depth[..., 0], batch)
    ratio = torch.full((len(batch),), _NAN, device=batch.images.device)
    if points is not None:
        pred_distance, distance = (masked_mean(x.norm(dim=-1), batch.points_mask) for x in (points, batch.pts3d))
        ratio = distance / pred_distance.masked_fill(pred_distance.isinf(), _NAN)  # by 0 it would be no motion
        metric_only = torch.where(batch.is_metric, 1.0, _NAN)
        results["scale_error"] = (pred_distance / distance - 1).abs() * metric_only
        error = (points * _per_pixel(ratio) - batch.pts3d).norm(dim=-1)
        length = batch.pts3d.norm(dim=-1)
        mask = batch.points_mask & (length > 0)
        results["points_abs_rel"] = masked_mean(error / length.masked_fill(~mask, 1.0), mask)
    flow = stacked("scene_flow")
    if flow is not None:
        results |= _motion(flow, points, ratio, batch)
    quats, trans = stacked("cam_quats"), stacked("cam_trans")
    if quats is not None and trans is not None:
        results |= _poses(quats, trans, ratio, batch)
    return results


def _per_pixel(values: Tensor) -> Tensor:
    return values[:, None, None, None, None]


def _depth(depth: Tensor, batch: Batch) -> dict[str, Tensor]:
    target, mask = batch.depth_along_ray[..., 0], batch.depth_mask
    ratio = masked_median(target, mask) / masked_median(depth, mask)
    abs_rel, delta = depth_errors(depth * ratio[:, None, None, None], target, mask)
    metric = [torch.where(batch.is_metric, value, _NAN) for value in depth_errors(depth, target, mask)]
    return {
        "depth_abs_rel": abs_rel,
        "depth_delta_1_25": delta,
        "depth_abs_rel_metric": metric[0],
        "depth_delta_1_25_metric": metric[1],
    }


def _motion(flow: Tensor, points: Tensor | None, ratio: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Errors of flow and, with points, tracks: on all, moving and resting pixels."""
    later = torch.arange(batch.num_views, device=flow.device) > 0
    flow_mask = batch.flow_mask & later[:, None, None]
    pairs = {"flow": (flow, batch.scene_flow, flow_mask)}
    if points is not None:
        known = flow_mask & batch.points_mask[:, :1]
        pairs["track"] = points[:, :1] + flow, batch.pts3d[:, :1] + batch.scene_flow, known
    subsets = {"": torch.ones_like(flow_mask), "_dynamic": batch.dynamic_mask, "_static": ~batch.dynamic_mask}
    scale = torch.where(batch.is_metric, 1.0, ratio)
    results = {}
    for name, (pred, target, mask) in pairs.items():
        for suffix, factor in (("", scale), ("_scaled", ratio)):
            error = (pred * _per_pixel(factor) - target).norm(dim=-1)
            for subset, chosen in subsets.items():
                epe, apd, inlier = point_errors(error, mask & chosen)
                # A sample without points has no ratio: NaN < threshold is False, which would count as 0.
                valid = batch.is_metric & ~factor.isnan()
                results[f"{name}_epe{subset}{suffix}"] = epe
                results[f"{name}_apd{subset}{suffix}"] = torch.where(valid, apd, _NAN)
                results[f"{name}_inlier_0_1m{subset}{suffix}"] = torch.where(valid, inlier, _NAN)
    length = batch.scene_flow.norm(dim=-1)
    results["flow_epe_dynamic_zero"] = masked_mean(length, flow_mask & batch.dynamic_mask)
    return results


def _poses(quats: Tensor, trans: Tensor, ratio: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Errors of camera-to-world poses; view 0's, the identity by definition, counts in pairs only."""
    pred, target = quats_trans_to_pose(quats, trans), batch.camera_poses.float()
    known = batch.has_poses
    # A rotation that is not finite counts in the median as the worst.
    angles = rotation_angle(pred[:, 1:, :3, :3], target[:, 1:, :3, :3]).nan_to_num(math.inf)
    later = known[:, None].expand(angles.shape)
    identity = torch.eye(4, device=target.device)
    results = {
        "rotation_degrees": masked_median(angles, later),
        "rotation_degrees_zero": masked_median(rotation_angle(identity[:3, :3], target[:, 1:, :3, :3]), later),
        "translation_error_zero": masked_mean(target[:, 1:, :3, 3].norm(dim=-1), later),
    }
    scale = torch.where(batch.is_metric, 1.0, ratio)
    for suffix, factor in (("", scale), ("_scaled", ratio)):
        distance = (pred[:, 1:, :3, 3] * factor[:, None, None] - target[:, 1:, :3, 3]).norm(dim=-1)
        results[f"translation_error{suffix}"] = masked_mean(distance, later)
    # Unknown poses may be anything, NaN too.
    areas = pose_auc(pred, torch.where(known[:, None, None, None], target, identity))
    for threshold, area in zip(_AUC, areas, strict=True):
        results[f"pose_auc_{threshold}"] = torch.where(known, area, _NAN)
    return results


class Accumulator:
    """Averages of what `evaluate` returns over a data set: every sample counts once, and NaN does not count."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}

    def add(self, results: Mapping[str, Tensor]) -> None:
        """One batch's metrics, [B] each."""
        for name, values in results.items():
            self._values.setdefault(name, []).append(values.detach().reshape(-1))

    def values(self) -> dict[str, Tensor]:
        """Every sample's metrics in the order of their coming, [N] float64 on the CPU."""
        return {name: torch.cat(parts).double().cpu() for name, parts in self._values.items()}

    def counts(self) -> dict[str, int]:
        """Samples that a metric is defined for."""
        return {name: int((~values.isnan()).sum()) for name, values in self.values().items()}

    def result(self) -> dict[str, float]:
        """Means over the samples that have a metric; of `rotation_degrees` medians. NaN where none has it."""
        return {
            name: float(values.nanmedian() if name.startswith("rotation_degrees") else values.nanmean())
            for name, values in self.values().items()
        }
