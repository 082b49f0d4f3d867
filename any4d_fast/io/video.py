"""Reading frames from video files, one at a time."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .errors import MediaError
from .images import UInt8Array, is_image

if TYPE_CHECKING:
    from av.container import InputContainer

# FFmpeg also "demuxes" still pictures (image2, png_pipe, ...) and text; these are its names for those.
_NOT_VIDEO_FORMATS = frozenset({"image2", "tty", "bin", "xbin", "adf", "idf"})


@dataclass(frozen=True)
class VideoFrame:
    """One decoded frame: `index` in the file (from 0), `timestamp` in seconds, `image` [H, W, 3] uint8 RGB."""

    index: int
    timestamp: float
    image: UInt8Array


def _open(path: Path) -> InputContainer:
    import av

    if path.is_dir():
        raise MediaError(f"{path}: expected a video file, got a folder")
    if not path.exists():
        raise MediaError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise MediaError(f"{path}: the file is empty")
    try:
        # "file:" keeps a name with a colon from being read as a protocol, and the whitelist keeps a playlist from
        # reaching the network.
        return av.open(f"file:{path}", options={"protocol_whitelist": "file"})
    except (av.FFmpegError, OSError) as error:
        raise MediaError(
            f"{path}: cannot be opened as a video; it is truncated, damaged or not a video ({error})"
        ) from error


def is_video(path: str | os.PathLike[str]) -> bool:
    """Whether the content of a file is a video that can be opened (an animated GIF counts)."""
    path = Path(path)
    if not path.is_file() or is_image(path):
        return False
    try:
        with _open(path) as container:
            return bool(container.streams.video) and not _is_still_or_text(container)
    except MediaError:
        return False


def _is_still_or_text(container: InputContainer) -> bool:
    names = container.format.name.split(",")
    return any(name in _NOT_VIDEO_FORMATS or name.endswith("_pipe") for name in names)


def iter_frames(
    path: str | os.PathLike[str],
    *,
    start: int = 0,
    stride: int = 1,
    max_frames: int | None = None,
    on_damage: Literal["raise", "warn"] = "raise",
) -> Iterator[VideoFrame]:
    """Decode a video frame by frame; one frame is held at a time and decoding stops at the last one wanted.

    Frames are turned upright by the file's rotation. A file that ends early or has damaged frames before the last
    one wanted is an error, because frames would be missing or smeared without anybody noticing;
    `on_damage="warn"` gives the intact frames before the first damaged one and a warning instead. An early end shows
    by a half-written frame or by the header's frame count or duration, with some slack (5 % and two frames, or 10 %
    and half a second); a stream without a header, such as raw .h264, does not tell.

    Args:
        path: a video file, local.
        start: index of the first frame, counted from 0.
        stride: every how-many-th frame.
        max_frames: at most so many frames; None: to the end.
        on_damage: "raise" or "warn".

    Raises:
        MediaError: missing, unreadable, no video stream, truncated or damaged, or no frame at `start`.
        ValueError: a negative start, or a stride or max_frames below 1.
    """
    _check_range(start, stride, max_frames)
    path = Path(path)
    given = 0
    with _open(path) as container:
        if _is_still_or_text(container):
            raise MediaError(f"{path}: expected a video, got {container.format.long_name}")
        if not container.streams.video:
            kinds = ", ".join(sorted({str(stream.type) for stream in container.streams})) or "nothing"
            raise MediaError(f"{path}: no video stream in this file (it holds: {kinds})")
        try:
            for index, seconds, frame in _decode(container, path):
                if index < start or (index - start) % stride:
                    continue
                yield VideoFrame(index, seconds, _upright(frame))
                given += 1
                if max_frames is not None and given >= max_frames:
                    return
        except MediaError as error:
            if on_damage == "raise" or given == 0:
                raise
            warnings.warn(f"{error}; going on with the {given} frames before", RuntimeWarning, stacklevel=2)
            return
    if given == 0:
        raise MediaError(f"{path}: no frame at start={start}; the video is shorter")


def read_frames(
    path: str | os.PathLike[str],
    *,
    start: int = 0,
    stride: int = 1,
    max_frames: int | None = None,
    on_damage: Literal["raise", "warn"] = "raise",
) -> tuple[list[UInt8Array], list[float]]:
    """The frames of a video as [H, W, 3] uint8 RGB arrays, and their timestamps in seconds; see `iter_frames`."""
    images, timestamps = [], []
    for frame in iter_frames(path, start=start, stride=stride, max_frames=max_frames, on_damage=on_damage):
        images.append(frame.image)
        timestamps.append(frame.timestamp)
    return images, timestamps


def _check_range(start: int, stride: int, max_frames: int | None) -> None:
    if start < 0:
        raise ValueError(f"start: expected 0 or more, got {start}")
    if stride < 1:
        raise ValueError(f"stride: expected 1 or more, got {stride}")
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames: expected 1 or more, or None, got {max_frames}")


def _decode(container: InputContainer, path: Path) -> Iterator[tuple[int, float, Any]]:
    """Yield (index, seconds, decoded frame); MediaError on damage or when the file ends before its header says."""
    import av

    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    # 25 is what FFmpeg itself assumes when nothing is known.
    interval = 1 / float(stream.average_rate or stream.guessed_rate or 25)
    # AVI has a constant rate and stores no presentation times; reordered frames come out with wrong ones.
    timed = container.format.name != "avi"
    count, end = 0, -interval
    try:
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise MediaError(f"{path}: frame {count} is truncated or damaged")
            given = frame.time if timed else count * interval
            # Times always increase, also where a file has none or repeats one.
            end = given if given is not None and (count == 0 or given > end) else end + interval
            yield count, float(end), frame
            count += 1
    except av.FFmpegError as error:
        raise MediaError(f"{path}: truncated or damaged after {count} frames ({error})") from error
    if count == 0:
        raise MediaError(f"{path}: no frame could be decoded; the file is truncated or damaged")
    # Edit lists may drop a few frames of an intact file, hence the slack.
    if stream.frames and count < 0.95 * stream.frames - 2:
        raise MediaError(f"{path}: truncated: {count} of the {stream.frames} frames that its header announces")
    if not stream.frames and container.duration and len(container.streams) == 1:
        begin = (container.start_time or 0) / av.time_base
        seconds = container.duration / av.time_base
        if end - begin < 0.9 * seconds - 0.5:
            raise MediaError(f"{path}: truncated: {end - begin:.1f} of the {seconds:.1f} s that its header announces")


def _upright(frame: Any) -> UInt8Array:
    image = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4  # counterclockwise
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image
