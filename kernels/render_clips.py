"""Ray casting of synthetic clips: one launch from scene tables to pictures, rays, depth, flow and masks.

A program is one warp with a small tile of pixels of one view. It casts the centres' rays at the slots of its clip, then
colour samples one after the other: a cast, a texture, a shadow ray each. An object whose bounding ball no ray of the
warp meets is left out. All programs of a view read the same few kilobytes of tables; nothing but the results goes to
memory. View 0's programs also write the scene flow of all views, which lives on their pixels. See
`reference.render_clips` for the tables; the arithmetic is that of `train.shapes` and `train.textures`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from any4d_fast.reference.render_clips import (
    CLIP_COLUMNS,
    CLIP_WIDTH,
    OCCLUSION_TOLERANCE,
    PRIMITIVE_COLUMNS,
    PRIMITIVE_WIDTH,
    ROOM_SLOTS,
    TEXTURE_WIDTH,
    VIEW_WIDTH,
    RenderedClips,
)

from ._shapes import FROM_VIEW, INF, PLANE, SIZE, mapped, meets, normal, offsets, plane, row_times, solid, triple
from ._textures import albedo, clamped, lattice, mixed
from .aot import AotCase


class Config(NamedTuple):
    """Launch configuration."""

    block: int
    warps: int


# One warp: it decides by itself, without a barrier, which objects to leave out.
CONFIG = Config(block=32, warps=1)
# Tiles are 8 pixels wide: a row of one is a sector of 32 bytes.
_TILE_WIDTH = tl.constexpr(8)


_CLIP, _PRIMITIVE = offsets(CLIP_COLUMNS), offsets(PRIMITIVE_COLUMNS)
_FOCAL, _CENTRE, _BLUR, _AMBIENT = _CLIP["focal"], _CLIP["centre"], _CLIP["blur"], _CLIP["ambient"]
_POWER, _SOFTNESS, _GAIN, _GAMMA = _CLIP["power"], _CLIP["softness"], _CLIP["gain"], _CLIP["gamma"]
_NOISE, _SEED, _FIRST, _END = _CLIP["noise"], _CLIP["seed"], _CLIP["first"], _CLIP["end"]
_HORIZON, _ZENITH = _CLIP["horizon"], _CLIP["zenith"]
_LIGHT, _UP = _PRIMITIVE["light"], _PRIMITIVE["up"]
_KIND, _MOVING, _BALL = _PRIMITIVE["kind"], _PRIMITIVE["moving"], _PRIMITIVE["ball"]
_EYE_TANGENT, _LAMP_TANGENT = _PRIMITIVE["eye_tangent"], _PRIMITIVE["lamp_tangent"]
_CLIP_WIDTH, _PRIMITIVE_WIDTH = tl.constexpr(CLIP_WIDTH), tl.constexpr(PRIMITIVE_WIDTH)
_VIEW_WIDTH, _TEXTURE_WIDTH, _ROOM_SLOTS = (tl.constexpr(n) for n in (VIEW_WIDTH, TEXTURE_WIDTH, ROOM_SLOTS))
_TOLERANCE = tl.constexpr(OCCLUSION_TOLERANCE)
_TRIANGLE = tl.constexpr(6**0.5)


@triton.jit
def _cast(primitives, first, end, x, y):
    """Nearest hit of the camera's rays (x, y, 1): t and slot; inf and -1 where there is none."""
    one = x * 0.0 + 1.0
    best = one * INF
    ids = (x * 0.0).to(tl.int32) - 1
    for slot in range(first, _ROOM_SLOTS):
        t = plane(primitives + slot * _PRIMITIVE_WIDTH, 0.0, 0.0, 0.0, x, y, one)
        closer = t < best
        best = tl.where(closer, t, best)
        ids = tl.where(closer, slot, ids)
    for slot in range(_ROOM_SLOTS, end):
        row = primitives + slot * _PRIMITIVE_WIDTH
        kind = tl.load(row + _KIND).to(tl.int32)
        if kind >= 0:
            if meets(row + _BALL, row + _EYE_TANGENT, 0.0, 0.0, 0.0, x, y, one):
                if kind == PLANE:
                    t = plane(row, 0.0, 0.0, 0.0, x, y, one)
                else:
                    m = row + FROM_VIEW
                    t = solid(
                        kind, row, tl.load(m + 3), tl.load(m + 7), tl.load(m + 11),
                        row_times(m, x, y, one), row_times(m + 4, x, y, one), row_times(m + 8, x, y, one),
                    )  # fmt: skip
                closer = t < best
                best = tl.where(closer, t, best)
                ids = tl.where(closer, slot, ids)
    return best, ids


@triton.jit
def _first_blocker(lamp, primitives, end, px, py, pz):
    """Smallest t of rays from the lamp, which reach the view's points (px, py, pz) at t = 1, on any object."""
    ox = tl.load(lamp)
    oy = tl.load(lamp + 1)
    oz = tl.load(lamp + 2)
    dx = px - ox
    dy = py - oy
    dz = pz - oz
    best = px * 0.0 + INF
    for slot in range(_ROOM_SLOTS, end):
        row = primitives + slot * _PRIMITIVE_WIDTH
        kind = tl.load(row + _KIND).to(tl.int32)
        if kind >= 0:
            if meets(row + _BALL, row + _LAMP_TANGENT, ox, oy, oz, dx, dy, dz):
                m = row + FROM_VIEW
                light = row + _LIGHT
                if kind == PLANE:
                    t = plane(row, ox, oy, oz, dx, dy, dz)
                else:
                    t = solid(
                        kind, row, tl.load(light), tl.load(light + 1), tl.load(light + 2),
                        row_times(m, dx, dy, dz), row_times(m + 4, dx, dy, dz), row_times(m + 8, dx, dy, dz),
                    )  # fmt: skip
                best = tl.minimum(best, t)
    return best


@triton.jit
def _sample(clip, view, primitives, textures, first, end, x, y, SHADOWS: tl.constexpr):
    """Linear RGB of the rays (x, y, 1)."""
    t, ids = _cast(primitives, first, end, x, y)
    hit = ids >= 0
    slot = tl.maximum(ids, 0)
    z = tl.where(hit, t, 1.0)
    vx = x * z
    vy = y * z
    row = primitives + slot * _PRIMITIVE_WIDTH
    # From the camera to the point, and the camera itself, in the object's frame.
    ex, ey, ez, ox, oy, oz = mapped(row + FROM_VIEW, vx, vy, z)
    px = ex + ox
    py = ey + oy
    pz = ez + oz
    kind = tl.load(row + _KIND).to(tl.int32)
    nx, ny, nz = normal(kind, row + SIZE, px, py, pz)
    facing = nx * ex + ny * ey + nz * ez
    outward = tl.where(facing > 0.0, -1.0, 1.0)
    distance = tl.sqrt(vx * vx + vy * vy + z * z)
    footprint = distance / tl.load(clip + _FOCAL) / tl.maximum(tl.abs(facing) / distance, 0.15)
    red, green, blue = albedo(textures + slot * _TEXTURE_WIDTH, px, py, pz, footprint)

    lx, ly, lz = triple(row + _LIGHT, px)
    lx -= px
    ly -= py
    lz -= pz
    squared = lx * lx + ly * ly + lz * lz
    reach = tl.sqrt(squared)
    lambert = tl.maximum(outward * (nx * lx + ny * ly + nz * lz) / reach, 0.0)
    if SHADOWS:
        blocker = _first_blocker(view + 3, primitives, end, vx, vy, z)
        lambert = tl.where(blocker >= 1.0 - _TOLERANCE / reach, lambert, 0.0)
    ux, uy, uz = triple(row + _UP, nx)
    upward = outward * (ux * nx + uy * ny + uz * nz)
    light = tl.load(clip + _AMBIENT) * (0.8 + 0.2 * upward)
    light += lambert * tl.load(clip + _POWER) / (squared + tl.load(clip + _SOFTNESS))

    height = row_times(view, x, y, 1.0) / tl.sqrt(x * x + y * y + 1.0)
    height = clamped(height, 0.0, 1.0)
    red = tl.where(hit, red * light, mixed(tl.load(clip + _HORIZON), tl.load(clip + _ZENITH), height))
    green = tl.where(hit, green * light, mixed(tl.load(clip + _HORIZON + 1), tl.load(clip + _ZENITH + 1), height))
    blue = tl.where(hit, blue * light, mixed(tl.load(clip + _HORIZON + 2), tl.load(clip + _ZENITH + 2), height))
    return red, green, blue


@triton.jit
def _grain(u, v, layer):
    """Noise of unit variance."""
    return _TRIANGLE * (lattice(u, v, layer) + lattice(u, v, layer + 2048.0) - 1.0)


@triton.jit
def _developed(clip, colour, channel, count, u, v, view):
    """What the sensor makes of a sum of `count` linear samples."""
    mean = tl.maximum(colour / count, 1e-20)  # black has no logarithm
    value = tl.math.exp2(tl.math.log2(mean) / tl.load(clip + _GAMMA))
    sigma = tl.load(clip + _NOISE)
    if sigma > 0.0:
        layer = tl.load(clip + _SEED) + (4096 * (3 * view + channel)).to(tl.float32)
        value += sigma * _grain(u, v, layer + u * 0.0)
    return clamped(value, 0.0, 1.0)


@triton.jit
def _store_flow(flows, primitives, flow, flow_mask, dynamic_mask, ids, vx, vy, vz, views, slots, pixels, lane, inside):
    """Scene flow and masks of all views on view 0's pixels."""
    seen = ids >= 0
    slot = tl.maximum(ids, 0)
    dynamic = seen & (tl.load(primitives + slot * _PRIMITIVE_WIDTH + _MOVING) > 0.0)
    for view in range(views):
        for axis in range(3):
            m = flows + (view * slots + slot) * 12 + axis * 4
            motion = row_times(m, vx, vy, vz) + tl.load(m + 3)
            tl.store(flow + lane * 3 + axis, tl.where(dynamic, motion, 0.0), mask=inside)
        tl.store(flow_mask + lane, seen.to(tl.int8), mask=inside)
        tl.store(dynamic_mask + lane, dynamic.to(tl.int8), mask=inside)
        flow += pixels * 3
        flow_mask += pixels
        dynamic_mask += pixels


@triton.jit(do_not_specialize=["height", "width", "across", "blocks", "views", "slots", "samples"])
def _render_kernel(
    clips, frames, primitives, textures, flows,
    images, rays, depth, flow, hit_ids, hits, flow_mask, dynamic_mask,
    height, width, across, blocks, views, slots, samples,
    BLOCK: tl.constexpr, SHADOWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = program // blocks
    view = row % views
    clip_number = row // views
    tile = program % blocks
    lane = tl.arange(0, BLOCK)
    column = tile % across * _TILE_WIDTH + lane % _TILE_WIDTH
    line = tile // across * (BLOCK // _TILE_WIDTH) + lane // _TILE_WIDTH
    pixels = height * width
    pixel = line * width + column
    inside = (column < width) & (line < height)
    u = column.to(tl.float32)
    v = line.to(tl.float32)

    clip = clips + clip_number * _CLIP_WIDTH
    frame = frames + row * _VIEW_WIDTH
    primitives += row.to(tl.int64) * slots * _PRIMITIVE_WIDTH
    textures += clip_number.to(tl.int64) * slots * _TEXTURE_WIDTH
    fx = tl.load(clip + _FOCAL)
    fy = tl.load(clip + _FOCAL + 1)
    cx = tl.load(clip + _CENTRE)
    cy = tl.load(clip + _CENTRE + 1)
    first = tl.load(clip + _FIRST).to(tl.int32)
    end = tl.load(clip + _END).to(tl.int32)

    x = tl.div_rn(u - cx, fx)
    y = tl.div_rn(v - cy, fy)
    t, ids = _cast(primitives, first, end, x, y)
    hit = ids >= 0
    z = tl.where(hit, t, 0.0)
    length = tl.sqrt(x * x + y * y + 1.0)
    start = row.to(tl.int64) * pixels
    out = rays + start * 3 + pixel * 3
    tl.store(out, x / length, mask=inside)
    tl.store(out + 1, y / length, mask=inside)
    tl.store(out + 2, 1.0 / length, mask=inside)
    tl.store(depth + start + pixel, z * length, mask=inside)
    tl.store(hit_ids + start + pixel, ids.to(tl.int8), mask=inside)
    tl.store(hits + start + pixel, hit.to(tl.int8), mask=inside)
    if view == 0:
        maps = flows + row.to(tl.int64) * slots * 12
        _store_flow(
            maps, primitives, flow + start * 3, flow_mask + start, dynamic_mask + start,
            ids, x * z, y * z, z, views, slots, pixels, pixel, inside,
        )  # fmt: skip

    red = x * 0.0
    green = x * 0.0
    blue = x * 0.0
    spread = tl.load(clip + _BLUR)
    for sample in range(samples * samples):
        down = sample // samples
        du = ((sample - down * samples).to(tl.float32) + 0.5) / samples - 0.5
        dv = (down.to(tl.float32) + 0.5) / samples - 0.5
        r, g, b = _sample(
            clip, frame, primitives, textures, first, end,
            (u + du * spread - cx) / fx, (v + dv * spread - cy) / fy, SHADOWS,
        )  # fmt: skip
        red += clamped(r * tl.load(clip + _GAIN), 0.0, 1.0)
        green += clamped(g * tl.load(clip + _GAIN + 1), 0.0, 1.0)
        blue += clamped(b * tl.load(clip + _GAIN + 2), 0.0, 1.0)
    count = (samples * samples).to(tl.float32)
    out = images + start * 3 + pixel
    for channel in range(3):
        colour = tl.where(channel == 0, red, tl.where(channel == 1, green, blue))
        tl.store(out, _developed(clip, colour, channel, count, u, v, view), mask=inside)
        out += pixels


def render_clips(
    clips: Tensor,
    frames: Tensor,
    primitives: Tensor,
    textures: Tensor,
    flows: Tensor,
    out: RenderedClips,
    samples: int,
    shadows: bool,
    config: Config | None = None,
) -> None:
    """Launch; the tables are `reference.render_clips.ClipTables`, contiguous float32, and `out` is filled.

    Args:
        clips, frames, primitives, textures, flows: the tables.
        out: contiguous float32, int8 and bool tensors.
        samples: n for n x n colour samples a pixel.
        shadows: cast shadows.
        config: launch configuration; the module's own by default.
    """
    config = config or CONFIG
    batch, views, slots = primitives.shape[:3]
    height, width = out.images.shape[3:]
    if out.images.numel() == 0:
        return
    across = triton.cdiv(width, _TILE_WIDTH.value)
    blocks = across * triton.cdiv(height, config.block // _TILE_WIDTH.value)
    # A mask is stored as the bytes that it is.
    masks = [mask.view(torch.int8) for mask in (out.hit, out.flow_mask, out.dynamic_mask)]
    _render_kernel[(batch * views * blocks,)](
        clips, frames, primitives, textures, flows,
        out.images, out.rays, out.depth, out.flow, out.ids, *masks,
        height, width, across, blocks, views, slots, samples,
        BLOCK=config.block, SHADOWS=shadows, num_warps=config.warps,
    )  # fmt: skip


_INTEGERS = ("height", "width", "across", "blocks", "views", "slots", "samples")
_BYTES = ("hit_ids", "hits", "flow_mask", "dynamic_mask")


def aot_cases() -> list[AotCase]:
    """Every production configuration: with and without shadows."""
    names = [name for name in _render_kernel.arg_names if not name.isupper()]
    types = {name: "i32" if name in _INTEGERS else "*i8" if name in _BYTES else "*fp32" for name in names}
    # All are tensors of their own, and torch aligns those.
    aligned = tuple(name for name in names if types[name].startswith("*"))
    return [
        AotCase(
            f"render_clips {'with' if shadows else 'without'} shadows",
            _render_kernel,
            types,
            {"BLOCK": CONFIG.block, "SHADOWS": shadows},
            aligned,
            {"num_warps": CONFIG.warps},
        )  # fmt: skip
        for shadows in (True, False)
    ]
