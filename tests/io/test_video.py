"""Reading videos: what is decoded, damage, rotation."""

from __future__ import annotations

import struct
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from any4d_fast.io import MediaError, is_video, iter_frames, read_frames
from any4d_fast.io import video as video_module

MakeVideo = Callable[..., Path]


def _levels(images: list[np.ndarray]) -> list[int]:
    """Which frame each picture is, from its red level."""
    return [round(float(image[:8, :, 0].mean()) / 6) for image in images]


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_all_frames(tmp_path: Path, make_video: MakeVideo, suffix: str, codec: str) -> None:
    path = make_video(tmp_path / f"ü:clip 日{suffix}", codec=codec)
    assert is_video(path)
    images, timestamps = read_frames(path)
    assert len(images) == 12 and images[0].shape == (48, 64, 3) and images[0].dtype == np.uint8
    assert _levels(images) == list(range(12))
    # Matroska keeps times in whole milliseconds.
    np.testing.assert_allclose(np.diff(timestamps), 0.1, atol=2e-3)


def test_odd_size(tmp_path: Path, make_video: MakeVideo) -> None:
    images, _ = read_frames(make_video(tmp_path / "odd.mkv", 3, size=(35, 21), codec="ffv1"))
    assert [image.shape for image in images] == [(21, 35, 3)] * 3


def test_start_stride_and_count(tmp_path: Path, make_video: MakeVideo) -> None:
    path = make_video(tmp_path / "clip.mp4")
    images, timestamps = read_frames(path, start=2, stride=3, max_frames=3)
    assert _levels(images) == [2, 5, 8]
    np.testing.assert_allclose(timestamps, [0.2, 0.5, 0.8], atol=1e-3)
    assert _levels(read_frames(path, stride=100)[0]) == [0]
    assert [frame.index for frame in iter_frames(path, start=10)] == [10, 11]


def test_decoding_stops_at_the_last_frame_wanted(
    tmp_path: Path, make_video: MakeVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video(tmp_path / "clip.mp4", 60)
    decoded = []
    original = video_module._decode

    def counting(*args: object) -> object:
        for item in original(*args):  # type: ignore[arg-type]
            decoded.append(item[0])
            yield item

    converted = []
    upright = video_module._upright
    monkeypatch.setattr(video_module, "_decode", counting)
    monkeypatch.setattr(video_module, "_upright", lambda frame: converted.append(1) or upright(frame))
    read_frames(path, stride=4, max_frames=3)
    assert decoded == list(range(9))
    assert len(converted) == 3
    frames = iter_frames(path)
    next(frames)
    assert len(decoded) == 10, "frames are decoded only when asked for"
    frames.close()


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_rotation(tmp_path: Path, make_video: MakeVideo, rotation: int) -> None:
    plain = read_frames(make_video(tmp_path / "plain.mp4", 2))[0][0]
    turned = read_frames(make_video(tmp_path / "turned.mp4", 2, rotation=rotation))[0][0]
    np.testing.assert_array_equal(turned, np.rot90(plain, rotation // 90))


def test_rotation_of_a_phone_held_upright(tmp_path: Path, make_video: MakeVideo) -> None:
    path = make_video(tmp_path / "clip.mp4", 2)
    plain = read_frames(path)[0][0]
    content = path.read_bytes()
    # The track header's matrix (ISO/IEC 14496-12, 8.3.2): right goes down and down goes left, a clockwise quarter turn.
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
    at = content.index(identity, content.index(b"tkhd"))
    path.write_bytes(content[:at] + clockwise + content[at + 36 :])
    np.testing.assert_array_equal(read_frames(path)[0][0], np.rot90(plain, -1))


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
@pytest.mark.parametrize("keep", [0.02, 0.3, 0.7])
def test_truncated(tmp_path: Path, make_video: MakeVideo, codec: str, suffix: str, keep: float) -> None:
    options = {"movflags": "faststart"} if suffix == ".mp4" else None
    path = make_video(tmp_path / f"clip{suffix}", 40, codec=codec, options=options)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(MediaError, match=r"clip\..*(truncated|damaged)"):
        read_frames(path)


def test_truncated_before_the_index(tmp_path: Path, make_video: MakeVideo) -> None:
    path = make_video(tmp_path / "clip.mp4")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(MediaError, match="cannot be opened as a video"):
        read_frames(path)
    assert not is_video(path)


def test_damage_after_the_last_frame_wanted_does_not_matter(tmp_path: Path, make_video: MakeVideo) -> None:
    path = make_video(tmp_path / "clip.mp4", 40, options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.7)])
    assert _levels(read_frames(path, max_frames=10)[0]) == list(range(10))


def test_damaged_video_can_be_used_up_to_the_damage(tmp_path: Path, make_video: MakeVideo) -> None:
    path = make_video(tmp_path / "clip.mp4", 40, options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.7)])
    with pytest.warns(RuntimeWarning, match="going on with the"):
        images, _ = read_frames(path, on_damage="warn")
    assert 10 < len(images) < 40
    assert _levels(images[:10]) == list(range(10))


def test_not_a_video(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("hello " * 100)
    (tmp_path / "notes.txt").write_text("hello " * 100)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "still.jpg")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    for name, message in [
        ("text.mp4", "cannot be opened as a video"),
        ("notes.txt", "video"),
        ("empty.mp4", "empty"),
        ("folder.mp4", "got a folder"),
        ("none.mp4", "no such file"),
        ("still.jpg", "expected a video"),
        ("sound.wav", "no video stream"),
    ]:
        assert not is_video(tmp_path / name)
        with pytest.raises(MediaError, match=message):
            read_frames(tmp_path / name)


def test_bad_ranges(tmp_path: Path, make_video: MakeVideo) -> None:
    path = make_video(tmp_path / "clip.mp4", 3)
    for options in ({"start": -1}, {"stride": 0}, {"max_frames": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            read_frames(path, **options)  # type: ignore[arg-type]
    with pytest.raises(MediaError, match="start=3; the video is shorter"):
        read_frames(path, start=3)


def test_animated_gif_is_a_video(tmp_path: Path) -> None:
    stills = [Image.new("RGB", (16, 16), (level, 0, 0)) for level in (0, 100, 200)]
    stills[0].save(tmp_path / "x.gif", save_all=True, append_images=stills[1:], duration=100)
    assert is_video(tmp_path / "x.gif")
    assert len(read_frames(tmp_path / "x.gif")[0]) == 3


def test_a_playlist_cannot_reach_the_network(tmp_path: Path) -> None:
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(playlist)
    with pytest.raises(MediaError):
        read_frames(tmp_path / "list.m3u8")
