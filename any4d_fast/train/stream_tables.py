"""Scenes of the stream as the renderer's tables: one copy to the device, then float64 there."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import roma
import torch
from torch import Tensor

from ..reference.render_clips import CLIP_COLUMNS, PRIMITIVE_COLUMNS, ROOM_SLOTS, ClipTables
from .stream_config import MAX_MOVING
from .stream_draw import Scenes
from .stream_objects import PLANE, SLOTS, bounding_radius
from .stream_random import Array

_FLOOR_HALF = 30.0  # half extent in metres of the floor of a scene without walls
_BALL_MARGIN = 1.02  # bounding balls are this much larger, against rounding far from a lamp
_X, _Y, _Z = np.eye(3)
# Plane to world, +z into the room: ceiling, walls -x +x -y +y, floor.
_ROOM_ROTATIONS = np.stack([
    np.stack(axes, -1)
    for axes in ((_X, -_Y, -_Z), (_Y, _Z, _X), (-_Y, _Z, -_X), (-_X, _Z, _Y), (_X, _Z, -_Y), (_X, _Y, _Z))
])  # fmt: skip
_ROOM_CENTRES = np.array([(0, 0, 1), (-0.5, 0, 0.5), (0.5, 0, 0.5), (0, -0.5, 0.5), (0, 0.5, 0.5), (0, 0, 0)])


class Packed(NamedTuple):
    """What the device needs of scenes: one float64 buffer on the host, and the shapes of its parts in order."""

    buffer: Tensor
    shapes: dict[str, tuple[int, ...]]


def pack(scenes: Scenes) -> Packed:
    """Gather B scenes."""
    cameras, objects = scenes.cameras, scenes.objects
    last = np.where(objects.kind >= 0, np.arange(SLOTS) + 1, 0).max(1)
    clip = {
        "focal": np.stack([cameras.focal, cameras.focal], -1),
        "centre": cameras.centre,
        "first": np.where(scenes.enclosed, 0, ROOM_SLOTS - 1)[:, None],
        "end": (ROOM_SLOTS + last)[:, None],
        **scenes.light,
    }
    radius = _BALL_MARGIN * bounding_radius(objects.kind, objects.size)
    objects_table = (objects.size, objects.kind[..., None], objects.moving[..., None], radius[..., None])
    parts: dict[str, Array] = {
        "clips": np.concatenate([clip[name] for name in CLIP_COLUMNS], -1),
        "textures": scenes.textures,
        "level": cameras.level,
        "eye": cameras.position,
        "lamp": scenes.lamp,
        "centres": _ROOM_CENTRES * scenes.room[:, None],
        "half": np.where(scenes.enclosed, np.inf, _FLOOR_HALF),
        "axes": np.broadcast_to(_ROOM_ROTATIONS, (len(scenes.room), *_ROOM_ROTATIONS.shape)),
        "objects": np.concatenate(objects_table, -1),
        "rotation": objects.rotation,
        "position": objects.position,
        "vectors": np.concatenate([cameras.shake[:, None], objects.turn], 1),
        "shift": objects.shift,
    }
    buffer = np.concatenate([np.asarray(part, np.float64).reshape(-1) for part in parts.values()])
    return Packed(torch.from_numpy(buffer), {name: part.shape for name, part in parts.items()})


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for many small matrices [..., 3, 3] and [..., 3, K]; no library call, and float64 all the way."""
    return (a[..., None] * b[..., None, :, :]).sum(-2)


def make_tables(packed: Packed, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[ClipTables, Tensor]:
    """The renderer's tables, and camera poses [B, V, 4, 4] in view 0's frame, on `device`; waits for nothing there."""
    buffer, shapes = packed
    if device.type == "cuda":
        # From page-locked memory nothing waits for the copy; torch gives that memory out again only after it.
        buffer = buffer.pin_memory()
    moved = buffer.to(device, non_blocking=True).split([int(np.prod(shape)) for shape in shapes.values()])
    part = {name: flat.view(shape) for flat, (name, shape) in zip(moved, shapes.items(), strict=True)}
    turns = roma.rotvec_to_rotmat(part["vectors"])
    part["camera"], part["turned"] = _product(part["level"], turns[:, 0]), turns[:, 1:]
    lamp = (part["lamp"][:, None] - part["eye"])[..., None]
    views = torch.cat([part["camera"][..., 2, :], _product(part["camera"].mT, lamp)[..., 0]], -1)
    tables = (part["clips"], views, _primitives(part), part["textures"], _flows(part))
    return ClipTables(*(table.to(dtype) for table in tables)), _poses(part).to(dtype)


def _primitives(part: dict[str, Tensor]) -> Tensor:
    """[B, V, N, PRIMITIVE_WIDTH]."""
    camera, eye, objects = part["camera"], part["eye"], part["objects"]
    batch, views = eye.shape[:2]
    room = part["axes"].mT[:, None].expand(-1, views, -1, -1, -1)
    solid = _product(part["turned"], part["rotation"][:, :, None]).mT.transpose(1, 2)
    rotation = torch.cat([room, solid], 2)  # world to shape, [B, V, N, 3, 3]
    centres = part["centres"][:, None].expand(-1, views, -1, -1)
    position = torch.cat([centres, (part["position"][:, :, None] + part["shift"]).transpose(1, 2)], 2)
    offsets = torch.stack([eye[:, :, None] - position, part["lamp"][:, None, None] - position], -1)
    maps = _product(rotation, torch.cat([camera[:, :, None].expand_as(rotation), offsets], -1))  # [..., 3, 5]

    def per_slot(room: Any, solid: Tensor) -> Tensor:
        """[B, V, N, channels] from the room's numbers and the objects'."""
        wide = solid.new_empty(batch, ROOM_SLOTS + SLOTS, solid.shape[-1])
        wide[:, :ROOM_SLOTS] = room
        wide[:, ROOM_SLOTS:] = solid
        return wide[:, None].expand(-1, views, -1, -1)

    radius = per_slot(torch.inf, objects[..., 5:])
    tangents = offsets.square().sum(-2) - radius.square()  # of camera and lamp
    columns = {
        "from_view": maps[..., :4].flatten(-2),
        "light": maps[..., 4],
        "up": rotation[..., 2],
        "size": per_slot(part["half"][:, None, None], objects[..., :3]),
        "kind": per_slot(PLANE, objects[..., 3:4]),
        "moving": per_slot(0, objects[..., 4:5]),
        "ball": -_product(camera.mT[:, :, None], offsets[..., :1])[..., 0],
        "eye_tangent": tangents[..., :1].masked_fill(tangents[..., :1] <= 0, -torch.inf),
        "lamp_tangent": tangents[..., 1:].masked_fill(tangents[..., 1:] <= 0, -torch.inf),
    }
    return torch.cat([columns[name] for name in PRIMITIVE_COLUMNS], -1)


def _flows(part: dict[str, Tensor]) -> Tensor:
    """[B, V, N, 12]; a mover's point x goes to turn (x - centre) + centre + shift in the world."""
    first, eye = part["camera"][:, 0, None, None], part["eye"][:, 0, None]
    change = part["turned"][:, :MAX_MOVING] - torch.eye(3, dtype=first.dtype, device=first.device)
    lever = (eye - part["position"][:, :MAX_MOVING])[:, :, None, :, None]
    shift = part["shift"][:, :MAX_MOVING, :, :, None]
    sources = torch.cat([first.expand_as(change), lever.expand_as(shift)], -1)
    motion = _product(change, sources)
    motion[..., 3:] += shift
    motion = _product(first.mT, motion)  # [B, MAX_MOVING, V, 3, 4]
    # Exactly 0 at rest, whatever the products round to.
    motion = motion * part["objects"][:, :MAX_MOVING, 4, None, None, None]
    batch, _, views = motion.shape[:3]
    out = motion.new_zeros(batch, views, ROOM_SLOTS + SLOTS, 12)
    out[:, :, ROOM_SLOTS : ROOM_SLOTS + MAX_MOVING] = motion.flatten(-2).transpose(1, 2)
    out[:, 0] = 0
    return out


def _poses(part: dict[str, Tensor]) -> Tensor:
    """[B, V, 4, 4]; exactly the identity for view 0."""
    first = part["camera"][:, :1].mT
    moved = (part["eye"] - part["eye"][:, :1])[..., None]
    top = _product(first, torch.cat([part["camera"], moved], -1))
    pose = torch.eye(4, dtype=top.dtype, device=top.device).repeat(*top.shape[:2], 1, 1)
    pose[:, 1:, :3] = top[:, 1:]
    return pose
