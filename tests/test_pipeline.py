"""From files to a reconstruction: reading, sensor files, determinism, memory, the demo's outputs and errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import any4d_fast
from any4d_fast import checkpoint
from any4d_fast.demo import FILES, HEIGHT, WIDTH, measure, run_demo, trusted
from any4d_fast.inputs import prepare_views
from any4d_fast.io import MediaError, load_npz
from any4d_fast.model import Any4D
from any4d_fast.pipeline import load_model, read_views, run, run_views
from any4d_fast.reconstruction import Reconstruction
from any4d_fast.train.config import TrainConfig
from any4d_fast.train.scene import SceneConfig
from any4d_fast.train.synthetic import SyntheticClip, make_clip, to_views


@pytest.fixture(scope="module")
def model() -> Any4D:
    return load_model(None, "tiny", "cpu")[0]


@pytest.fixture(scope="module")
def clip() -> SyntheticClip:
    return make_clip(3, SceneConfig(num_views=3, height=56, width=84, supersampling=1, shadows=False))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, clip: SyntheticClip) -> Path:
    """A clip as a person has it: pictures, K, poses and depth in files."""
    path = tmp_path_factory.mktemp("clip")
    (path / "images").mkdir()
    (path / "depth").mkdir()
    for i in range(clip.num_views):
        image = (clip.images[i] * 255).round().byte().numpy()
        Image.fromarray(image).save(path / "images" / f"{i}.png")
        np.save(path / "depth" / f"{i}.npy", clip.depth_z[i, ..., 0].numpy())
    np.save(path / "poses.npy", clip.camera_poses.numpy())
    (path / "K.json").write_text(json.dumps(clip.intrinsics[0].tolist()))
    return path


def test_poses_far_from_the_worlds_origin_keep_their_motion(folder: Path, tmp_path: Path) -> None:
    poses = np.tile(np.eye(4), (3, 1, 1))
    poses[:, :3, 3] = [[450e3, 4600e3, 100], [450e3 + 0.1, 4600e3 + 0.07, 100], [450e3 + 0.2, 4600e3 + 0.14, 100]]
    np.save(tmp_path / "utm.npy", poses)
    views, _ = read_views(folder / "images", None, 1, None, 14, intrinsics=None, depth=None, poses=tmp_path / "utm.npy")
    moved = [view["camera_pose_trans"][0].tolist() for view in prepare_views(views).views]
    # Coordinates of 4,600 km resolve 1e-9 m in float64, and half a metre in float32.
    np.testing.assert_allclose(moved, poses[:, :3, 3] - poses[0, :3, 3], atol=1e-7)


def test_reconstruct_takes_a_folder_and_returns_everything(folder: Path) -> None:
    result = any4d_fast.reconstruct(folder / "images", preset="tiny", device="cpu", stride=2, size=(28, 42))
    assert (result.num_views, result.height, result.width) == (2, 28, 42)
    for name in ("depth_z", "scene_flow", "conf", "mask", "intrinsics", "camera_poses", "ray_directions"):
        assert getattr(result, name) is not None, name
    assert np.isfinite(result.pts3d).all()


@pytest.mark.parametrize("other", [{"checkpoint": "other.pth"}, {"preset": "any4d"}, {"device": "cuda"}])
def test_a_loaded_model_takes_no_other_choice(model: Any4D, folder: Path, other: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="model: .* leave out checkpoint, preset and device"):
        any4d_fast.reconstruct(folder / "images", model=model, **other)  # type: ignore[arg-type]


@pytest.mark.parametrize("packaged", [True, False])
def test_presets_agree_and_leave_the_global_generator_alone(
    packaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packaged:
        monkeypatch.setattr(checkpoint, "PACKAGED", tmp_path)
    state = torch.random.get_rng_state()
    first, trained = load_model(None, "tiny", "cpu")
    second, _ = load_model(None, "tiny", "cpu")
    assert trained == packaged
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_sensor_files_reach_the_model_in_its_pixels(folder: Path, clip: SyntheticClip) -> None:
    views, frames = read_views(
        folder / "images", None, 1, None, 14,
        intrinsics=folder / "K.json", depth=folder / "depth", poses=folder / "poses.npy",
    )  # fmt: skip
    assert len(frames) == 3
    for i, view in enumerate(views):
        torch.testing.assert_close(view["intrinsics"], clip.intrinsics[0])
        torch.testing.assert_close(view["depth_z"], clip.depth_z[i, ..., 0])
        torch.testing.assert_close(view["camera_poses"], clip.camera_poses[i].double())


def test_images_alone_are_resized_as_they_are_read_and_intrinsics_follow(folder: Path, clip: SyntheticClip) -> None:
    views, frames = read_views(
        folder / "images", None, 1, (28, 42), 14, intrinsics=folder / "K.json", depth=None, poses=None
    )
    assert frames.original_hw == (56, 84)
    assert views[0]["img"].shape == (28, 42, 3)
    true = clip.intrinsics[0]
    torch.testing.assert_close(views[0]["intrinsics"][0, 0], true[0, 0] / 2)
    torch.testing.assert_close(views[0]["intrinsics"][0, 2], (true[0, 2] + 0.5) / 2 - 0.5)


def test_known_cameras_come_back_exactly_and_improve_on_hints(folder: Path, model: Any4D, clip: SyntheticClip) -> None:
    kept = run(
        model, folder / "images", intrinsics=folder / "K.json", depth=folder / "depth", poses=folder / "poses.npy",
        known="keep", apply_mask=False,
    ).reconstruction  # fmt: skip
    errors = measure(kept, clip)
    assert errors.rotation_degrees is not None and errors.rotation_degrees < 0.1
    assert errors.focal_percent is not None and errors.focal_percent < 1e-3


def test_a_perfect_reconstruction_has_no_error(clip: SyntheticClip) -> None:
    perfect = Reconstruction(
        images=(clip.images * 255).byte().numpy(),
        pts3d=clip.pts3d.numpy(),
        depth_z=clip.depth_z[..., 0].numpy(),
        scene_flow=clip.scene_flow.numpy(),
        intrinsics=clip.intrinsics.numpy(),
        camera_poses=(torch.linalg.inv(clip.camera_poses[0]) @ clip.camera_poses).numpy(),
    )
    errors = measure(perfect, clip)
    assert errors.depth_abs_rel == pytest.approx(0, abs=1e-6)
    assert errors.scale_ratio == pytest.approx(1, abs=1e-6)
    assert errors.flow_epe == pytest.approx(0, abs=1e-6)
    assert errors.rotation_degrees == pytest.approx(0, abs=0.1)  # acos near 1 in float32
    assert errors.focal_percent == pytest.approx(0, abs=1e-4)
    assert errors.flow_epe_of_no_motion > 0.01


def test_the_demo_is_what_tiny_was_trained_on() -> None:
    stream = TrainConfig.load("tiny").data.stream
    assert (HEIGHT, WIDTH) == stream.sizes[0]


def test_the_demo_writes_files_that_other_programs_open(tmp_path: Path, model: Any4D) -> None:
    import plyfile
    import pygltflib
    import rerun.chunk

    result, errors, paths = run_demo(model, tmp_path, frames=2, seed=1, trained=True)
    valid = sum(int(result.reconstruction.valid(view).sum()) for view in range(2))
    assert [p.name for p in paths] == list(FILES)
    assert load_npz(tmp_path / "demo.npz").num_views == 2
    points = plyfile.PlyData.read(tmp_path / "demo.ply")["vertex"]
    assert len(points) == valid and {"x", "y", "z", "red"} <= set(points.data.dtype.names)
    gltf = pygltflib.GLTF2().load(str(tmp_path / "demo.glb"))
    assert gltf.meshes
    recording = rerun.chunk.RrdReader(str(tmp_path / "demo.rrd"))
    assert len(list(recording.recordings())) == 1
    with Image.open(tmp_path / "demo.png") as sheet:
        assert sheet.size[0] > 400 and len(np.unique(np.asarray(sheet.convert("RGB")).reshape(-1, 3), axis=0)) > 500
    assert all(value is not None and np.isfinite(value) for value in vars(errors).values())
    assert sum(result.times.seconds.values()) > 0 and result.peak_bytes > 0


def test_the_demo_masks_as_infer_does_and_measures_every_pixel(tmp_path: Path, model: Any4D) -> None:
    config = SceneConfig(num_views=2, height=HEIGHT, width=WIDTH)
    clip = make_clip(1, config)
    masked, whole = (run_views(model, to_views(clip), apply_mask=apply).reconstruction for apply in (True, False))
    mask = trusted(whole)
    assert mask is not None and masked.mask is not None and whole.depth_z is not None
    np.testing.assert_array_equal(mask, masked.mask)
    result, errors, _ = run_demo(model, tmp_path, frames=2, seed=1, trained=True)
    found = result.reconstruction
    np.testing.assert_array_equal(found.mask if mask.any() else mask, mask)
    np.testing.assert_array_equal(found.depth_z, whole.depth_z)
    assert errors == measure(whole, clip)


@pytest.mark.parametrize("kept", [0.0, 0.01])
def test_the_demo_writes_its_files_where_nearly_everything_is_masked(
    kept: float, tmp_path: Path, model: Any4D, monkeypatch: pytest.MonkeyPatch
) -> None:
    import plyfile

    mask = np.random.default_rng(0).random((2, HEIGHT, WIDTH)) < kept
    monkeypatch.setattr("any4d_fast.demo.trusted", lambda reconstruction: mask)
    result, errors, paths = run_demo(model, tmp_path, frames=2, seed=1, trained=True)
    assert all(path.stat().st_size > 0 for path in paths)
    points = plyfile.PlyData.read(tmp_path / "demo.ply")["vertex"]
    assert len(points) == (mask.sum() or sum(result.reconstruction.valid(view).sum() for view in range(2)))
    assert len(points) > 0
    assert errors.depth_abs_rel is not None and np.isfinite(errors.depth_abs_rel)


def test_the_demo_shows_all_that_random_weights_give(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Any4D.from_preset("tiny").eval()
    result, errors, _ = run_demo(model, tmp_path, frames=1, seed=1, trained=False)
    assert result.reconstruction.mask is None and not result.trained
    assert errors.depth_abs_rel is not None and errors.depth_abs_rel > 0.05  # they know nothing


def test_reading_errors_name_the_file(tmp_path: Path, model: Any4D) -> None:
    with pytest.raises(MediaError, match="nowhere"):
        run(model, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="checkpoint: give Any4D weights"):
        any4d_fast.reconstruct(tmp_path)


@pytest.mark.slow
def test_a_long_clip_stays_within_memory() -> None:
    """64 frames of 224 x 168 with `tiny` peak under 3 GB on the CPU, interpreter and libraries included."""
    program = """
import torch
from any4d_fast.pipeline import load_model, run_views
from any4d_fast.stages import peak_memory
model, _ = load_model(None, "tiny", "cpu")
images = torch.randint(0, 256, (64, 168, 224, 3), dtype=torch.uint8)
result = run_views(model, [{"img": image} for image in images])
assert result.reconstruction.num_views == 64
print(peak_memory(torch.device("cpu")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 3e9
