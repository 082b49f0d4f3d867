"""Rays against the shapes of synthetic scenes: the arithmetic of `train.shapes`, one shape for a whole block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from any4d_fast.reference.render_clips import PRIMITIVE_COLUMNS, slices


def offsets(columns: dict[str, int]) -> dict[str, tl.constexpr]:
    """Where each of some columns begins."""
    return {name: tl.constexpr(part.start) for name, part in slices(columns).items()}


_COLUMNS = offsets(PRIMITIVE_COLUMNS)
FROM_VIEW, SIZE = _COLUMNS["from_view"], _COLUMNS["size"]
# Numbers of `shapes.SHAPES`.
PLANE, BOX, SPHERE, CYLINDER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
INF = tl.constexpr(float("inf"))


@triton.jit
def row_times(row, x, y, z):
    """The linear part of one row of a 3 x 4 map times a vector."""
    return tl.load(row) * x + tl.load(row + 1) * y + tl.load(row + 2) * z


@triton.jit
def triple(pointer, like):
    """Three consecutive numbers a lane, in blocks shaped as `like`.

    A loop, which LLVM unrolls: for every load at a computed address a lane, Triton's choice of layouts walks through
    most of the kernel, and a pointer that a loop carries is not walked from. The zeros are apart because Triton's front
    end takes names of one value, exchanged in a loop, for unchanged.
    """
    a = like * 0.0
    b = like * 0.0
    c = like * 0.0
    for _ in range(3):
        a, b, c = b, c, tl.load(pointer)
        pointer += 1
    return a, b, c


@triton.jit
def mapped(row, x, y, z):
    """The linear part of a 3 x 4 map a lane times a vector, and the map's translation; a loop as in `triple`."""
    ax = x * 0.0
    ay = x * 0.0
    az = x * 0.0
    bx = x * 0.0
    by = x * 0.0
    bz = x * 0.0
    for _ in range(3):
        ax, ay, az = ay, az, row_times(row, x, y, z)
        bx, by, bz = by, bz, tl.load(row + 3)
        row += 4
    return ax, ay, az, bx, by, bz


@triton.jit
def _nonzero(x):
    return tl.where(x == 0.0, 4 * _TINY, x)


@triton.jit
def _slab(origin, direction, half):
    inverse = 1.0 / _nonzero(direction)
    a = (-half - origin) * inverse
    b = (half - origin) * inverse
    return tl.minimum(a, b), tl.maximum(a, b)


@triton.jit
def _ball(ox, oy, oz, dx, dy, dz, radius):
    """Interval inside a ball, from the point of closest approach; empty as (inf, -inf)."""
    squared = _nonzero(dx * dx + dy * dy + dz * dz)
    closest = -(ox * dx + oy * dy + oz * dz) / squared
    px = ox + closest * dx
    py = oy + closest * dy
    pz = oz + closest * dz
    gap = radius * radius - (px * px + py * py + pz * pz)
    half = tl.sqrt(tl.maximum(gap, 0.0) / squared)
    hit = gap >= 0.0
    return tl.where(hit, closest - half, INF), tl.where(hit, closest + half, -INF)


@triton.jit
def _entry(near, far):
    """Where a ray first meets the surface of the convex body that it is inside of between `near` and `far`."""
    first = tl.where(near > 0.0, near, far)
    return tl.where((near <= far) & (first > 0.0), first, INF)


@triton.jit
def meets(ball, tangent, ox, oy, oz, dx, dy, dz):
    """Whether any ray of the block meets a ball; `tangent`, the squared length of tangents from the rays' origin."""
    along = (tl.load(ball) - ox) * dx + (tl.load(ball + 1) - oy) * dy + (tl.load(ball + 2) - oz) * dz
    meets = along * tl.abs(along) >= tl.load(tangent) * (dx * dx + dy * dy + dz * dz)
    return tl.max(meets.to(tl.int32), axis=0) > 0


@triton.jit
def plane(row, ox, oy, oz, dx, dy, dz):
    """First t > 0 of rays, in the view's frame, against a rectangle; those that bound a room have no borders."""
    m = row + FROM_VIEW
    height = row_times(m + 8, ox, oy, oz) + tl.load(m + 11)
    t = -height / _nonzero(row_times(m + 8, dx, dy, dz))
    hit = t > 0.0
    sx = tl.load(row + SIZE)
    if sx < INF:
        px = ox + t * dx
        py = oy + t * dy
        pz = oz + t * dz
        x = row_times(m, px, py, pz) + tl.load(m + 3)
        y = row_times(m + 4, px, py, pz) + tl.load(m + 7)
        hit &= (tl.abs(x) <= sx) & (tl.abs(y) <= tl.load(row + SIZE + 1))
    return tl.where(hit, t, INF)


@triton.jit
def solid(kind, row, ox, oy, oz, dx, dy, dz):
    """First t > 0 of rays, in the object's frame, against a box, a sphere or a cylinder."""
    sx = tl.load(row + SIZE)
    if kind == SPHERE:
        near, far = _ball(ox, oy, oz, dx, dy, dz, sx)
    else:
        near, far = _slab(oz, dz, tl.load(row + SIZE + 2))
        if kind == BOX:
            a, b = _slab(ox, dx, sx)
            near = tl.maximum(near, a)
            far = tl.minimum(far, b)
            a, b = _slab(oy, dy, tl.load(row + SIZE + 1))
        else:
            a, b = _ball(ox, oy, 0.0, dx, dy, dx * 0.0, sx)
        near = tl.maximum(near, a)
        far = tl.minimum(far, b)
    return _entry(near, far)


@triton.jit
def normal(kind, size, x, y, z):
    """Outward unit normals at surface points; +z on both sides of a plane."""
    sx, sy, sz = triple(size, x)
    ix = sx - tl.abs(x)
    iy = sy - tl.abs(y)
    iz = sz - tl.abs(z)
    face_x = (kind == BOX) & (ix <= iy) & (ix <= iz)
    face_y = (kind == BOX) & (ix > iy) & (iy <= iz)
    radial = tl.sqrt(x * x + y * y)
    round_ = 1.0 / tl.maximum(tl.where(kind == SPHERE, tl.sqrt(x * x + y * y + z * z), radial), _TINY)
    tube = (kind == CYLINDER) & (iz >= sx - radial)
    curved = (kind == SPHERE) | tube
    sign = tl.where((z < 0.0) & (kind != PLANE), -1.0, 1.0)
    nx = tl.where(curved, x * round_, tl.where(face_x, tl.where(x < 0.0, -1.0, 1.0), 0.0))
    ny = tl.where(curved, y * round_, tl.where(face_y, tl.where(y < 0.0, -1.0, 1.0), 0.0))
    nz = tl.where(tube | face_x | face_y, 0.0, tl.where(kind == SPHERE, z * round_, sign))
    return nx, ny, nz
