"""Triton `normalize_depth` against the float64 oracle: in the interpreter, and on a GPU at the model's sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from any4d_fast import testing
from any4d_fast.ops.normalize_depth import normalize_depth
from any4d_fast.reference.normalize_depth import normalize_depth as reference
from tests.kernels_common import DEVICE, GPU, gpu_only, kernel_test

pytestmark = kernel_test


def depths(n: int, height: int, width: int, dtype: torch.dtype = torch.float32, sparse: float = 0.3) -> Tensor:
    """Depths between millimetres and hundreds of metres, `sparse` of them zero."""
    generator = torch.Generator().manual_seed(height * 31 + width)
    metres = torch.randn(n, height, width, 1, generator=generator).exp() * 3
    return (metres * (torch.rand(metres.shape, generator=generator) > sparse)).to(DEVICE, dtype)


def check(depth: Tensor) -> None:
    """Both results and the gradient within the budget that plain PyTorch sets."""
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(depth.shape, generator=generator), torch.randn(depth.shape[0], generator=generator)]
    cotangents = [c.to(DEVICE) for c in cotangents]
    oracles, plains = reference(depth.double()), reference(depth)
    (fine,) = testing.gradients(reference, [depth.double()], [c.double() for c in cotangents])
    (base,) = testing.gradients(reference, [depth], cotangents)
    with testing.poisoned_empty():
        actuals = normalize_depth(depth, backend="triton")
        (grad,) = testing.gradients(lambda d: normalize_depth(d, backend="triton"), [depth], cotangents)
    for name, actual, oracle, plain in zip(("log depth", "log factor"), actuals, oracles, plains, strict=True):
        assert actual.dtype == plain.dtype and actual.shape == plain.shape
        testing.assert_within_budget(actual, oracle, plain, name=name)
    assert grad is not None and fine is not None and base is not None
    testing.assert_within_budget(grad, fine, base, name="gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 13, 7), (3, 41, 211)])
def test_parity(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(depths(*size, dtype=dtype, sparse=0.0 if size == (1, 1, 1) else 0.3))


def test_strided_maps() -> None:
    image = torch.zeros(2, 20, 30, 4, device=DEVICE)
    depth = depths(2, 19, 17)
    for view in (
        image[:, 1:, 3:20, 3:],
        image[:, 1:, :17].transpose(1, 2)[:, :, :, 1:2].transpose(1, 2),
        image[..., 3:],
    ):
        source = depth if view.shape == depth.shape else depths(*view.shape[:3])
        view.copy_(source)
        for actual, expected in zip(
            normalize_depth(view, backend="triton"), normalize_depth(source, backend="triton"), strict=True
        ):
            assert torch.equal(actual, expected)


def test_extreme_depths() -> None:
    depth = depths(4, 9, 11)
    depth[0] = 0
    depth[1] *= 1e-12
    depth[2] *= 1e12
    depth[3] -= 2
    # Absolute and relative error of a few float32 roundings; negative depths count as unknown and are scaled.
    for actual, expected in zip(normalize_depth(depth, backend="triton"), reference(depth.double()), strict=True):
        torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-6, atol=1e-7)


def test_an_infinite_depth_shows_in_the_factor() -> None:
    depth = depths(2, 9, 11)
    depth[1, 3, 4] = float("inf")
    for actual, expected in zip(normalize_depth(depth, backend="triton"), reference(depth.double()), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-7, equal_nan=True)


def test_logarithms_are_accurate_for_each_pixel() -> None:
    depth = torch.logspace(-9, 9, 4001, device=DEVICE).reshape(1, 1, 4001, 1)
    actual, _ = normalize_depth(depth, backend="triton")
    expected, _ = reference(depth.double())
    # Six float32 roundings: the mean, the division, log1p's own, and the products.
    torch.testing.assert_close(actual.double(), expected, rtol=6 * 2.0**-23, atol=0)


def test_nan_pixels_stay_alone() -> None:
    depth = depths(1, 8, 8)
    clean = depth.clone()
    clean[0, 3, 4] = 0
    depth[0, 3, 4] = float("nan")
    (nan, factor), (scaled, expected) = (
        normalize_depth(depth, backend="triton"),
        normalize_depth(clean, backend="triton"),
    )
    assert nan[0, 3, 4].isnan() and torch.equal(factor, expected)
    nan[0, 3, 4] = 0
    assert torch.equal(nan, scaled)


@pytest.mark.parametrize("size", [(0, 4, 4), (2, 0, 4)])
def test_empty(size: tuple[int, int, int]) -> None:
    for actual, expected in zip(
        normalize_depth(torch.zeros(*size, 1, device=DEVICE), backend="triton"),
        reference(torch.zeros(*size, 1, device=DEVICE)),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


def test_is_deterministic() -> None:
    depth = depths(2, 64, 100)
    first, second = normalize_depth(depth, backend="triton"), normalize_depth(depth, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_opcheck() -> None:
    depth = depths(2, 5, 7)
    torch.library.opcheck(torch.ops.any4d_fast.normalize_depth_forward.default, (depth,))
    arguments = (torch.ones_like(depth), torch.ones(2, device=DEVICE), depth)
    torch.library.opcheck(torch.ops.any4d_fast.normalize_depth_backward.default, arguments)


def test_compiles_fullgraph_with_dynamic_shapes() -> None:
    def step(depth: Tensor) -> tuple[Tensor, Tensor]:
        return normalize_depth(depth, backend="triton")

    compiled = torch.compile(step, fullgraph=True, backend="inductor" if GPU else "aot_eager", dynamic=True)
    for n in (2, 3):
        depth = depths(n, 6, 7 + n)
        cotangents = [torch.ones_like(depth), torch.ones(n, device=DEVICE)]
        for actual, expected in zip(
            testing.gradients(compiled, [depth], cotangents), testing.gradients(step, [depth], cotangents), strict=True
        ):
            torch.testing.assert_close(actual, expected)


class TestRealSizes:
    pytestmark = gpu_only

    @pytest.mark.parametrize("views", [1, 41])
    def test_parity(self, views: int) -> None:
        check(depths(views, 518, 336))

    def test_beyond_31_bits(self) -> None:
        one = depths(1, 518, 336, torch.float16)
        many = torch.zeros(12_400, 518, 336, 1, dtype=torch.float16, device=DEVICE)
        many[-1] = one[0]
        actual, factor = normalize_depth(many, backend="triton")
        expected = normalize_depth(one, backend="triton")
        assert torch.equal(actual[-1:], expected[0]) and torch.equal(factor[-1:], expected[1])
