"""Made-up reconstructions and videos for the tests of reading and writing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from any4d_fast.reconstruction import Reconstruction


def _make_reconstruction(views: int = 3, height: int = 21, width: int = 28, **changes: object) -> Reconstruction:
    """A wavy floor in front of a camera that moves right, with a disc that moves down by 0.1 m a frame."""
    v, u = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    focal = 0.9 * width
    intrinsics = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]], np.float32)
    plane = np.stack([(u - intrinsics[0, 2]) / focal, (v - intrinsics[1, 2]) / focal, np.ones_like(u)], axis=-1)
    length = np.linalg.norm(plane, axis=-1)
    disc = np.hypot(u / width - 0.5, v / height - 0.45) < 0.2
    steps = np.arange(views)[:, None, None]
    depth_z = np.where(disc, 1.5, 5 - 3 * v / height + 0.3 * np.sin(6 * u / width + 0.2 * steps))
    poses = np.tile(np.eye(4, dtype=np.float32), (views, 1, 1))
    poses[:, 0, 3] = 0.2 * np.arange(views)
    blue = np.where(disc, 230, 60 + 10 * steps)
    images = np.stack(np.broadcast_arrays(255 * u / width, 255 * v / height, blue), axis=-1)
    motion = np.array([0.02, 0.1, 0.0])
    mask = np.ones((views, height, width), bool)
    mask[:, :3, :4] = False
    fields: dict[str, object] = {
        "images": images.astype(np.uint8),
        "pts3d": (depth_z[..., None] * plane + poses[:, None, None, :3, 3]).astype(np.float32),
        "depth_z": depth_z.astype(np.float32),
        "depth_along_ray": (depth_z * length).astype(np.float32),
        "ray_directions": np.tile(plane / length[..., None], (views, 1, 1, 1)).astype(np.float32),
        "scene_flow": (disc[None, ..., None] * steps[..., None] * motion).astype(np.float32),
        "conf": (1 + 4 / depth_z).astype(np.float32),
        "mask": mask,
        "intrinsics": np.tile(intrinsics, (views, 1, 1)),
        "camera_poses": poses,
        "metric_scale": 1.5,
        "timestamps": np.arange(views) / 10,
        "names": [f"frame_{i:02d}.png" for i in range(views)],
    }
    return Reconstruction(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def make_reconstruction() -> Callable[..., Reconstruction]:
    return _make_reconstruction


def _make_video(
    path: Path,
    frames: int = 12,
    size: tuple[int, int] = (64, 48),
    codec: str = "mpeg4",
    rotation: int | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Encode frames (width, height = `size`) whose red level is 6 * index (mod 256); noise keeps the packets large."""
    import av

    width, height = size
    noise = np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 8_000_000
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for index in range(frames):
            image = np.zeros((height, width, 3), np.uint8)
            image[..., 0] = 6 * index % 256
            image[height // 2 :, :, 1] = np.roll(noise, 5 * index, axis=1)[height // 2 :]
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@pytest.fixture
def make_video() -> Callable[..., Path]:
    return _make_video
