"""The frames of a clip, from a folder, a video or a list of images."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .errors import MediaError
from .images import UInt8Array, is_image, list_images, load_image
from .video import is_video, iter_frames

PathLike = str | os.PathLike[str]


@dataclass
class Frames:
    """Frames chosen from a clip.

    Attributes:
        images: V arrays [H, W, 3] uint8 RGB, all of one size.
        names: V names: file names, or frame numbers of a video.
        indices: V positions in the source, before `stride` and `frames` chose.
        timestamps: V times in seconds; None when the source has none (images).
        original_hw: (height, width) in pixels as read, before any `transform`.
        total: how many frames the source has; None when it was not read to its end.
    """

    images: list[UInt8Array]
    names: list[str]
    indices: list[int]
    original_hw: tuple[int, int]
    timestamps: list[float] | None = None
    total: int | None = None

    def __len__(self) -> int:
        return len(self.images)

    def select(self, count: int, argument: str) -> list[int]:
        """Which of `count` sensor readings belong to these frames: one reading a chosen frame, or one a source frame.

        Raises:
            MediaError: `count` fits neither.
        """
        if count == len(self):
            return list(range(count))
        if count == self.total or (self.total is None and count > self.indices[-1]):
            return list(self.indices)
        source = "" if self.total in (None, len(self)) else f" (or {self.total}, one for every frame of the source)"
        raise MediaError(f"{argument}: expected {len(self)}, one for every frame{source}, got {count}")


@dataclass
class _Collector:
    transform: Callable[[UInt8Array], UInt8Array] | None
    images: list[UInt8Array] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    original_hw: tuple[int, int] | None = None

    def add(self, image: UInt8Array, name: str, index: int) -> None:
        height, width = image.shape[:2]
        if self.original_hw is None:
            self.original_hw = (height, width)
        elif self.original_hw != (height, width):
            first_height, first_width = self.original_hw
            raise MediaError(
                f"{name}: is {width}x{height} but {self.names[0]} is {first_width}x{first_height}; "
                "all frames of a clip must have one size, resize or crop them first"
            )
        self.images.append(image if self.transform is None else self.transform(image))
        self.names.append(name)
        self.indices.append(index)

    def finish(self, total: int | None, timestamps: list[float] | None = None) -> Frames:
        assert self.original_hw is not None
        return Frames(self.images, self.names, self.indices, self.original_hw, timestamps, total)


def load_frames(
    inputs: PathLike | Sequence[PathLike],
    frames: int | None = None,
    stride: int = 1,
    *,
    transform: Callable[[UInt8Array], UInt8Array] | None = None,
) -> Frames:
    """Read a clip.

    Args:
        inputs: one folder of images, one video file, or image files (kept in the given order).
        frames: at most so many, counted after `stride`; None: all.
        stride: every how-many-th frame.
        transform: applied to each [H, W, 3] uint8 image as it is read, such as a resize, so that the full-size
            frames of a long clip never pile up in memory.

    Raises:
        MediaError: a missing, unreadable or damaged file, an empty folder, no inputs, several videos or folders, or
            images of different sizes.
        ValueError: `frames` or `stride` below 1.
    """
    if frames is not None and frames < 1:
        raise ValueError(f"frames: expected 1 or more, or None, got {frames}")
    if stride < 1:
        raise ValueError(f"stride: expected 1 or more, got {stride}")
    paths = [Path(inputs)] if isinstance(inputs, (str, os.PathLike)) else [Path(item) for item in inputs]
    if not paths:
        raise MediaError("inputs: expected a folder, a video or image files, got none")
    for path in paths:
        if not path.exists():
            raise MediaError(f"{path}: no such file or folder")
        if len(paths) > 1 and not is_image(path) and (path.is_dir() or is_video(path)):
            kind = "folder" if path.is_dir() else "video"
            raise MediaError(f"{path}: a {kind} among {len(paths)} inputs; give one folder, one video or only images")
    if paths[0].is_file() and not is_image(paths[0]) and len(paths) == 1 and not _looks_like_image(paths[0]):
        return _from_video(paths[0], frames, stride, transform)
    files = list_images(paths[0]) if paths[0].is_dir() else paths
    collector = _Collector(transform)
    for index in range(0, len(files), stride)[:frames]:
        collector.add(load_image(files[index]), files[index].name, index)
    return collector.finish(len(files))


def _looks_like_image(path: Path) -> bool:
    from .images import IMAGE_SUFFIXES

    # A damaged picture should be reported as a picture; an animated GIF is a video.
    return path.suffix.lower() in IMAGE_SUFFIXES and not is_video(path)


def _from_video(
    path: Path, frames: int | None, stride: int, transform: Callable[[UInt8Array], UInt8Array] | None
) -> Frames:
    collector = _Collector(transform)
    timestamps = []
    for frame in iter_frames(path, stride=stride, max_frames=frames):
        collector.add(frame.image, f"{path.name}#{frame.index}", frame.index)
        timestamps.append(frame.timestamp)
    # Only a video read frame by frame to its end has told how many frames it has.
    total = len(timestamps) if stride == 1 and (frames is None or len(timestamps) < frames) else None
    return collector.finish(total, timestamps)
