"""People's own clips: what is read is what was written, at any size, with any part missing."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from any4d_fast.geometry import rays_from_intrinsics
from any4d_fast.io.errors import MediaError
from any4d_fast.train.batch import collate
from any4d_fast.train.dataset import ClipArrays, ClipFolder, DatasetConfig, write_clip
from any4d_fast.train.synthetic import SceneConfig, SyntheticClip, make_clip
from tests.clip_folders import (
    SIZE,
    assert_same,
    one,
    small,
    truth,
)

SCENE = SceneConfig(
    num_views=4, height=28, width=42, num_objects=(3, 4), num_moving=(2, 3), enclosed=False, supersampling=1
)
WHOLE = DatasetConfig(views=4, sizes=(SIZE,), stride=(1, 1), split="all")


@pytest.fixture(scope="module")
def synthetic() -> SyntheticClip:
    return make_clip(3, SCENE)


def test_a_synthetic_clip_comes_back_with_its_ground_truth(tmp_path: Path, synthetic: SyntheticClip) -> None:
    assert 0 < synthetic.valid_mask.float().mean() < 1 and synthetic.moving_mask.any()
    assert write_clip(tmp_path / "clip", synthetic) == tmp_path / "clip"
    assert_same(ClipFolder(tmp_path, WHOLE)[0], truth(synthetic))


def test_a_batch_comes_back(tmp_path: Path, synthetic: SyntheticClip) -> None:
    batch = truth(synthetic)
    write_clip(tmp_path / "clip", batch)
    back = ClipFolder(tmp_path, WHOLE)[0]
    assert_same(back, batch)
    assert torch.equal(back.depth_along_ray, batch.depth_along_ray)
    with pytest.raises(ValueError, match="batch of one sample, got 2"):
        write_clip(tmp_path / "two", collate([batch, batch]))
    write_clip(tmp_path / "clip", ClipArrays.from_batch(collate([batch, batch]), 1), overwrite=True)
    assert_same(ClipFolder(tmp_path, WHOLE)[0], batch)


def test_a_batch_of_a_lens_that_is_no_pinhole_comes_back(tmp_path: Path, synthetic: SyntheticClip) -> None:
    batch = truth(synthetic)
    bent = batch.ray_directions * torch.tensor([1.0, 1.0, 1.0]) + 0.1 * batch.ray_directions.square()
    batch = dataclasses.replace(batch, ray_directions=bent / bent.norm(dim=-1, keepdim=True))
    write_clip(tmp_path / "clip", batch)
    assert (tmp_path / "clip" / "rays.npy").exists() and not (tmp_path / "clip" / "intrinsics.json").exists()
    assert_same(ClipFolder(tmp_path, WHOLE)[0], batch)


def test_the_documented_layout(tmp_path: Path, synthetic: SyntheticClip) -> None:
    write_clip(tmp_path / "clip", synthetic)
    files = sorted(str(p.relative_to(tmp_path / "clip")) for p in (tmp_path / "clip").rglob("*") if p.is_file())
    names = [f"{i:06d}" for i in range(4)]
    expected = [f"{part}/{n}.{s}" for part, s in (("images", "png"), ("depth", "npy"), ("masks", "png")) for n in names]
    expected += [f"flow/000000/{n}.npz" for n in names[1:]] + ["clip.json", "intrinsics.json", "poses.npy"]
    assert files == sorted(expected)


def test_a_folder_written_by_hand_in_other_forms(tmp_path: Path) -> None:
    """JPEG, depth in 16-bit steps of 1/256 m, one K in text, TUM poses, frames named by numbers of any length."""
    clip = tmp_path / "scenes" / "kitchen"
    (clip / "images").mkdir(parents=True)
    (clip / "depth").mkdir()
    for number in (8, 9, 10, 11):
        Image.fromarray(np.full((28, 42, 3), 10 * number, np.uint8)).save(clip / "images" / f"f{number}.jpg")
        Image.fromarray(np.full((28, 42), 256 * number, np.uint16)).save(clip / "depth" / f"f{number}.png")
    (clip / "intrinsics.TXT").write_text("40 40 20.5 13.5\n")
    (clip / "poses.txt").write_text("".join(f"{i} {i} 0 0 0 0 0.70711 0.70711\n" for i in range(4)))
    (clip / "clip.json").write_text(json.dumps({"is_metric": False, "depth_unit": 1 / 256}))
    dataset = ClipFolder(tmp_path, WHOLE)
    assert dataset.clips == ["scenes/kitchen"]
    batch = dataset[0]
    middle = batch.depth_along_ray[0, :, 13, 20, 0]
    torch.testing.assert_close(middle, torch.tensor([8.0, 9, 10, 11]), rtol=1e-3, atol=0)
    assert not batch.is_metric and batch.has_rays and batch.has_poses and not batch.has_surface
    # The camera is turned by 90 degrees about z: world x is its -y.
    torch.testing.assert_close(batch.camera_poses[0, 3, :3, 3], torch.tensor([0.0, -3, 0]), rtol=0, atol=1e-4)
    rotation = batch.camera_poses[0, :, :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand(4, 3, 3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("missing", ["depth_z", "intrinsics", "camera_poses", "all"])
def test_any_part_may_be_missing(tmp_path: Path, missing: str) -> None:
    parts = ("depth_z", "intrinsics", "camera_poses")
    write_clip(tmp_path / "clip", small(**dict.fromkeys(parts if missing == "all" else (missing,))))
    batch = one(tmp_path)
    lacks = set(parts if missing == "all" else (missing,))
    assert batch.has_rays.item() == ("intrinsics" not in lacks)
    assert batch.has_poses.item() == ("camera_poses" not in lacks)
    # Depth along the optical axis becomes a distance only with the lens.
    assert batch.depth_mask.all().item() == lacks.isdisjoint({"depth_z", "intrinsics"})
    assert not (batch.flow_mask.any() or batch.dynamic_mask.any() or batch.scene_flow.any() or batch.has_surface)
    if not batch.has_poses:
        assert torch.equal(batch.camera_poses, torch.eye(4).expand(1, 3, 4, 4))
    for name in ("rays", "depth", "poses"):
        known = {"rays": batch.has_rays.all(), "depth": batch.depth_mask.any(), "poses": batch.has_poses.all()}[name]
        if not known:
            with pytest.raises(MediaError, match=rf"clip: frames .* have no {name}, expected for every view"):
                one(tmp_path, require=name)


def test_single_frames_may_lack_depth_and_masks(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip", small(3, surface_mask=np.ones((3, 28, 42), bool)))
    assert one(tmp_path).has_surface
    (tmp_path / "clip" / "depth" / "000001.npy").unlink()
    (tmp_path / "clip" / "masks" / "000001.png").unlink()
    batch = one(tmp_path)
    assert batch.depth_mask.flatten(2).all(-1).tolist() == [[True, False, True]]
    assert not batch.has_surface and not batch.surface_mask.any()
    with pytest.raises(MediaError, match="have no depth"):
        one(tmp_path, require=("depth",))


def test_depth_that_cannot_be_is_unknown(tmp_path: Path) -> None:
    depth = np.full((3, 28, 42), 2.0)
    depth[:, 0, :6] = [np.nan, np.inf, -np.inf, -1, 0, 1e30]
    depth[:, 1, 0] = 50
    write_clip(tmp_path / "clip", small(3, depth_z=depth))
    batch = one(tmp_path)
    assert not batch.depth_mask[0, :, 0, :6].any() and batch.depth_mask.sum() == 3 * (28 * 42 - 6)
    assert (batch.depth_along_ray[~batch.depth_mask] == 0).all()
    assert not one(tmp_path, max_depth=10.0).depth_mask[0, :, 1, 0].any()


def test_depth_in_millimetres(tmp_path: Path) -> None:
    depth = np.full((3, 28, 42), 1.2344, np.float32)
    depth[:, 0, 0] = np.nan
    write_clip(tmp_path / "clip", small(3, depth_z=depth), depth_format="png")
    batch = one(tmp_path)
    expected = torch.tensor(1.234) / batch.ray_directions[..., 2:]
    torch.testing.assert_close(batch.depth_along_ray[:, :, 1:], expected[:, :, 1:], rtol=1e-6, atol=0)
    assert not batch.depth_mask[:, :, 0, 0].any()
    with pytest.raises(ValueError, match="up to 65.535, got depth of 66"):
        write_clip(tmp_path / "far", small(depth_z=np.full((6, 28, 42), 66.0)), depth_format="png")


def test_flow_masks_and_what_moves(tmp_path: Path) -> None:
    flow = np.zeros((28, 42, 3), np.float32)
    flow[:, :10] = [0.3, 0, 0]
    flow[:, 10:20] = [0.001, 0, 0]
    flow[0] = np.nan
    valid = np.ones((28, 42), bool)
    valid[1] = False
    write_clip(tmp_path / "clip", small(3, scene_flow={(0, 2): flow}, flow_mask={(0, 2): valid}))
    batch = one(tmp_path)
    expected = torch.ones(28, 42, dtype=torch.bool)
    expected[:2] = False
    assert torch.equal(batch.flow_mask[0, 2], expected) and torch.equal(batch.flow_mask[0, 0], expected)
    assert not batch.flow_mask[0, 1].any()
    assert batch.dynamic_mask[0, 2, 2:, :10].all() and not batch.dynamic_mask[0, 2, :, 10:].any()
    assert torch.equal(batch.dynamic_mask[0, 0], batch.dynamic_mask[0, 2]) and not batch.scene_flow[0, 0].any()
    assert one(tmp_path, dynamic_threshold=0.0005).dynamic_mask[0, 2, 2:, :20].all()
    with pytest.raises(MediaError, match="have no flow"):
        one(tmp_path, require="flow")


def test_a_static_clip_has_zero_flow_wherever_something_is_seen(tmp_path: Path) -> None:
    depth = np.full((3, 28, 42), 2.0)
    depth[:, :5] = 0
    write_clip(tmp_path / "clip", small(3, depth_z=depth, static=True))
    batch = one(tmp_path, require="flow")
    assert torch.equal(batch.flow_mask, batch.depth_mask[:, :1].expand_as(batch.flow_mask))
    assert not batch.scene_flow.any() and not batch.dynamic_mask.any()


@pytest.mark.parametrize("fit", ["crop", "stretch"])
@pytest.mark.parametrize("hw", [(56, 84), (61, 97), (28, 84), (20, 31)])
def test_rays_and_depth_follow_the_image(tmp_path: Path, fit: str, hw: tuple[int, int]) -> None:
    """A picture whose colours are its pixel coordinates says what each new pixel sees."""
    v, u = np.meshgrid(np.arange(hw[0]), np.arange(hw[1]), indexing="ij")
    images = np.stack([u, v, 0 * u], axis=-1)[None].repeat(3, 0).astype(np.uint8)
    depth = np.broadcast_to(1 + u / 100 + v / 10, (3, *hw)).astype(np.float32)
    intrinsics = np.array([[60.0, 0, 30], [0, 70, 25], [0, 0, 1]])
    write_clip(tmp_path / "clip", small(3, hw, images=images, depth_z=depth, intrinsics=intrinsics))
    batch = one(tmp_path, fit=fit)
    assert batch.images.shape == (1, 3, 3, *SIZE)
    ray = batch.ray_directions[0, 0] / batch.ray_directions[0, 0, ..., 2:]
    inner = (slice(3, -3), slice(3, -3))  # at the border, the filter leans on what is there
    for axis, (focal, centre) in enumerate([(60, 30), (70, 25)]):
        shown = batch.images[0, 0, axis] * 255
        assert (ray[..., axis] * focal + centre - shown)[inner].abs().max() < 0.6  # an 8-bit step, and rounding
    seen = batch.pts3d_cam[0, 0, ..., 2]
    pixel = ray[..., :2] * torch.tensor([60.0, 70]) + torch.tensor([30.0, 25])
    # Nearest: half an old pixel in each axis.
    assert (seen - (1 + pixel[..., 0] / 100 + pixel[..., 1] / 10)).abs().max() < 0.5 / 100 + 0.5 / 10 + 1e-3


def test_rays_of_a_file_are_cut_and_scaled_as_intrinsics_are(tmp_path: Path) -> None:
    arrays = small(3, (60, 100))
    rays = rays_from_intrinsics(torch.from_numpy(arrays.intrinsics), 60, 100).numpy()
    write_clip(tmp_path / "k" / "clip", arrays)
    write_clip(tmp_path / "rays" / "clip", dataclasses.replace(arrays, intrinsics=None, ray_directions=rays * 3))
    assert_same(one(tmp_path / "rays"), one(tmp_path / "k"))


def test_maps_of_a_lower_resolution(tmp_path: Path) -> None:
    depth = np.zeros((3, 14, 21), np.float32)
    depth[:, :7] = 2.0
    flow = np.ones((3, 14, 21, 3), np.float32)
    mask = depth > 0
    write_clip(tmp_path / "clip", small(3, depth_z=depth, surface_mask=mask, scene_flow=flow))
    batch = one(tmp_path)
    assert batch.depth_mask[0, :, :14].all() and not batch.depth_mask[0, :, 14:].any()
    assert torch.equal(batch.surface_mask, batch.depth_mask) and batch.flow_mask.all()


def test_a_map_of_another_field_of_view_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="depth_z: expected the images' 28x42 or its aspect ratio, got 42x28"):
        write_clip(tmp_path / "clip", small(3, depth_z=np.ones((3, 42, 28))))


def test_frames_as_far_from_the_origin_as_a_map_grid(tmp_path: Path) -> None:
    """Relative poses are formed in float64: 5,000 km away, float32 would be off by half a metre."""
    arrays = small(3)
    assert arrays.camera_poses is not None
    far = arrays.camera_poses + np.array([[0, 0, 0, 5e6], [0, 0, 0, 4e5], [0] * 4, [0] * 4])
    write_clip(tmp_path / "clip", dataclasses.replace(arrays, camera_poses=far))
    places = one(tmp_path).camera_poses[0, :, 0, 3].tolist()
    assert all(math.isclose(place, 0.1 * i, abs_tol=1e-6) for i, place in enumerate(places))
