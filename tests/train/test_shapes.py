"""Ray intersections and normals of single shapes, against marching and implicit surfaces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from any4d_fast.train.shapes import SHAPES, intersect, normals

SIZES = {"plane": (0.8, 0.5, 0.0), "box": (0.4, 0.7, 0.3), "sphere": (0.6, 0.6, 0.6), "cylinder": (0.4, 0.4, 0.7)}


def implicit(shape: str, points: Tensor) -> Tensor:
    """Negative inside, zero on the surface, of a solid; [3, ...] -> [...]."""
    size = SIZES[shape]
    x, y, z = points
    if shape == "sphere":
        return points.norm(dim=0) - size[0]
    if shape == "box":
        return torch.stack([x.abs() - size[0], y.abs() - size[1], z.abs() - size[2]]).amax(0)
    return torch.maximum((x * x + y * y).sqrt() - size[0], z.abs() - size[2])


def random_rays(count: int, spread: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    origin = spread * torch.randn(3, 1, count, generator=generator, dtype=torch.float64)
    towards = 0.5 * torch.randn(3, 1, count, generator=generator, dtype=torch.float64)
    return origin, towards - origin


@pytest.mark.parametrize("shape", ["box", "sphere", "cylinder"])
@pytest.mark.parametrize("spread", [0.2, 2.0])  # many origins inside, most outside
def test_first_hit_is_where_the_sign_changes_first(shape: str, spread: float) -> None:
    origin, direction = random_rays(500, spread)
    t = intersect(shape, SIZES[shape], origin, direction)
    steps = torch.linspace(0, 8, 8001, dtype=torch.float64)
    inside = implicit(shape, origin[..., None] + steps * direction[..., None]) < 0
    changes = inside[..., 1:] != inside[..., :-1]
    first = torch.where(changes.any(-1), steps[changes.double().argmax(-1)], torch.inf)
    hit = t.isfinite()
    # Marching may step over a grazed edge.
    assert (hit != first.isfinite()).sum() <= 2
    both = hit & first.isfinite()
    assert 100 < both.sum()
    off = (t - first)[both]
    assert ((off >= -1e-9) & (off <= 1e-3 + 1e-9)).double().mean() > 0.995
    assert implicit(shape, (origin + t * direction)[:, hit]).abs().max() < 1e-12


def test_plane_is_a_rectangle_seen_from_both_sides() -> None:
    origin = torch.tensor([[0.0, 0.7, 0.9, 0.0, 0.0], [0.0, 0.4, 0.0, 0.6, 0.0], [1.0, -1.0, 1.0, 1.0, 1.0]])[:, None]
    direction = torch.tensor([[0.0] * 5, [0.0] * 5, [-2.0, 2.0, -1.0, -1.0, 1.0]])[:, None]
    t = intersect("plane", SIZES["plane"], origin, direction)
    assert t.tolist() == [[0.5, 0.5, torch.inf, torch.inf, torch.inf]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rays_along_the_axes(shape: str, dtype: torch.dtype) -> None:
    """Zero components of the direction neither divide by zero nor miss."""
    size = SIZES[shape]
    for axis in range(3):
        origin, direction = torch.zeros(3, 1, 1, dtype=dtype), torch.zeros(3, 1, 1, dtype=dtype)
        origin[axis], direction[axis] = -3, 2
        t = intersect(shape, size, origin, direction)
        if shape == "plane" and axis != 2:
            assert t.isinf().all()  # edge on
        else:
            assert t.item() == pytest.approx((3 - size[axis]) / 2, rel=1e-6)
        origin[(axis + 1) % 3] = 5
        assert intersect(shape, size, origin, direction).isinf().all()


def test_a_far_sphere_keeps_its_digits_in_float32() -> None:
    """From 100 m the discriminant b^2 - 4ac would lose a ball of 0.3 m to rounding."""
    origin = torch.tensor([0.0, 0.0, -100.0]).view(3, 1, 1)
    direction = torch.tensor([[0.002, 0.0, 1.0], [0.0, 0.0028, 1.0]]).T[:, None]
    t = intersect("sphere", (0.3, 0.3, 0.3), origin, direction)
    exact = intersect("sphere", (0.3, 0.3, 0.3), origin.double(), direction.double())
    torch.testing.assert_close(t.double(), exact, atol=2e-5, rtol=0)


@pytest.mark.parametrize("shape", ["box", "sphere", "cylinder"])
def test_normals_are_the_gradient_of_the_implicit_surface(shape: str) -> None:
    origin, direction = random_rays(300, 2.0)
    t = intersect(shape, SIZES[shape], origin, direction)
    points = (origin + t * direction)[:, t.isfinite()][:, None].requires_grad_()
    (gradient,) = torch.autograd.grad(implicit(shape, points).sum(), points)
    kind = torch.full(points.shape[1:], SHAPES.index(shape))
    size = torch.tensor(SIZES[shape], dtype=torch.float64)[:, None, None].expand_as(points)
    actual = normals(kind, size, points.detach())
    torch.testing.assert_close(actual, gradient)


def test_unknown_shape() -> None:
    with pytest.raises(ValueError, match="shape: expected one of plane, box, sphere, cylinder, got 'cone'"):
        intersect("cone", (1, 1, 1), torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
