"""Coloured point clouds as PLY files."""

from __future__ import annotations

import os

from ..reconstruction import Reconstruction
from .atomic import atomic_path
from .errors import require_viz
from .points import gather_points


def save_ply(
    reconstruction: Reconstruction,
    path: str | os.PathLike[str],
    *,
    max_points: int | None = 5_000_000,
    min_confidence: float | None = None,
    seed: int = 0,
) -> None:
    """Write the valid points of all views as a binary PLY: x, y, z in float32 metres, and red, green, blue, alpha.

    The frame is the world's (the reference view's camera: x right, y down, z forward). Every view's points are where
    they were at that view's time, so moving things appear once for each view.

    Args:
        reconstruction: what to write; masked points are left out.
        path: the file; an existing one is replaced only by a complete one.
        max_points: draw so many at random when there are more; None: all.
        min_confidence: leave out points with a smaller `conf`.
        seed: of the draw.

    Raises:
        ImportError: trimesh is not installed.
        MediaError: the file cannot be written.
    """
    trimesh = require_viz("trimesh")
    points, colors = gather_points(reconstruction, max_points=max_points, min_confidence=min_confidence, seed=seed)
    with atomic_path(path) as temporary:
        temporary.write_bytes(trimesh.PointCloud(points, colors=colors).export(file_type="ply"))
