"""Rays against planes, boxes, spheres and cylinders.

Vectors are component-first, [3, V, P] for P rays in each of V views, so that every component is contiguous.
Rotations are spelled out instead of calling matmul: ground truth must stay exact when a trainer allows TF32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# A shape's index here is its number in the tables. Each is centred on the origin of its own frame:
# plane (rectangle z = 0), size = half extents (x, y, 0); box, half extents; sphere, (r, r, r);
# cylinder with caps along z, (r, r, half height).
SHAPES = ("plane", "box", "sphere", "cylinder")


def apply_affine(matrix: Tensor, points: Tensor) -> Tensor:
    """Affine maps of point clouds, one map a view or one a point.

    Args:
        matrix: [3, 4, V, P] or [3, 4, V, 1].
        points: [3, V, P].

    Returns:
        [3, V, P].
    """
    return rotate(matrix, points) + matrix[:, 3]


def rotate(matrix: Tensor, vectors: Tensor) -> Tensor:
    """The linear part of `apply_affine`: [3, 3 or 4, V, P or 1] on [3, V, P]."""
    return matrix[:, 0] * vectors[0] + matrix[:, 1] * vectors[1] + matrix[:, 2] * vectors[2]


def _first_positive(near: Tensor, far: Tensor) -> Tensor:
    """Where a ray first meets the surface of a convex body that it is inside of between `near` and `far`."""
    first = torch.where(near > 0, near, far)
    return torch.where((near <= far) & (first > 0), first, torch.inf)


def _nonzero(x: Tensor) -> Tensor:
    """`x` with zeros replaced by the smallest positive number whose reciprocal is finite."""
    return torch.where(x == 0, torch.finfo(x.dtype).tiny * 4, x)


def _slab(origin: Tensor, direction: Tensor, half: float) -> tuple[Tensor, Tensor]:
    """Interval of a ray between the planes at -half and +half of one axis."""
    inverse = 1 / _nonzero(direction)
    a, b = (-half - origin) * inverse, (half - origin) * inverse
    return torch.minimum(a, b), torch.maximum(a, b)


def _ball(origin: Tensor, direction: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Interval of a ray inside a ball of 2 or 3 dimensions; empty as (inf, -inf).

    Works from the point of closest approach: the textbook discriminant loses half the digits far from the centre.
    """
    squared = _nonzero((direction * direction).sum(0))
    closest = -(origin * direction).sum(0) / squared
    offset = origin + closest * direction
    gap = radius * radius - (offset * offset).sum(0)
    half = (gap.clamp(min=0) / squared).sqrt()
    hit = gap >= 0
    return torch.where(hit, closest - half, torch.inf), torch.where(hit, closest + half, -torch.inf)


def intersect(shape: str, size: Sequence[float], origin: Tensor, direction: Tensor) -> Tensor:
    """Ray parameter of the first hit in front of the origin.

    Args:
        shape: one of `SHAPES`.
        size: three half sizes in metres, see `SHAPES`.
        origin: [3, V, P] or [3, V, 1] in the shape's frame, metres.
        direction: [3, V, P] in the shape's frame, any length.

    Returns:
        [V, P] t > 0 with hit = origin + t * direction; inf where the ray misses.
    """
    if shape == "plane":
        t = -origin[2] / _nonzero(direction[2])
        x, y = origin[0] + t * direction[0], origin[1] + t * direction[1]
        return torch.where((t > 0) & (x.abs() <= size[0]) & (y.abs() <= size[1]), t, torch.inf)
    if shape == "sphere":
        return _first_positive(*_ball(origin, direction, size[0]))
    near, far = _slab(origin[2], direction[2], size[2])
    if shape == "box":
        others = [_slab(origin[axis], direction[axis], size[axis]) for axis in (0, 1)]
    elif shape == "cylinder":
        others = [_ball(origin[:2], direction[:2], size[0])]
    else:
        raise ValueError(f"shape: expected one of {', '.join(SHAPES)}, got {shape!r}")
    for other_near, other_far in others:
        near, far = torch.maximum(near, other_near), torch.minimum(far, other_far)
    return _first_positive(near, far)


def cast(
    shapes: Sequence[tuple[str, Sequence[float]]], from_camera: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor]:
    """First hit of every ray among all objects.

    Args:
        shapes: (shape, size) of N objects.
        from_camera: [N, 3, 4, V, 1], the map from the rays' frame, whose origin they start from, to each object's.
        direction: [3, V, P].

    Returns:
        t [V, P] (inf: no hit) and the object's number [V, P] int64 (-1: no hit).
    """
    best = torch.full_like(direction[0], torch.inf)
    ids = torch.full(best.shape, -1, dtype=torch.int64, device=best.device)
    for number, (shape, size) in enumerate(shapes):
        t = intersect(shape, size, from_camera[number][:, 3], rotate(from_camera[number], direction))
        closer = t < best
        best = torch.where(closer, t, best)
        ids = torch.where(closer, number, ids)
    return best, ids


def normals(kind: Tensor, size: Tensor, points: Tensor) -> Tensor:
    """Outward unit normals at surface points; +z on both sides of a plane.

    Args:
        kind: [V, P] index into `SHAPES`.
        size: [3, V, P] half sizes, metres.
        points: [3, V, P] on the surface, in the object's frame.

    Returns:
        [3, V, P] in the object's frame.
    """
    x, y, z = points
    zero, sign = torch.zeros_like(x), torch.where(points < 0, -1.0, 1.0).to(points.dtype)
    inside = size - points.abs()  # distance to each pair of faces
    face = torch.zeros_like(points).scatter(0, inside.argmin(0, keepdim=True), 1) * sign
    length = (x * x + y * y + z * z).sqrt().clamp(min=torch.finfo(x.dtype).tiny)
    radial = (x * x + y * y).sqrt()
    cap = (inside[2] < size[0] - radial)[None]
    side = torch.stack([x, y, zero]) / radial.clamp(min=torch.finfo(x.dtype).tiny)
    tube = torch.where(cap, torch.stack([zero, zero, sign[2]]), side)
    flat = torch.stack([zero, zero, torch.ones_like(x)])
    out = torch.where(kind == SHAPES.index("box"), face, flat)
    out = torch.where(kind == SHAPES.index("sphere"), points / length, out)
    return torch.where(kind == SHAPES.index("cylinder"), tube, out)
