"""What is written is opened again: by the package itself (npz) and by other libraries (PLY, GLB, RRD, PNG)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from any4d_fast import io
from any4d_fast.io.colors import direction_colors, srgb_to_linear, time_colors
from any4d_fast.io.glb import frustum_corners
from any4d_fast.io.points import gather_points
from any4d_fast.reconstruction import Reconstruction

Make = Callable[..., Reconstruction]
SUFFIXES = [".npz", ".ply", ".glb", ".rrd", ".png"]


def _valid_points(r: Reconstruction) -> np.ndarray:
    return np.concatenate([r.pts3d[view][r.valid(view)] for view in range(r.num_views)])


@pytest.mark.parametrize("compress", [False, True])
def test_npz_round_trip(tmp_path: Path, make_reconstruction: Make, compress: bool) -> None:
    r = make_reconstruction(reference=1, names=["ä.png", "b", "日"])
    io.save_npz(r, tmp_path / "x.npz", compress=compress)
    got = io.load_npz(tmp_path / "x.npz")
    for name, value in vars(r).items():
        np.testing.assert_array_equal(getattr(got, name), value, err_msg=name)
    sparse = Reconstruction(images=r.images, pts3d=r.pts3d)
    io.save(sparse, tmp_path / "x.npz")
    got = io.load_npz(tmp_path / "x.npz")
    assert got.depth_z is None and got.timestamps is None and got.metric_scale == 1.0


def test_npz_errors(tmp_path: Path, make_reconstruction: Make) -> None:
    r = make_reconstruction()
    io.save_npz(r, tmp_path / "good.npz")
    content = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(content[: len(content) // 2])
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    with np.load(tmp_path / "good.npz") as archive:
        arrays = dict(archive)
    np.savez(tmp_path / "new.npz", **(arrays | {"version": np.int64(2)}))
    np.savez(tmp_path / "sizes.npz", **(arrays | {"conf": np.zeros((3, 3, 3), np.float32)}))
    np.savez(tmp_path / "pickle.npz", **(arrays | {"conf": np.array([{}], dtype=object)}))
    for name, message in [
        ("short.npz", "truncated"),
        ("other.npz", "it lacks format"),
        ("array.npy", "not an .npz file"),
        ("new.npz", "version 2 is newer"),
        ("sizes.npz", "do not fit together"),
        ("pickle.npz", "damaged"),
        ("none.npz", "no such file"),
    ]:
        with pytest.raises(io.MediaError, match=message):
            io.load_npz(tmp_path / name)


def test_ply_opened_by_plyfile(tmp_path: Path, make_reconstruction: Make) -> None:
    plyfile = pytest.importorskip("plyfile")
    r = make_reconstruction()
    r.pts3d[1, 5, 5] = np.inf
    io.save(r, tmp_path / "x.ply")
    data = plyfile.PlyData.read(tmp_path / "x.ply")
    assert not data.text
    vertex = data["vertex"]
    points = np.stack([vertex["x"], vertex["y"], vertex["z"]], axis=-1)
    colors = np.stack([vertex["red"], vertex["green"], vertex["blue"]], axis=-1)
    assert points.dtype == np.float32
    np.testing.assert_array_equal(points, _valid_points(r))
    np.testing.assert_array_equal(colors, np.concatenate([r.images[i][r.valid(i)] for i in range(3)]))


def test_points_are_bounded(make_reconstruction: Make) -> None:
    r = make_reconstruction()
    everything = {tuple(point) for point in _valid_points(r)}
    points, colors = gather_points(r, max_points=100, seed=3)
    assert points.shape == colors.shape == (100, 3)
    assert len({tuple(point) for point in points} & everything) == 100
    np.testing.assert_array_equal(points, gather_points(r, max_points=100, seed=3)[0])
    assert not np.array_equal(points, gather_points(r, max_points=100, seed=4)[0])
    assert len(gather_points(r, max_points=0)[0]) == 0
    assert r.conf is not None
    sure, _ = gather_points(r, min_confidence=2.0)
    assert len(sure) == sum(int((r.valid(i) & (r.conf[i] >= 2)).sum()) for i in range(3))
    with pytest.raises(ValueError, match="max_points"):
        gather_points(r, max_points=-1)


def _glb_array(gltf: Any, accessor_index: int) -> np.ndarray:
    accessor = gltf.accessors[accessor_index]
    view = gltf.bufferViews[accessor.bufferView]
    dtype = {5126: np.float32, 5121: np.uint8}[accessor.componentType]
    width = {"VEC3": 3, "VEC4": 4}[accessor.type]
    start = (view.byteOffset or 0) + (accessor.byteOffset or 0)
    return np.frombuffer(gltf.binary_blob(), dtype, accessor.count * width, start).reshape(-1, width)


def test_glb_opened_by_pygltflib(tmp_path: Path, make_reconstruction: Make) -> None:
    pygltflib = pytest.importorskip("pygltflib")
    r = make_reconstruction()
    io.save(r, tmp_path / "x.glb")
    gltf = pygltflib.GLTF2().load(str(tmp_path / "x.glb"))
    nodes = {node.name: gltf.meshes[node.mesh].primitives[0] for node in gltf.nodes if node.mesh is not None}
    assert sorted(nodes) == ["camera_0000", "camera_0001", "camera_0002", "points"]
    assert all(node.matrix in (None, np.eye(4).ravel().tolist()) for node in gltf.nodes)
    cloud = nodes["points"]
    assert cloud.mode == pygltflib.POINTS
    np.testing.assert_array_equal(_glb_array(gltf, cloud.attributes.POSITION), _valid_points(r) * [1, -1, -1])
    colors = np.concatenate([r.images[i][r.valid(i)] for i in range(3)])
    np.testing.assert_array_equal(_glb_array(gltf, cloud.attributes.COLOR_0)[:, :3], srgb_to_linear(colors))
    for view in range(3):
        vertices = _glb_array(gltf, nodes[f"camera_{view:04d}"].attributes.POSITION)
        corners = frustum_corners(r, view, 1.0)
        assert corners is not None
        centre = vertices[np.linalg.norm(vertices - corners[0] * [1, -1, -1], axis=1).argsort()[:12]].mean(axis=0)
        size = np.abs(vertices - centre).max()
        np.testing.assert_allclose(centre, [0.2 * view, 0, 0], atol=0.03 * size)
        assert vertices[:, 2].max() < 0.05 * size, "cameras look along -z"


def test_glb_without_a_point_or_a_camera_is_an_error(tmp_path: Path, make_reconstruction: Make) -> None:
    r = make_reconstruction()
    assert r.mask is not None and r.intrinsics is not None
    r.mask[:] = False
    r.intrinsics[:, 0, 0] *= -1
    (tmp_path / "x.glb").write_bytes(b"earlier result")
    with pytest.warns(RuntimeWarning, match="no valid points"), pytest.raises(io.MediaError, match="nothing to write"):
        io.save(r, tmp_path / "x.glb")
    assert (tmp_path / "x.glb").read_bytes() == b"earlier result"


def test_frustum_corners(make_reconstruction: Make) -> None:
    r = make_reconstruction()
    corners = frustum_corners(r, 1, 2.0)
    assert corners is not None
    # The image spans width / focal = 1 / 0.9 of the depth; the camera sits 0.2 m to the right.
    half = np.array([1 / 0.9, 21 / 28 / 0.9])
    np.testing.assert_allclose(corners[0], [0.2, 0, 0], atol=1e-6)
    np.testing.assert_allclose(corners[1], [0.2 - half[0], -half[1], 2], atol=1e-6)
    np.testing.assert_allclose(corners[3], [0.2 + half[0], half[1], 2], atol=1e-6)
    assert corners[5, 1] < corners[1, 1], "the mark is above the image, where y is smaller"
    assert r.camera_poses is not None
    r.camera_poses[0] = np.nan
    assert frustum_corners(r, 0, 1.0) is None


def _rows(path: Path, entity: str, component: str) -> dict[int, Any]:
    """Frame number -> the logged values of a component."""
    from rerun.chunk import RrdReader

    out = {}
    for chunk in RrdReader(path).stream():
        batch = chunk.to_record_batch()
        if chunk.entity_path != entity or component not in batch.schema.names:
            continue
        if chunk.is_static:
            out[-1] = batch.column(component)[0].as_py()
            continue
        for index in range(batch.num_rows):
            out[batch.column("frame")[index].as_py()] = batch.column(component)[index].as_py()
    return out


def test_rrd_opened_by_rerun(tmp_path: Path, make_reconstruction: Make) -> None:
    pytest.importorskip("rerun.chunk", reason="reading recordings needs rerun-sdk")
    r = make_reconstruction(reference=1)
    path = tmp_path / "ü x.rrd"
    io.save(r, path, max_points=200, max_tracks=15, trail=2)
    positions = _rows(path, "/world/points", "Points3D:positions")
    assert sorted(positions) == [0, 1, 2]
    for view, points in positions.items():
        expected = {tuple(point) for point in r.pts3d[view][r.valid(view)]}
        assert len(points) == 200 and {tuple(np.float32(point)) for point in points} <= expected
    origins = _rows(path, "/world/scene_flow", "Arrows3D:origins")
    vectors = _rows(path, "/world/scene_flow", "Arrows3D:vectors")
    strips = _rows(path, "/world/tracks", "LineStrips3D:strips")
    tracks = r.tracks().reshape(3, -1, 3)
    chosen = [int(np.flatnonzero((r.pts3d[1].reshape(-1, 3) == np.float32(o)).all(1))[0]) for o in origins[0]]
    assert len(chosen) == 15
    for view in range(3):
        np.testing.assert_allclose(np.add(origins[view], vectors[view]), tracks[view, chosen], atol=1e-5)
    assert not strips[0]
    np.testing.assert_allclose(strips[2], tracks[1:3, chosen].swapaxes(0, 1), atol=1e-6)
    translations = _rows(path, "/world/camera", "Transform3D:translation")
    np.testing.assert_allclose([translations[i][0] for i in range(3)], [[0, 0, 0], [0.2, 0, 0], [0.4, 0, 0]], atol=1e-6)
    matrices = _rows(path, "/world/camera", "Pinhole:image_from_camera")
    assert r.intrinsics is not None and r.depth_z is not None
    np.testing.assert_allclose(np.reshape(matrices[0][0], (3, 3)).T, r.intrinsics[0])
    right_down_forward = [3, 2, 5]
    assert _rows(path, "/world", "ViewCoordinates:xyz")[-1][0] == right_down_forward
    buffer = _rows(path, "/world/camera/depth", "DepthImage:buffer")[2][0]
    depth = np.frombuffer(bytes(buffer), np.float16).reshape(21, 28)
    # float16 rounds to 11 bits; masked pixels are 0.
    np.testing.assert_allclose(depth, np.where(r.valid(2), r.depth_z[2], 0), rtol=2**-11)
    assert len(_rows(path, "/world/camera/image", "EncodedImage:blob")) == 3


def test_rrd_timelines(tmp_path: Path, make_reconstruction: Make) -> None:
    reader = pytest.importorskip("rerun.chunk", reason="reading recordings needs rerun-sdk").RrdReader
    for name, timestamps in [("with", np.array([0.0, 0.5, 1.0])), ("without", None)]:
        path = tmp_path / f"{name}.rrd"
        io.save(make_reconstruction(timestamps=timestamps), path)
        lines = {line for chunk in reader(path).stream() for line in chunk.timeline_names} - {"log_time"}
        assert lines == ({"frame"} if timestamps is None else {"frame", "time"})
        assert len(reader(path).recordings()) == 1 and len(reader(path).blueprints()) == 1


def test_rrd_limits_are_checked(tmp_path: Path, make_reconstruction: Make) -> None:
    with pytest.raises(ValueError, match="trail: 2 or more"):
        io.save(make_reconstruction(), tmp_path / "x.rrd", trail=1)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("views", "height", "width"), [(1, 1, 1), (3, 21, 28), (11, 13, 7)])
def test_sheet(tmp_path: Path, make_reconstruction: Make, views: int, height: int, width: int) -> None:
    pytest.importorskip("matplotlib")
    r = make_reconstruction(views, height, width)
    io.save(r, tmp_path / "x.png", max_views=4, thumb_width=40)
    with Image.open(tmp_path / "x.png") as sheet:
        assert sheet.format == "PNG" and sheet.mode == "RGB"
        thumb = round(40 * height / width)
        assert sheet.size == (520, 24 + 26 + 4 * (24 + thumb + 4))
    plain = Reconstruction(images=r.images, pts3d=r.pts3d)
    assert io.contact_sheet(plain, thumb_width=40, max_views=4).shape[0] == 24 + 26 + 24 + thumb + 4
    many = io.contact_sheet(make_reconstruction(20), thumb_width=100, max_views=8)
    assert many.shape[1] == 24 + 8 * 104 - 4
    with pytest.raises(ValueError, match="max_views"):
        io.contact_sheet(r, max_views=0)


def test_colors() -> None:
    np.testing.assert_array_equal(srgb_to_linear(np.array([0, 128, 255], np.uint8)), [0, 55, 255])
    assert time_colors(1).shape == (1, 3) and time_colors(5)[0, 2] > 200 and time_colors(5)[-1, 0] > 200
    vectors = np.array([[0, 0, 0], [1, 0, 0], [-2, 0, 0], [0, 0, 1], [np.nan, 0, 0]])
    expected = [[255, 255, 255], [255, 0, 0], [0, 255, 255], [255, 0, 0], [255, 255, 255]]
    np.testing.assert_array_equal(direction_colors(vectors, 1.0), expected)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_everything_masked_or_not_finite(tmp_path: Path, make_reconstruction: Make, suffix: str) -> None:
    r = make_reconstruction(mask=np.zeros((3, 21, 28), bool))
    r.pts3d[:] = np.nan
    path = tmp_path / f"x{suffix}"
    if suffix in (".ply", ".glb"):
        with pytest.warns(RuntimeWarning, match="no valid points"):
            io.save(r, path)
    else:
        io.save(r, path)
    assert path.stat().st_size > 100
    if suffix == ".ply":
        assert len(pytest.importorskip("plyfile").PlyData.read(path)["vertex"]) == 0


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_only_what_is_required(tmp_path: Path, make_reconstruction: Make, suffix: str) -> None:
    r = make_reconstruction(1, 1, 1)
    io.save(Reconstruction(images=r.images, pts3d=r.pts3d), tmp_path / f"x{suffix}")
    assert os.listdir(tmp_path) == [f"x{suffix}"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_failure_keeps_the_old_file(
    tmp_path: Path, make_reconstruction: Make, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        io.save(make_reconstruction(), path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]


_SAVE_IN_200_KB = """
import faulthandler, resource, sys
from any4d_fast import io
faulthandler.dump_traceback_later(60, exit=True)
loaded = io.load_npz(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    io.save(loaded, sys.argv[2])
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_cannot_be_written_to_its_end(tmp_path: Path, make_reconstruction: Make, suffix: str) -> None:
    """As on a full disk: an error with the file's name, at once, and the old file."""
    r = make_reconstruction(8, 96, 128)
    r.images = np.random.default_rng(0).integers(0, 255, r.images.shape, dtype=np.uint8)
    io.save(r, tmp_path / "in.npz")
    target = tmp_path / "out" / f"x{suffix}"
    target.parent.mkdir()
    target.write_bytes(b"old")
    command = [sys.executable, "-c", _SAVE_IN_200_KB, tmp_path / "in.npz", target]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"File too large: '{target}'" in done.stdout, done.stdout + done.stderr
    assert os.listdir(target.parent) == [target.name] and target.read_bytes() == b"old"


def test_save_checks_the_path_first(tmp_path: Path, make_reconstruction: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.ply").mkdir()
    (tmp_path / "file").touch()
    for name, message in [
        ("x.obj", r"unknown output format .obj; use one of .npz \(every factor\), .ply"),
        ("x", "no suffix"),
        ("folder.ply", "is a folder"),
        ("file/x.ply", "is a file, not a folder"),
    ]:
        with pytest.raises(io.MediaError, match=message):
            io.check_output(tmp_path / name)
        with pytest.raises(io.MediaError, match=message):
            io.save(make_reconstruction(), tmp_path / name)
    io.save(make_reconstruction(), tmp_path / "new" / "folder" / "X.NPZ")
    assert (tmp_path / "new" / "folder" / "X.NPZ").exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs trimesh; run `pip install any4d-fast\[viz\]`"):
        io.check_output(tmp_path / "x.ply")


def test_missing_extra_says_what_to_install(
    tmp_path: Path, make_reconstruction: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("trimesh", "rerun", "matplotlib"):
        monkeypatch.setitem(sys.modules, module, None)
    for writer in (io.save_ply, io.save_glb, io.save_rrd, io.save_sheet):
        with pytest.raises(ImportError, match=r"pip install any4d-fast\[viz\]"):
            writer(make_reconstruction(), tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_import_is_light() -> None:
    code = (
        "import sys, any4d_fast.io as io; io.save, io.load_frames, io.load_depth, io.load_npz;"
        "heavy = {'triton', 'rerun', 'trimesh', 'matplotlib', 'av', 'PIL', 'torch'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
