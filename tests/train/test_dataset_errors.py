"""Bad data is named or counted, and a clip is written complete or not at all."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from any4d_fast.io.errors import MediaError
from any4d_fast.train import dataset_write
from any4d_fast.train.dataset import ClipFolder, DatasetConfig, loader, write_clip
from tests.clip_folders import (
    LOADER,
    SIZE,
    clips_of,
    fingerprints,
    folder_of,
    one,
    small,
)

FLOW = np.zeros((3, 28, 42, 3), np.float32)


@pytest.fixture(autouse=True)
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing to the disk takes most of these tests' time; test_dataset.py does it."""
    monkeypatch.setattr(dataset_write, "flush", lambda path: None)


def _save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def _poses(edit: Callable[[np.ndarray], object]) -> Callable[[Path], None]:
    def spoil(clip: Path) -> None:
        poses = np.load(clip / "poses.npy")
        edit(poses)
        np.save(clip / "poses.npy", poses)

    return spoil


def _info(**changes: object) -> Callable[[Path], object]:
    return lambda clip: (clip / "clip.json").write_text(json.dumps(changes))


_FLOW = "flow/000000/000001.npy"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no images": (lambda c: shutil.rmtree(c / "images"), r"images: no images; expected a folder of files such as"),
    "lost image": (lambda c: (c / "images/000002.png").unlink(), r"images: holds 2 images, expected 3 as clip.json"),
    "no image": (lambda c: (c / "images/000001.png").write_bytes(b"text"), r"000001.png: not an image"),
    "cut image": (
        lambda c: (c / "images/000001.png").write_bytes((c / "images/000001.png").read_bytes()[:60]),
        r"000001.png: the image is truncated",
    ),
    "other size": (
        lambda c: Image.new("RGB", (21, 28)).save(c / "images/000001.png"),
        r"000001.png: is 21x28 but 000000.png is 42x28; expected one size",
    ),
    "two images": (lambda c: Image.new("RGB", (42, 28)).save(c / "images/000001.jpg"), "is of the same frame"),
    "too short": (
        lambda c: (
            [(c / part / f"00000{i}.{s}").unlink() for part, s in (("images", "png"), ("depth", "npy")) for i in (1, 2)]
            + [(c / "clip.json").unlink(), (c / "poses.npy").unlink()]
        ),
        r"images: holds 1 images, expected at least 3 for 3 views 1 frames apart",
    ),
    "depth of no image": (lambda c: _save(c / "depth/x.npy", np.ones((28, 42))), r"x.npy: there is no image of this"),
    "depth shape": (lambda c: _save(c / "depth/000001.npy", np.ones((3, 28, 42))), r"000001.npy: expected a depth map"),
    "depth turned": (lambda c: _save(c / "depth/000001.npy", np.ones((42, 28))), r"is 28x42 but the images are 42x28"),
    "depth bytes": (lambda c: _save(c / "depth/000001.npy", np.ones((28, 42), np.uint8)), r"expected floats in metres"),
    "depth text": (lambda c: (c / "depth/000001.npy").write_text("1 2"), r"000001.npy: truncated, damaged or not"),
    "depth cut": (
        lambda c: (c / "depth/000001.npy").write_bytes((c / "depth/000001.npy").read_bytes()[:300]),
        r"000001.npy: truncated",
    ),
    "depth pickle": (
        lambda c: np.save(c / "depth/000001.npy", np.array([{}], dtype=object), allow_pickle=True),
        r"000001.npy: truncated, damaged or not",
    ),
    "all depth NaN": (
        lambda c: [_save(c / f"depth/00000{i}.npy", np.full((28, 42), np.nan)) for i in range(3)],
        r"depth: no known pixel in the depth of frames 000000, 000001, 000002",
    ),
    "no depth files": (lambda c: [p.unlink() for p in (c / "depth").iterdir()], r"depth: holds nothing that can be"),
    "empty masks": (
        lambda c: [_save(c / f"masks/00000{i}.npy", np.zeros((28, 42), bool)) for i in range(3)],
        r"masks: the masks of frames .* are all empty",
    ),
    "mask of floats": (
        lambda c: [_save(c / f"masks/00000{i}.npy", np.zeros((28, 42))) for i in range(3)],
        r"000000.npy: expected booleans",
    ),
    "flow shape": (lambda c: _save(c / _FLOW, np.ones((28, 42, 2))), r"000001.npy: expected flow \[H, W, 3\]"),
    "flow size": (lambda c: _save(c / _FLOW, np.ones((42, 28, 3))), r"000001.npy: is 28x42 but the images are 42x28"),
    "flow NaN": (lambda c: _save(c / _FLOW, np.full((28, 42, 3), np.nan)), r"000000: no known pixel in the flow"),
    "flow file": (lambda c: _save(c / "flow/000001.npy", np.ones((28, 42, 3))), r"expected flow/REFERENCE/TARGET"),
    "flow frame": (lambda c: _save(c / "flow/9/000001.npy", np.ones((28, 42, 3))), r"flow/9: there is no image 9"),
    "poses count": (lambda c: np.save(c / "poses.npy", np.tile(np.eye(4), (4, 1, 1))), r"holds 4 poses, expected 3"),
    "poses scaled": (_poses(lambda p: np.multiply(p, 2, out=p, where=np.arange(4)[:, None] < 3)), "is not rigid"),
    "poses NaN": (_poses(lambda p: p.__setitem__((1, 0, 3), np.nan)), r"pose 1 holds NaN"),
    "poses apart": (_poses(lambda p: p.__setitem__((1, 0, 3), 1e9)), r"poses of frames .*: expected cameras at most"),
    "two poses": (lambda c: (c / "poses.txt").write_text("1"), r"poses.npy: the clip has poses.txt too"),
    "K count": (lambda c: (c / "intrinsics.json").write_text(json.dumps([[40, 40, 20, 13]] * 2)), "holds 2 matrices"),
    "K focal": (lambda c: (c / "intrinsics.json").write_text("[0, 40, 20, 13]"), "focal lengths must be positive"),
    "K text": (lambda c: (c / "intrinsics.json").write_text("fx"), "not valid JSON"),
    "K and rays": (lambda c: _save(c / "rays.npy", np.ones((28, 42, 3))), "the clip has intrinsics.json too"),
    "rays size": (
        lambda c: [(c / "intrinsics.json").unlink(), _save(c / "rays.npy", np.ones((14, 21, 3)))],
        r"rays.npy: expected \[28, 42, 3\]",
    ),
    "rays zero": (
        lambda c: [(c / "intrinsics.json").unlink(), _save(c / "rays.npy", np.zeros((28, 42, 3)))],
        r"rays.npy: ray directions of frame 0 hold zeros",
    ),
    "info key": (_info(is_metrik=True), r"clip.json: unknown is_metrik; expected keys among is_metric"),
    "info value": (_info(is_metric="yes"), r"clip.json: is_metric: expected true or false, got 'yes'"),
    "info kind": (_info(depth="log"), r'clip.json: depth: expected "z" or "along_ray", got'),
    "info text": (lambda c: (c / "clip.json").write_text("{"), r"clip.json: is not valid JSON"),
    "static flow": (
        lambda c: [_info(static=True)(c), _save(c / _FLOW, np.zeros((28, 42, 3)))],
        r"flow: clip.json says that the clip is static",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_data_is_named_or_counted(tmp_path: Path, kind: str) -> None:
    spoil, message = BAD[kind]
    for name in ("bad", "good"):
        write_clip(tmp_path / name, small(3, level=len(name)))
    spoil(tmp_path / "bad")
    config = DatasetConfig(views=3, sizes=(SIZE,), stride=(1, 1), split="all")
    with pytest.raises(MediaError, match=message) as error:
        ClipFolder(tmp_path, config)[0]
    assert str(tmp_path / "bad") in str(error.value)

    batches = loader(ClipFolder(tmp_path, dataclasses.replace(config, on_error="skip")), 2, seed=0)
    for _ in range(2):
        batch = next(batches)
        assert clips_of(batch) == [4, 4]
        assert all(getattr(batch, field.name).isfinite().all() for field in dataclasses.fields(batch))
    assert batches.skipped >= 2 and list(batches.skipped_clips) == ["bad"]
    assert str(tmp_path / "bad") in batches.skipped_clips["bad"]


def test_zero_dynamic_pixels_are_no_error(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip", small(3, scene_flow=np.zeros((3, 28, 42, 3), np.float32)))
    batch = one(tmp_path)
    assert batch.flow_mask.all() and not batch.dynamic_mask.any()


def test_replacements_are_the_same_in_every_process_and_after_resuming(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder_of(tmp_path, 6)
    for index in (1, 4):
        (tmp_path / f"clip{index}" / "images" / "000002.png").write_bytes(b"")
    dataset = ClipFolder(tmp_path, dataclasses.replace(LOADER, on_error="skip"))
    with caplog.at_level(logging.WARNING):
        here = loader(dataset, 3, seed=5)
        expected = fingerprints([next(here) for _ in range(8)])
    assert here.skipped > 0 and len(caplog.records) == len(here.skipped_clips)
    workers = loader(dataset, 3, seed=5, num_workers=2)
    assert fingerprints([next(workers) for _ in range(8)]) == expected
    assert (workers.skipped, workers.skipped_clips) == (here.skipped, here.skipped_clips)
    workers.close()
    assert fingerprints([next(loader(dataset, 3, seed=5, start_step=7))]) == expected[7:]


def test_nothing_but_bad_data_is_an_error(tmp_path: Path) -> None:
    folder_of(tmp_path, 2)
    for index in range(2):
        (tmp_path / f"clip{index}" / "clip.json").write_text("{")
    dataset = ClipFolder(tmp_path, dataclasses.replace(LOADER, on_error="skip"))
    message = r"100 draws one after the other failed, of 2 different clips of 2; the first: .*clip.json"
    with pytest.raises(MediaError, match=message):
        next(loader(dataset, 2))
    batches = loader(dataset, 2, num_workers=1)
    with pytest.raises(MediaError, match=message):
        next(batches)
    batches.close()


def test_errors_of_a_worker_are_those_of_this_process(tmp_path: Path) -> None:
    folder_of(tmp_path, 2)
    (tmp_path / "clip0" / "poses.npy").write_bytes(b"")
    dataset = ClipFolder(tmp_path, LOADER)
    for workers in (0, 1):
        batches = loader(dataset, 1, shuffle=False, num_workers=workers)
        with pytest.raises(MediaError) as error:
            next(batches)
        assert str(error.value).startswith(str(tmp_path / "clip0" / "poses.npy: truncated"))
        assert clips_of(next(batches)) == [1] and batches.step == 2
        batches.close()


def test_a_clip_appears_complete_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def failing(*args: object) -> None:
        nonlocal calls
        calls += 1
        assert not (tmp_path / "clip").exists() and len(list(tmp_path.glob(".tmp-*"))) == 1
        if calls == 3:
            raise OSError(28, "No space left on device")
        original(*args)

    original = dataset_write._write_depth
    monkeypatch.setattr(dataset_write, "_write_depth", failing)
    with pytest.raises(MediaError, match="clip: cannot write here .No space left"):
        write_clip(tmp_path / "clip", small())
    assert list(tmp_path.iterdir()) == []


def test_a_clip_is_replaced_only_when_asked_and_only_by_a_good_one(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip", small(3, level=1))
    with pytest.raises(MediaError, match="already exists"):
        write_clip(tmp_path / "clip", small(3, level=2))
    poses = np.tile(np.eye(4) * 2, (3, 1, 1))
    poses[:, 3, 3] = 1
    with pytest.raises(MediaError, match=r"clip/poses.npy: pose 0 is not rigid"):
        write_clip(tmp_path / "clip", small(3, camera_poses=poses), overwrite=True)
    assert clips_of(one(tmp_path)) == [1]
    write_clip(tmp_path / "clip", small(3, level=2), overwrite=True)
    assert clips_of(one(tmp_path)) == [2] and [p.name for p in tmp_path.iterdir()] == ["clip"]


def test_a_clip_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clip(tmp_path / "clip", small(3, level=1))
    calls, original = [], Path.rename

    def failing(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:  # the old clip is out of the way
            raise OSError(28, "No space left on device")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(MediaError, match="clip: cannot write here .No space left"):
        write_clip(tmp_path / "clip", small(3, level=2), overwrite=True)
    assert clips_of(one(tmp_path)) == [1] and [p.name for p in tmp_path.iterdir()] == ["clip"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((3, 28, 42))[..., None].repeat(2, -1)}, r"images: expected \[V, H, W, 3\]"),
        ({"images": np.full((3, 28, 42, 3), 255.0)}, "images: expected floats from 0 to 1, got 255 to 255"),
        ({"images": np.full((3, 28, 42, 3), np.nan)}, "images: expected floats from 0 to 1, got nan"),
        ({"depth_z": np.ones((2, 28, 42))}, r"depth_z: expected \[3, h, w\] floats, got \[2, 28, 42\]"),
        ({"depth_z": np.ones((3, 28, 42), int)}, "depth_z: expected .* floats, got .* int64"),
        ({"depth_along_ray": np.ones((3, 28, 42))}, "expected one of them, got both"),
        ({"surface_mask": np.ones((3, 28, 42))}, r"surface_mask: expected \[3, h, w\] booleans"),
        ({"ray_directions": np.ones((28, 41, 3)), "intrinsics": None}, "ray_directions: expected"),
        ({"scene_flow": np.ones((2, 28, 42, 3))}, "scene_flow: expected one map for each of the 3 frames"),
        ({"scene_flow": {(0, 3): np.ones((28, 42, 3))}}, r"scene_flow: expected frames 0 to 2, got \(0, 3\)"),
        ({"scene_flow": {(0, 1): np.ones((28, 42, 2))}}, r"scene_flow: expected \[h, w, 3\] floats"),
        ({"scene_flow": FLOW, "flow_mask": np.ones((3, 28, 41), bool)}, r"flow_mask: .* expected \[28, 42\] booleans"),
        ({"scene_flow": FLOW, "dynamic_mask": np.ones((3, 28, 42))}, r"dynamic_mask: frames \(0, 1\): .* float64"),
        (
            {"scene_flow": {(0, 1): FLOW[1]}, "flow_mask": {(0, 2): FLOW[2, ..., 0] == 0}},
            r"\(0, 2\): expected scene_",
        ),
        ({"intrinsics": np.eye(3)[None].repeat(2, 0)}, "holds 2 matrices, expected 1 or 3"),
        ({"static": True, "scene_flow": np.zeros((3, 28, 42, 3))}, "the clip is static"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_clip(tmp_path / "clip", small(3, **changes))
    assert list(tmp_path.iterdir()) == []
