"""Kernels of `map_losses` against the float64 oracle: in the interpreter, and on a GPU at the model's sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from any4d_fast.kernels import map_losses as kernels
from torch import Tensor

from any4d_fast import testing
from any4d_fast.ops import MapLosses, PredictedMaps, TargetMaps, map_losses
from any4d_fast.ops.map_losses import _backward, _forward
from tests.kernels_common import DEVICE, GPU, gpu_only, kernel_test
from tests.loss_inputs import make_maps, make_targets

pytestmark = kernel_test

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROBUST = (0.5, 0.05)
ABSENT = ("depth_along_ray", "ray_directions", "mask_logits", "conf")


def make(
    batch: int, views: int, height: int, width: int, dtype: torch.dtype = torch.float32, known: float = 0.7
) -> tuple[PredictedMaps, TargetMaps]:
    maps, targets = make_maps(batch, views, height, width, dtype), make_targets(batch, views, height, width, 0, known)
    return PredictedMaps(*(m.to(DEVICE) for m in maps)), TargetMaps(*(t.to(DEVICE) for t in targets))


def function(targets: TargetMaps, backend: str, robust: tuple[float, float] | None) -> Callable[..., list[Tensor]]:
    """The op of the maps alone, with targets in the maps' precision."""

    def call(*maps: Tensor | None) -> list[Tensor]:
        kind = torch.float64 if maps[0].dtype == torch.float64 else torch.float32
        given = TargetMaps(*(t.to(kind) if t.is_floating_point() else t for t in targets))
        found = map_losses(PredictedMaps(*maps), given, robust=robust, backend=backend)
        return [found.terms, found.pred_distance, found.distance]

    return call


def check(maps: PredictedMaps, targets: TargetMaps, robust: tuple[float, float] | None = None) -> None:
    """Every loss and every gradient within the budget that plain PyTorch sets."""
    wide = [None if m is None else m.double() for m in maps]
    kernel, eager = function(targets, "triton", robust), function(targets, "eager", robust)
    with torch.no_grad():
        oracle, plain = eager(*wide), eager(*maps)
    generator = torch.Generator().manual_seed(7)
    cotangents = [(0.5 + torch.rand(o.shape, generator=generator)).to(DEVICE) for o in plain[:2]]
    oracles, plains = (
        testing.gradients(lambda *m: eager(*m)[:2], list(given), cotangents) for given in (wide, list(maps))
    )
    with testing.poisoned_empty():
        actual = kernel(*maps)
        grads = testing.gradients(lambda *m: kernel(*m)[:2], list(maps), cotangents)
    for name, output, exact, baseline in zip(MapLosses._fields, actual, oracle, plain, strict=False):
        # A handful of sums, which plain PyTorch may get right by luck: credited with four roundings.
        testing.assert_within_budget(output, exact, baseline, name=name, floor=4 * 2.0**-24)
    for name, tensor, grad, exact, baseline in zip(PredictedMaps._fields, maps, grads, oracles, plains, strict=True):
        if tensor is None:
            assert grad is None
            continue
        assert grad is not None and grad.dtype == tensor.dtype and grad.shape == tensor.shape
        # As above: four roundings of float32 on the way, whatever plain PyTorch's luck.
        testing.assert_within_budget(grad, exact, baseline, name=f"grad of {name}", floor=4 * 2.0**-24)
        assert not grad[exact == 0].any(), f"grad of {name}: not zero without supervision"


@pytest.fixture(autouse=not GPU)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs a row and several steps a program on small maps."""
    for name in ("DISTANCES", "LOSSES", "ROBUST_LOSSES", "BACKWARD"):
        monkeypatch.setattr(kernels, name, kernels.Config(block=128, warps=4, iterations=2))


@pytest.mark.parametrize("robust", [None, ROBUST])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parity(dtype: torch.dtype, robust: tuple[float, float] | None) -> None:
    check(*make(3, 2, 13, 23, dtype), robust)


@pytest.mark.parametrize("absent", [("conf",), ("mask_logits", "conf"), ("depth_along_ray",), ABSENT])
def test_without_some_outputs(absent: tuple[str, ...]) -> None:
    maps, targets = make(3, 2, 7, 9)
    check(maps._replace(**dict.fromkeys(absent)), targets)


@pytest.mark.parametrize(
    ("batch", "views", "height", "width"), [(1, 1, 1, 1), (2, 3, 1, 7), (4, 1, 31, 1), (1, 1, 37, 41)]
)
def test_sizes(batch: int, views: int, height: int, width: int) -> None:
    check(*make(batch, views, height, width, known=1.0))


@pytest.mark.parametrize("size", [1e-6, 1e4])
def test_short_and_long_vectors(size: float) -> None:
    """Flow far shorter or longer than the scene: the logarithm keeps its digits at both ends."""
    maps, targets = make(1, 2, 8, 9)
    longer = (1e-3 if size < 1 else 1e2) * maps.pts3d
    longer[:, :, ::2] = maps.pts3d[:, :, ::2]
    given = targets._replace(scene_flow=size * targets.scene_flow)
    for robust in (None, ROBUST):
        check(maps._replace(scene_flow=size * maps.scene_flow, pts3d=longer), given, robust)


@pytest.mark.parametrize("variant", [{"stages": 2}, {"stages": 3, "registers": 128}])
def test_ways_to_load_and_store(variant: dict[str, Any]) -> None:
    """Stages and registers change when bytes move, not what is computed from them."""
    maps, targets = make(2, 2, 13, 23)
    options = (10.0, 0.2, 0.0, 0.0)
    ones = torch.ones(2, 5, device=DEVICE), torch.ones(2, device=DEVICE)
    config = kernels.BACKWARD._replace(iterations=2)
    found = []
    for given in (config, config._replace(**variant)):
        numbers = kernels.forward(maps, targets, *options, distances=given, losses=given)
        grads = kernels.backward(maps, targets, *numbers[1:], *ones, (True,) * 6, *options, config=given)
        found.append([*numbers, *grads])
    for actual, expected in zip(*found, strict=True):
        # The compiler may contract products and sums differently.
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def test_slices_of_one_map() -> None:
    """Views as the model returns them: slices whose gradients go to the whole."""
    maps, targets = make(2, 3, 6, 7)
    leaves = [m.flatten(0, 1).requires_grad_() for m in maps]
    found = []
    for backend in ("triton", "eager"):
        parts = PredictedMaps(*((1.0 * leaf).split(2) for leaf in leaves))
        losses = map_losses(parts, targets, backend=backend)
        found.append(torch.autograd.grad(losses.terms.sum(), leaves))
    for actual, reference in zip(*found, strict=True):
        assert testing.relative_error(actual, reference) < 1e-5  # float32 sums of 126 terms each, in two orders


def test_maps_in_other_layouts() -> None:
    maps, targets = make(2, 2, 9, 11)
    expected = function(targets, "triton", None)(*maps)
    planar = [m.movedim(-1, 2).contiguous().movedim(2, -1) if m.ndim == 5 else m.mT.contiguous().mT for m in maps]
    strided = TargetMaps(*(t.transpose(0, 1).contiguous().transpose(0, 1) if t.ndim > 1 else t for t in targets))
    for actual, reference in zip(function(strided, "triton", None)(*planar), expected, strict=True):
        assert torch.equal(actual, reference)
    check(PredictedMaps(*planar), strided)


def test_nothing_is_known() -> None:
    maps, targets = make(3, 2, 5, 6)
    nothing = targets._replace(
        **{name: torch.zeros_like(t) for name, t in targets._asdict().items() if t.dtype == torch.bool},
        **{name: torch.full_like(t, float("nan")) for name, t in targets._asdict().items() if t.is_floating_point()},
    )
    leaves = [m.clone().requires_grad_() for m in maps]
    with testing.poisoned_empty():
        found = map_losses(PredictedMaps(*leaves), nothing, backend="triton")
        grads = torch.autograd.grad(found.terms.sum() + found.pred_distance.sum(), leaves)
    assert not found.terms.any() and not found.counts.any() and not any(g.any() for g in grads)


def test_unsupervised_predictions_cannot_leak() -> None:
    """NaN in a prediction where nothing is known of the target changes no loss and no other gradient."""
    maps, targets = make(3, 2, 8, 9)
    targets = targets._replace(has_surface=torch.zeros_like(targets.has_surface))
    world = (targets.has_rays & targets.has_poses)[:, None, None, None]
    masks = {
        "pts3d": targets.depth_mask & world,
        "scene_flow": targets.flow_mask,
        "depth_along_ray": targets.depth_mask,
        "ray_directions": targets.has_rays[:, None, None, None].expand_as(targets.depth_mask),
        "mask_logits": torch.zeros_like(targets.depth_mask),
        "conf": targets.depth_mask & world,
    }

    def poison(name: str, tensor: Tensor) -> Tensor:
        mask = masks[name].transpose(0, 1)
        return tensor.masked_fill(~(mask if tensor.ndim == 4 else mask[..., None]), float("nan"))

    poisoned = PredictedMaps(*(poison(name, m) for name, m in maps._asdict().items()))
    results = []
    for given in (maps, poisoned):
        leaves = [m.clone().requires_grad_() for m in given]
        found = map_losses(PredictedMaps(*leaves), targets, backend="triton")
        grads = torch.autograd.grad(found.terms.sum(), leaves)
        results.append([found.terms, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_lengths_of_zero() -> None:
    """Zero vectors, and predictions that are exactly right: finite, and as plain PyTorch has it."""
    maps, targets = make(1, 2, 6, 7, known=1.0)
    targets = TargetMaps(*(t.nan_to_num() for t in targets))
    exact = [targets.scene_flow, targets.depth_along_ray, targets.ray_directions]
    flow, depth, rays = (t.transpose(0, 1).contiguous() for t in exact)
    right = PredictedMaps(torch.zeros_like(flow), torch.zeros_like(flow), depth, rays)
    for given in (right, right._replace(depth_along_ray=torch.zeros_like(depth), pts3d=maps.pts3d)):
        found = []
        for backend in ("triton", "eager"):
            leaves = [m.clone().requires_grad_() for m in given if m is not None]
            losses = map_losses(PredictedMaps(*leaves), targets, backend=backend)
            found.append([losses.terms, *torch.autograd.grad(losses.terms.sum(), leaves)])
        for actual, reference in zip(*found, strict=True):
            assert actual.isfinite().all()
            # Sums of float32 in two orders.
            torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-5 * reference.abs().max().item())


def test_a_broken_prediction_shows() -> None:
    for value in (float("nan"), float("inf")):
        maps, targets = make(1, 1, 4, 5, known=1.0)
        for name in PredictedMaps._fields:
            broken = getattr(maps, name).clone()
            broken[0, 0, 1, 2] = value
            found = map_losses(maps._replace(**{name: broken}), targets, backend="triton")
            assert not found.terms.isfinite().all(), f"{name}: {value}"


def test_empty() -> None:
    for size in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4)):
        maps, targets = make(*size)
        leaves = [m.clone().requires_grad_() for m in maps]
        with testing.poisoned_empty():
            found = map_losses(PredictedMaps(*leaves), targets, backend="triton")
            grads = torch.autograd.grad(found.terms.sum(), leaves)
        assert found.terms.shape == (size[0], 5) and not found.terms.any()
        assert all(g.shape == m.shape for g, m in zip(grads, maps, strict=True))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (5,), (0, 2)])
def test_maps_without_gradients(wanted: tuple[int, ...]) -> None:
    maps, targets = make(2, 2, 5, 7)
    leaves = [m.requires_grad_() if i in wanted else m for i, m in enumerate(maps)]
    found, expected = (
        torch.autograd.grad(
            map_losses(PredictedMaps(*leaves), targets, backend=b).terms.square().sum(), [leaves[i] for i in wanted]
        )
        for b in ("triton", "eager")
    )
    for actual, reference in zip(found, expected, strict=True):
        assert testing.relative_error(actual, reference) < 1e-5  # float32 sums of 70 terms each, in two orders


def test_results_are_bitwise_repeatable() -> None:
    maps, targets = make(1, 2, 20, 40)
    cotangents = [torch.rand(1, 5).to(DEVICE), torch.rand(1).to(DEVICE)]
    call = function(targets, "triton", None)
    runs = [[*call(*maps), *testing.gradients(lambda *m: call(*m)[:2], list(maps), cotangents)] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_opcheck() -> None:
    maps, targets = make(2, 2, 4, 5)
    targets = TargetMaps(*(t.nan_to_num() if t.is_floating_point() else t for t in targets))
    for given, robust in ((maps, (0.0, 0.0)), (maps._replace(conf=None, mask_logits=None), ROBUST)):
        options = (10.0, 0.2, *robust, "triton")
        torch.library.opcheck(_forward, (*given, *targets, *options))
        terms, pred_distance, distance, counts, slopes = _forward(*given, *targets, *options)
        needed = [m is not None for m in given]
        numbers = (pred_distance, distance, counts, slopes, torch.ones_like(terms), torch.ones_like(distance))
        torch.library.opcheck(_backward, (*given, *targets, *numbers, *needed, *options))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    torch.compiler.reset()

    def loss(maps: PredictedMaps, targets: TargetMaps) -> Tensor:
        found = map_losses(maps, targets, backend="triton")
        return (found.terms * 2).sum() + found.pred_distance.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch, height in ((2, 4), (3, 5)):
        maps, targets = make(batch, 2, height, 6)
        grads = []
        for call in (compiled, loss):
            leaves = [m.clone().requires_grad_() for m in maps]
            grads.append(torch.autograd.grad(call(PredictedMaps(*leaves), targets), leaves))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("robust", [None, ROBUST])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.skipif(not GPU, reason="real sizes: needs a CUDA device (make test-gpu)")
def test_real_size(dtype: torch.dtype, robust: tuple[float, float] | None) -> None:
    check(*make(3, 4, 336, 518, dtype), robust)


class TestOffsets:
    """Element offsets beyond 2^31."""

    pytestmark = gpu_only

    def test_beyond_two_to_the_31(self) -> None:
        views = 4_200  # 3 * 4,200 * 518 * 336 > 2^31
        if torch.cuda.mem_get_info()[0] < 80 * 2**30:
            pytest.skip("needs 80 GB of free GPU memory")
        one, target = make(1, 1, 336, 518, torch.float16)
        one = one._replace(scene_flow=one.scene_flow.float())  # a pixel's share of the mean is below float16's range
        maps = PredictedMaps(*(m.expand(views, *m.shape[1:]).contiguous() for m in one))
        targets = TargetMaps(*(t.expand(-1, views, *t.shape[2:]).contiguous() if t.ndim > 1 else t for t in target))
        options = (10.0, 0.2, 0.0, 0.0)
        found, expected = kernels.forward(maps, targets, *options), kernels.forward(one, target, *options)
        # The same mean over 4,200 times as many pixels: one rounding of a float64 sum to float32.
        torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
        only_flow = (False, True, False, False, False, False)
        ones = torch.ones(1, 5, device=DEVICE), torch.zeros(1, device=DEVICE)
        (grad,), (reference,) = (
            [g for g in kernels.backward(m, t, *numbers[1:], *ones, only_flow, *options) if g.numel()]
            for m, t, numbers in ((maps, targets, found), (one, target, expected))
        )
        # Differences of nearly equal terms have no relative precision of their own.
        least = 1e-6 * reference[0].abs().max().item()
        torch.testing.assert_close(grad[-1] * float(views), reference[0], rtol=1e-4, atol=least)
