"""Rerun recordings."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from ..reconstruction import FloatArray, Reconstruction
from .atomic import atomic_path
from .errors import require_viz
from .points import sample_valid_pixels

_APPLICATION = "any4d-fast"


def save_rrd(
    reconstruction: Reconstruction,
    path: str | os.PathLike[str],
    *,
    max_points: int = 50_000,
    max_tracks: int = 1_000,
    trail: int = 16,
    min_confidence: float | None = None,
    jpeg_quality: int = 90,
    seed: int = 0,
) -> None:
    """Write a Rerun recording: everything on the timeline `frame`, and on `time` (seconds) where times are known.

    Entities, world frame (the reference view's camera: x right, y down, z forward), metres:

    - `world/camera`: pose and pinhole; `world/camera/image`: JPEG; `world/camera/depth`: float16 metres, 0: masked
    - `world/points`: the frame's points
    - `world/scene_flow`: arrows from points of the reference view to where they are at this frame's time
    - `world/tracks`: the paths of these points over the last frames

    The size is bounded by V times `max_points`, `max_tracks` x `trail` and the images, and is held in memory before it
    is written; exact numbers are what `save_npz` is for.

    Args:
        reconstruction: what to write; masked points are left out.
        path: the file; an existing one is replaced only by a complete one.
        max_points: points of a frame, drawn at random when there are more.
        max_tracks: arrows and tracks of a frame, points drawn once for all frames.
        trail: how many frames a track reaches back.
        min_confidence: leave out points with a smaller `conf`.
        jpeg_quality: 1 to 95.
        seed: of the draws.

    Raises:
        ImportError: rerun-sdk is not installed.
        ValueError: a negative limit, or a trail below 2.
        MediaError: the file cannot be written.
    """
    if max_points < 0 or max_tracks < 0 or trail < 2:
        raise ValueError(
            f"max_points, max_tracks: expected 0 or more; trail: 2 or more; got {max_points}, {max_tracks} and {trail}"
        )
    rerun = require_viz("rerun")
    rng = np.random.default_rng(seed)
    # Not `stream.save(path)`: a thread of rerun's own would write, and where it cannot (a full disk) it only logs so,
    # leaves half a file and lets `flush` wait forever.
    stream = rerun.RecordingStream(_APPLICATION)
    try:
        recording = stream.binary_stream()
        stream.send_blueprint(_blueprint(rerun), make_active=False, make_default=True)
        stream.log("world", rerun.ViewCoordinates.RDF, static=True, strict=True)
        tracks = _Tracks(reconstruction, max_tracks, min_confidence, rng)
        for view in range(reconstruction.num_views):
            stream.set_time("frame", sequence=view)
            if reconstruction.timestamps is not None:
                stream.set_time("time", duration=float(reconstruction.timestamps[view]))
            _log_camera(rerun, stream, reconstruction, view, jpeg_quality)
            chosen = sample_valid_pixels(reconstruction.valid(view, min_confidence), max_points, rng)
            points = rerun.Points3D(
                reconstruction.pts3d[view].reshape(-1, 3)[chosen],
                colors=reconstruction.images[view].reshape(-1, 3)[chosen],
            )
            stream.log("world/points", points, strict=True)
            tracks.log(rerun, stream, view, trail)
        content = recording.read()
    finally:
        stream.disconnect()
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


class _Tracks:
    """The same few points of the reference view, followed through every frame."""

    def __init__(
        self,
        reconstruction: Reconstruction,
        max_tracks: int,
        min_confidence: float | None,
        rng: np.random.Generator,
    ) -> None:
        reference = reconstruction.reference
        self.paths: FloatArray | None = None  # [V, N, 3] metres, world
        if reconstruction.scene_flow is None:
            return
        chosen = sample_valid_pixels(reconstruction.valid(reference, min_confidence), max_tracks, rng)
        self.origins = reconstruction.pts3d[reference].reshape(-1, 3)[chosen]  # [N, 3]
        views = reconstruction.num_views
        self.paths = self.origins + reconstruction.scene_flow.reshape(views, -1, 3)[:, chosen]
        self.colors = _height_colors(chosen // reconstruction.width, reconstruction.height)

    def log(self, rerun: Any, stream: Any, view: int, trail: int) -> None:
        if self.paths is None:
            return
        finite = np.isfinite(self.paths[view]).all(axis=-1)
        arrows = rerun.Arrows3D(
            origins=self.origins[finite],
            vectors=(self.paths[view] - self.origins)[finite],
            colors=self.colors[finite],
        )
        stream.log("world/scene_flow", arrows, strict=True)
        recent = self.paths[max(0, view - trail + 1) : view + 1]
        finite = np.isfinite(recent).all(axis=(0, 2))
        # A strip needs two points; before that, an empty one clears what a viewer shows.
        strips = list(recent[:, finite].swapaxes(0, 1)) if len(recent) > 1 else []
        colors = self.colors[finite] if strips else None
        stream.log("world/tracks", rerun.LineStrips3D(strips, colors=colors), strict=True)


def _height_colors(rows: npt.NDArray[np.int64], height: int) -> npt.NDArray[np.uint8]:
    """Bright colours that change with the image row, so that neighbouring tracks are told apart."""
    from .colors import time_colors

    return time_colors(256)[(rows * 255) // max(height - 1, 1)]


def _log_camera(rerun: Any, stream: Any, reconstruction: Reconstruction, view: int, jpeg_quality: int) -> None:
    poses, intrinsics = reconstruction.camera_poses, reconstruction.intrinsics
    if poses is not None and np.isfinite(poses[view]).all():
        pose = poses[view]
        stream.log("world/camera", rerun.Transform3D(translation=pose[:3, 3], mat3x3=pose[:3, :3]), strict=True)
    if intrinsics is not None and np.isfinite(intrinsics[view]).all():
        pinhole = rerun.Pinhole(
            image_from_camera=intrinsics[view],
            resolution=[reconstruction.width, reconstruction.height],
            camera_xyz=rerun.ViewCoordinates.RDF,
        )
        stream.log("world/camera", pinhole, strict=True)
    jpeg = _jpeg(reconstruction.images[view], jpeg_quality)
    stream.log("world/camera/image", rerun.EncodedImage(contents=jpeg, media_type="image/jpeg"), strict=True)
    if reconstruction.depth_z is not None:
        # float16 keeps 0.05 % at any distance up to 65 km in half the bytes.
        depth = np.where(reconstruction.valid(view), reconstruction.depth_z[view], 0)
        depth = np.nan_to_num(depth, posinf=0, neginf=0).clip(0, 65000).astype(np.float16)
        stream.log("world/camera/depth", rerun.DepthImage(depth, meter=1.0), strict=True)


def _jpeg(image: npt.NDArray[np.uint8], quality: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def _blueprint(rerun: Any) -> Any:
    """The scene beside image and depth; depth stays out of the scene, where it would repeat the points."""
    blueprint = require_viz("rerun.blueprint")
    return blueprint.Blueprint(
        blueprint.Horizontal(
            blueprint.Spatial3DView(
                origin="/world",
                contents=["+ /world/**", "- /world/camera/depth"],
                name="Scene",
            ),
            blueprint.Vertical(
                blueprint.Spatial2DView(origin="/world/camera/image", name="Image"),
                blueprint.Spatial2DView(origin="/world/camera/depth", name="Depth"),
            ),
            column_shares=[3, 1],
        ),
        blueprint.TimePanel(state="expanded", timeline="frame"),
        collapse_panels=True,
    )
