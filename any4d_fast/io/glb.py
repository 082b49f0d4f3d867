"""Points and cameras as binary glTF."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from ..reconstruction import FloatArray, Reconstruction
from .atomic import atomic_path
from .colors import srgb_to_linear, time_colors
from .errors import MediaError, require_viz
from .points import gather_points

# glTF is y up, and its viewers look along -z: turning OpenCV axes (y down, z forward) by 180 degrees about x puts the
# reference camera where such a viewer stands.
_OPENCV_TO_GLTF = np.array([1.0, -1.0, -1.0], dtype=np.float32)


def save_glb(
    reconstruction: Reconstruction,
    path: str | os.PathLike[str],
    *,
    max_points: int | None = 1_000_000,
    min_confidence: float | None = None,
    frustum_size: float | None = None,
    seed: int = 0,
) -> None:
    """Write the valid points of all views and a wire frustum for each camera as a binary glTF scene.

    The frame is glTF's (x right, y up, z backward), metres: the world's points times (1, -1, -1). Vertex colours are
    linear light, as glTF has them. Nodes: `points`, and `camera_0000` ... coloured by time from blue to red; cameras
    need intrinsics and poses.

    Args:
        reconstruction: what to write; masked points are left out.
        path: the file; an existing one is replaced only by a complete one.
        max_points: draw so many at random when there are more; None: all.
        min_confidence: leave out points with a smaller `conf`.
        frustum_size: metres from a camera's centre to its drawn image; None: a tenth of the scene's spread.
        seed: of the draw.

    Raises:
        ImportError: trimesh is not installed.
        MediaError: the file cannot be written, or there is neither a point nor a camera to write.
    """
    trimesh = require_viz("trimesh")
    points, colors = gather_points(reconstruction, max_points=max_points, min_confidence=min_confidence, seed=seed)
    size = _default_frustum_size(points) if frustum_size is None else frustum_size
    scene = trimesh.Scene()
    if len(points):
        cloud = trimesh.PointCloud(points * _OPENCV_TO_GLTF, colors=srgb_to_linear(colors))
        scene.add_geometry(cloud, node_name="points", geom_name="points")
    for view, color in enumerate(srgb_to_linear(time_colors(reconstruction.num_views))):
        corners = frustum_corners(reconstruction, view, size)
        if corners is None:
            continue
        vertices, faces = _wire_mesh(corners[_FRUSTUM_EDGES], radius=0.01 * size)
        mesh = trimesh.Trimesh(
            vertices * _OPENCV_TO_GLTF, faces, vertex_colors=np.tile(color, (len(vertices), 1)), process=False
        )
        name = f"camera_{view:04d}"
        scene.add_geometry(mesh, node_name=name, geom_name=name)
    if not scene.geometry:
        raise MediaError(
            f"{path}: nothing to write: every point is masked or below min_confidence, and no camera has finite "
            "numbers and positive focal lengths; write .npz to look at the raw factors"
        )
    with atomic_path(path) as temporary:
        temporary.write_bytes(scene.export(file_type="glb"))


# The centre, the image's corners (clockwise from top left), and a mark above the image's upper edge.
_FRUSTUM_EDGES = np.array([[0, 1], [0, 2], [0, 3], [0, 4], [1, 2], [2, 3], [3, 4], [4, 1], [1, 5], [2, 5]])


def frustum_corners(reconstruction: Reconstruction, view: int, size: float) -> FloatArray | None:
    """A camera's centre, image corners at depth `size`, and the tip of its "up" mark, [6, 3] metres, world frame.

    None where the reconstruction lacks the camera or it is not finite.
    """
    if reconstruction.intrinsics is None or reconstruction.camera_poses is None:
        return None
    intrinsics, pose = reconstruction.intrinsics[view], reconstruction.camera_poses[view]
    if not (np.isfinite(intrinsics).all() and np.isfinite(pose).all() and (np.diag(intrinsics) > 0).all()):
        return None
    # Pixel centres are integers, so the image reaches half a pixel further.
    left, top, right, bottom = -0.5, -0.5, reconstruction.width - 0.5, reconstruction.height - 0.5
    uv = np.array(
        [[left, top], [right, top], [right, bottom], [left, bottom], [(left + right) / 2, top - 0.2 * (bottom - top)]]
    )
    rays = np.ones((5, 3))
    rays[:, :2] = (uv - intrinsics[:2, 2]) / np.diag(intrinsics)[:2]
    local = np.concatenate([np.zeros((1, 3)), size * rays])
    return (local @ pose[:3, :3].T + pose[:3, 3]).astype(np.float32)


def _default_frustum_size(points: FloatArray) -> float:
    if len(points) == 0:
        return 0.1
    spread = float(np.median(np.linalg.norm(points - np.median(points, axis=0), axis=1)))
    return 0.1 * spread or 0.1


def _wire_mesh(edges: FloatArray, radius: float) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """Thin three-sided bars along edges [E, 2, 3]; a mesh, because many glTF viewers draw no visible lines."""
    start, end = edges[:, 0], edges[:, 1]
    along = end - start
    along = along / np.linalg.norm(along, axis=1, keepdims=True).clip(min=1e-12)
    helper = np.where(np.abs(along[:, :1]) < 0.7, [[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]])
    side = np.cross(along, helper)
    side = side / np.linalg.norm(side, axis=1, keepdims=True).clip(min=1e-12)
    other = np.cross(along, side)
    angles = 2 * np.pi * np.arange(3) / 3
    ring = radius * (np.cos(angles)[None, :, None] * side[:, None] + np.sin(angles)[None, :, None] * other[:, None])
    vertices = np.concatenate([start[:, None] + ring, end[:, None] + ring], axis=1)  # [E, 6, 3]
    bar = np.array([[0, 2, 1], [3, 4, 5], *_sides()])
    faces = bar[None] + 6 * np.arange(len(edges))[:, None, None]
    return vertices.reshape(-1, 3).astype(np.float32), faces.reshape(-1, 3)


def _sides() -> list[list[int]]:
    out = []
    for i in range(3):
        j = (i + 1) % 3
        out += [[i, j, j + 3], [i, j + 3, i + 3]]
    return out
