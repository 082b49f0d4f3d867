"""Procedural solid textures, evaluated in object coordinates so that they move with the object."""

from __future__ import annotations

import colorsys
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Vec3 = tuple[float, float, float]
TEXTURES = ("checker", "stripes", "tiles", "sines", "noise")

# Rows of the parameter table: kind, frequency, phase, direction, two colours, strength of the noise on top.
_COLUMNS = {"kind": 1, "frequency": 3, "phase": 3, "direction": 3, "dark": 3, "light": 3, "grain": 1}


@dataclass(frozen=True)
class Texture:
    """A pattern between two colours.

    Attributes:
        kind: one of `TEXTURES`.
        frequency: periods a metre along the object's axes.
        phase: offsets in periods.
        direction: unit vector across the stripes.
        dark, light: linear RGB, 0 to 1.
        grain: how much value noise modulates the brightness, 0 to 1.
    """

    kind: str
    frequency: Vec3
    phase: Vec3
    direction: Vec3
    dark: Vec3
    light: Vec3
    grain: float

    def row(self) -> list[float]:
        """The texture as one row of the parameter table."""
        colours = (*self.dark, *self.light)
        return [TEXTURES.index(self.kind), *self.frequency, *self.phase, *self.direction, *colours, self.grain]


def random_texture(
    rng: random.Random,
    *,
    kinds: Sequence[str],
    period: tuple[float, float],
    saturation: tuple[float, float],
    flat: bool,
) -> Texture:
    """Draw a texture.

    Args:
        rng: source of randomness.
        kinds: names to draw from, see `TEXTURES`.
        period: range of the pattern's period in metres.
        saturation: range of the colours' saturation.
        flat: the texture lies on a plane z = 0; keeps the pattern's edges off that plane.
    """
    kind = rng.choice(list(kinds))
    base = 1 / rng.uniform(*period)
    stretch = rng.choice((1.0, 1.0, 0.25)) if kind == "tiles" else 1.0  # long tiles are planks
    angle = rng.choice((0.0, math.pi / 2, rng.uniform(0, math.pi)))
    tilt = 0.0 if flat else rng.uniform(-0.6, 0.6)
    direction = (math.cos(angle) * math.cos(tilt), math.sin(angle) * math.cos(tilt), math.sin(tilt))
    hue, value = rng.random(), rng.uniform(0.65, 0.95)
    dark = colorsys.hsv_to_rgb(hue, rng.uniform(*saturation), value * rng.uniform(0.35, 0.65))
    light = colorsys.hsv_to_rgb((hue + rng.uniform(-0.15, 0.15)) % 1, rng.uniform(*saturation), value)
    r, g, b = (tuple(channel**2.2 for channel in pair) for pair in zip(dark, light, strict=True))
    return Texture(
        kind=kind,
        frequency=(base, base * stretch, base),
        phase=(rng.random(), rng.random(), 0.25 if flat else rng.random()),
        direction=direction,
        dark=(r[0], g[0], b[0]),
        light=(r[1], g[1], b[1]),
        grain=rng.uniform(0.15, 0.4),
    )


def texture_table(textures: Sequence[Texture], *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Parameters of N textures, [17, N], for `texture_colours`."""
    return torch.tensor([texture.row() for texture in textures], dtype=dtype, device=device).T.contiguous()


def _lattice_hash(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Pseudo-random integers in [0, 65535] of int64 lattice points; every product fits 63 bits."""
    h = (x * 73856093) ^ (y * 19349663) ^ (z * 83492791)
    h = ((h ^ (h >> 13)) & 0x7FFFFFFF) * 1274126177
    h = ((h ^ (h >> 17)) & 0x7FFFFFFF) * 1103515245
    return (h >> 16) & 0xFFFF


def value_noise(points: Tensor) -> Tensor:
    """Smooth noise in [0, 1] with one random value a unit cell corner; points [3, ...] -> [...]."""
    floor = points.floor()
    weight = points - floor
    weight = weight * weight * (3 - 2 * weight)
    corner = floor.long()
    total = torch.zeros_like(points[0])
    for dx in (0, 1):
        wx = weight[0] if dx else 1 - weight[0]
        for dy in (0, 1):
            wxy = wx * (weight[1] if dy else 1 - weight[1])
            for dz in (0, 1):
                wxyz = wxy * (weight[2] if dz else 1 - weight[2])
                total += wxyz * _lattice_hash(corner[0] + dx, corner[1] + dy, corner[2] + dz)
    return total / 0xFFFF


def _soft_square(periods: Tensor, blur: Tensor) -> Tensor:
    """Square wave in [-1, 1] with edges as wide as a pixel's footprint `blur`, in periods."""
    return (torch.sin(2 * math.pi * periods) / (math.pi * blur.clamp(min=0.02))).clamp(-1, 1)


def texture_colours(table: Tensor, ids: Tensor, points: Tensor, footprint: Tensor) -> Tensor:
    """Albedo of surface points.

    Args:
        table: [17, N] of `texture_table`.
        ids: [V, P] number of each point's texture.
        points: [3, V, P] metres, in the object's frame.
        footprint: [V, P] metres of surface that a pixel covers; finer patterns fade to their mean, as in a camera.

    Returns:
        [3, V, P] linear RGB.
    """
    rows = table.index_select(1, ids.flatten()).unflatten(1, ids.shape)
    kind, frequency, phase, direction, dark, light, grain = rows.split(list(_COLUMNS.values()))
    kind, grain = kind[0], grain[0]
    blur = frequency[0] * footprint
    periods = points * frequency + phase
    waves = _soft_square(periods, blur)
    checker = waves[0] * waves[1] * waves[2]
    stripes = _soft_square((points * direction).sum(0) * frequency[0] + phase[0], blur)

    # 64 periods of offset give every texture its own part of the noise.
    coarse = value_noise(0.7 * periods + 64 * phase)
    fine = (value_noise(3.1 * periods + 64 * phase) - 0.5) * (2 - 12 * blur).clamp(0, 1)
    noise = coarse - 0.5 + fine
    cell = periods.floor()
    joint = 0.5 - (periods - cell - 0.5).abs().amax(0)  # distance to the nearest joint between tiles, in periods
    tint = _lattice_hash(*(cell + 64 * phase).floor().long().unbind(0)).to(points.dtype) / 0xFFFF
    tiles = torch.where(joint < 0.03 + blur / 2, -1.0, 0.2 + 0.8 * tint)
    swirl = 2.5 * coarse
    sines = torch.sin(2 * math.pi * (points * direction).sum(0) * frequency[0] + 2 * math.pi * swirl)

    pattern = torch.where(kind == TEXTURES.index("checker"), checker, stripes)
    for name, value in (("tiles", tiles), ("sines", sines), ("noise", (1.6 * noise).clamp(-1, 1))):
        pattern = torch.where(kind == TEXTURES.index(name), value, pattern)
    visible = (2 - 4 * blur).clamp(0, 1)  # fades out towards half a period a pixel, the Nyquist limit
    return torch.lerp(dark, light, 0.5 + 0.5 * pattern * visible) * (1 + grain * noise * visible)
