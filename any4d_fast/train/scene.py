"""What a synthetic scene is: objects on smooth rigid motions, a camera path and a light, all functions of time.

The world is the room: z up, origin on the floor's centre, metres. Everything here is float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import roma
import torch
from torch import Tensor

from .textures import Texture, Vec3


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"SceneConfig.{name}: expected {expected}, got {value!r}")


@dataclass(frozen=True)
class SceneConfig:
    """What scenes are drawn from. Ranges are (low, high), both included.

    Attributes:
        num_views: frames in the clip.
        height, width: image size in pixels.
        fov_degrees: horizontal field of view.
        num_objects: objects besides the room.
        num_moving: how many of them move.
        room_size: length and width of the room, metres.
        room_height: metres.
        frame_interval: seconds between frames.
        object_speed: peak speed of moving objects, m/s.
        camera_speed: peak speed of the camera, m/s; (0, 0) is a tripod.
        enclosed: with walls and a ceiling; without, rays that leave over the floor hit nothing.
        shadows: cast shadows.
        supersampling: n for n x n colour samples a pixel; geometry is always that of the pixel's centre.

    Raises:
        ValueError: a value outside what is possible; the message names it.
    """

    num_views: int = 8
    height: int = 168
    width: int = 224
    fov_degrees: tuple[float, float] = (50.0, 75.0)
    num_objects: tuple[int, int] = (6, 8)
    num_moving: tuple[int, int] = (2, 4)
    room_size: tuple[float, float] = (4.5, 7.0)
    room_height: tuple[float, float] = (2.6, 3.4)
    frame_interval: float = 0.2
    object_speed: tuple[float, float] = (0.4, 1.2)
    camera_speed: tuple[float, float] = (0.2, 0.6)
    enclosed: bool = True
    shadows: bool = True
    supersampling: int = 2

    def __post_init__(self) -> None:
        for name in ("num_views", "height", "width", "supersampling"):
            value = getattr(self, name)
            _require(type(value) is int and value >= 1, name, value, "an int of at least 1")
        interval = self.frame_interval
        number = isinstance(interval, (int, float)) and not isinstance(interval, bool)
        _require(number and 0 < interval < math.inf, "frame_interval", interval, "seconds, positive and finite")
        self._require_range("fov_degrees", "degrees between 10 and 150", lambda v: 10 <= v <= 150)
        self._require_range("num_objects", "0 to 64 objects", lambda v: type(v) is int and 0 <= v <= 64)
        self._require_range("num_moving", "0 to 64 objects", lambda v: type(v) is int and 0 <= v <= 64)
        self._require_range("room_size", "metres between 3 and 100", lambda v: 3 <= v <= 100)
        self._require_range("room_height", "metres between 2.2 and 30", lambda v: 2.2 <= v <= 30)
        self._require_range("object_speed", "m/s above 0 and up to 20", lambda v: 0 < v <= 20)
        self._require_range("camera_speed", "m/s between 0 and 20", lambda v: 0 <= v <= 20)
        if self.num_moving[1] > self.num_objects[0]:
            raise ValueError(
                f"SceneConfig.num_moving: up to {self.num_moving[1]} moving objects, but num_objects allows scenes of "
                f"{self.num_objects[0]}; raise num_objects[0] or lower num_moving[1]"
            )

    def _require_range(self, name: str, expected: str, ok: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        numbers = isinstance(value, (tuple, list)) and len(value) == 2
        numbers = numbers and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
        _require(numbers and value[0] <= value[1], name, value, f"a pair (low, high) with low <= high, {expected}")
        _require(ok(value[0]) and ok(value[1]), name, value, expected)


@dataclass(frozen=True)
class Wave:
    """A quantity that starts at `start` and swings: start + amplitude (sin(2 pi f t + phase) - sin(phase))."""

    start: float
    amplitude: float = 0.0
    frequency: float = 0.0
    phase: float = 0.0

    def at(self, times: Tensor) -> Tensor:
        """Values at `times` [T] seconds."""
        swing = torch.sin(2 * math.pi * self.frequency * times + self.phase) - math.sin(self.phase)
        return self.start + self.amplitude * swing

    def rate(self, times: Tensor) -> Tensor:
        """Time derivatives at `times` [T] seconds."""
        omega = 2 * math.pi * self.frequency
        return self.amplitude * omega * torch.cos(omega * times + self.phase)


@dataclass(frozen=True)
class Motion:
    """A rigid motion: a swing along a line, and a rotation about an axis of fixed direction through the centre.

    Attributes:
        rotation: object to world at time 0, rows of a 3x3 matrix.
        position: centre at time 0, metres.
        travel: direction times amplitude of the swing, metres.
        swing: starts at 0 with amplitude 1.
        axis: unit vector in the world.
        spin: rad/s about it, constant.
        roll: radians about it for a swing of 1 (a ball that rolls).
    """

    rotation: tuple[Vec3, Vec3, Vec3]
    position: Vec3
    travel: Vec3 = (0.0, 0.0, 0.0)
    swing: Wave = Wave(0.0)
    axis: Vec3 = (0.0, 0.0, 1.0)
    spin: float = 0.0
    roll: float = 0.0

    @property
    def moving(self) -> bool:
        """Whether the object moves or turns at all."""
        swings = self.swing.amplitude * self.swing.frequency != 0
        return self.spin != 0 or (swings and (any(self.travel) or self.roll != 0))

    def poses(self, times: Tensor) -> Tensor:
        """Object-to-world transforms [T, 4, 4] at `times` [T] seconds."""
        swing = self.swing.at(times)
        angle = self.spin * times + self.roll * swing
        turn = roma.rotvec_to_rotmat(angle[:, None] * _vector(self.axis))
        pose = torch.eye(4, dtype=torch.float64).repeat(len(times), 1, 1)
        pose[:, :3, :3] = turn @ torch.tensor(self.rotation, dtype=torch.float64)
        pose[:, :3, 3] = _vector(self.position) + swing[:, None] * _vector(self.travel)
        return pose

    def velocities(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity of the centre [T, 3] in m/s and angular velocity [T, 3] in rad/s, in the world, at `times` [T]."""
        rate = self.swing.rate(times)[:, None]
        return rate * _vector(self.travel), (self.spin + self.roll * rate) * _vector(self.axis)


def _vector(values: Vec3) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class CameraPath:
    """A camera that circles a target at a swinging azimuth, distance and height, and looks at a point that drifts.

    Attributes:
        target: point on the floor plan that it circles, metres.
        azimuth, roll: radians.
        distance, height: metres.
        look: the point looked at, metres in the world.
    """

    target: tuple[float, float]
    azimuth: Wave
    distance: Wave
    height: Wave
    roll: Wave
    look: tuple[Wave, Wave, Wave]

    def poses(self, times: Tensor) -> Tensor:
        """Camera-to-world transforms [T, 4, 4] (x right, y down, z forward) at `times` [T] seconds."""
        azimuth, distance = self.azimuth.at(times), self.distance.at(times)
        x, y = self.target[0] + distance * torch.cos(azimuth), self.target[1] + distance * torch.sin(azimuth)
        position = torch.stack([x, y, self.height.at(times)], dim=-1)
        forward = torch.stack([wave.at(times) for wave in self.look], dim=-1) - position
        forward = forward / forward.norm(dim=-1, keepdim=True)
        right = torch.cross(forward, _vector((0.0, 0.0, 1.0)).expand_as(forward), dim=-1)
        right = right / right.norm(dim=-1, keepdim=True)
        level = torch.stack([right, torch.cross(forward, right, dim=-1), forward], dim=-1)
        roll = roma.rotvec_to_rotmat(self.roll.at(times)[:, None] * _vector((0.0, 0.0, 1.0)))
        pose = torch.eye(4, dtype=torch.float64).repeat(len(times), 1, 1)
        pose[:, :3, :3] = level @ roll
        pose[:, :3, 3] = position
        return pose


@dataclass(frozen=True)
class SceneObject:
    """A shape (see `shapes.SHAPES` for the meaning of `size`) with a texture and a motion."""

    shape: str
    size: Vec3
    texture: Texture
    motion: Motion


@dataclass(frozen=True)
class Scene:
    """A world over time.

    Attributes:
        seed, config: what it was made from.
        objects: the room's planes first, then the objects.
        camera: the camera's path.
        intrinsics: rows of the 3x3 camera matrix, pixels.
        light: position of the lamp, metres.
    """

    seed: int
    config: SceneConfig
    objects: tuple[SceneObject, ...]
    camera: CameraPath
    intrinsics: tuple[Vec3, Vec3, Vec3]
    light: Vec3

    @property
    def timestamps(self) -> Tensor:
        """Times of the frames, [V] seconds from 0."""
        return torch.arange(self.config.num_views, dtype=torch.float64) * self.config.frame_interval

    def object_poses(self, times: Tensor) -> Tensor:
        """Object-to-world transforms, [N, T, 4, 4]."""
        return torch.stack([item.motion.poses(times) for item in self.objects])

    def object_velocities(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity of the centres, m/s, and angular velocity, rad/s, both [N, T, 3] in the world."""
        pairs = [item.motion.velocities(times) for item in self.objects]
        return torch.stack([linear for linear, _ in pairs]), torch.stack([angular for _, angular in pairs])
