"""Clips in folders and as batches, for the tests of the dataset."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from any4d_fast.train.batch import Batch, to_first_view
from any4d_fast.train.dataset import ClipArrays, ClipFolder, DatasetConfig, write_clip
from any4d_fast.train.synthetic import SyntheticClip

SIZE = (28, 42)
LOADER = DatasetConfig(views=2, sizes=((28, 42), (42, 28)), stride=(1, 3), split="all")
ONE_STEP = 0.5 / 255 + 1e-6  # of 8-bit images
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}  # float32 here and float64 there, lengths of a few metres


def truth(clip: SyntheticClip) -> Batch:
    """A synthetic clip as a batch of one."""
    hit = clip.valid_mask
    yes = torch.tensor([True])
    return Batch(
        images=clip.images.movedim(-1, 1)[None],
        ray_directions=clip.ray_directions[None],
        depth_along_ray=clip.depth_along_ray[None],
        camera_poses=to_first_view(clip.camera_poses)[None],
        scene_flow=clip.scene_flow[None],
        depth_mask=hit[None],
        flow_mask=hit[:1].expand_as(hit)[None],
        dynamic_mask=clip.moving_mask[:1].expand_as(hit)[None],
        surface_mask=hit[None],
        has_rays=yes,
        has_poses=yes,
        has_surface=yes,
        is_metric=yes,
    )


def assert_same(batch: Batch, expected: Batch) -> None:
    for field in dataclasses.fields(Batch):
        a, b = getattr(batch, field.name), getattr(expected, field.name)
        assert a.dtype == b.dtype and a.shape == b.shape, field.name
        if field.name == "images":
            torch.testing.assert_close(a, b, rtol=0, atol=ONE_STEP)
        else:
            torch.testing.assert_close(a, b, **(ROUNDING if a.is_floating_point() else {}), msg=field.name)


def small(frames: int = 6, hw: tuple[int, int] = (28, 42), level: int = 0, **changes: object) -> ClipArrays:
    """A flat wall 2 m ahead, a camera that moves right by 0.1 m a frame; red tells the frame, green the clip."""
    height, width = hw
    images = np.zeros((frames, height, width, 3), np.uint8)
    images[..., 0] = np.arange(frames)[:, None, None] * 10
    images[..., 1] = level
    poses = np.tile(np.eye(4), (frames, 1, 1))
    poses[:, 0, 3] = 0.1 * np.arange(frames)
    fields: dict[str, object] = {
        "images": images,
        "depth_z": np.full((frames, height, width), 2.0, np.float32),
        "intrinsics": np.array([[40.0, 0, (width - 1) / 2], [0, 40, (height - 1) / 2], [0, 0, 1]]),
        "camera_poses": poses,
    }
    return ClipArrays(**(fields | changes))  # type: ignore[arg-type]


def frames_of(batch: Batch) -> list[int]:
    return [round(value * 255 / 10) for value in batch.images[0, :, 0, 0, 0].tolist()]


def clips_of(batch: Batch) -> list[int]:
    return [round(value * 255) for value in batch.images[:, 0, 1, 0, 0].tolist()]


def folder_of(path: Path, count: int, **changes: object) -> Path:
    for index in range(count):
        write_clip(path / f"clip{index}", small(level=index, **changes))
    return path


def one(path: Path, **changes: object) -> Batch:
    """The only clip of a folder, with three neighbouring views."""
    config = {"views": 3, "sizes": (SIZE,), "stride": (1, 1), "split": "all"} | changes
    return ClipFolder(path, DatasetConfig(**config))[0]  # type: ignore[arg-type]


def fingerprints(batches: list[Batch]) -> list[tuple[object, ...]]:
    return [(clips_of(batch), batch.images.shape, float(batch.images.sum())) for batch in batches]
