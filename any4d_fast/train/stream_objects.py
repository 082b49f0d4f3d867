"""Objects of the endless stream: in front of the first camera, on the floor or above it, some in rigid motion.

Nothing is drawn twice: what would not fit is made smaller, slowed down or pushed away by a factor, and an object that
would still hold a camera is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .shapes import SHAPES
from .stream_cameras import Cameras
from .stream_config import MAX_MOVING, MAX_STATIC, StreamConfig
from .stream_random import Array, Draws, columns, cross, fit, level, norm, swing, unit

SLOTS = MAX_MOVING + MAX_STATIC
_LAMP_SPACE = 0.45  # metres under the ceiling that objects leave to the lamp
_CLEARANCE = 0.3  # metres between a camera and an object's bounding ball
_OPEN_REACH = 9.0  # metres from the camera within which objects stand in scenes without walls
_LEAST_APPARENT = 0.05  # an object's radius over its distance: none is a speck
_UP = np.array([0.0, 0.0, 1.0])
PLANE, BOX, SPHERE, CYLINDER = (SHAPES.index(name) for name in ("plane", "box", "sphere", "cylinder"))
_KINDS = (BOX, BOX, BOX, SPHERE, SPHERE, SPHERE, CYLINDER, CYLINDER, CYLINDER, PLANE)


@dataclass
class Objects:
    """Rigid objects in M slots, those that move first.

    Attributes:
        kind: [B, M] index into `SHAPES`; -1 in empty slots.
        size: [B, M, 3] half sizes, metres.
        rotation: [B, M, 3, 3], object to world at time 0.
        position: [B, M, 3] of the centre at time 0, metres in the world.
        turn: [B, M, V, 3] rotation vectors in the world, from time 0 on.
        shift: [B, M, V, 3] motion of the centre from time 0 on.
        moving: [B, M] bool.
    """

    kind: Array
    size: Array
    rotation: Array
    position: Array
    turn: Array
    shift: Array
    moving: Array


@dataclass
class _Styles:
    """How each object, [B, M], stands and moves."""

    moving: Array
    floats: Array
    rolls: Array  # of those that move; the others lie
    spins: Array  # turns on the spot
    lies: Array  # a cylinder on its side


def bounding_radius(kind: Array, size: Array) -> Array:
    """Radius [B, M] of the ball around the centre that holds the shape."""
    x, z = size[..., 0], size[..., 2]
    radius = np.where(kind == CYLINDER, np.sqrt(x * x + z * z), norm(size))
    return np.where(kind == SPHERE, x, radius)


def draw_objects(
    draws: Draws, config: StreamConfig, room: Array, enclosed: Array, cameras: Cameras, size: tuple[int, int]
) -> Objects:
    """Objects for rooms [B, 3], enclosed [B] or not, and pictures of a size (height, width)."""
    movers, statics = draws.integer(*config.moving_objects, 1), draws.integer(*config.static_objects, 1)
    slot = np.arange(SLOTS)
    moving, present = slot < movers, slot < movers + statics
    kind = draws.choose(_KINDS, SLOTS)
    style = draws.unit(SLOTS)
    floats = np.where(moving, style < 0.4, style < 0.12)
    rolls = style > 0.7
    spins = moving & ~floats & ~rolls & (style > 0.62)
    styles = _Styles(moving, floats, rolls, spins, rolls & (kind == CYLINDER))

    heading = draws.uniform(-np.pi, np.pi, SLOTS)
    ahead, across = level(heading), level(heading + np.pi / 2)
    rotation = columns(ahead, across, _UP)
    rotation = np.where((kind == PLANE)[..., None, None], columns(ahead, _UP, -across), rotation)
    rotation = np.where(styles.lies[..., None, None], columns(ahead, -_UP, across), rotation)
    rotation = np.where(floats[..., None, None], _random_rotations(draws), rotation)
    half = _draw_sizes(draws, kind, moving, room)
    position, half = _place(draws, kind, half, styles, movers + statics, room, enclosed, cameras, size)
    radius = bounding_radius(kind, half)
    turn, shift = _draw_motion(
        draws, config, kind, half, radius, styles, ahead, rotation, position, room, enclosed, cameras
    )
    moves = moving & ((np.abs(shift).max((-2, -1)) > 0.01) | (np.abs(turn).max((-2, -1)) > 0.01))
    position = _clear(position, shift * moves[..., None, None], radius, cameras.position)
    gap = norm(position[..., None, :] + shift * moves[..., None, None] - cameras.position[:, None]).min(-1)
    present = present & (gap > radius + 0.1)
    moves = moves & present
    shift, turn = shift * moves[..., None, None], turn * moves[..., None, None]
    return Objects(np.where(present, kind, -1), half, rotation, position, turn, shift, moves)


def _draw_sizes(draws: Draws, kind: Array, moving: Array, room: Array) -> Array:
    """Half sizes [B, M, 3]: those of `layout` times a factor, wider for furniture."""
    a, b, c = np.moveaxis(draws.unit(3, SLOTS), 1, 0)
    scale = draws.logarithmic(np.where(moving, 0.4, 0.5), np.where(moving, 1.6, 2.2), SLOTS)
    box, ball, tube = kind == BOX, kind == SPHERE, kind == CYLINDER
    x = np.where(ball, 0.18 + 0.24 * a, np.where(tube, 0.12 + 0.18 * a, np.where(box, 0.15, 0.25) + 0.25 * a))
    y = np.where(ball | tube, x, np.where(box, 0.15 + 0.25 * b, 0.3 + 0.3 * b))
    z = np.where(ball, x, np.where(box | tube, 0.15 + 0.35 * c, 0.0))
    size = np.stack([x, y, z], -1) * scale[..., None]
    most = 0.42 * (room[:, 2:] - 0.5)
    return size * np.minimum(1.0, most / bounding_radius(kind, size))[..., None]


def _random_rotations(draws: Draws) -> Array:
    """Uniform over all rotations, [B, M, 3, 3] (Shoemake 1992)."""
    a, b, c = np.moveaxis(draws.unit(3, SLOTS), 1, 0)
    r, s, b, c = np.sqrt(1 - a), np.sqrt(a), 2 * np.pi * b, 2 * np.pi * c
    x, y, z, w = r * np.sin(b), r * np.cos(b), s * np.sin(c), s * np.cos(c)
    entries = (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
               2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
               2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y))  # fmt: skip
    return np.stack(entries, -1).reshape(*a.shape, 3, 3)


def _limits(room: Array, enclosed: Array) -> Array:
    """How far from the middle things may be, [B, 1, 2] metres."""
    return np.where(enclosed[:, None], room[:, :2] / 2, _OPEN_REACH)[:, None]


def _place(
    draws: Draws, kind: Array, half: Array, styles: _Styles, total: Array, room: Array, enclosed: Array,
    cameras: Cameras, picture: tuple[int, int],
) -> tuple[Array, Array]:  # fmt: skip
    """Positions at time 0, and half sizes that suit the distance: no object fills the first view."""
    height, width = picture
    eye, forward = cameras.position[:, None, 0], cameras.level[:, None, 0, :, 2]
    tangent = (width / 2 / cameras.focal)[:, None]  # of half the horizontal field of view
    # A bearing for each object: shuffled sectors of the field of view.
    order = np.argsort(np.where(np.arange(SLOTS) < total, draws.unit(SLOTS), 2.0), 1).argsort(1)
    sector = (order + draws.unit(SLOTS)) / np.maximum(total, 1) - 0.5
    along = level(np.arctan2(forward[..., 1], forward[..., 0]) - np.arctan(1.75 * sector * tangent))
    wall = np.where(enclosed[:, None, None], _limits(room, enclosed), 1e3) - np.sign(along[..., :2]) * eye[..., :2]
    wall = (wall / np.maximum(np.abs(along[..., :2]), 1e-6)).min(-1)
    radius, upright = bounding_radius(kind, half), _upright(kind, half, styles)
    far = np.minimum(wall - radius - 0.05, _OPEN_REACH)
    # The floor comes into view where the lower edge of the picture, nearly, meets it.
    pitch, spread = np.arcsin(np.clip(forward[..., 2], -1, 1)), np.arctan(0.8 * height / width * tangent)
    near = np.where(styles.floats, 0.0, (eye[..., 2] - upright) / np.tan(np.clip(spread - pitch, 0.05, 1.4)))
    near = np.minimum(np.maximum(near, 0.9), np.maximum(far, 0.6))
    distance = near + (np.maximum(far, near) - near) * draws.unit(SLOTS) ** 1.2
    apparent = np.clip(radius / distance, _LEAST_APPARENT, draws.uniform(0.2, 0.42, SLOTS))
    half = half * (apparent * distance / radius)[..., None]

    radius = bounding_radius(kind, half)
    aloft = eye[..., 2] + distance * np.tan(np.clip(pitch + draws.uniform(-1, 1, SLOTS) * spread, -1.2, 1.2))
    aloft = np.clip(aloft, radius + 0.05, np.maximum(room[:, 2:] - _LAMP_SPACE - radius, radius + 0.05))
    position = eye + distance[..., None] * along
    position[..., 2] = np.where(styles.floats, aloft, _upright(kind, half, styles))
    return position, half


def _upright(kind: Array, half: Array, styles: _Styles) -> Array:
    """Height of the centre over the floor that an object rests on."""
    return np.where(kind == PLANE, half[..., 1], np.where(styles.lies, half[..., 0], half[..., 2]))


def _draw_motion(
    draws: Draws, config: StreamConfig, kind: Array, half: Array, radius: Array, styles: _Styles, ahead: Array,
    rotation: Array, position: Array, room: Array, enclosed: Array, cameras: Cameras,
) -> tuple[Array, Array]:  # fmt: skip
    """Rotation vectors and displacements [B, M, V, 3]: a swing along a line, and a turn about a fixed axis."""
    limit, times = _limits(room, enclosed), cameras.times
    # What starts near a wall starts away from it.
    inside = np.abs(position[..., :2]) < 0.4 * limit
    direction = ahead.copy()
    direction[..., :2] = np.where(inside, ahead[..., :2], -np.sign(position[..., :2]) * np.abs(ahead[..., :2]))
    direction = towards_view(direction, position, cameras)
    rolling = cross(_UP, direction)
    direction[..., 2] = np.where(styles.floats, draws.uniform(-0.5, 0.5, SLOTS), 0.0)
    direction = unit(direction)
    speed, travel = draws.uniform(*config.object_speed, SLOTS, 1), draws.logarithmic(0.25, 1.5, SLOTS, 1)
    wave = swing(times[:, None], speed, travel, draws.uniform(-0.6, 0.6, SLOTS, 1))
    wave = wave * (styles.moving & ~styles.spins)[..., None]
    ceiling = room[:, 2:] - _LAMP_SPACE - radius
    low = np.concatenate([radius[..., None] - limit, np.minimum(radius, position[..., 2])[..., None]], -1)
    high = np.concatenate([limit - radius[..., None], np.maximum(ceiling, position[..., 2])[..., None]], -1)
    shift = direction[..., None, :] * wave[..., None]
    factor = fit(position, shift, low, high)[..., None]

    spin = draws.sign(SLOTS) * draws.uniform(0.2, 1.5, SLOTS) * np.where(styles.spins, 1.5, 1.0)
    # What has no room to roll turns on the spot.
    wheel = styles.rolls & ~styles.floats & ((kind == CYLINDER) | (kind == SPHERE)) & (factor[..., 0] > 0.1)
    axis = np.where(styles.floats[..., None], rotation[..., 0], np.where(wheel[..., None], rolling, _UP))
    angle = np.where(wheel[..., None], wave * factor / half[..., :1], spin[..., None] * times[:, None])
    return axis[..., None, :] * (angle * styles.moving[..., None])[..., None], shift * factor[..., None]


def towards_view(direction: Array, position: Array, cameras: Cameras) -> Array:
    """Directions [B, M, 3] of which those that start beside the middle half of the first view do not lead out of it."""
    right, forward = (cameras.level[:, None, 0, :, axis] for axis in (0, 2))
    away = position - cameras.position[:, None, 0]
    side = (away * right).sum(-1) * cameras.focal[:, None] / np.maximum((away * forward).sum(-1), 0.1)  # pixels
    outwards = (direction * right).sum(-1) * np.sign(side)
    beside = np.abs(side) > 0.5 * cameras.centre[:, :1]
    return direction - np.where(beside, 2 * np.maximum(outwards, 0) * np.sign(side), 0.0)[..., None] * right


def _clear(position: Array, shift: Array, radius: Array, cameras: Array) -> Array:
    """Positions pushed away from the first camera, along the floor, until no view's camera is close."""
    gap = norm(position[..., None, :] + shift - cameras[:, None]) - radius[..., None]
    missing = np.maximum(np.maximum(_CLEARANCE, 0.5 * radius)[..., None] - gap, 0).max(-1)
    away = position - cameras[:, None, 0]
    away[..., 2] = 0
    return position + 1.3 * missing[..., None] * unit(away)
