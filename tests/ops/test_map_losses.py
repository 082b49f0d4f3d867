"""`map_losses` in eager mode: its equations, its masks, its errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from any4d_fast.geometry import transform_points
from any4d_fast.ops import PredictedMaps, TargetMaps, map_losses
from any4d_fast.ops._stacking import stack_views
from any4d_fast.reference.map_losses import TERMS, squash
from tests.loss_inputs import make_maps, make_targets, wide

ROBUST = (0.5, 0.05)


def make(batch: int = 3, views: int = 2, height: int = 5, width: int = 6) -> tuple[PredictedMaps, TargetMaps]:
    return (
        PredictedMaps(*wide(make_maps(batch, views, height, width))),
        TargetMaps(*wide(make_targets(batch, views, height, width))),
    )


def rho(residual: Tensor, robust: tuple[float, float] | None) -> Tensor:
    """Barron's loss, written as in his paper."""
    if robust is None:
        return residual.norm(dim=-1)
    alpha, c = robust
    squares = (residual / c).square().sum(-1)
    return abs(alpha - 2) / alpha * ((squares / abs(alpha - 2) + 1) ** (alpha / 2) - 1)


def log_space(x: Tensor) -> Tensor:
    length = x.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, x / length * torch.log(1 + length), x)


@pytest.mark.parametrize("robust", [None, ROBUST])
def test_equations(robust: tuple[float, float] | None) -> None:
    """Sample by sample, over lists of the known pixels."""
    maps, targets = make()
    found = map_losses(maps, targets, dynamic_weight=7.0, conf_alpha=0.3, robust=robust)
    for b in range(3):
        gt = TargetMaps(*(t[b] for t in targets))
        points, flow, depth, rays, logits, conf = (m[:, b] for m in maps)
        mask, expected = gt.depth_mask, {}
        assert mask.any() and gt.flow_mask.any()
        if gt.has_rays and gt.has_poses:
            local = gt.ray_directions * gt.depth_along_ray
            world = transform_points(gt.camera_poses, local)[mask]
            unit, pred_unit = world.norm(dim=-1).mean(), points[mask].norm(dim=-1).mean()
            loss = rho(log_space(points[mask] / pred_unit) - log_space(world / unit), robust)
            expected["points"] = (conf[mask] * loss - 0.3 * conf[mask].log()).mean()
        else:
            unit, pred_unit = gt.depth_along_ray[mask].mean(), depth[mask].mean()
        residual = log_space(depth[mask] / pred_unit) - log_space(gt.depth_along_ray[mask] / unit)
        expected["depth"] = rho(residual, robust).mean()
        weight = 1 + 6 * gt.dynamic_mask[gt.flow_mask].double()
        residual = log_space(flow[gt.flow_mask] / pred_unit) - log_space(gt.scene_flow[gt.flow_mask] / unit)
        expected["flow"] = (weight * rho(residual, robust)).mean()
        if gt.has_rays:
            residual = rays - gt.ray_directions
            expected["rays"] = (residual.abs().sum(-1) if robust is None else rho(residual, robust)).mean()
        if gt.has_surface:
            probability = logits.sigmoid()
            likelihood = torch.where(gt.surface_mask, probability, 1 - probability)
            expected["mask"] = -likelihood.log().mean()
        for i, name in enumerate(TERMS):
            assert (found.counts[b, i] > 0) == (name in expected)
            torch.testing.assert_close(found.terms[b, i], torch.as_tensor(expected.get(name, 0.0), dtype=torch.float64))
        torch.testing.assert_close(found.distance[b], unit)
        torch.testing.assert_close(found.pred_distance[b], pred_unit)
        assert found.counts[b, TERMS.index("depth")] == mask.sum()


def test_gradcheck() -> None:
    maps, targets = make(2, 2, 2, 2)
    for robust in (None, ROBUST):
        leaves = [m.clone().requires_grad_() for m in maps]

        def numbers(*given: Tensor, robust: tuple[float, float] | None = robust) -> tuple[Tensor, Tensor]:
            found = map_losses(PredictedMaps(*given), targets, robust=robust)
            return found.terms, found.pred_distance

        assert torch.autograd.gradcheck(numbers, leaves)


def test_gradients_are_zero_without_supervision() -> None:
    maps, targets = make()
    leaves = PredictedMaps(*(m.clone().requires_grad_() for m in maps))
    found = map_losses(leaves, targets)
    grads = PredictedMaps(*torch.autograd.grad(found.terms.sum(), list(leaves)))
    world = (targets.has_rays & targets.has_poses)[:, None, None, None]
    masks = {
        "pts3d": targets.depth_mask & world,
        "scene_flow": targets.flow_mask,
        "depth_along_ray": targets.depth_mask,
        "ray_directions": targets.has_rays[:, None, None, None].expand_as(targets.depth_mask),
        "mask_logits": targets.has_surface[:, None, None, None].expand_as(targets.depth_mask),
        "conf": targets.depth_mask & world,
    }
    for name, grad in grads._asdict().items():
        mask = masks[name].transpose(0, 1)
        assert grad.isfinite().all()
        assert not grad[~mask].any(), name
        touched = grad[mask] != 0
        assert (touched.any(-1) if grad.ndim == 5 else touched).all(), name


def test_scale_of_the_prediction_cancels() -> None:
    """No loss but the rays' and mask's changes with a factor on all maps, so that factor's gradient is zero."""
    maps, targets = make()
    scale = torch.tensor([0.3, 2.0, 5.0], dtype=torch.float64, requires_grad=True)
    per_map = scale[None, :, None, None, None]
    scaled = maps._replace(
        pts3d=maps.pts3d * per_map, scene_flow=maps.scene_flow * per_map, depth_along_ray=maps.depth_along_ray * per_map
    )
    found, reference = map_losses(scaled, targets), map_losses(maps, targets)
    torch.testing.assert_close(found.terms, reference.terms)
    (grad,) = torch.autograd.grad(found.terms.sum(), scale)
    assert grad.abs().max() < 1e-12  # float64 rounding of sums that cancel


def test_flow_without_any_depth_is_left_out() -> None:
    maps, targets = make()
    found = map_losses(maps, targets._replace(depth_mask=torch.zeros_like(targets.depth_mask)))
    assert not found.counts[:, [TERMS.index(name) for name in ("depth", "points", "flow")]].any()
    assert not found.distance.any() and found.terms.isfinite().all()


def test_squash_near_zero() -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [1e-30, 0.0, 0.0], [3e-9, 4e-9, 0.0]], requires_grad=True)
    torch.testing.assert_close(squash(x), x, rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(squash(x).sum(), x)
    torch.testing.assert_close(grad, torch.ones_like(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pts3d": torch.zeros(2, 3, 4, 5)}, "pts3d: expected"),
        ({"scene_flow": torch.zeros(2, 3, 5, 6, 2)}, "scene_flow: expected"),
        ({"scene_flow": None}, "scene_flow: expected"),
        ({"conf": torch.zeros(2, 3, 5, 6, dtype=torch.int64)}, "conf: expected"),
        ({"mask_logits": torch.zeros(2, 3, 5, 6, device="meta")}, "mask_logits: expected device"),
    ],
)
def test_wrong_maps(change: dict[str, Tensor], message: str) -> None:
    maps, targets = make()
    with pytest.raises(ValueError, match=message):
        map_losses(maps._replace(**change), targets)


def test_wrong_targets_and_options() -> None:
    maps, targets = make()
    for name, tensor in targets._asdict().items():
        with pytest.raises(ValueError, match=f"targets.{name}: expected"):
            map_losses(maps, targets._replace(**{name: tensor[:1]}))
    with pytest.raises(ValueError, match="depth_mask"):
        map_losses(maps, targets._replace(depth_mask=targets.depth_mask.float()))
    for robust in ((0.0, 0.1), (2.0, 0.1), (0.5, 0.0)):
        with pytest.raises(ValueError, match="robust"):
            map_losses(maps, targets, robust=robust)


def test_compile_without_kernels() -> None:
    torch.compiler.reset()
    maps, targets = make_maps(2, 2, 4, 5), make_targets(2, 2, 4, 5)

    def loss(maps: PredictedMaps) -> Tensor:
        return map_losses(maps, targets, backend="eager").terms.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(maps), loss(maps))


class TestStackViews:
    def test_slices_of_one_tensor_are_not_copied(self) -> None:
        whole = torch.randn(6, 4, 5, 3, requires_grad=True) * 1.0
        for views in (whole.split(2), [whole[0:2], whole[2:4]], [whole[2:4], whole[4:6]]):
            stacked = stack_views(list(views))
            torch.testing.assert_close(stacked, torch.stack(list(views)))
            first = stacked.data_ptr() == views[0].data_ptr()
            assert first == (len(views) == 3)
        (grad,) = torch.autograd.grad(stack_views(whole.split(2)).square().sum(), whole)
        torch.testing.assert_close(grad, 2 * whole)

    def test_one_channel_of_a_tensor_is_not_copied(self) -> None:
        for whole in (torch.randn(6, 7, 4, 5), torch.randn(6, 4, 5, 7)):
            whole.requires_grad_()
            base = whole * 1.0
            channel = base[:, 3] if base.shape[1] == 7 else base[..., 3]
            views = channel.split(2)
            stacked = stack_views(views)
            assert stacked.data_ptr() == views[0].data_ptr()
            torch.testing.assert_close(stacked, torch.stack(views))
            (grad,) = torch.autograd.grad(stacked.sum(), whole)
            assert grad.sum() == channel.numel()

    def test_anything_else_is_stacked(self) -> None:
        whole = torch.randn(6, 4, 5, 3)
        leaves = [part.clone().requires_grad_() for part in whole.split(2)]
        torch.testing.assert_close(stack_views(leaves), whole.unflatten(0, (3, 2)))
        grads = torch.autograd.grad(stack_views(leaves).sum(), leaves)
        assert all((g == 1).all() for g in grads)
        backwards = list(whole.split(2))[::-1]
        torch.testing.assert_close(stack_views(backwards), torch.stack(backwards))
        mixed = [*whole.split(2)[:2], torch.randn(2, 4, 5, 3)]
        torch.testing.assert_close(stack_views(mixed), torch.stack(mixed))

    def test_detached_slices_get_no_gradient(self) -> None:
        whole = torch.randn(4, 3, requires_grad=True) * 1.0
        assert not stack_views([part.detach() for part in whole.split(2)]).requires_grad

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="at least one"):
            stack_views([])
        with pytest.raises(ValueError, match="one shape"):
            stack_views([torch.zeros(2), torch.zeros(3)])
