"""A synthetic 4D world with exact ground truth: `make_clip(seed)` is a video with everything known about it.

Textured rooms with rigidly moving objects (`layout.make_scene`), ray-cast in torch on any device. Frames:

- world: the room, z up, metres; not any view's camera. Camera poses are camera-to-world, OpenCV axes.
- `pts3d` and `scene_flow` are in view 0's camera frame, the one that Any4D predicts in.

A seed and a config give the same scene everywhere; pixels may differ in rounding between devices and dtypes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..geometry import depth_z_to_along_ray, rays_from_intrinsics
from .layout import make_scene
from .scene import Scene, SceneConfig
from .shapes import apply_affine, cast, normals
from .tables import SceneTables, look_up
from .textures import texture_colours

__all__ = ["Scene", "SceneConfig", "SyntheticClip", "clips", "make_clip", "make_scene", "render", "to_views"]

# What `to_views` can put into a view besides its image.
VIEW_KEYS = (
    "intrinsics",
    "ray_directions",
    "depth_z",
    "camera_poses",
    "is_metric_scale",
    "doppler",
    "timestamps",
)
# A surface less than this far, in metres, in front of a point does not hide it: rounding in float32 stays below.
OCCLUSION_TOLERANCE = 1e-3
# Rays cast at once, which bounds memory whatever the clip's size: on a CPU few enough for the caches, elsewhere enough
# to fill the device.
_MAX_RAYS_CPU, _MAX_RAYS = 1 << 16, 1 << 20
_AMBIENT, _DIFFUSE = 0.5, 1.0
_SKY = ((0.75, 0.8, 0.85), (0.2, 0.4, 0.75))  # linear RGB at the horizon and above


@dataclass
class SyntheticClip:
    """A rendered clip of V views; pixels are [V, H, W].

    Attributes:
        images: [V, H, W, 3] sRGB, 0 to 1.
        depth_z: [V, H, W, 1] metres along the optical axis; 0 where the ray hits nothing (open scenes).
        intrinsics: [V, 3, 3] pixels, pixel centres at integers.
        camera_poses: [V, 4, 4] camera-to-world.
        timestamps: [V] seconds, from 0.
        pts3d: [V, H, W, 3] metres, view 0's camera frame; 0 where nothing is hit.
        scene_flow: [V, H, W, 3] metres along the axes of view 0's camera: the motion of view 0's points from time 0 to
            time i, so that `pts3d[0] + scene_flow[i]` are tracks. Exactly 0 on static surfaces.
        visibility: [V, H, W] bool, on view 0's pixels: the track's point at time i is inside view i's image and not
            hidden there by a surface more than `OCCLUSION_TOLERANCE` in front of it.
        moving_mask: [V, H, W] bool, on each view's own pixels: the object seen moves or turns during the clip.
        doppler: [V, H, W, 1] m/s, on each view's own pixels: the velocity over ground of the surface point, projected
            on the ray from the camera to it; positive moves away. The camera's own velocity is taken out: static
            surfaces have 0 also for a moving camera. 0 where nothing is hit.
        instance_ids: [V, H, W] int64 number of the object in `Scene.objects`; -1 where nothing is hit.
        seed: of the scene.
    """

    images: Tensor
    depth_z: Tensor
    intrinsics: Tensor
    camera_poses: Tensor
    timestamps: Tensor
    pts3d: Tensor
    scene_flow: Tensor
    visibility: Tensor
    moving_mask: Tensor
    doppler: Tensor
    instance_ids: Tensor
    seed: int

    @property
    def num_views(self) -> int:
        """Number of frames."""
        return self.images.shape[0]

    @property
    def valid_mask(self) -> Tensor:
        """Where a surface is hit, [V, H, W] bool."""
        return self.instance_ids >= 0

    @property
    def ray_directions(self) -> Tensor:
        """Unit rays in each view's camera frame, [V, H, W, 3]."""
        return rays_from_intrinsics(self.intrinsics, *self.images.shape[1:3])

    @property
    def depth_along_ray(self) -> Tensor:
        """Distance from the camera centre, [V, H, W, 1] metres; 0 where nothing is hit."""
        return depth_z_to_along_ray(self.depth_z, self.ray_directions)

    def to(self, device: str | torch.device) -> SyntheticClip:
        """The clip with every tensor on `device`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **moved)


def make_clip(
    seed: int,
    config: SceneConfig | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> SyntheticClip:
    """Scene and rendering of a seed in one call; see `make_scene` and `render`."""
    return render(make_scene(seed, config), device=device, dtype=dtype)


def clips(
    config: SceneConfig | None = None,
    *,
    start: int = 0,
    step: int = 1,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[SyntheticClip]:
    """An endless stream of clips with the seeds start, start + step, ...

    With `start=first + rank, step=world_size` every process of a training run gets its own seeds, and a run resumes
    from the seed after the last clip's.

    Raises:
        ValueError: step is 0: the same clip for ever.
    """
    if step == 0:
        raise ValueError("step: expected a non-zero int, got 0; every clip would be the same")
    return (make_clip(seed, config, device=device, dtype=dtype) for seed in itertools.count(start, step))


def _rays(intrinsics: Tensor, rows: slice, width: int, shift: tuple[float, float]) -> Tensor:
    """Rays on the image plane z = 1 through pixel centres moved by `shift` (du, dv), [3, 1, P] of the given rows."""
    v = torch.arange(rows.start, rows.stop, device=intrinsics.device, dtype=intrinsics.dtype) + shift[1]
    u = torch.arange(width, device=intrinsics.device, dtype=intrinsics.dtype) + shift[0]
    y = ((v - intrinsics[1, 2]) / intrinsics[1, 1])[:, None].expand(-1, width).flatten()
    x = ((u - intrinsics[0, 2]) / intrinsics[0, 0])[None].expand(len(v), -1).flatten()
    return torch.stack([x, y, torch.ones_like(x)])[:, None]


def _tiles(num_views: int, height: int, width: int, max_rays: int) -> Iterator[tuple[slice, slice]]:
    """Views and image rows of pieces of at most `max_rays` pixels (or one row)."""
    rows = min(height, max(1, max_rays // width))
    views = max(1, max_rays // (rows * width)) if rows == height else 1
    for first in range(0, num_views, views):
        for top in range(0, height, rows):
            yield slice(first, min(first + views, num_views)), slice(top, min(top + rows, height))


def _shade(tables: SceneTables, rays: Tensor, t: Tensor, ids: Tensor, views: slice, shadows: bool) -> Tensor:
    """Linear RGB of rays [3, V, P] with hits at t [V, P] on objects ids [V, P] -> [3, V, P]."""
    num_views = len(tables.times)
    hit, number = ids >= 0, ids.clamp(min=0)
    in_view = rays * torch.where(hit, t, 1.0)
    from_view = look_up(tables.rows_object_from_view, number, views, num_views).unflatten(0, (3, 4))
    point = apply_affine(from_view, in_view)
    eye = point - from_view[:, 3]  # from the camera to the point, in the object's frame
    size = tables.sizes.index_select(1, number.flatten()).unflatten(1, number.shape)
    normal = normals(tables.kinds[number], size, point)
    facing = (normal * eye).sum(0)
    normal = torch.where(facing > 0, -normal, normal)

    distance = in_view.square().sum(0).sqrt()
    slope = (facing.abs() / distance).clamp(min=0.15)
    footprint = distance / tables.intrinsics[0, 0] / slope
    albedo = texture_colours(tables.textures, number, point, footprint)

    to_light = look_up(tables.rows_light, number, views, num_views) - point
    range_squared = to_light.square().sum(0)
    lambert = ((normal * to_light).sum(0) / range_squared.sqrt()).clamp(min=0)
    lambert = lambert * 9 / (range_squared + 6)  # falls off with distance without burning out under the lamp
    if shadows:
        from_light = apply_affine(tables.light_from_view[..., views, :], in_view)
        blocked, _ = cast(tables.shapes, tables.object_from_light[..., views, :], from_light)
        lambert = lambert * (blocked >= 1 - OCCLUSION_TOLERANCE / range_squared.sqrt())
    upward = (normal * look_up(tables.rows_up, number, views, num_views)).sum(0)
    light = _AMBIENT * (0.8 + 0.2 * upward) + _DIFFUSE * lambert
    world_z = tables.cameras[views, 2, :3].T[..., None]
    height = (world_z * rays).sum(0) / rays.square().sum(0).sqrt()
    low, high = (torch.tensor(c, device=t.device, dtype=t.dtype)[:, None, None] for c in _SKY)
    sky = torch.lerp(low, high, height.clamp(0, 1))
    return torch.where(hit, albedo * light, sky)


def render(scene: Scene, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> SyntheticClip:
    """Ray-cast a scene.

    Args:
        scene: of `make_scene`.
        device: where to compute, and where the clip lies.
        dtype: torch.float32 or torch.float64, of all floating-point outputs.

    Raises:
        ValueError: another dtype: half precision cannot hold exact ground truth.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: expected torch.float32 or torch.float64, got {dtype}; convert the clip afterwards")
    device, config = torch.device(device), scene.config
    views, height, width = config.num_views, config.height, config.width
    tables = SceneTables(scene, device, dtype)

    def empty(*channels: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(views, height, width, *channels, device=device, dtype=kind)

    clip = SyntheticClip(
        images=empty(3),
        depth_z=empty(1),
        intrinsics=tables.intrinsics.repeat(views, 1, 1),
        camera_poses=tables.cameras,
        timestamps=tables.times,
        pts3d=empty(3),
        scene_flow=empty(3),
        visibility=empty(kind=torch.bool),
        moving_mask=empty(kind=torch.bool),
        doppler=empty(1),
        instance_ids=empty(kind=torch.int64),
        seed=scene.seed,
    )
    tiles = list(_tiles(views, height, width, _MAX_RAYS_CPU if device.type == "cpu" else _MAX_RAYS))
    for tile in tiles:
        _render_geometry(clip, tables, *tile)
        _render_image(clip, tables, *tile, config)
    for tile in tiles:
        _render_tracks(clip, tables, *tile)
    return clip


def _render_geometry(clip: SyntheticClip, tables: SceneTables, views: slice, rows: slice) -> None:
    """Fill depth, points, ids, moving mask and Doppler of a tile."""
    width, count = clip.images.shape[2], views.stop - views.start
    rays = _rays(tables.intrinsics, rows, width, (0.0, 0.0)).expand(-1, count, -1)
    t, ids = cast(tables.shapes, tables.object_from_view[..., views, :], rays)
    hit, number = ids >= 0, ids.clamp(min=0)
    depth = torch.where(hit, t, 0.0)  # rays have z = 1: t is the z-depth
    points = apply_affine(tables.first_from_view[..., views, :], rays * depth)
    velocity = look_up(tables.rows_velocity, number, views, clip.num_views)
    doppler = (velocity * rays).sum(0) / rays.square().sum(0).sqrt()
    shape = (count, rows.stop - rows.start, width)
    clip.depth_z[views, rows] = depth.view(*shape, 1)
    clip.pts3d[views, rows] = torch.where(hit, points, 0.0).movedim(0, -1).reshape(*shape, 3)
    clip.doppler[views, rows] = torch.where(hit, doppler, 0.0).view(*shape, 1)
    clip.instance_ids[views, rows] = ids.view(shape)
    clip.moving_mask[views, rows] = (hit & tables.moving[number]).view(shape)


def _render_image(clip: SyntheticClip, tables: SceneTables, views: slice, rows: slice, config: SceneConfig) -> None:
    """Fill the images of a tile: the mean of a grid of samples a pixel."""
    width, count = clip.images.shape[2], views.stop - views.start
    offsets = [(index + 0.5) / config.supersampling - 0.5 for index in range(config.supersampling)]
    total: Tensor | float = 0.0
    for shift in itertools.product(offsets, offsets):
        rays = _rays(tables.intrinsics, rows, width, shift).expand(-1, count, -1)
        t, ids = cast(tables.shapes, tables.object_from_view[..., views, :], rays)
        total = total + _shade(tables, rays, t, ids, views, config.shadows).clamp(0, 1)
    assert isinstance(total, Tensor)
    colour = (total / len(offsets) ** 2).pow(1 / 2.2)
    clip.images[views, rows] = colour.movedim(0, -1).reshape(count, rows.stop - rows.start, width, 3)


def _render_tracks(clip: SyntheticClip, tables: SceneTables, views: slice, rows: slice) -> None:
    """Fill flow and visibility of view 0's pixels in `rows` at the times of `views`."""
    height, width = clip.images.shape[1:3]
    count = views.stop - views.start
    ids = clip.instance_ids[0, rows].flatten().expand(count, -1)
    hit, number = ids >= 0, ids.clamp(min=0)
    points = clip.pts3d[0, rows].flatten(0, 1).T[:, None].expand(-1, count, -1)
    flow = apply_affine(look_up(tables.rows_flow, number, views, clip.num_views).unflatten(0, (3, 4)), points)
    moved = apply_affine(look_up(tables.rows_track, number, views, clip.num_views).unflatten(0, (3, 4)), points)
    (fx, _, cx), (_, fy, cy), _ = tables.intrinsics.tolist()
    front = moved[2] > 0
    z = torch.where(front, moved[2], 1.0)
    u, v = moved[0] / z * fx + cx, moved[1] / z * fy + cy
    # A pixel reaches half a pixel around its integer centre.
    inside = front & (u >= -0.5) & (u < width - 0.5) & (v >= -0.5) & (v < height - 0.5)
    first, _ = cast(tables.shapes, tables.object_from_view[..., views, :], moved)
    distance = moved.square().sum(0).sqrt().clamp(min=torch.finfo(moved.dtype).tiny)
    visible = hit & inside & (first >= 1 - OCCLUSION_TOLERANCE / distance)
    shape = (count, rows.stop - rows.start, width)
    clip.scene_flow[views, rows] = torch.where(hit, flow, 0.0).movedim(0, -1).reshape(*shape, 3)
    clip.visibility[views, rows] = visible.view(shape)


def to_views(clip: SyntheticClip, with_: Sequence[str] = (), *, uint8: bool = False) -> list[dict[str, Any]]:
    """The clip as input views of `Any4D.infer`, batch size 1.

    Args:
        clip: of `render`.
        with_: what to give besides the image, of `VIEW_KEYS`: intrinsics [1, 3, 3], ray_directions [1, H, W, 3],
            depth_z [1, H, W, 1] (0: unknown), camera_poses [1, 4, 4], is_metric_scale [1], doppler [1, H, W, 1]
            (NaN: none), timestamps [1]. Units and frames are the clip's.
        uint8: images as uint8; else in the clip's dtype, 0 to 1.

    Returns:
        V dictionaries with `img` [1, 3, H, W].

    Raises:
        ValueError: an unknown name in `with_`.
    """
    names = [with_] if isinstance(with_, str) else list(with_)
    unknown = sorted(set(names) - set(VIEW_KEYS))
    if unknown:
        raise ValueError(f"with_: unknown {', '.join(unknown)}; expected names among {', '.join(VIEW_KEYS)}")
    images = clip.images.movedim(-1, 1)
    if uint8:
        images = (images * 255).round().to(torch.uint8)
    doppler = torch.where(clip.valid_mask[..., None], clip.doppler, math.nan)
    sources = {
        "intrinsics": clip.intrinsics,
        "ray_directions": clip.ray_directions,
        "depth_z": clip.depth_z,
        "camera_poses": clip.camera_poses,
        "is_metric_scale": torch.ones(clip.num_views, dtype=torch.bool, device=clip.images.device),
        "doppler": doppler,
        "timestamps": clip.timestamps,
    }
    return [
        {"img": images[view, None].contiguous(), **{name: sources[name][view, None] for name in names}}
        for view in range(clip.num_views)
    ]
