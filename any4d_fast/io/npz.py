"""Every factor of a reconstruction in one NumPy archive."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from ..reconstruction import Reconstruction
from .atomic import atomic_path
from .errors import MediaError

_FORMAT = "any4d_fast.reconstruction"
_VERSION = 1
_ARRAYS = (
    "images", "pts3d", "depth_z", "depth_along_ray", "ray_directions", "scene_flow", "conf", "mask", "intrinsics",
    "camera_poses", "timestamps",
)  # fmt: skip


def save_npz(reconstruction: Reconstruction, path: str | os.PathLike[str], *, compress: bool = False) -> None:
    """Write every factor to an .npz file; an existing file is replaced only by a complete one.

    Keys (those that the model does not predict are absent). World: the reference view's camera, OpenCV axes
    (x right, y down, z forward); pixel centres at integer coordinates.

    ================  =================  =========================================================================
    key               shape, type        meaning
    ================  =================  =========================================================================
    images            [V,H,W,3] uint8    RGB, as the model saw them
    pts3d             [V,H,W,3] float32  points, metres, world frame
    depth_z           [V,H,W] float32    metres along the optical axis
    depth_along_ray   [V,H,W] float32    metres from the camera centre
    ray_directions    [V,H,W,3] float32  unit vectors, camera frame
    scene_flow        [V,H,W,3] float32  metres, world frame; row i moves the points of view `reference`, pixel by
                                         pixel, to the time of view i: tracks = pts3d[reference] + scene_flow
    conf              [V,H,W] float32    confidence, larger is surer
    mask              [V,H,W] bool       True: the geometry is to be used
    intrinsics        [V,3,3] float32    pixels
    camera_poses      [V,4,4] float32    camera-to-world, metres
    metric_scale      [] float64         metres for one unit of the network's own
    reference         [] int64           index of the reference view
    timestamps        [V] float64        seconds
    names             [V] str            names of the frames
    format, version   [] str, [] int64   "any4d_fast.reconstruction", 1
    ================  =================  =========================================================================

    Args:
        reconstruction: what to write.
        path: the file.
        compress: zlib; about 10-30 % smaller and many times slower.

    Raises:
        MediaError: the file cannot be written.
    """
    arrays: dict[str, Any] = {name: getattr(reconstruction, name) for name in _ARRAYS}
    arrays = {name: value for name, value in arrays.items() if value is not None}
    arrays["metric_scale"] = np.float64(reconstruction.metric_scale)
    arrays["reference"] = np.int64(reconstruction.reference)
    arrays["names"] = np.array(reconstruction.names, dtype=np.str_)
    arrays["format"] = np.array(_FORMAT)
    arrays["version"] = np.int64(_VERSION)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        (np.savez_compressed if compress else np.savez)(file, **arrays)


def load_npz(path: str | os.PathLike[str]) -> Reconstruction:
    """Read what `save_npz` wrote. Nothing in the file is executed (no pickles).

    Raises:
        MediaError: missing, truncated or damaged, not such a file, or of a later version.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            content = {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise MediaError(f"{path}: no such file") from error
    # A damaged archive shows as OSError, ValueError, EOFError, zipfile.BadZipFile or zlib.error; a single .npy array
    # as TypeError or AttributeError, for it is no context manager.
    except Exception as error:
        raise MediaError(f"{path}: truncated, damaged or not an .npz file ({error})") from error
    required = ("format", "version", "images", "pts3d", "metric_scale", "reference", "names")
    missing = [name for name in required if name not in content]
    if missing or str(content["format"]) != _FORMAT:
        reason = f"it lacks {', '.join(missing)}" if missing else f"its format is {content['format']}"
        raise MediaError(f"{path}: not a reconstruction written by any4d-fast ({reason})")
    if int(content["version"]) > _VERSION:
        raise MediaError(f"{path}: version {int(content['version'])} is newer than {_VERSION}; upgrade any4d-fast")
    try:
        return Reconstruction(
            **{name: content.get(name) for name in _ARRAYS},  # type: ignore[arg-type]
            metric_scale=float(content["metric_scale"]),
            reference=int(content["reference"]),
            names=[str(name) for name in content["names"]],
        )
    except (ValueError, TypeError) as error:
        raise MediaError(f"{path}: its arrays do not fit together ({error})") from error
