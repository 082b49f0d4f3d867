"""Depth, intrinsics and poses from files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import roma
import torch
from PIL import Image

from any4d_fast.io import Frames, MediaError, load_depth, load_intrinsics, load_poses

K = np.array([[500.0, 0, 320], [0, 510, 240], [0, 0, 1]])


def _frames(count: int = 2, total: int | None = 4, hw: tuple[int, int] = (5, 7)) -> Frames:
    indices = list(range(0, 2 * count, 2))
    return Frames([np.zeros((*hw, 3), np.uint8)] * count, [str(i) for i in indices], indices, hw, total=total)


def _poses(count: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    quats = torch.nn.functional.normalize(torch.randn(count, 4, generator=generator, dtype=torch.float64), dim=-1)
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, :3, :3] = roma.unitquat_to_rotmat(quats).numpy()
    poses[:, :3, 3] = torch.randn(count, 3, generator=generator).numpy()
    return poses


@pytest.fixture
def depth() -> np.ndarray:
    values = np.random.default_rng(0).uniform(0.5, 60, (4, 5, 7)).astype(np.float32)
    values[:, 0, 0] = 0
    return values


def test_depth_folder_of_millimetres(tmp_path: Path, depth: np.ndarray) -> None:
    for index, item in enumerate(depth):
        Image.fromarray(np.rint(item * 1000).astype(np.uint16)).save(tmp_path / f"d{index + 8}.png")
    loaded = load_depth(tmp_path)
    assert loaded.dtype == np.float32
    np.testing.assert_allclose(loaded, depth, atol=5.1e-4)  # half a millimetre and its float32 rounding
    np.testing.assert_allclose(load_depth(tmp_path, _frames()), depth[::2], atol=5.1e-4)


def test_depth_arrays(tmp_path: Path, depth: np.ndarray) -> None:
    (tmp_path / "maps").mkdir()
    for index, item in enumerate(depth):
        np.save(tmp_path / "maps" / f"{index}.npy", item)
    np.save(tmp_path / "d.npy", depth.astype(np.float64)[..., None])
    np.savez(tmp_path / "d.npz", depth_z=depth, other=np.zeros(3))
    np.savez(tmp_path / "one.npz", anything=depth)
    for name in ("maps", "d.npy", "d.npz", "one.npz"):
        np.testing.assert_array_equal(load_depth(tmp_path / name), depth)
        np.testing.assert_array_equal(load_depth(tmp_path / name, _frames()), depth[::2])
    np.save(tmp_path / "single.npy", depth[0])
    assert load_depth(tmp_path / "single.npy").shape == (1, 5, 7)


def test_depth_that_is_not_finite_is_unknown(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.array([[np.nan, np.inf, -np.inf, 2.0]]))
    np.testing.assert_array_equal(load_depth(tmp_path / "d.npy"), [[[0, 0, 0, 2]]])


def test_depth_errors(tmp_path: Path, depth: np.ndarray) -> None:
    for name in ("empty", "bytes", "sizes"):
        (tmp_path / name).mkdir()
    Image.fromarray(np.ones((5, 7), np.uint8)).save(tmp_path / "bytes" / "0.png")
    np.save(tmp_path / "sizes" / "0.npy", depth[0])
    np.save(tmp_path / "sizes" / "1.npy", depth[0, :3])
    np.save(tmp_path / "negative.npy", -depth)
    np.save(tmp_path / "ints.npy", np.ones((2, 5, 7), np.uint16))
    np.save(tmp_path / "rank.npy", np.ones((2, 5, 7, 3)))
    np.save(tmp_path / "pickle.npy", np.array([{"a": 1}], dtype=object))
    np.savez(tmp_path / "keys.npz", a=depth, b=depth)
    np.save(tmp_path / "good.npy", depth)
    (tmp_path / "depth.mp4").touch()
    (tmp_path / "short.npy").write_bytes((tmp_path / "good.npy").read_bytes()[:200])
    (tmp_path / "short.npz").write_bytes((tmp_path / "keys.npz").read_bytes()[:200])
    for name, message in [
        ("empty", "no depth maps"),
        ("bytes", "16-bit depth in millimetres"),
        ("sizes", "is 7x3 but the first depth map is 7x5"),
        ("negative.npy", "negative depth"),
        ("ints.npy", "expected floating-point metres"),
        ("rank.npy", r"expected depth of shape \[V, H, W\]"),
        ("pickle.npy", "not a NumPy file of plain numbers"),
        ("keys.npz", "expected a key depth_z or depth, got a, b"),
        ("short.npy", "truncated"),
        ("short.npz", "truncated"),
        ("none.npy", "no such file"),
        ("no_folder", "no such file or folder"),
        ("depth.mp4", "expected .npy or .npz"),
    ]:
        with pytest.raises(MediaError, match=message):
            load_depth(tmp_path / name)
    with pytest.raises(MediaError, match=r"number of depth maps: expected 3, .*got 4"):
        load_depth(tmp_path / "good.npy", _frames(3, total=6))
    with pytest.raises(MediaError, match="depth is 7x5 but the images are 14x10"):
        load_depth(tmp_path / "good.npy", _frames(hw=(10, 14)))


def test_intrinsics_forms(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"fx": 500, "fy": 510, "cx": 320, "cy": 240}))
    (tmp_path / "b.json").write_text(json.dumps({"K": K.tolist()}))
    (tmp_path / "c.json").write_text(json.dumps(K.tolist()))
    (tmp_path / "d.txt").write_text("# camera\n500 0 320\n0 510 240\n0 0 1\n")
    (tmp_path / "e.txt").write_text("500, 510, 320, 240\n")
    (tmp_path / "f.txt").write_text(" ".join(map(str, K.ravel())))
    np.save(tmp_path / "g.npy", K.astype(np.float32))
    np.savez(tmp_path / "h.npz", intrinsics=K, other=K)
    for path in sorted(tmp_path.iterdir()):
        np.testing.assert_array_equal(load_intrinsics(path), K, err_msg=path.name)
    np.testing.assert_array_equal(load_intrinsics("500,510, 320,240"), K)


def test_intrinsics_of_every_frame(tmp_path: Path) -> None:
    matrices = np.stack([K, K, K * [[2], [2], [1]], K])
    np.save(tmp_path / "k.npy", matrices)
    assert load_intrinsics(tmp_path / "k.npy").shape == (4, 3, 3)
    np.testing.assert_array_equal(load_intrinsics(tmp_path / "k.npy", _frames()), matrices[::2])
    assert load_intrinsics("500,510,320,240", _frames()).shape == (3, 3)
    with pytest.raises(MediaError, match=r"number of intrinsics: expected 3, .*got 4"):
        load_intrinsics(tmp_path / "k.npy", _frames(3, total=6))


def test_intrinsics_errors(tmp_path: Path) -> None:
    texts = {
        "nan.txt": "500 nan 320 240",
        "focal.txt": "0 510 320 240",
        "count.txt": "1 2 3 4 5",
        "ragged.txt": "500 0 320\n0 510\n",
        "word.txt": "500 510 320 left",
        "empty.txt": "# nothing\n",
        "row.txt": "500 0 320\n0 510 240\n0 0 2",
        "skew.txt": "500 50 320\n0 510 240\n0 0 1",
        "bad.json": "{",
        "keys.json": '{"focal": 3}',
        "ragged.json": "[[1, 2], [3]]",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    for name, message in [
        ("nan.txt", "NaN or infinite"),
        ("focal.txt", "focal lengths must be positive"),
        ("count.txt", r"got shape \[1, 5\]"),
        ("ragged.txt", "line 2: expected 3 numbers as above, got 2"),
        ("word.txt", "line 1: expected numbers"),
        ("empty.txt", "holds no numbers"),
        ("row.txt", "expected rows"),
        ("skew.txt", "skew"),
        ("bad.json", "not valid JSON"),
        ("keys.json", "got focal"),
        ("ragged.json", "all of one length"),
        ("binary.txt", "cannot be read as text"),
        ("none.txt", "no such file"),
    ]:
        with pytest.raises(MediaError, match=message):
            load_intrinsics(tmp_path / name)
    with pytest.raises(MediaError, match="four numbers"):
        load_intrinsics("500,x,1,2")
    with pytest.raises(MediaError, match="expected a 3x3 matrix or"):
        load_intrinsics("500,510")


def test_pose_forms(tmp_path: Path) -> None:
    poses = _poses(4)
    quats = roma.rotmat_to_unitquat(torch.from_numpy(poses[:, :3, :3])).numpy()
    np.save(tmp_path / "a.npy", poses)
    np.save(tmp_path / "b.npy", poses[:, :3])
    np.savez(tmp_path / "c.npz", camera_poses=poses, intrinsics=K)
    np.savetxt(tmp_path / "kitti.txt", poses[:, :3].reshape(4, 12))
    np.savetxt(tmp_path / "flat.txt", poses.reshape(4, 16))
    tum = np.column_stack([np.arange(4) / 10, poses[:, :3, 3], quats])
    np.savetxt(tmp_path / "tum.txt", tum, header="timestamp tx ty tz qx qy qz qw")
    (tmp_path / "d.json").write_text(json.dumps({"poses": poses.tolist()}))
    for path in sorted(tmp_path.iterdir()):
        np.testing.assert_allclose(load_poses(path), poses, atol=1e-12, err_msg=path.name)
        np.testing.assert_allclose(load_poses(path, _frames()), poses[::2], atol=1e-12)


def test_pose_errors(tmp_path: Path) -> None:
    poses = _poses(2)
    arrays = {
        "shape": np.zeros((2, 3)),
        "nan": np.where(np.arange(16).reshape(4, 4) == 3, np.nan, poses),
        "scaled": poses * [[[2, 2, 2, 1]]],
        "mirrored": poses * [[[-1, 1, 1, 1]]],
        "bottom": poses + np.eye(4)[3][:, None],
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    for name, message in [
        ("shape", "expected poses"),
        ("nan", "pose 0 holds NaN"),
        ("scaled", "pose 0 is not rigid"),
        ("mirrored", "pose 0 is not rigid"),
        ("bottom", "last row"),
    ]:
        with pytest.raises(MediaError, match=message):
            load_poses(tmp_path / f"{name}.npy")
    (tmp_path / "tum.txt").write_text("0 0 0 0 0 0 0 2\n")
    with pytest.raises(MediaError, match="row 0: expected a unit quaternion"):
        load_poses(tmp_path / "tum.txt")
    (tmp_path / "order.txt").write_text("1 0 0 0 0 0 0 1\n0 0 0 0 0 0 0 1\n")
    with pytest.warns(UserWarning, match="timestamps do not increase"):
        load_poses(tmp_path / "order.txt")
    np.save(tmp_path / "good.npy", poses)
    with pytest.raises(MediaError, match=r"number of poses: expected 3, .*got 2"):
        load_poses(tmp_path / "good.npy", _frames(3, total=6))
