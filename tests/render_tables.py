"""Tables of the clip renderer for scenes that are described in other ways: of `make_scene`, or a few shapes by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from any4d_fast.geometry import invert_pose
from any4d_fast.reference.render_clips import CLIP_COLUMNS, PRIMITIVE_COLUMNS, ROOM_SLOTS, ClipTables
from any4d_fast.train.scene import Scene
from any4d_fast.train.shapes import SHAPES
from any4d_fast.train.stream_config import StreamConfig
from any4d_fast.train.stream_draw import draw_scenes
from any4d_fast.train.stream_random import Draws
from any4d_fast.train.stream_tables import make_tables, pack


def stream_tables(
    count: int, height: int, width: int, config: StreamConfig, *, first: int = 0, dtype: torch.dtype = torch.float32
) -> ClipTables:
    """Clips first, first + 1, ... of a stream of these tests' own, on the CPU."""
    scenes = draw_scenes(Draws(7, first, count), config, height, width)
    return make_tables(pack(scenes), torch.device("cpu"), dtype)[0]


def moved(tables: ClipTables, device: str = "cpu", dtype: torch.dtype = torch.float32) -> ClipTables:
    return ClipTables(*(t.to(device, dtype) for t in tables))


def scene_tables(scenes: Sequence[Scene]) -> ClipTables:
    """Tables of scenes with one number of views and of objects, float64 on the CPU; apart from `make_tables`."""
    tables = [_one(scene) for scene in scenes]
    return ClipTables(*(torch.stack(parts) for parts in zip(*tables, strict=True)))


def _one(scene: Scene) -> ClipTables:
    times, planes = scene.timestamps, 6 if scene.config.enclosed else 1
    views, first = len(times), ROOM_SLOTS - planes
    slots = first + len(scene.objects)
    cameras, objects = scene.camera.poses(times), scene.object_poses(times)  # [V, 4, 4], [K, V, 4, 4]
    light = torch.tensor(scene.light, dtype=torch.float64)
    (fx, _, cx), (_, fy, cy), _ = scene.intrinsics
    clip = {
        "focal": (fx, fy), "centre": (cx, cy), "blur": (1.0,), "ambient": (0.5,), "power": (9.0,), "softness": (6.0,),
        "gain": (1.0, 1.0, 1.0), "gamma": (2.2,), "noise": (0.0,), "seed": (0.0,), "first": (float(first),),
        "end": (float(slots),), "horizon": (0.75, 0.8, 0.85), "zenith": (0.2, 0.4, 0.75),
    }  # fmt: skip
    primitives = torch.zeros(views, slots, sum(PRIMITIVE_COLUMNS.values()), dtype=torch.float64)
    textures, flows = torch.zeros(slots, 17, dtype=torch.float64), torch.zeros(views, slots, 12, dtype=torch.float64)
    from_world, eye = invert_pose(objects), invert_pose(cameras)
    for number, item in enumerate(scene.objects):
        slot, moving = first + number, item.motion.moving
        textures[slot] = torch.tensor(item.texture.row(), dtype=torch.float64)
        radius = math.hypot(*item.size) if number >= planes else math.inf
        for view in range(views):
            centre = objects[number, view, :3, 3]
            tangents = [float((centre - p).square().sum()) - radius**2 for p in (cameras[view, :3, 3], light)]
            parts = (
                (from_world[number, view] @ cameras[view])[:3].flatten(),
                (from_world[number, view, :3, :3] @ (light - centre)), from_world[number, view, :3, 2],
                torch.tensor([*item.size, SHAPES.index(item.shape), moving], dtype=torch.float64),
                _apply(eye[view], centre), torch.tensor([t if t > 0 else -math.inf for t in tangents]),
            )  # fmt: skip
            primitives[view, slot] = torch.cat(parts)
            if moving and view > 0:
                displacement = objects[number, view] @ invert_pose(objects[number, :1])[0]
                flow = eye[0] @ displacement @ cameras[0] - torch.eye(4, dtype=torch.float64)
                flows[view, slot] = flow[:3].flatten()
    lamps = torch.stack([_apply(pose, light) for pose in eye])
    frames = torch.cat([cameras[:, 2, :3], lamps], 1)
    row = torch.tensor([v for name in CLIP_COLUMNS for v in clip[name]], dtype=torch.float64)
    return ClipTables(row, frames, primitives, textures, flows)


def _apply(pose: Tensor, point: Tensor) -> Tensor:
    return pose[:3, :3] @ point + pose[:3, 3]
