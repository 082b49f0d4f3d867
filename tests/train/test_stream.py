"""The endless stream: what a step's batch depends on, and whether its ground truth is true."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from any4d_fast.geometry import invert_pose
from any4d_fast.train.batch import Batch
from any4d_fast.train.scene import SceneConfig
from any4d_fast.train.stream import Stream, StreamConfig, held_out
from any4d_fast.train.stream_draw import Scenes, draw_scenes
from any4d_fast.train.stream_objects import SLOTS, bounding_radius, towards_view
from any4d_fast.train.stream_random import Draws

SMALL = StreamConfig(num_views=3, sizes=((28, 42),), supersampling=1)
MANY = 200  # scenes drawn, not rendered: milliseconds


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Stream(SMALL, 6, seed=1).batch(0)


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return draw_scenes(Draws(11, 0, MANY), StreamConfig(), 126, 168)


def tensors(batch: Batch) -> dict[str, Tensor]:
    return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}


def assert_same(a: Batch, b: Batch) -> None:
    for name, tensor in tensors(a).items():
        assert torch.equal(tensor, getattr(b, name)), name


def assert_different(a: Batch, b: Batch) -> None:
    assert not any(torch.equal(x, y) for x in a.images for y in b.images)


def test_shapes_and_dtypes(batch: Batch) -> None:
    shapes = {
        "images": (6, 3, 3, 28, 42), "ray_directions": (6, 3, 28, 42, 3), "depth_along_ray": (6, 3, 28, 42, 1),
        "camera_poses": (6, 3, 4, 4), "scene_flow": (6, 3, 28, 42, 3),
        **dict.fromkeys(("depth_mask", "flow_mask", "dynamic_mask", "surface_mask"), (6, 3, 28, 42)),
        **dict.fromkeys(("has_rays", "has_poses", "has_surface", "is_metric"), (6,)),
    }  # fmt: skip
    for name, tensor in tensors(batch).items():
        assert tuple(tensor.shape) == shapes[name] and tensor.is_contiguous(), name
        assert tensor.dtype == (torch.bool if name.endswith("mask") or name[:3] in ("has", "is_") else torch.float32)
        assert tensor.isfinite().all()
    assert batch.has_rays.all() and batch.has_poses.all() and batch.has_surface.all() and batch.is_metric.all()


def test_a_step_is_the_same_whatever_came_before(batch: Batch) -> None:
    resumed = Stream(SMALL, 6, seed=1)
    later = resumed.batch(2)
    assert_same(resumed.batch(0), batch)
    ahead = Stream(SMALL, 6, seed=1, ahead=True)
    for step in (0, 1, 2, 0):  # in order, then back
        found = ahead.batch(step)
        if step != 1:
            assert_same(found, later if step == 2 else batch)


def test_steps_ranks_and_seeds_differ(batch: Batch) -> None:
    assert_different(batch, Stream(SMALL, 6, seed=1).batch(1))
    assert_different(batch, Stream(SMALL, 6, seed=2).batch(0))
    first, second = (Stream(SMALL, 3, seed=1, rank=rank, world_size=2).batch(0) for rank in (0, 1))
    assert_different(first, second)
    # The ranks of a run share one sequence of clips.
    assert torch.equal(torch.cat([first.images, second.images]), batch.images)


def test_sizes_depend_on_seed_and_step_alone() -> None:
    config = StreamConfig(sizes=[[14, 28], [28, 14], [14, 14]])  # type: ignore[arg-type]
    assert config.sizes == ((14, 28), (28, 14), (14, 14)) and hash(config) == hash(dataclasses.replace(config))
    streams = [Stream(config, b, seed=4, rank=r, world_size=2) for b, r in ((1, 0), (7, 1))]
    sizes = [streams[0].size(step) for step in range(40)]
    assert sizes == [streams[1].size(step) for step in range(40)] and set(sizes) == set(config.sizes)
    assert tuple(streams[0].batch(3).images.shape[-2:]) == sizes[3]


def test_held_out_clips_are_apart_from_training() -> None:
    config = dataclasses.replace(SMALL, sizes=((14, 28), (28, 14)))
    batches = list(held_out(config, 5, 2))
    assert [len(b) for b in batches] == [2, 2, 1]
    images = torch.cat([b.images for b in batches])
    assert torch.equal(images, next(held_out(config, 5, 5)).images)
    training = Stream(dataclasses.replace(config, sizes=config.sizes[:1]), 20)
    assert_different(batches[0], training.batch(0))
    other = next(held_out(config, 5, 5, seed=1))
    assert not any(torch.equal(a, b) for a in images for b in other.images)


def test_numbers_of_clips_never_overlap() -> None:
    table = Draws(3, 0, 10).unit(800)
    assert (Draws(3, 4, 2).unit(800) == table[4:6]).all()
    assert len(set(table.reshape(-1).tolist())) == table.size
    assert abs(table.mean() - 0.5) < 0.02 and table.min() >= 0 and table.max() < 1
    with pytest.raises(AssertionError, match="takes more than"):
        Draws(3, 0, 1).unit(1000)


def test_poses_are_rigid_and_start_at_the_identity(batch: Batch) -> None:
    poses = batch.camera_poses
    assert torch.equal(poses[:, 0], torch.eye(4).expand(6, 4, 4))
    rotation = poses[..., :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand_as(rotation), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(6, 3), atol=1e-6, rtol=0)
    assert torch.equal(poses[..., 3, :], torch.tensor([0.0, 0, 0, 1]).expand(6, 3, 4))
    assert (poses[:, 1:, :3, 3].norm(dim=-1) > 1e-3).any()


def test_masks_flow_and_rays_agree(batch: Batch) -> None:
    torch.testing.assert_close(batch.ray_directions.norm(dim=-1), torch.ones(6, 3, 28, 42), atol=1e-6, rtol=0)
    assert (batch.depth_along_ray[batch.depth_mask] > 0).all() and not batch.depth_along_ray[~batch.depth_mask].any()
    assert torch.equal(batch.surface_mask, batch.depth_mask)
    for view in range(3):
        assert torch.equal(batch.flow_mask[:, view], batch.depth_mask[:, 0])
        assert torch.equal(batch.dynamic_mask[:, view], batch.dynamic_mask[:, 0])
    assert (batch.flow_mask | ~batch.dynamic_mask).all()
    assert not batch.scene_flow[:, 0].any() and not batch.scene_flow[~batch.dynamic_mask].any()
    assert batch.scene_flow[:, 2][batch.dynamic_mask[:, 2]].norm(dim=-1).median() > 0.01


def test_moved_points_lie_on_what_the_other_views_see() -> None:
    """Points of view 0, moved by the flow and projected, are met by the other view's depth or hidden behind it."""
    config = StreamConfig(num_views=3, sizes=((84, 112),), supersampling=1, enclosed=1.0, moving_objects=(4, 8))
    batch = Stream(config, 4, seed=6).batch(0)
    size = torch.tensor([112.0, 84.0])
    compared, comparable, dynamic = 0, 0, 0
    for view in (1, 2):
        world = batch.pts3d[:, 0] + batch.scene_flow[:, view]
        inverse = invert_pose(batch.camera_poses[:, view])[:, None, None]
        local = (inverse[..., :3, :3] * world[..., None, :]).sum(-1) + inverse[..., :3, 3]
        for clip in range(4):
            rays = batch.ray_directions[clip, view]
            plane = rays[..., :2] / rays[..., 2:]  # affine in the pixel
            step = torch.stack([plane[0, 1, 0] - plane[0, 0, 0], plane[1, 0, 1] - plane[0, 0, 1]])
            uv = (local[clip, ..., :2] / local[clip, ..., 2:] - plane[0, 0]) / step
            inside = (local[clip, ..., 2] > 0.1) & ((uv > 0.5) & (uv < size - 1.5)).all(-1)
            u, v = uv[inside].round().long().unbind(-1)
            seen = batch.depth_along_ray[clip, view, ..., 0]
            around = torch.stack([seen[v + dv, u + du] for dv in (-1, 0, 1) for du in (-1, 0, 1)])
            distance = local[clip][inside].norm(dim=-1)
            smooth = around.amax(0) - around.amin(0) < 0.04 * distance
            # In the nearest pixel the surface may be as much nearer or farther as it varies among the neighbours.
            slack = around.amax(0) - around.amin(0) + 1e-4
            assert (distance[smooth] >= (around.amin(0) - slack)[smooth]).all()  # nothing shows through
            visible = smooth & ((distance - seen[v, u]).abs() <= slack)
            comparable += int(smooth.sum())
            compared += int(visible.sum())
            dynamic += int(batch.dynamic_mask[clip, 0][inside][visible].sum())
    # A single view may be covered by an object that came close.
    assert compared > 0.5 * comparable and compared > 10_000 and dynamic > 200


def test_scenes_are_what_the_configuration_says(scenes: Scenes) -> None:
    config, cameras, objects = StreamConfig(), scenes.cameras, scenes.objects
    fov = 2 * torch.atan(84 / torch.from_numpy(cameras.focal)).rad2deg()
    assert config.fov_degrees[0] <= fov.min() and fov.max() <= config.fov_degrees[1]
    movers = objects.moving.sum(1)
    assert (movers >= 2).mean() > 0.99 and set(movers) >= set(range(2, 9))
    travelled = ((objects.shift**2).sum(-1) ** 0.5).max(-1)[objects.moving]
    assert (travelled > 0.1).mean() > 0.75 and travelled.max() < 4
    assert 0.75 < scenes.enclosed.mean() < 0.95
    gaps = (cameras.times[:, 1:] - cameras.times[:, :-1]) / config.frame_interval[0]
    assert gaps.min() > 0.74 and gaps.max() < 1.26 * config.frame_interval[1] / config.frame_interval[0]
    assert (cameras.times[:, 0] == 0).all()
    moved = abs(cameras.position - cameras.position[:, :1]).max((1, 2)) > 1e-9
    turned = abs(cameras.shake - cameras.shake[:, :1]).max((1, 2)) > 1e-9
    tripods, pans = ~moved & ~turned, ~moved & turned
    assert 0.02 < tripods.mean() < 0.16 and 0.07 < pans.mean() < 0.24 and (moved & turned).mean() > 0.3
    assert set(objects.kind.reshape(-1)) == {-1, 0, 1, 2, 3}
    assert (abs(objects.turn).max((-2, -1)) + abs(objects.shift).max((-2, -1)) > 0.01)[objects.moving].all()
    assert not objects.turn[~objects.moving].any() and not objects.shift[:, :, 0].any()


def test_cameras_stay_inside_the_room_and_out_of_objects(scenes: Scenes) -> None:
    cameras, objects = scenes.cameras, scenes.objects
    half = scenes.room[:, None] / 2
    assert (abs(cameras.position[..., :2]) < half[..., :2] - 0.05).all()
    assert (cameras.position[..., 2] > 0.2).all() and (cameras.position[..., 2] < 2 * half[..., 2] - 0.2).all()
    centres = objects.position[:, :, None] + objects.shift
    gap = ((centres - cameras.position[:, None]) ** 2).sum(-1) ** 0.5 - bounding_radius(objects.kind, objects.size)[
        ..., None
    ]
    assert gap.shape == (MANY, SLOTS, 4) and (gap.min(-1) > 0.1)[objects.kind >= 0].all()
    assert (objects.kind >= 0).sum(1).min() >= 1


def test_objects_beside_the_middle_do_not_start_out_of_the_picture(scenes: Scenes) -> None:
    """One second along their directions, none that is beside the middle half of view 0 is farther to its side."""
    cameras, objects = scenes.cameras, scenes.objects
    right = cameras.level[:, 0, :, 0][:, None]
    away = objects.position - cameras.position[:, None, 0]
    side = (away * right).sum(-1)
    depth = (away * cameras.level[:, 0, :, 2][:, None]).sum(-1)
    beside = abs(side) * cameras.focal[:, None] > 0.5 * cameras.centre[:, :1] * np.maximum(depth, 0.1)
    outwards = np.random.default_rng(0).normal(size=objects.position.shape)
    directions = towards_view(outwards, objects.position, cameras)
    lateral = (directions * right).sum(-1) * np.sign(side)
    assert beside.any() and (lateral[beside] <= 1e-12).all() and (lateral[~beside] > 0).any()
    assert np.allclose((directions**2).sum(-1), (outwards**2).sum(-1))


def test_views_look_at_the_same_things() -> None:
    """Most of view 0's centre falls into the last view's picture."""
    batch = Stream(dataclasses.replace(SMALL, enclosed=1.0, num_views=4), 40, seed=3).batch(0)
    points = batch.pts3d[:, 0, 7:21, 10:32] + batch.scene_flow[:, 3, 7:21, 10:32]
    inverse = invert_pose(batch.camera_poses[:, 3])[:, None, None]
    local = (inverse[..., :3, :3] * points[..., None, :]).sum(-1) + inverse[..., :3, 3]
    rays = batch.ray_directions[:, 3]
    low, high = (rays[:, v, u, :2] / rays[:, v, u, 2:] for v, u in ((0, 0), (27, 41)))
    xy = local[..., :2] / local[..., 2:]
    inside = (local[..., 2] > 0) & ((xy > low[:, None, None]) & (xy < high[:, None, None])).all(-1)
    share = inside.float().mean((1, 2))
    assert share.mean() > 0.85 and share.min() > 0.2


def test_pictures_differ_and_are_exposed() -> None:
    batch = Stream(SMALL, 40, seed=9).batch(0)
    mean = batch.images.mean((1, 2, 3, 4))
    assert mean.min() > 0.12 and mean.max() < 0.9 and mean.std() > 0.05
    contrast = batch.images.flatten(1).std(1)
    assert contrast.min() > 0.03 and batch.images.min() >= 0 and batch.images.max() <= 1
    depth = torch.stack([d[m].median() for d, m in zip(batch.depth_along_ray[..., 0], batch.depth_mask, strict=True)])
    assert depth.min() > 0.5 and depth.max() < 15 and depth.std() / depth.mean() > 0.2


def test_the_defaults_contain_the_scenes_of_the_demo() -> None:
    ours, demo = StreamConfig(), SceneConfig()
    for name in ("fov_degrees", "room_size", "room_height", "object_speed", "camera_speed"):
        low, high = getattr(ours, name)
        assert low <= getattr(demo, name)[0] and getattr(demo, name)[1] <= high, name
    assert ours.frame_interval[0] <= demo.frame_interval <= ours.frame_interval[1]
    assert ours.moving_objects[0] <= demo.num_moving[0] and demo.num_moving[1] <= ours.moving_objects[1]
    assert demo.num_objects[1] - demo.num_moving[0] <= ours.static_objects[1]


def test_nothing_moves_where_nothing_may() -> None:
    config = dataclasses.replace(SMALL, moving_objects=(0, 0), static_objects=(0, 0), tripod=1.0, panning=0.0)
    batch = Stream(config, 3).batch(0)
    assert not batch.dynamic_mask.any() and not batch.scene_flow.any()
    torch.testing.assert_close(batch.camera_poses, torch.eye(4).expand(3, 3, 4, 4), atol=1e-7, rtol=0)
    assert (batch.depth_along_ray[:, 0] - batch.depth_along_ray[:, 2]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_views": 0}, "num_views: expected an int of 1 to 64, got 0"),
        ({"sizes": ()}, r"sizes: expected one \(height, width\) or more"),
        ({"sizes": ((14, 0),)}, "sizes: expected"),
        ({"fov_degrees": (90.0, 60.0)}, r"fov_degrees: expected a pair \(low, high\) with low <= high"),
        ({"fov_degrees": (5.0, 60.0)}, "fov_degrees: expected degrees between 10 and 150"),
        ({"moving_objects": (2, 9)}, "moving_objects: expected ints, 0 to 8"),
        ({"static_objects": (0.0, 2.0)}, "static_objects: expected ints, 0 to 6"),
        ({"enclosed": 1.5}, "enclosed: expected a share between 0 and 1"),
        ({"tripod": 0.6, "panning": 0.6}, "panning: expected at most 1 - tripod"),
        ({"room_size": (1.0, 5.0)}, "room_size: expected metres between 3 and 40"),
        ({"frame_interval": (0.0, 0.1)}, "frame_interval: expected seconds above 0"),
        ({"object_speed": (0.0, math.nan)}, "object_speed: expected a pair"),
        ({"noise": (-0.1, 0.0)}, "noise: expected between 0 and 0.5"),
        ({"shadows": 1}, "shadows: expected True or False"),
        ({"supersampling": 2.0}, "supersampling: expected an int"),
    ],
)
def test_configurations_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"StreamConfig.{message}"):
        StreamConfig(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected an int of at least 1, got 0"),
        ({"seed": -1}, "seed: expected an int from 0 to"),
        ({"rank": 2, "world_size": 2}, "rank: expected an int from 0 to 1, got 2"),
        ({"world_size": 0}, "world_size: expected an int of at least 1"),
    ],
)
def test_streams_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stream(**{"config": SMALL, "batch_size": 1, **change})
    if "batch_size" in change or "seed" in change:
        with pytest.raises(ValueError, match=message):
            held_out(**{"config": SMALL, "count": 1, "batch_size": 1, **change})


def test_steps_and_counts_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="step: expected an int of at least 0, got -1"):
        Stream(SMALL, 1).batch(-1)
    with pytest.raises(ValueError, match="count: expected an int of at least 1, got 0"):
        held_out(SMALL, 0, 1)
