"""Per-object, per-view quantities that pixels look up while a scene is rendered."""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import invert_pose
from .scene import Scene
from .shapes import SHAPES
from .textures import texture_table


class SceneTables:
    """Everything per object and view that pixels look up, in the device's dtype, from float64."""

    def __init__(self, scene: Scene, device: torch.device, dtype: torch.dtype) -> None:
        def ready(x: Tensor) -> Tensor:
            return x.to(device=device, dtype=dtype)

        times = scene.timestamps
        cameras = scene.camera.poses(times)  # [V, 4, 4]
        objects = scene.object_poses(times)  # [N, V, 4, 4]
        moving = torch.tensor([item.motion.moving for item in scene.objects])
        from_world = invert_pose(objects)
        light = torch.eye(4, dtype=torch.float64)
        light[:3, 3] = torch.tensor(scene.light, dtype=torch.float64)
        view_from_world = invert_pose(cameras)

        self.shapes = [(item.shape, item.size) for item in scene.objects]
        self.textures = texture_table([item.texture for item in scene.objects], device=device, dtype=dtype)
        self.kinds = torch.tensor([SHAPES.index(item.shape) for item in scene.objects], device=device)
        self.sizes = ready(torch.tensor([item.size for item in scene.objects], dtype=torch.float64).T.contiguous())
        self.moving = moving.to(device)
        self.cameras, self.times = ready(cameras), ready(times)
        self.intrinsics = ready(torch.tensor(scene.intrinsics, dtype=torch.float64))
        # Per view, [3, 4, V, 1].
        self.first_from_view = ready(_component_first(view_from_world[:1] @ cameras))
        self.light_from_view = ready(_component_first(invert_pose(light) @ cameras))
        # Per object and view, [N, 3, 4, V, 1] where rays are cast, and [C, N * V] where pixels look up.
        self.object_from_view = ready(_component_first(from_world @ cameras))
        self.object_from_light = ready(_component_first(from_world @ light))
        self.rows_object_from_view = _rows(self.object_from_view)
        self.rows_light = _rows(self.object_from_light[:, :, 3:])
        self.rows_up = _rows(ready(_component_first(from_world)[:, :, 2:3]))

        displacement = objects @ invert_pose(objects[:, :1])  # world at time 0 -> world at time i
        displacement[~moving] = torch.eye(4, dtype=torch.float64)
        displacement[:, 0] = torch.eye(4, dtype=torch.float64)
        track = view_from_world @ displacement @ cameras[:1]
        self.rows_track = _rows(ready(_component_first(track)))
        flow = view_from_world[:1] @ displacement @ cameras[:1] - torch.eye(4, dtype=torch.float64)
        # An object at rest has a flow of exactly zero, whatever the products above round to.
        still = (displacement == torch.eye(4, dtype=torch.float64)).all(-1).all(-1)
        flow[still] = 0
        self.rows_flow = _rows(ready(_component_first(flow)))

        # A rigid body's velocity at x is v + w x (x - centre). Its part along the ray is that of the body's velocity
        # at the camera, because w x x is orthogonal to a ray x from the camera: one vector an object, not a field.
        linear, angular = scene.object_velocities(times)
        at_camera = linear + torch.linalg.cross(angular, cameras[:, :3, 3] - objects[..., :3, 3])
        at_camera = (cameras[:, :3, :3].mT @ at_camera[..., None])[..., 0]
        self.rows_velocity = _rows(ready(at_camera.movedim(-1, 1)[:, :, None, :, None]))


def _component_first(pose: Tensor) -> Tensor:
    """[..., V, 4, 4] -> [..., 3, 4, V, 1]."""
    return pose[..., :3, :].movedim(-3, -1)[..., None]


def _rows(maps: Tensor) -> Tensor:
    """[N, a, b, V, 1] -> [a * b, N * V]: one column an object and view."""
    return maps.movedim(0, 2).flatten(0, 1).flatten(1).contiguous()


def look_up(rows: Tensor, ids: Tensor, views: slice, num_views: int) -> Tensor:
    """Columns of each pixel's object and view; rows [C, N * V], ids [V, P] >= 0 -> [C, V, P]."""
    view = torch.arange(views.start, views.stop, device=ids.device)[:, None]
    return rows.index_select(1, (ids * num_views + view).flatten()).unflatten(1, ids.shape)
