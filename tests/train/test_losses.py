"""The training losses: hand-computed values, missing supervision, gradients through the model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from any4d_fast import Any4D
from any4d_fast.geometry import pose_to_quats_trans
from any4d_fast.train.batch import Batch, to_first_view
from any4d_fast.train.losses import LossConfig, compute_losses, rotation_loss, scale_loss, translation_loss
from tests.loss_inputs import make_targets, unit

NAMES = ("rays", "rotation", "translation", "depth", "points", "flow", "scale", "mask")
BATCH, VIEWS, HEIGHT, WIDTH = 3, 2, 14, 28


def make_batch(seed: int = 0, **changes: Tensor) -> Batch:
    """Sample 0 is complete; 1 lacks poses, 2 lacks rays and the surface mask and is not metric. Unknown is NaN."""
    targets = make_targets(BATCH, VIEWS, HEIGHT, WIDTH, seed)._asdict()
    targets["camera_poses"] = to_first_view(targets["camera_poses"]).masked_fill(
        ~targets["has_poses"][:, None, None, None], float("nan")
    )
    images = torch.rand(BATCH, VIEWS, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))
    return Batch(**({"images": images, "is_metric": torch.tensor([True, True, False])} | targets | changes))


def make_outputs(seed: int = 0, batch: int = BATCH, views: int = VIEWS) -> list[dict[str, Tensor]]:
    """Leaves, one a view and key."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    scale = normal(1).exp().requires_grad_()
    outputs = []
    for _ in range(views):
        view = {
            "pts3d": normal(HEIGHT, WIDTH, 3),
            "scene_flow": normal(HEIGHT, WIDTH, 3),
            "depth_along_ray": 1 + normal(HEIGHT, WIDTH, 1).abs(),
            "ray_directions": unit(normal(HEIGHT, WIDTH, 3)),
            "cam_trans": normal(3),
            "cam_quats": unit(normal(4)),
            "conf": 1 + normal(HEIGHT, WIDTH).exp(),
            "non_ambiguous_mask_logits": normal(HEIGHT, WIDTH),
        }
        outputs.append({k: v.requires_grad_() for k, v in view.items()} | {"metric_scaling_factor": scale})
    return outputs


def ground_truth(batch: Batch) -> list[dict[str, Tensor]]:
    """Outputs that are right, of a complete batch."""
    quats, trans = pose_to_quats_trans(batch.camera_poses)
    return [
        {
            "pts3d": batch.pts3d[:, i],
            "scene_flow": batch.scene_flow[:, i],
            "depth_along_ray": batch.depth_along_ray[:, i],
            "ray_directions": batch.ray_directions[:, i],
            "cam_trans": trans[:, i],
            "cam_quats": -quats[:, i],
            "non_ambiguous_mask_logits": 100.0 * (2.0 * batch.surface_mask[:, i] - 1),
            "metric_scaling_factor": torch.ones(BATCH, 1),
        }
        for i in range(VIEWS)
    ]


def complete(batch: Batch) -> Batch:
    """Sample 0 thrice."""
    return Batch(**{k: v[:1].expand(BATCH, *v.shape[1:]).nan_to_num() for k, v in vars(batch).items()})


def test_the_truth_costs_nothing() -> None:
    batch = complete(make_batch())
    for config in (LossConfig(), LossConfig(robust=True)):
        losses = compute_losses(ground_truth(batch), batch, config)
        assert set(losses.terms) == set(NAMES)
        for name, value in losses.terms.items():
            assert value.abs() < 1e-6, name  # float32 sums of residuals that round to a few 1e-8
        assert all(count == BATCH for count in losses.samples.values())


def test_the_unit_of_the_prediction_costs_scale_alone() -> None:
    batch = complete(make_batch())
    outputs = ground_truth(batch)
    for view in outputs:
        for key in ("pts3d", "scene_flow", "depth_along_ray", "cam_trans"):
            view[key] = 3 * view[key]
        view["metric_scaling_factor"] = torch.full((BATCH, 1), 3.0)
    terms = compute_losses(outputs, batch).terms
    distance = batch.pts3d[0].norm(dim=-1)[batch.points_mask[0]].mean()
    torch.testing.assert_close(terms.pop("scale"), torch.log1p(3 * distance) - torch.log1p(distance))
    assert all(value < 1e-5 for value in terms.values())  # rounding of float32 products


def test_rotation() -> None:
    half = math.radians(60) / 2
    turned = torch.tensor([[[math.sin(half), 0.0, 0.0, math.cos(half)], [0.0, 0.0, 0.0, 1.0]]])
    still = torch.tensor([[[0.0, 0.0, 0.0, 1.0]] * 2])
    # Unit quaternions an angle apart are a chord of a quarter of it apart.
    expected = torch.tensor([2 * math.sin(math.radians(60) / 4) / 2])
    for sign in (1, -1):
        torch.testing.assert_close(rotation_loss(sign * turned, still), expected)
        quats = (sign * still).requires_grad_()
        (grad,) = torch.autograd.grad(rotation_loss(quats, still).sum(), quats)
        assert not grad.any()


def test_translation() -> None:
    trans, target = torch.tensor([[[0.0, 0.0, 0.0], [3.0, 0.0, 4.0]]]), torch.zeros(1, 2, 3)
    mean = torch.tensor([2.0], requires_grad=True)
    loss = translation_loss(trans, target, mean, torch.tensor([7.0]))
    torch.testing.assert_close(loss, torch.tensor([5 / 2 / 2]))
    (grad,) = torch.autograd.grad(loss.sum(), mean)
    torch.testing.assert_close(grad, torch.tensor([-5 / 4 / 2]))
    same = translation_loss(torch.ones(1, 2, 3), 4 * torch.ones(1, 2, 3), torch.tensor([0.5]), torch.tensor([2.0]))
    torch.testing.assert_close(same, torch.zeros(1))


def test_scale() -> None:
    scale = torch.tensor([2.0, 2.0], requires_grad=True)
    pred, target = torch.tensor([3.0, 3.0], requires_grad=True), torch.tensor([1.0, 8.0])
    loss = scale_loss(scale, pred, target)
    torch.testing.assert_close(loss, torch.tensor([math.log(4 / 2), math.log(9 / 4)]))
    (grad,) = torch.autograd.grad(loss.sum(), scale)
    torch.testing.assert_close(grad, torch.tensor([1.5 / 4, -1.5 / 4]))
    (grad,) = torch.autograd.grad(scale_loss(scale, pred, target).sum(), pred, allow_unused=True)
    assert grad is None


def test_total_is_the_weighted_sum() -> None:
    batch, outputs = make_batch(), make_outputs()
    losses = compute_losses(outputs, batch, LossConfig(rays=2.0, points=0.0, mask=0.5))
    weights = dict.fromkeys(NAMES, 1.0) | {"rays": 2.0, "points": 0.0, "mask": 0.5}
    torch.testing.assert_close(losses.total, sum(weights[k] * v for k, v in losses.terms.items()))
    assert losses.total.shape == () and losses.terms["points"] > 0


def test_missing_supervision() -> None:
    """Samples that lack something neither add to its loss nor get a gradient from it, whatever stands there."""
    batch, outputs = make_batch(), make_outputs()
    losses = compute_losses(outputs, batch, LossConfig(confidence=True))
    samples = {"rays": 2, "rotation": 2, "translation": 2, "depth": 3, "points": 1, "flow": 3, "scale": 2, "mask": 2}
    assert {k: int(v) for k, v in losses.samples.items()} == samples
    lacking = {
        "rays": [2],
        "rotation": [1],
        "translation": [1],
        "points": [1, 2],
        "scale": [2],
        "mask": [2],
    }
    leaves = {(i, k): v for i, view in enumerate(outputs) for k, v in view.items() if i == 0 or "metric" not in k}
    for name, term in losses.terms.items():
        grads = torch.autograd.grad(term, list(leaves.values()), retain_graph=True, allow_unused=True)
        touched = torch.zeros(BATCH, dtype=torch.bool)
        for grad in grads:
            assert grad is None or grad.isfinite().all(), name
            touched |= False if grad is None else grad.flatten(1).any(1)
        assert touched.tolist() == [b not in lacking.get(name, []) for b in range(BATCH)], name


@pytest.mark.parametrize("confidence", [False, True])
def test_nothing_known_at_all(confidence: bool) -> None:
    batch = make_batch()
    flags = {k: torch.zeros_like(v) for k, v in vars(batch).items() if v.dtype == torch.bool}
    maps = {k: torch.full_like(v, float("nan")) for k, v in vars(batch).items() if v.is_floating_point()}
    batch, outputs = make_batch(**maps, **flags), make_outputs()
    losses = compute_losses(outputs, batch, LossConfig(confidence=confidence, robust=confidence))
    leaves = [v for view in outputs for v in view.values()]
    grads = torch.autograd.grad(losses.total, leaves, allow_unused=True)
    assert losses.total == 0 and not any(g is not None and (g != 0).any() for g in grads)


def test_no_moving_pixels() -> None:
    batch = make_batch()
    outputs = make_outputs()
    resting = make_batch(dynamic_mask=torch.zeros_like(batch.dynamic_mask))
    plain = compute_losses(outputs, resting, LossConfig()).terms["flow"]
    torch.testing.assert_close(plain, compute_losses(outputs, batch, LossConfig(dynamic_weight=1)).terms["flow"])
    assert compute_losses(outputs, batch, LossConfig()).terms["flow"] > plain


def test_only_its_own_loss_trains_the_scale() -> None:
    torch.manual_seed(0)
    model = Any4D.from_preset("tiny").train()
    batch = make_batch()
    outputs = model(batch.views())
    losses = compute_losses(outputs, batch)
    scale = model.scale_head.parameters()
    weights = [p for p in scale if p.requires_grad]
    sizes = {}
    for name, term in losses.terms.items():
        grads = torch.autograd.grad(term, weights, retain_graph=True, allow_unused=True)
        sizes[name] = sum(float(g.norm()) for g in grads if g is not None)
    own = sizes.pop("scale")
    # What cancels leaves float32 rounding of sums over all pixels.
    assert own > 0 and all(size < 1e-4 * own for size in sizes.values()), (own, sizes)


def test_the_model_learns_from_every_term() -> None:
    torch.manual_seed(0)
    model = Any4D.from_preset("tiny").train()
    batch = make_batch()
    for config in (LossConfig(), LossConfig(confidence=True, robust=True)):
        model.zero_grad()
        compute_losses(model(batch.views()), batch, config).total.backward()
        heads = (model.dense_head, model.scene_flow_dense_head, model.pose_head, model.scale_head)
        for head in heads:
            grads = [p.grad for p in head.parameters() if p.grad is not None]
            assert grads and all(g.isfinite().all() for g in grads) and any(g.any() for g in grads)


def test_outputs_of_another_representation() -> None:
    """A model of world points alone: the terms of what it lacks are zero or left out."""
    outputs = [{k: view[k] for k in ("pts3d", "scene_flow")} for view in make_outputs()]
    losses = compute_losses(outputs, make_batch())
    assert losses.terms["points"] > 0 and losses.terms["flow"] > 0
    assert losses.terms["depth"] == losses.terms["rays"] == 0 and "rotation" not in losses.terms
    losses.total.backward()


def test_errors() -> None:
    batch, outputs = make_batch(), make_outputs()
    with pytest.raises(ValueError, match="2 views, got 1"):
        compute_losses(outputs[:1], batch)
    without = [{k: v for k, v in view.items() if k != "conf"} for view in outputs]
    compute_losses(without, batch)
    with pytest.raises(ValueError, match="conf missing"):
        compute_losses(without, batch, LossConfig(confidence=True))
