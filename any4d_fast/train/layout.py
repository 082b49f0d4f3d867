"""Drawing a scene from a seed: a room, a camera in it that looks at the middle, objects in front of the camera."""

from __future__ import annotations

import math
import random

import roma
import torch
from torch import Tensor

from ..geometry import invert_pose
from .scene import CameraPath, Motion, Scene, SceneConfig, SceneObject, Wave
from .textures import Vec3, random_texture

_WALL_MARGIN = 0.45  # metres between the camera's path and the walls
_LAMP_SPACE = 0.4  # metres under the ceiling that objects leave to the lamp
_ATTEMPTS = 80  # per object; objects shrink on the way, so that crowded rooms fill up too
_MAX_APPARENT = 0.28  # an object's radius over its distance: no object fills the view
_OPEN_FLOOR = 30.0  # half extent in metres of the floor of a scene without walls


def make_scene(seed: int, config: SceneConfig | None = None) -> Scene:
    """The scene of a seed: the same on every machine, device and dtype.

    Objects rest on the floor, slide or roll on it, or tumble in the air; they start inside the first view and keep
    clear of each other, of the walls and of the camera (very crowded rooms may let them touch each other).

    Args:
        seed: any int; scenes of different seeds are independent.
        config: what to draw from; the defaults make a furnished room seen by a walking camera.

    Raises:
        TypeError: a seed that is not an int.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, got {type(seed).__name__} {seed!r}")
    config = config or SceneConfig()
    # A string seeds through SHA-512: an int would give seeds s and -s the same scene.
    rng = random.Random(f"any4d_fast scene {seed}")
    room = (rng.uniform(*config.room_size), rng.uniform(*config.room_size), rng.uniform(*config.room_height))
    field = math.radians(rng.uniform(*config.fov_degrees))
    intrinsics = _draw_intrinsics(rng, config, field)
    lamp_height = room[2] - 0.2 if config.enclosed else room[2] + 2
    light = (rng.uniform(-0.25, 0.25) * room[0], rng.uniform(-0.25, 0.25) * room[1], lamp_height)
    times = torch.arange(config.num_views, dtype=torch.float64) * config.frame_interval
    camera = _draw_camera(rng, config, room, times)
    placer = _Placer(rng, config, room, camera.poses(times), times, field)
    count, moving = rng.randint(*config.num_objects), rng.randint(*config.num_moving)
    objects = [placer.place(moving=number < moving) for number in range(count)]
    return Scene(seed, config, (*_draw_room(rng, config, room), *objects), camera, intrinsics, light)


def _draw_intrinsics(rng: random.Random, config: SceneConfig, field: float) -> tuple[Vec3, Vec3, Vec3]:
    """Square pixels; the principal point within 2 % of the image's centre."""
    focal = config.width / 2 / math.tan(field / 2)
    cx = (config.width - 1) / 2 + rng.uniform(-0.02, 0.02) * config.width
    cy = (config.height - 1) / 2 + rng.uniform(-0.02, 0.02) * config.height
    return (focal, 0.0, cx), (0.0, focal, cy), (0.0, 0.0, 1.0)


def _draw_room(rng: random.Random, config: SceneConfig, room: Vec3) -> list[SceneObject]:
    """The floor and, in enclosed scenes, ceiling and walls, as planes whose +z points into the room."""
    length, width, height = room[0] / 2, room[1] / 2, room[2]

    def plane(size: tuple[float, float], columns: tuple[Vec3, Vec3, Vec3], position: Vec3, part: str) -> SceneObject:
        kinds = {"floor": ("tiles", "checker", "tiles", "stripes"), "ceiling": ("noise",)}
        period = {"floor": (0.5, 1.1), "ceiling": (0.5, 1.0)}
        texture = random_texture(
            rng,
            kinds=kinds.get(part, ("stripes", "tiles", "noise", "sines", "checker")),
            period=period.get(part, (0.4, 1.2)),
            saturation=(0.05, 0.2) if part == "ceiling" else (0.1, 0.45),
            flat=True,
        )
        rows = tuple(zip(*columns, strict=True))
        return SceneObject("plane", (*size, 0.0), texture, Motion((rows[0], rows[1], rows[2]), position))

    x, y, z = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)
    minus_x, minus_y, minus_z = (-1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, -1.0)
    if not config.enclosed:
        return [plane((_OPEN_FLOOR, _OPEN_FLOOR), (x, y, z), (0.0, 0.0, 0.0), "floor")]
    return [
        plane((length, width), (x, y, z), (0.0, 0.0, 0.0), "floor"),
        plane((length, width), (x, minus_y, minus_z), (0.0, 0.0, height), "ceiling"),
        plane((width, height / 2), (y, z, x), (-length, 0.0, height / 2), "wall"),
        plane((width, height / 2), (minus_y, z, minus_x), (length, 0.0, height / 2), "wall"),
        plane((length, height / 2), (minus_x, z, y), (0.0, -width, height / 2), "wall"),
        plane((length, height / 2), (x, z, minus_y), (0.0, width, height / 2), "wall"),
    ]


def _draw_camera(rng: random.Random, config: SceneConfig, room: Vec3, times: Tensor) -> CameraPath:
    """A camera near the walls that looks at the middle; its swings shrink until the path stays inside the room."""
    target = (rng.uniform(-0.08, 0.08) * room[0], rng.uniform(-0.08, 0.08) * room[1])
    azimuth = rng.uniform(-math.pi, math.pi)
    reach = min(
        (room[axis] / 2 - _WALL_MARGIN - math.copysign(1, part) * target[axis]) / max(abs(part), 1e-6)
        for axis, part in enumerate((math.cos(azimuth), math.sin(azimuth)))
    )
    distance = min(rng.uniform(0.8, 0.97) * reach, 6.0)
    height, look_height = rng.uniform(1.1, 1.65), rng.uniform(0.5, 0.85)
    # The arc is what moves the camera most: its peak speed is the one that was asked for.
    arc, speed = rng.uniform(0.25, 0.45), rng.uniform(*config.camera_speed)
    frequency = speed / (2 * math.pi * arc * distance)

    def wave(start: float, amplitude: float, pace: float = 1.0) -> Wave:
        return Wave(start, amplitude * rng.choice((-1, 1)), pace * frequency, rng.uniform(-0.6, 0.6))

    for shrink in range(12):
        factor = 0.7**shrink
        path = CameraPath(
            target=target,
            azimuth=wave(azimuth, factor * arc),
            distance=wave(distance, factor * rng.uniform(0.05, 0.2), 1.5),
            height=wave(height, factor * rng.uniform(0.03, 0.1), 2.0),
            roll=wave(rng.uniform(-0.03, 0.03), factor * 0.02, 2.5),
            look=(wave(target[0], 0.15, 1.3), wave(target[1], 0.15, 1.7), wave(look_height, 0.1, 1.9)),
        )
        limit = torch.tensor([room[0] / 2, room[1] / 2]) - 0.6 * _WALL_MARGIN
        if (path.poses(times)[:, :2, 3].abs() <= limit).all():
            break
    return path


def _random_rotation(rng: random.Random) -> Tensor:
    quaternion = torch.tensor([rng.gauss(0, 1) for _ in range(4)], dtype=torch.float64)
    return roma.unitquat_to_rotmat(quaternion / quaternion.norm())


def _rows(rotation: Tensor) -> tuple[Vec3, Vec3, Vec3]:
    a, b, c = rotation.tolist()
    return (a[0], a[1], a[2]), (b[0], b[1], b[2]), (c[0], c[1], c[2])


class _Placer:
    """Puts objects into the first view, one after the other."""

    def __init__(
        self,
        rng: random.Random,
        config: SceneConfig,
        room: Vec3,
        cameras: Tensor,  # [T, 4, 4]
        times: Tensor,  # [T]
        field: float,
    ) -> None:
        self.rng, self.config, self.room, self.times, self.field = rng, config, room, times, field
        self.cameras = cameras
        self.world_to_first = invert_pose(cameras[:1])[0]
        self.placed: list[tuple[Tensor, float]] = []  # centres [T, 3] and bounding radii

    def place(self, *, moving: bool) -> SceneObject:
        """The first candidate that is clear of everything, else the clearest one that is clear of the camera."""
        best: tuple[float, SceneObject, Tensor, float] | None = None
        for attempt in range(_ATTEMPTS):
            scale = max(0.25, 0.97**attempt)
            item, on_floor = self._candidate(moving, scale)
            centres, radius = item.motion.poses(self.times)[:, :3, 3], math.hypot(*item.size)
            if item.shape == "sphere":
                radius = item.size[0]
            elif item.shape == "cylinder":
                radius = math.hypot(item.size[0], item.size[2])
            from_camera = float((centres - self.cameras[:, :3, 3]).norm(dim=-1).min())
            if from_camera - radius < 0.35:
                continue
            score = min(self._clearance(centres, radius, on_floor), _MAX_APPARENT * from_camera - radius)
            if best is None or score > best[0]:
                best = (score, item, centres, radius)
            if score > 0:
                break
        if best is None:
            raise RuntimeError(
                f"no place for an object that stays clear of the camera in {_ATTEMPTS} attempts; "
                "lower SceneConfig.object_speed or camera_speed, or raise room_size"
            )
        self.placed.append((best[2], best[3]))
        return best[1]

    def _clearance(self, centres: Tensor, radius: float, on_floor: bool) -> float:
        """Smallest distance in metres to what the object must not touch or hide; negative when it does."""
        limits = torch.tensor([self.room[0] / 2, self.room[1] / 2], dtype=torch.float64)
        gaps = [float((limits - centres[:, :2].abs()).min()) - radius - 0.03]
        gaps.append(self.room[2] - _LAMP_SPACE - float(centres[:, 2].max()) - radius)
        if not on_floor:
            gaps.append(float(centres[:, 2].min()) - radius - 0.05)
        first = self.world_to_first[:3, :3] @ centres[0] + self.world_to_first[:3, 3]
        tangent = math.tan(self.field / 2)
        for axis, limit in ((0, tangent), (1, tangent * self.config.height / self.config.width)):
            gaps.append(float(0.85 * limit * first[2] - first[axis].abs()))
        eye = self.cameras[0, :3, 3]
        mine = centres[0] - eye
        for others, other_radius in self.placed:
            gaps.append(float((centres - others).norm(dim=-1).min()) - radius - other_radius - 0.03)
            theirs = others[0] - eye
            near, far = (mine, theirs) if mine.norm() < theirs.norm() else (theirs, mine)
            # How far the farther centre is from being hidden behind the nearer object, in the first view.
            hidden = (radius if near is mine else other_radius) / float(near.norm())
            cosine = float(torch.dot(near, far) / (near.norm() * far.norm()))
            angle = math.acos(min(1.0, max(-1.0, cosine)))
            gaps.append((angle - math.asin(min(1.0, hidden))) * float(far.norm()))
        return min(gaps)

    def _candidate(self, moving: bool, scale: float) -> tuple[SceneObject, bool]:
        """A random object and whether it touches the floor."""
        rng = self.rng
        shape = rng.choice(("box", "box", "sphere", "sphere", "cylinder", "cylinder", "plane"))
        size = self._size(shape, scale)
        style = rng.choice(("slide", "roll", "float") if moving else ("rest", "rest", "lie"))
        heading = rng.uniform(0, 2 * math.pi)
        direction = torch.tensor([math.cos(heading), math.sin(heading), 0.0], dtype=torch.float64)
        axis, spin, roll = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64), 0.0, 0.0
        across = torch.linalg.cross(axis, direction)
        upright = torch.stack([direction, across, axis], dim=-1)
        travel = rng.uniform(0.3, 0.8) * scale
        rotation, rest = upright, size[2]
        if style == "float":
            rotation, spin = _random_rotation(rng), rng.choice((-1, 1)) * rng.uniform(0.4, 1.4)
            axis = _random_rotation(rng)[:, 0]
            direction = direction + 0.5 * rng.uniform(-1, 1) * torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
        elif shape == "plane":
            rotation, rest = torch.stack([direction, axis, -across], dim=-1), size[1]  # stands on its lower edge
        elif style in ("roll", "lie") and shape == "cylinder":
            rotation, rest = torch.stack([direction, -axis, across], dim=-1), size[0]
        if style == "slide" or (style == "roll" and shape in ("box", "plane")):
            spin = rng.choice((-1, 1)) * rng.uniform(0.2, 0.9)
        elif style == "roll":
            axis, roll = across, travel / size[0]
        position = self._position(rest, floating=style == "float")
        speed = rng.uniform(*self.config.object_speed)
        swing = Wave(0.0, 1.0, speed / (2 * math.pi * travel), rng.uniform(-0.5, 0.5)) if moving else Wave(0.0)
        texture = random_texture(
            rng, kinds=("checker", "stripes", "sines", "noise"), period=(0.12, 0.35), saturation=(0.45, 0.9), flat=False
        )
        dx, dy, dz = (travel * direction / direction.norm()).tolist() if moving else (0.0, 0.0, 0.0)
        ax, ay, az = axis.tolist()
        motion = Motion(_rows(rotation), position, (dx, dy, dz), swing, (ax, ay, az), spin, roll)
        return SceneObject(shape, size, texture, motion), style != "float"

    def _size(self, shape: str, scale: float) -> Vec3:
        uniform = self.rng.uniform
        if shape == "sphere":
            radius = scale * uniform(0.18, 0.42)
            return radius, radius, radius
        if shape == "cylinder":
            radius = scale * uniform(0.12, 0.3)
            return radius, radius, scale * uniform(0.15, 0.5)
        if shape == "plane":
            return scale * uniform(0.25, 0.5), scale * uniform(0.3, 0.6), 0.0
        return scale * uniform(0.15, 0.4), scale * uniform(0.15, 0.4), scale * uniform(0.15, 0.5)

    def _position(self, rest: float, *, floating: bool) -> Vec3:
        """A point in front of the first camera, on the floor or above it."""
        eye, forward = self.cameras[0, :3, 3], self.cameras[0, :3, 2]
        bearing = math.atan2(float(forward[1]), float(forward[0])) + self.rng.uniform(-0.42, 0.42) * self.field
        reach = min(max(self.room[0], self.room[1]), 8.0)
        distance = self.rng.uniform(1.3, reach)
        height = self.rng.uniform(0.5, self.room[2] - 0.7) if floating else rest
        return (
            float(eye[0]) + distance * math.cos(bearing),
            float(eye[1]) + distance * math.sin(bearing),
            height,
        )
