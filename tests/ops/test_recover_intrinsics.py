"""recover_intrinsics: exact on pinhole rays, least squares on noisy ones, finite on hopeless ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from any4d_fast.backends import BackendError
from any4d_fast.geometry import rays_from_intrinsics
from any4d_fast.ops.recover_intrinsics import recover_intrinsics


def pinhole(height: int, width: int, focal: float, dtype: torch.dtype = torch.float32) -> Tensor:
    matrix = [[focal, 0, width * 0.51], [0, focal * 1.03, height * 0.47], [0, 0, 1]]
    return torch.tensor(matrix, dtype=dtype)


@pytest.mark.parametrize(
    ("height", "width", "focal"),
    [(336, 518, 400.0), (28, 42, 60.0), (1200, 1000, 900.0), (2, 3, 1.0), (2, 2, 3.0), (53, 97, 5000.0)],
)
@pytest.mark.parametrize("unit", [True, False])
def test_pinhole_rays_give_their_intrinsics(height: int, width: int, focal: float, unit: bool) -> None:
    intrinsics = torch.stack([pinhole(height, width, focal), pinhole(height, width, 1.3 * focal)])
    found = recover_intrinsics(rays_from_intrinsics(intrinsics, height, width, unit=unit))
    # A field of view of 1/100 costs two of float32's seven digits in the ratios themselves.
    tolerance = 1e-5 if focal < 10 * width else 1e-4
    assert ((found - intrinsics).abs().amax() / focal).item() < tolerance


def test_leading_dimensions() -> None:
    intrinsics = pinhole(8, 9, 10.0)
    rays = rays_from_intrinsics(intrinsics, 8, 9)
    torch.testing.assert_close(recover_intrinsics(rays), intrinsics)
    torch.testing.assert_close(recover_intrinsics(rays.expand(2, 3, 8, 9, 3)), intrinsics.expand(2, 3, 3, 3))


def test_noisy_rays_are_fitted_by_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    rays = rays_from_intrinsics(pinhole(20, 30, 25.0, torch.float64), 20, 30)
    rays = rays + 0.02 * torch.randn(rays.shape, generator=generator, dtype=torch.float64)
    found = recover_intrinsics(rays)
    u, v = np.meshgrid(np.arange(30), np.arange(20))
    for axis, pixels in ((0, u), (1, v)):
        ratios = (rays[..., axis] / rays[..., 2]).numpy().ravel()
        slope, offset = np.polyfit(ratios, pixels.ravel(), 1)
        assert found[axis, axis].item() == pytest.approx(slope, rel=1e-9)
        assert found[axis, 2].item() == pytest.approx(offset, rel=1e-9)


def test_rays_that_do_not_point_forward_are_left_out() -> None:
    intrinsics = pinhole(20, 30, 25.0)
    rays = rays_from_intrinsics(intrinsics, 20, 30)
    rays[3, 4] = torch.tensor([0.3, 0.1, -0.5])
    rays[5, 6] = 0
    rays[7, 8] = torch.tensor([1.0, 0.0, 1e-9])
    torch.testing.assert_close(recover_intrinsics(rays), intrinsics, rtol=1e-5, atol=1e-4)


def test_undetermined_focal_length_is_zero_and_finite() -> None:
    rays = torch.zeros(2, 4, 6, 3)
    rays[1, ..., 2] = 1
    rays.requires_grad_()
    found = recover_intrinsics(rays)
    expected = torch.tensor([[0, 0, 2.5], [0, 0, 1.5], [0, 0, 1]])
    torch.testing.assert_close(found, expected.expand(2, 3, 3))
    found.sum().backward()
    assert rays.grad is not None and not rays.grad.any()


def test_gradcheck() -> None:
    rays = rays_from_intrinsics(pinhole(4, 5, 6.0, torch.float64), 4, 5)
    generator = torch.Generator().manual_seed(0)
    rays = rays + 0.01 * torch.randn(rays.shape, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(recover_intrinsics, [rays.requires_grad_()])


def test_compiles_without_graph_breaks() -> None:
    rays = rays_from_intrinsics(pinhole(8, 9, 10.0), 8, 9)
    compiled = torch.compile(recover_intrinsics, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rays), recover_intrinsics(rays))


def test_narrow_rays_give_float32() -> None:
    intrinsics = pinhole(28, 42, 60.0)
    found = recover_intrinsics(rays_from_intrinsics(intrinsics, 28, 42).half())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, intrinsics, rtol=1e-2, atol=0.1)  # the rays carry half precision's 5e-4


@pytest.mark.parametrize(
    ("rays", "message"),
    [
        (torch.zeros(4, 5, 4), r"rays: expected \[\.\.\., H, W, 3\] floating point, got \[4, 5, 4\]"),
        (torch.zeros(5, 3), "rays: expected"),
        (torch.zeros(4, 5, 3, dtype=torch.int32), "rays: .* torch.int32"),
        (torch.zeros(4, 1, 3), "H and W of at least 2"),
        (None, "got a NoneType"),
    ],
)
def test_errors_say_what_to_do(rays: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recover_intrinsics(rays)


def test_there_is_no_kernel() -> None:
    with pytest.raises(BackendError, match="eager"):
        recover_intrinsics(torch.ones(4, 5, 3), backend="triton")
