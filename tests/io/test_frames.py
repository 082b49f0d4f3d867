"""A clip from a folder, a video or files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from any4d_fast.io import Frames, MediaError, load_frames


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "clip ö"
    out.mkdir()
    for index in range(12):
        # JPEG content under a .png name, as some public clips have it.
        Image.new("RGB", (9, 6), (20 * index, 0, 0)).save(out / f"f{index}.png", format="JPEG", quality=100)
    return out


def _levels(frames: Frames) -> list[int]:
    return [round(float(image[..., 0].mean()) / 20) for image in frames.images]


def test_folder(folder: Path) -> None:
    frames = load_frames(folder)
    assert _levels(frames) == list(range(12)) == frames.indices
    assert frames.names[10] == "f10.png" and frames.timestamps is None
    assert (frames.original_hw, frames.total, len(frames)) == ((6, 9), 12, 12)
    frames = load_frames(str(folder), frames=3, stride=4)
    assert _levels(frames) == [0, 4, 8] == frames.indices
    assert _levels(load_frames(folder, frames=2)) == [0, 1]


def test_files_keep_their_order(folder: Path) -> None:
    frames = load_frames([folder / "f3.png", str(folder / "f1.png")])
    assert frames.names == ["f3.png", "f1.png"]
    assert _levels(load_frames([folder / "f3.png"])) == [3]


def test_video(tmp_path: Path, make_video: Callable[..., Path]) -> None:
    path = make_video(tmp_path / "v.mp4")
    frames = load_frames([path], stride=5)
    assert frames.indices == [0, 5, 10] and frames.names[1] == "v.mp4#5" and frames.total is None
    np.testing.assert_allclose(frames.timestamps or [], [0, 0.5, 1.0], atol=1e-3)
    assert load_frames(path).total == 12
    assert load_frames(path, frames=12).total is None


def test_transform_sees_each_frame(folder: Path) -> None:
    frames = load_frames(folder, frames=2, transform=lambda image: image[::2, ::2])
    assert frames.images[0].shape == (3, 5, 3) and frames.original_hw == (6, 9)


def test_errors(folder: Path, tmp_path: Path, make_video: Callable[..., Path]) -> None:
    video = make_video(tmp_path / "v.mp4", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    (tmp_path / "notes.txt").write_text("hello")
    cases: list[tuple[object, str]] = [
        ([], "got none"),
        (tmp_path / "none", "no such file or folder"),
        (tmp_path / "empty", "no images in this folder"),
        (tmp_path / "broken.png", r"broken\.png: not an image"),
        (tmp_path / "notes.txt", r"notes\.txt: .*video"),
        ([folder / "f0.png", video], "a video among 2 inputs"),
        ([folder, folder], "a folder among 2 inputs"),
        ([folder / "f0.png", tmp_path / "notes.txt"], "not an image"),
    ]
    for inputs, message in cases:
        with pytest.raises(MediaError, match=message):
            load_frames(inputs)  # type: ignore[arg-type]
    for options in ({"frames": 0}, {"stride": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            load_frames(folder, **options)


def test_sizes_must_agree(folder: Path) -> None:
    Image.new("RGB", (9, 7)).save(folder / "f12.png")
    with pytest.raises(MediaError, match=r"f12\.png: is 9x7 but f0\.png is 9x6"):
        load_frames(folder)


def test_select() -> None:
    image = np.zeros((2, 2, 3), np.uint8)
    frames = Frames([image] * 3, ["a", "b", "c"], [0, 2, 4], (2, 2), total=6)
    assert frames.select(3, "depth") == [0, 1, 2]
    assert frames.select(6, "depth") == [0, 2, 4]
    with pytest.raises(MediaError, match=r"depth: expected 3, .* \(or 6, one for every frame of the source\), got 5"):
        frames.select(5, "depth")
    frames.total = None
    assert frames.select(5, "depth") == [0, 2, 4]
    with pytest.raises(MediaError, match="got 4"):
        frames.select(4, "depth")
