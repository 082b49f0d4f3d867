"""Camera paths of the endless stream: inside the room, from near a wall towards the middle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .stream_config import StreamConfig
from .stream_random import Array, Draws, columns, cross, fit, level, swing, unit

_WALL_MARGIN = 0.35  # metres between a camera's start and the walls; its path may take two thirds of it
_UP = np.array([0.0, 0.0, 1.0])


@dataclass
class Cameras:
    """Pinhole cameras on their paths.

    Attributes:
        level: [B, V, 3, 3] rotations, camera to world, before `shake`.
        shake: [B, V, 3] rotation vectors in the camera's frame, radians: rotation = level @ exp(shake).
        position: [B, V, 3] metres in the world.
        focal, centre: [B], [B, 2] pixels.
        times: [B, V] s from 0.
    """

    level: Array
    shake: Array
    position: Array
    focal: Array
    centre: Array
    times: Array


def draw_cameras(draws: Draws, config: StreamConfig, room: Array, height: int, width: int) -> Cameras:
    """Arcs, dollies, sweeps, walks, pans and tripods in rooms [B, 3], for pictures of height x width pixels."""
    times = _draw_times(draws, config)
    tangent = np.tan(np.radians(draws.uniform(*config.fov_degrees)) / 2)
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    centre = centre + draws.uniform(-0.03, 0.03, 2) * np.array([width, height])
    target = np.concatenate([draws.uniform(-0.12, 0.12, 2) * room[:, :2], draws.uniform(0.2, 1.2, 1)], 1)
    azimuth = draws.uniform(-np.pi, np.pi)
    outward = level(azimuth)
    space = (room[:, :2] / 2 - _WALL_MARGIN) - np.sign(outward[:, :2]) * target[:, :2]
    reach = (space / np.maximum(np.abs(outward[:, :2]), 1e-6)).min(1)
    distance = np.clip(draws.uniform(0.55, 0.97) * reach, 0.6, 7.0)
    eye = target + distance[:, None] * outward
    usual, rare = draws.uniform(0.9, 1.8), draws.uniform(0.35, room[:, 2] - 0.4)
    eye[:, 2] = np.where(draws.chance(0.75), usual, rare)

    kind = draws.unit()
    still = kind < config.tripod + config.panning
    pans = still & (kind >= config.tripod)
    speed = np.where(still, 0.0, draws.uniform(*config.camera_speed))
    path, follows = _draw_path(draws, times, speed, azimuth, distance)
    edge = room[:, :2] / 2 - 0.33 * _WALL_MARGIN
    low, high = (np.concatenate(parts, 1) for parts in ((-edge, 0.25 + 0 * room[:, 2:]), (edge, room[:, 2:] - 0.25)))
    path = path * fit(eye, path, low, high)[:, None, None]
    drift = draws.uniform(-0.15, 0.15, 3) * np.minimum(speed, 1.0)[:, None]
    look = target[:, None] + np.where(follows[:, None, None], path, drift[:, None] * times[..., None])
    position = eye[:, None] + path

    forward = unit(look - position)
    right = unit(cross(forward, _UP))
    hand = draws.chance(0.5) & ~still
    sway = np.where(hand, np.radians(draws.uniform(*config.shake_degrees)), 0.0)[:, None, None]
    rates, phases = draws.uniform(4.0, 24.0, 1, 3), draws.uniform(0, 2 * np.pi, 1, 3)
    shake = sway * np.array([1.0, 1.0, 0.6]) * np.sin(times[..., None] * rates + phases)
    sweep = draws.sign(1) * draws.uniform(0.15, 0.5, 1) * (2 * np.arctan(tangent))[:, None]  # over the whole clip
    shake[..., 1] += np.where(pans[:, None], sweep * times / np.maximum(times[:, -1:], 1e-9), 0.0)
    shake[..., 2] += draws.uniform(-0.06, 0.06, 1)
    return Cameras(columns(right, cross(forward, right), forward), shake, position, width / 2 / tangent, centre, times)


def _draw_times(draws: Draws, config: StreamConfig) -> Array:
    interval = draws.logarithmic(*config.frame_interval, 1) * draws.uniform(0.75, 1.25, config.num_views)
    interval[:, 0] = 0
    return np.cumsum(interval, 1)


def _draw_path(draws: Draws, times: Array, speed: Array, azimuth: Array, distance: Array) -> tuple[Array, Array]:
    """Displacements [B, V, 3] of cameras at an azimuth and distance from their targets, and who takes the target along.

    One kind of motion leads, and a little of another direction joins in.
    """
    style = draws.integer(0, 9)
    arcs, dollies, walks = style <= 4, style == 5, style >= 8  # the others are sweeps
    inward, across = -level(azimuth), level(azimuth + np.pi / 2)
    radial = dollies | walks
    lead = np.where(radial[:, None], inward, across) * draws.sign(1)
    length = draws.logarithmic(0.4, 1.5)
    length = np.where(radial, np.minimum(length, 0.25 * distance), length)[:, None]
    wave = swing(times, speed[:, None], length, draws.uniform(-0.6, 0.6, 1))
    path = lead[:, None] * wave[..., None]
    # An arc's deviation from its tangent: along it by distance * (sin a - a), inwards by distance * (1 - cos a).
    angle = np.where(arcs, (lead * across).sum(1) / distance, 0.0)[:, None] * wave
    path = path + distance[:, None, None] * (
        across[:, None] * (np.sin(angle) - angle)[..., None] + inward[:, None] * (1 - np.cos(angle))[..., None]
    )
    aside = draws.uniform(-0.3, 0.3, 3) * np.array([1.0, 1.0, 0.6])
    path = path + aside[:, None] * swing(times, speed[:, None], length, draws.uniform(-0.6, 0.6, 1))[..., None]
    steps = np.sin(times * 11.0 + draws.uniform(0, 2 * np.pi, 1))
    path[..., 2] += np.where(walks & (speed > 0), 0.03, 0.0)[:, None] * (steps - steps[:, :1])
    return path, style >= 6
