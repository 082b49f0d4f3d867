"""Drawing scenes for the endless stream: every number of B clips at once, without a loop over clips.

The world is the room, z up, origin on the floor's centre, metres; t = 0 is view 0's time. Arrays are [B], [B, V]
(views), [B, M] (object slots: movers first) or [B, M, V], with 3-vectors and 3 x 3 matrices behind.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .stream_cameras import Cameras, draw_cameras
from .stream_config import StreamConfig
from .stream_objects import SLOTS, Objects, draw_objects
from .stream_random import Array, Draws, level, linear_rgb
from .textures import TEXTURES

_UP = np.array([0.0, 0.0, 1.0])
_SUN = 40.0  # metres to a lamp that stands for the sun
_CHECKER, _STRIPES, _TILES, _NOISE = (TEXTURES.index(name) for name in ("checker", "stripes", "tiles", "noise"))
_PAVINGS = (_TILES, _TILES, _CHECKER, _STRIPES, _NOISE)


@dataclass
class Scenes:
    """B scenes.

    Attributes:
        room: [B, 3] length, width and height, metres.
        enclosed: [B] bool.
        cameras, objects: what the names say.
        textures: [B, 6 + M, 17] rows as of `textures.Texture.row`, the room's first: ceiling, walls, floor.
        lamp: [B, 3] metres in the world.
        light: columns of `ClipTables.clips` about light and sensor, [B, channels] by name.
    """

    room: Array
    enclosed: Array
    cameras: Cameras
    objects: Objects
    textures: Array
    lamp: Array
    light: dict[str, Array]


def draw_scenes(draws: Draws, config: StreamConfig, height: int, width: int) -> Scenes:
    """Everything about B clips of pictures of height x width pixels."""
    room = np.concatenate([draws.logarithmic(*config.room_size, 2), draws.uniform(*config.room_height, 1)], 1)
    enclosed = draws.chance(config.enclosed)
    cameras = draw_cameras(draws, config, room, height, width)
    objects = draw_objects(draws, config, room, enclosed, cameras, (height, width))
    lamp, light = _draw_light(draws, config, room, enclosed)
    return Scenes(room, enclosed, cameras, objects, _draw_textures(draws), lamp, light)


def _draw_textures(draws: Draws) -> Array:
    count = 6 + SLOTS
    part = np.arange(count)
    flat, ceiling, floor = part < 6, part == 0, part == 5
    kind = draws.integer(0, len(TEXTURES) - 1, count)
    kind = np.where(ceiling & draws.chance(0.7, count), _NOISE, kind)
    kind = np.where(floor, draws.choose(_PAVINGS, count), kind)
    kind = np.where((kind == _TILES) & ~flat, _NOISE, kind)  # tiles are laid on the room only
    base = 1 / draws.logarithmic(np.where(flat, 0.3, 0.09), np.where(flat, 1.6, 0.5), count)
    planks = np.where((kind == _TILES) & draws.chance(0.33, count), 0.25, 1.0)
    phase = draws.unit(count, 3)
    phase[..., 2] = np.where(flat, 0.25, phase[..., 2])  # keeps the pattern's edges off a plane z = 0
    angle = draws.choose((0, 1, 2), count) * (np.pi / 2)
    angle = np.where(angle > 3, draws.uniform(0, np.pi, count), angle)
    tilt = np.where(flat, 0.0, draws.uniform(-0.6, 0.6, count))
    direction = np.cos(tilt)[..., None] * level(angle)
    direction[..., 2] = np.sin(tilt)

    least, most = np.where(flat, 0.02, 0.15), np.where(ceiling, 0.2, np.where(flat, 0.5, 0.95))
    hue, value = draws.unit(count), draws.uniform(np.where(flat, 0.5, 0.35), 0.97, count)
    contrast = np.where(draws.chance(0.2, count), draws.uniform(0.75, 0.97, count), draws.uniform(0.3, 0.65, count))
    dark = linear_rgb(hue, draws.uniform(least, most, count), value * contrast)
    light = linear_rgb(hue + draws.uniform(-0.2, 0.2, count), draws.uniform(least, most, count), value)
    numbers = np.stack([kind, base, base * planks, base], -1)
    grain = draws.uniform(0.1, 0.45, count, 1)
    return np.concatenate([numbers, phase, direction, dark, light, grain], -1)


def _draw_light(draws: Draws, config: StreamConfig, room: Array, enclosed: Array) -> tuple[Array, dict[str, Array]]:
    """Lamps [B, 3], and the columns of `ClipTables.clips` about light and sensor.

    A lamp hangs under the ceiling; without one, it hangs higher or is a sun.
    """
    lamp = np.concatenate([draws.uniform(-0.35, 0.35, 2) * room[:, :2], room[:, 2:] - draws.uniform(0.1, 0.3, 1)], 1)
    azimuth, elevation = draws.uniform(-np.pi, np.pi), draws.uniform(0.5, 1.4, 1)
    sunny = ~enclosed & draws.chance(0.7)
    sun = _SUN * (np.cos(elevation) * level(azimuth) + np.sin(elevation) * _UP)
    lamp = np.where(sunny[:, None], sun, lamp + np.where(enclosed, 0.0, 2.2)[:, None] * _UP)
    softness = np.full((len(room), 1), 6.0)
    # As bright 1.7 m from a lamp as under the sun.
    power = np.where(sunny[:, None], _SUN**2 + softness, 9.0) * draws.uniform(0.6, 1.3, 1)
    tinted = draws.chance(0.5, 1)
    stops = draws.uniform(*config.exposure_stops, 1) + draws.uniform(-0.12, 0.12, 3)
    hue, clear = draws.uniform(0.5, 0.66), draws.unit()
    return lamp, {
        "ambient": draws.uniform(0.3, 0.65, 1),
        "power": power,
        "softness": softness,
        "gain": 2.0 ** np.where(tinted, stops, 0.0),
        "gamma": np.where(draws.chance(0.3, 1), draws.uniform(1.9, 2.5, 1), 2.2),
        "noise": np.where(draws.chance(0.5, 1), draws.uniform(*config.noise, 1), 0.0),
        "blur": np.where(draws.chance(0.5, 1), draws.uniform(*config.blur, 1), 1.0),
        "seed": draws.integer(0, 2**20 - 1, 1),
        "horizon": linear_rgb(hue, 0.15 * clear, draws.uniform(0.8, 0.97)),
        "zenith": linear_rgb(hue, 0.75 * clear, draws.uniform(0.6, 0.9)),
    }
