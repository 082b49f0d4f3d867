"""The clip renderer in plain PyTorch, against the renderer of single scenes and its own invariances."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from any4d_fast.geometry import invert_pose
from any4d_fast.ops.render_clips import render_clips
from any4d_fast.reference import render_clips as reference
from any4d_fast.reference.render_clips import CLIP_COLUMNS, ClipTables, slices
from any4d_fast.train.scene import SceneConfig
from any4d_fast.train.stream_config import StreamConfig
from any4d_fast.train.synthetic import make_scene, render
from tests.render_tables import scene_tables, stream_tables

SCENE = SceneConfig(num_views=3, height=21, width=30, num_objects=(7, 7), num_moving=(3, 3), supersampling=2)
HEIGHT, WIDTH = 12, 16
CONFIG = StreamConfig(num_views=2)
COLUMN = {name: where.start for name, where in slices(CLIP_COLUMNS).items()}


@pytest.mark.parametrize("enclosed", [True, False])
def test_equals_the_renderer_of_single_scenes(enclosed: bool) -> None:
    config = dataclasses.replace(SCENE, enclosed=enclosed)
    scenes = [make_scene(seed, config) for seed in (3, 4)]
    found = render_clips(scene_tables(scenes), SCENE.height, SCENE.width, samples=2)
    for number, scene in enumerate(scenes):
        clip = render(scene, dtype=torch.float64)
        hidden = 0 if enclosed else 5  # slots of the room that an open scene does not use
        expected = torch.where(clip.instance_ids >= 0, clip.instance_ids + hidden, -1)
        assert torch.equal(found.ids[number].long(), expected)
        assert torch.equal(found.hit[number], clip.valid_mask)
        torch.testing.assert_close(found.images[number].movedim(1, -1), clip.images, atol=1e-9, rtol=0)
        torch.testing.assert_close(found.rays[number], clip.ray_directions, atol=1e-12, rtol=0)
        torch.testing.assert_close(found.depth[number], clip.depth_along_ray, atol=1e-9, rtol=0)
        torch.testing.assert_close(found.flow[number], clip.scene_flow, atol=1e-9, rtol=0)
        assert torch.equal(found.dynamic_mask[number], clip.moving_mask[:1].expand(3, -1, -1))
        assert torch.equal(found.flow_mask[number], clip.valid_mask[:1].expand(3, -1, -1))
    assert found.dynamic_mask.any() and found.hit.all() == enclosed


def test_clips_are_rendered_independently_and_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = stream_tables(3, HEIGHT, WIDTH, CONFIG, dtype=torch.float64)
    whole = render_clips(tables, HEIGHT, WIDTH)
    monkeypatch.setattr(reference, "_MAX_RAYS_CPU", 100)
    for number in range(3):
        alone = render_clips(ClipTables(*(t[number : number + 1] for t in tables)), HEIGHT, WIDTH)
        for actual, expected in zip(alone, whole, strict=True):
            torch.testing.assert_close(actual, expected[number : number + 1], atol=1e-12, rtol=0)


def test_more_samples_converge() -> None:
    tables = stream_tables(2, HEIGHT, WIDTH, CONFIG)
    tables.clips[:, COLUMN["noise"]] = 0
    one, two, six = (render_clips(tables, HEIGHT, WIDTH, samples=n) for n in (1, 2, 6))
    assert torch.equal(one.depth, six.depth)
    assert (two.images - six.images).abs().mean() < 0.7 * (one.images - six.images).abs().mean()


def test_shadows_only_darken() -> None:
    tables = stream_tables(4, HEIGHT, WIDTH, CONFIG)
    tables.clips[:, COLUMN["noise"]] = 0
    lit, shaded = (render_clips(tables, HEIGHT, WIDTH, shadows=s).images for s in (False, True))
    assert (shaded <= lit + 1e-6).all() and (shaded < lit - 0.02).any()


def test_noise_has_the_deviation_asked_for_and_differs_everywhere() -> None:
    tables = stream_tables(1, 40, 40, CONFIG)
    tables.clips[:, COLUMN["noise"]] = 0
    clean = render_clips(tables, 40, 40, samples=1).images
    tables.clips[:, COLUMN["noise"]] = 0.02
    noise = render_clips(tables, 40, 40, samples=1).images - clean
    noise = noise[:, :, :, 1:]  # the first row's hash has fewer bits
    free = (clean[:, :, :, 1:] > 0.06) & (clean[:, :, :, 1:] < 0.94)  # where nothing is cut off
    assert noise[free].std() == pytest.approx(0.02, rel=0.1) and noise[free].mean().abs() < 2e-3
    layers = noise.flatten(0, 2).flatten(1)
    correlation = torch.corrcoef(layers) - torch.eye(len(layers))
    assert correlation.abs().max() < 0.15


def test_gain_and_gamma() -> None:
    tables = stream_tables(1, HEIGHT, WIDTH, CONFIG, dtype=torch.float64)
    neutral = {"noise": 0.0, "gamma": 1.0}
    for name, value in neutral.items():
        tables.clips[:, COLUMN[name]] = value
    tables.clips[:, COLUMN["gain"] : COLUMN["gain"] + 3] = torch.tensor([0.1, 0.2, 0.05], dtype=torch.float64)
    dim = render_clips(tables, HEIGHT, WIDTH).images
    tables.clips[:, COLUMN["gain"] : COLUMN["gain"] + 3] /= 2
    torch.testing.assert_close(render_clips(tables, HEIGHT, WIDTH).images, dim / 2)
    tables.clips[:, COLUMN["gamma"]] = 2.0
    torch.testing.assert_close(render_clips(tables, HEIGHT, WIDTH).images, (dim / 2).sqrt())


def test_flow_moves_points_as_the_objects_frames_move() -> None:
    """The object's own coordinates of a point stay what they are: from the primitives' maps, not from the flows'."""
    config = StreamConfig(num_views=3, moving_objects=(8, 8), static_objects=(2, 2), enclosed=1.0)
    scene = make_scene(5, dataclasses.replace(SCENE, num_views=3))
    for tables in (stream_tables(3, HEIGHT, WIDTH, config, dtype=torch.float64), scene_tables([scene])):
        found = render_clips(tables, HEIGHT, WIDTH)
        points = found.rays[:, :1] * found.depth[:, :1]
        batch = torch.arange(len(points))[:, None, None]
        rows = tables.primitives[..., :12].unflatten(-1, (3, 4))  # [B, V, N, 3, 4]
        ids = found.ids[:, 0].long()
        bottom = torch.tensor([0, 0, 0, 1.0], dtype=torch.float64).expand(*rows.shape[:3], 1, 4)
        pose = torch.cat([rows, bottom], -2)
        floor = pose[:, :, 5]  # a slot of the room, at rest: it tells where the cameras are
        for view in range(3):
            to_first = invert_pose(floor[:, 0]) @ floor[:, view]
            moved = points[:, 0] + found.flow[:, view]
            in_view = _apply(invert_pose(to_first)[:, None, None], moved)
            start, end = _apply(pose[batch, 0, ids], points[:, 0]), _apply(pose[batch, view, ids], in_view)
            torch.testing.assert_close(end, start, atol=1e-9, rtol=0)
        assert found.dynamic_mask.any()


def _apply(pose: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    return (pose[..., :3, :3] * points[..., None, :]).sum(-1) + pose[..., :3, 3]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("clips", lambda t: t[:, 1:], r"tables.clips: expected \[2, 22\]"),
        ("views", lambda t: t[..., :3], r"tables.views: expected \[2, 2, 6\]"),
        ("primitives", lambda t: t[..., :23], r"tables.primitives: expected \[B, V, N, 28\]"),
        ("primitives", lambda t: t[:, :0], r"tables.primitives: expected V >= 1"),
        ("textures", lambda t: t.double(), r"tables.textures: .* got .* torch.float64"),
        ("flows", lambda t: t[:1], r"tables.flows: expected \[2, 2, 20, 12\]"),
    ],
)
def test_tables_that_do_not_fit(name: str, change: object, message: str) -> None:
    tables = stream_tables(2, HEIGHT, WIDTH, CONFIG)
    with pytest.raises(ValueError, match=message):
        render_clips(tables._replace(**{name: change(getattr(tables, name))}), HEIGHT, WIDTH)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["height", "width", "samples"])
def test_sizes_that_do_not_fit(name: str) -> None:
    sizes = {"height": 4, "width": 4, "samples": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        render_clips(stream_tables(1, HEIGHT, WIDTH, CONFIG), **sizes)


def test_no_clips() -> None:
    tables = ClipTables(*(t[:0] for t in stream_tables(1, HEIGHT, WIDTH, CONFIG)))
    assert render_clips(tables, HEIGHT, WIDTH).images.shape == (0, 2, 3, HEIGHT, WIDTH)
