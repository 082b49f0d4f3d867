"""The synthetic world: its ground truth against the analytic surfaces, motions and brute force."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from any4d_fast.geometry import invert_pose, rays_from_intrinsics, transform_points
from any4d_fast.inputs import prepare_views
from any4d_fast.testing import relative_error
from any4d_fast.train import synthetic
from any4d_fast.train.scene import Scene
from any4d_fast.train.synthetic import VIEW_KEYS, SceneConfig, SyntheticClip, clips, make_clip, make_scene, render
from any4d_fast.train.synthetic import to_views as views_of

EXACT = 1e-9  # metres; float64 coordinates of a few metres, a few dozen operations
SMALL = SceneConfig(num_views=4, height=42, width=56, num_objects=(8, 8), num_moving=(4, 4), supersampling=1)
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module", params=SEEDS)
def world(request: pytest.FixtureRequest) -> tuple[Scene, SyntheticClip]:
    scene = make_scene(request.param, SMALL)
    return scene, render(scene, dtype=torch.float64)


def in_world(clip: SyntheticClip, points: Tensor) -> Tensor:
    """[V, H, W, 3] of view 0's camera frame -> world."""
    return transform_points(clip.camera_poses[:1].expand(len(points), -1, -1), points)


def in_object(scene: Scene, number: int, view: int, points: Tensor, times: Tensor | None = None) -> Tensor:
    pose = scene.object_poses(scene.timestamps if times is None else times)[number, view]
    return (points - pose[:3, 3]) @ pose[:3, :3]


def distance_to_surface(shape: str, size: tuple[float, float, float], points: Tensor) -> Tensor:
    """Distance of points near a shape, in its frame, to its surface."""
    x, y, z = points.unbind(-1)
    if shape == "plane":
        outside = torch.maximum(x.abs() - size[0], y.abs() - size[1]).clamp(min=0)
        return torch.maximum(z.abs(), outside)
    if shape == "sphere":
        return (points.norm(dim=-1) - size[0]).abs()
    if shape == "box":
        return (points.abs() - torch.tensor(size, dtype=points.dtype)).amax(-1).abs()
    return torch.maximum((x * x + y * y).sqrt() - size[0], z.abs() - size[2]).abs()


def test_every_pixel_of_a_room_lies_on_the_surface_of_its_object(world: tuple[Scene, SyntheticClip]) -> None:
    scene, clip = world
    assert clip.valid_mask.all()
    rays = rays_from_intrinsics(clip.intrinsics, SMALL.height, SMALL.width, unit=False)
    points = transform_points(clip.camera_poses, rays * clip.depth_z)
    seen = set()
    for view, number in itertools.product(range(SMALL.num_views), range(len(scene.objects))):
        mask = clip.instance_ids[view] == number
        local = in_object(scene, number, view, points[view][mask])
        item = scene.objects[number]
        if len(local):
            seen.add(item.shape)
            assert distance_to_surface(item.shape, item.size, local).max() < EXACT
    assert {"plane", "sphere"} <= seen
    torch.testing.assert_close(in_world(clip, clip.pts3d), points, atol=EXACT, rtol=0)


def solid_samples(scene: Scene, number: int, view: int, points: Tensor) -> Tensor:
    """Whether a surface is met between consecutive samples along segments, [K, S, 3] world -> [K] bool."""
    item = scene.objects[number]
    local = in_object(scene, number, view, points)
    x, y, z = local.unbind(-1)
    if item.shape == "plane":
        crosses = z[:, 1:] * z[:, :-1] < 0
        within = (x.abs() < item.size[0]) & (y.abs() < item.size[1])
        return (crosses & within[:, 1:]).any(1)
    if item.shape == "sphere":
        return (local.norm(dim=-1) < item.size[0]).any(1)
    if item.shape == "box":
        return (local.abs() < torch.tensor(item.size, dtype=local.dtype)).all(-1).any(1)
    return (((x * x + y * y).sqrt() < item.size[0]) & (z.abs() < item.size[2])).any(1)


def test_visibility_equals_marching_along_the_line_of_sight(world: tuple[Scene, SyntheticClip]) -> None:
    scene, clip = world
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(SMALL.height, (150,), generator=generator)
    columns = torch.randint(SMALL.width, (150,), generator=generator)
    tracks = in_world(clip, clip.pts3d[:1] + clip.scene_flow)[:, rows, columns]
    for view in range(SMALL.num_views):
        eye = clip.camera_poses[view, :3, 3]
        local = (tracks[view] - eye) @ clip.camera_poses[view, :3, :3]
        uv = (local / local[:, 2:]) @ clip.intrinsics[view].T
        size = torch.tensor([SMALL.width, SMALL.height])
        expected = (local[:, 2] > 0) & ((uv[:, :2] >= -0.5) & (uv[:, :2] < size - 0.5)).all(-1)
        # Steps of about 2 mm, up to 2 mm in front of the point.
        length = (tracks[view] - eye).norm(dim=-1, keepdim=True)
        steps = torch.linspace(0, 1, 3000, dtype=torch.float64) * (1 - 2e-3 / length)
        samples = eye + steps[..., None] * (tracks[view] - eye)[:, None]
        for number in range(len(scene.objects)):
            expected &= ~solid_samples(scene, number, view, samples)
        actual = clip.visibility[view, rows, columns]
        # A line that cuts an edge by less than a step, or meets it within the last 2 mm, may be counted either way.
        assert (actual != expected).sum() <= 1
        assert 0.2 < actual.double().mean()
    assert clip.visibility[0].all()
    assert not clip.visibility[1:].all()


def test_flow_is_the_rigid_motion_of_the_object(world: tuple[Scene, SyntheticClip]) -> None:
    scene, clip = world
    start = in_world(clip, clip.pts3d[:1])[0]
    tracks = in_world(clip, clip.pts3d[:1] + clip.scene_flow)
    poses = scene.object_poses(scene.timestamps)
    assert (clip.scene_flow[0] == 0).all()
    for number, item in enumerate(scene.objects):
        mask = clip.instance_ids[0] == number
        if not item.motion.moving:
            assert (clip.scene_flow[:, mask] == 0).all()
            continue
        local = in_object(scene, number, 0, start[mask])
        expected = local @ poses[number, :, :3, :3].mT + poses[number, :, None, :3, 3]
        torch.testing.assert_close(tracks[:, mask], expected, atol=EXACT, rtol=0)
        if mask.any():
            assert clip.scene_flow[-1, mask].norm(dim=-1).mean() > 0.02


def test_visible_tracks_land_on_what_their_view_sees(world: tuple[Scene, SyntheticClip]) -> None:
    """On a plane 1/z is affine in the pixel, so that interpolating it is exact."""
    scene, clip = world
    flat = torch.tensor([item.shape == "plane" for item in scene.objects])
    compared = 0
    for view in range(1, SMALL.num_views):
        track = in_world(clip, clip.pts3d[:1] + clip.scene_flow[view : view + 1])
        local = transform_points(invert_pose(clip.camera_poses[view : view + 1]), track)[0]
        u, v = ((local / local[..., 2:]) @ clip.intrinsics[view].T)[..., :2].unbind(-1)
        inside = (u >= 0) & (v >= 0) & (u < SMALL.width - 1) & (v < SMALL.height - 1)
        usable = inside & clip.visibility[view] & flat[clip.instance_ids[0]]
        left, top = u[usable].floor().long(), v[usable].floor().long()
        du, dv = u[usable] - left, v[usable] - top
        number, inverse = clip.instance_ids[0][usable], torch.zeros_like(du)
        same = torch.ones_like(number, dtype=torch.bool)
        for dx, dy in itertools.product((0, 1), (0, 1)):
            weight = (du if dx else 1 - du) * (dv if dy else 1 - dv)
            inverse += weight / clip.depth_z[view, top + dy, left + dx, 0]
            same &= clip.instance_ids[view, top + dy, left + dx] == number
        torch.testing.assert_close(1 / inverse[same], local[..., 2][usable][same], atol=EXACT, rtol=0)
        compared += int(same.sum())
    assert compared > 1000


def test_doppler_is_the_rate_at_which_the_point_recedes_from_a_camera_held_still(
    world: tuple[Scene, SyntheticClip],
) -> None:
    scene, clip = world
    step = 1e-4  # seconds; central differences err by about step^2 times the third derivative
    points = in_world(clip, clip.pts3d)
    moving_pixels = 0
    for view, number in itertools.product(range(SMALL.num_views), range(len(scene.objects))):
        mask = clip.instance_ids[view] == number
        doppler = clip.doppler[view][mask][:, 0]
        if not scene.objects[number].motion.moving:
            assert (doppler == 0).all()
            continue
        local = in_object(scene, number, view, points[view][mask])
        poses = scene.object_poses(scene.timestamps[view] + torch.tensor([-step, step], dtype=torch.float64))[number]
        before, after = (
            ((local @ pose[:3, :3].T + pose[:3, 3]) - clip.camera_poses[view, :3, 3]).norm(dim=-1) for pose in poses
        )
        torch.testing.assert_close(doppler, (after - before) / (2 * step), atol=1e-6, rtol=0)
        moving_pixels += len(doppler)
    assert moving_pixels > 50
    assert clip.doppler.abs().max() > 0.05


def test_moving_mask_is_the_pixels_of_moving_objects(world: tuple[Scene, SyntheticClip]) -> None:
    scene, clip = world
    moving = [number for number, item in enumerate(scene.objects) if item.motion.moving]
    assert len(moving) == 4
    assert torch.equal(clip.moving_mask, torch.isin(clip.instance_ids, torch.tensor(moving)))
    assert clip.moving_mask.any(-1).any(-1).all()


def test_factors_compose_to_the_points_in_float32() -> None:
    clip = make_clip(5, SMALL)
    local = clip.depth_along_ray * clip.ray_directions
    first_from_view = invert_pose(clip.camera_poses[:1].double()) @ clip.camera_poses.double()
    composed = transform_points(first_from_view.float(), local)
    assert relative_error(composed, clip.pts3d) < 1e-5
    exact = make_clip(5, SMALL, dtype=torch.float64)
    # A pixel on an outline may fall on either side of it.
    same = clip.instance_ids == exact.instance_ids
    assert same.double().mean() > 0.999
    for name in ("pts3d", "depth_z", "scene_flow", "doppler"):
        both = same[0] if name == "scene_flow" else same
        actual, oracle = getattr(clip, name), getattr(exact, name)
        select = (slice(None), both) if name == "scene_flow" else (both,)
        assert relative_error(actual[select], oracle[select]) < 1e-5, name
    assert (clip.visibility != exact.visibility).double().mean() < 1e-3


def test_poses_are_rigid_smooth_and_the_world_is_no_views_camera() -> None:
    clip = make_clip(0, dataclasses.replace(SMALL, num_views=20, height=14, width=14), dtype=torch.float64)
    rotation = clip.camera_poses[:, :3, :3]
    torch.testing.assert_close(rotation.mT @ rotation, torch.eye(3, dtype=torch.float64).expand(20, 3, 3))
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(20, dtype=torch.float64))
    assert (clip.camera_poses - torch.eye(4)).abs().amax((1, 2)).min() > 0.1
    assert (rotation[:, 2, 1] < -0.8).all()  # z is up, the camera's y is down
    position = clip.camera_poses[:, :3, 3]
    steps = position.diff(dim=0)
    # 0.6 m/s at most along the arc, and the smaller swings in distance and height.
    assert 0 < steps.norm(dim=-1).max() < 1.0 * SMALL.frame_interval
    assert steps.diff(dim=0).norm(dim=-1).max() < 0.5 * steps.norm(dim=-1).max()
    torch.testing.assert_close(clip.timestamps, torch.arange(20, dtype=torch.float64) * 0.2)


def test_static_scene_and_tripod() -> None:
    still = dataclasses.replace(SMALL, num_moving=(0, 0), camera_speed=(0.0, 0.0))
    clip = make_clip(1, still)
    assert not clip.scene_flow.any() and not clip.doppler.any() and not clip.moving_mask.any()
    assert clip.visibility.all()
    assert torch.equal(clip.images[:1].expand_as(clip.images), clip.images)
    walking = make_clip(1, dataclasses.replace(SMALL, num_moving=(0, 0)))
    assert not walking.scene_flow.any() and not walking.doppler.any()
    assert not torch.equal(walking.depth_z[0], walking.depth_z[-1])


def test_the_same_seed_makes_the_same_clip_and_others_differ() -> None:
    first, again, other = make_clip(7, SMALL), make_clip(7, SMALL), make_clip(-7, SMALL)
    for field in dataclasses.fields(SyntheticClip):
        a, b = getattr(first, field.name), getattr(again, field.name)
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    assert not torch.equal(first.images, other.images)
    assert make_scene(7, SMALL) == make_scene(7, SMALL) != make_scene(8, SMALL)


def test_pieces_rendered_apart_make_the_same_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_clip(3, SMALL)
    for max_rays in (3 * SMALL.height * SMALL.width, 5 * SMALL.width, 1):
        monkeypatch.setattr(synthetic, "_MAX_RAYS_CPU", max_rays)
        config = SMALL if max_rays > 1 else dataclasses.replace(SMALL, height=5)
        pieces = make_clip(3, config)
        if max_rays > 1:
            for field in dataclasses.fields(SyntheticClip):
                a, b = getattr(whole, field.name), getattr(pieces, field.name)
                # Vectorised and scalar loops may contract multiplications differently.
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        assert pieces.images.isfinite().all()


def test_open_scenes_have_pixels_without_depth() -> None:
    clip = make_clip(2, dataclasses.replace(SMALL, enclosed=False))
    assert 0.02 < clip.valid_mask.double().mean() < 0.98
    nothing = ~clip.valid_mask
    for name in ("depth_z", "pts3d", "doppler"):
        assert not getattr(clip, name)[nothing].any()
    assert not clip.scene_flow[:, nothing[0]].any() and not clip.visibility[:, nothing[0]].any()
    assert (clip.instance_ids[nothing] == -1).all() and not clip.moving_mask[nothing].any()
    assert clip.images.isfinite().all()
    view = views_of(clip, ("doppler", "depth_z"))[0]
    assert torch.equal(view["doppler"].isnan()[0, ..., 0], nothing[0])


@pytest.mark.parametrize("seed", range(12))
def test_layout_is_sane(seed: int) -> None:
    """The camera stays in the room and out of the objects; objects start in view and stay in the room."""
    scene = make_scene(seed, SceneConfig(num_views=16, height=168, width=224))
    cameras, objects = scene.camera.poses(scene.timestamps), scene.object_poses(scene.timestamps)
    floor, ceiling = scene.objects[:2]
    limits = torch.tensor([floor.size[0], floor.size[1]], dtype=torch.float64)
    assert (cameras[:, :2, 3].abs() < limits - 0.2).all()
    assert (cameras[:, 2, 3] > 0.9).all() and (cameras[:, 2, 3] < ceiling.motion.position[2] - 0.2).all()
    first = invert_pose(cameras[:1])[0]
    in_view = []
    for number, item in enumerate(scene.objects[6:], start=6):
        for view in range(len(cameras)):
            local = in_object(scene, number, view, cameras[view, :3, 3])
            corner = torch.tensor(item.size, dtype=torch.float64)
            assert (local.abs() - corner).clamp(min=0).norm() > 0.2
        assert (objects[number, :, :2, 3].abs() < limits).all()
        centre = first[:3, :3] @ objects[number, 0, :3, 3] + first[:3, 3]
        u, v, _ = (torch.tensor(scene.intrinsics, dtype=torch.float64) @ (centre / centre[2])).tolist()
        in_view.append(bool(centre[2] > 0) and -10 < u < 234 and -10 < v < 178)
        lowest = objects[number, :, 2, 3].min()
        assert lowest > 0.03
    assert sum(in_view) >= len(in_view) - 1


def test_crowded_and_empty_rooms() -> None:
    config = SceneConfig(num_views=2, height=14, width=14, num_objects=(64, 64), num_moving=(64, 64), room_size=(3, 3))
    clip = make_clip(0, config)
    assert clip.moving_mask.any() and clip.images.isfinite().all()
    empty = make_clip(0, dataclasses.replace(config, num_objects=(0, 0), num_moving=(0, 0)))
    assert empty.valid_mask.all() and not empty.moving_mask.any()


def test_one_view_of_one_pixel() -> None:
    clip = make_clip(0, SceneConfig(num_views=1, height=1, width=1))
    assert clip.images.shape == (1, 1, 1, 3) and clip.visibility.all() and not clip.scene_flow.any()


def test_images_are_lit_textured_and_in_range() -> None:
    clip = make_clip(4, dataclasses.replace(SMALL, supersampling=2))
    assert clip.images.min() >= 0 and clip.images.max() <= 1
    assert 0.15 < clip.images.mean() < 0.85
    assert clip.images.std() > 0.05
    dark = make_clip(4, dataclasses.replace(SMALL, supersampling=2, shadows=False))
    assert (dark.images - clip.images).min() > -1e-4  # shadows only take light away
    assert (dark.images - clip.images).max() > 0.02


def test_stream_gives_every_rank_its_own_seeds() -> None:
    tiny = dataclasses.replace(SMALL, num_views=1, height=4, width=4)
    seeds = [[clip.seed for clip in itertools.islice(clips(tiny, start=rank, step=2), 3)] for rank in (0, 1)]
    assert seeds == [[0, 2, 4], [1, 3, 5]]
    with pytest.raises(ValueError, match="step: expected a non-zero int"):
        clips(tiny, step=0)


def test_views_are_what_the_model_takes() -> None:
    config = dataclasses.replace(SMALL, num_views=2)
    clip = make_clip(0, config)
    views = views_of(clip, VIEW_KEYS)
    assert [sorted(view) for view in views] == [sorted(("img", *VIEW_KEYS))] * 2
    assert views[1]["img"].shape == (1, 3, 42, 56) and views[1]["img"].dtype == torch.float32
    assert torch.equal(views[1]["camera_poses"][0], clip.camera_poses[1])
    assert views_of(clip, uint8=True)[0]["img"].dtype == torch.uint8
    prepare_views(views_of(clip, [key for key in VIEW_KEYS if key != "ray_directions"]))
    prepare_views(views_of(clip, [key for key in VIEW_KEYS if key != "intrinsics"], uint8=True))
    with pytest.raises(ValueError, match="with_: unknown depth, pose; expected names among intrinsics"):
        views_of(clip, ("depth", "pose"))


def test_rendering_is_fast_enough_for_a_cpu() -> None:
    scene = make_scene(0, SceneConfig())
    render(make_scene(0, SMALL))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would spin, on a busy machine, for as long as others keep them waiting
    try:
        start = time.process_time()
        render(scene)
        # Measured: 0.9 s of one core.
        assert time.process_time() - start < 12
    finally:
        torch.set_num_threads(threads)


def test_half_precision_and_wrong_seeds_are_refused() -> None:
    scene = make_scene(0, SMALL)
    with pytest.raises(ValueError, match="dtype: expected torch.float32 or torch.float64, got torch.float16"):
        render(scene, dtype=torch.float16)
    seeds: list[Any] = [1.5, "a", True, None]
    for seed in seeds:
        with pytest.raises(TypeError, match="seed: expected an int"):
            make_scene(seed)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"num_views": 0}, "num_views: expected an int of at least 1, got 0"),
    ({"num_views": 2.0}, "num_views: expected an int"),
    ({"height": 0}, "height: expected an int of at least 1"),
    ({"width": -14}, "width: expected an int of at least 1, got -14"),
    ({"supersampling": 0}, "supersampling"),
    ({"frame_interval": 0.0}, "frame_interval: expected seconds"),
    ({"frame_interval": math.nan}, "frame_interval: expected seconds"),
    ({"frame_interval": "1"}, "frame_interval: expected seconds"),
    ({"fov_degrees": (5.0, 60.0)}, "fov_degrees: expected degrees between 10 and 150"),
    ({"fov_degrees": (60.0, 180.0)}, "fov_degrees"),
    ({"fov_degrees": (70.0, 50.0)}, "fov_degrees: expected a pair"),
    ({"fov_degrees": 60.0}, "fov_degrees: expected a pair"),
    ({"fov_degrees": (50.0, math.nan)}, "fov_degrees"),
    ({"num_objects": (-1, 3)}, "num_objects"),
    ({"num_objects": (2, 3), "num_moving": (1, 3)}, "num_moving: up to 3 moving objects, but num_objects"),
    ({"num_moving": (0.5, 1.5)}, "num_moving"),
    ({"room_size": (1.0, 2.0)}, "room_size: expected metres between 3 and 100"),
    ({"room_height": (2.6, math.inf)}, "room_height"),
    ({"object_speed": (0.0, 1.0)}, "object_speed: expected m/s above 0"),
    ({"camera_speed": (-1.0, 1.0)}, "camera_speed"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_bad_configurations_say_what_is_wrong(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"SceneConfig.{message}"):
        SceneConfig(**values)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_renders_the_same_clip_also_with_tf32_allowed() -> None:
    scene = make_scene(1, SMALL)
    here = render(scene)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        there = render(scene, device="cuda").to("cpu")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    same = here.instance_ids == there.instance_ids
    assert same.double().mean() > 0.999
    assert relative_error(there.depth_z[same], here.depth_z[same]) < 1e-5
    assert relative_error(there.scene_flow[:, same[0]], here.scene_flow[:, same[0]]) < 1e-5
    assert (there.images - here.images)[same].abs().mean() < 1e-3
