"""Reading what other sensors gave: depth, intrinsics and camera poses."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import MediaError
from .frames import Frames
from .images import IMAGE_SUFFIXES, load_raw_array, natural_key

Array = npt.NDArray[Any]
PathLike = str | os.PathLike[str]

_K_KEYS = ("intrinsics", "K", "camera_matrix", "intrinsic_matrix")
_POSE_KEYS = ("camera_poses", "poses", "cam2world")
_DEPTH_KEYS = ("depth_z", "depth")


def load_depth(path: PathLike, frames: Frames | None = None) -> npt.NDArray[np.float32]:
    """Read depth along the optical axis, [V, H, W] metres; 0: unknown.

    Args:
        path: a folder with one file for every frame in natural order, each a 16-bit PNG or TIFF in millimetres or a
            .npy [H, W] in metres; or one .npy [V, H, W] (or [H, W]) or .npz (key `depth_z` or `depth`) in metres.
            Values that are not finite count as unknown.
        frames: the chosen frames: picks the maps that belong to them and checks number and size.

    Raises:
        MediaError: missing, unreadable or damaged files, wrong shapes or types, negative depth, or a number or size
            that does not match the frames.
    """
    path = Path(path)
    if path.is_dir():
        files = _depth_files(path)
        chosen = range(len(files)) if frames is None else frames.select(len(files), f"{path}: number of depth maps")
        maps = [_read_depth_map(files[i]) for i in chosen]
        for file, item in zip((files[i] for i in chosen), maps, strict=True):
            if item.shape != maps[0].shape:
                raise MediaError(f"{file}: is {_size(item)} but the first depth map is {_size(maps[0])}")
        depth = np.stack(maps)
    else:
        if not path.exists():
            raise MediaError(f"{path}: no such file or folder")
        depth = _as_metres(_read_array(path, _DEPTH_KEYS), path)
        depth = depth[..., 0] if depth.ndim == 4 and depth.shape[-1] == 1 else depth
        depth = depth[None] if depth.ndim == 2 else depth
        if depth.ndim != 3 or 0 in depth.shape:
            raise MediaError(f"{path}: expected depth of shape [V, H, W] in metres, got {list(depth.shape)}")
        if frames is not None:
            depth = depth[frames.select(len(depth), f"{path}: number of depth maps")]
    if frames is not None and depth.shape[1:] != frames.original_hw:
        height, width = frames.original_hw
        raise MediaError(
            f"{path}: depth is {_size(depth[0])} but the images are {width}x{height}; "
            "resize the depth to the images with nearest-neighbour sampling"
        )
    return depth


def load_intrinsics(source: PathLike, frames: Frames | None = None) -> npt.NDArray[np.float64]:
    """Read pinhole intrinsics in pixels of the images as given: [3, 3] for all frames, or [V, 3, 3].

    Args:
        source: "fx,fy,cx,cy"; or a .json file (`{"fx":..., "fy":..., "cx":..., "cy":...}`, a matrix, or a list of
            matrices, also under the key `intrinsics` or `K`), a .txt file (3 rows of 3 numbers, or one row of
            fx fy cx cy or of 9 numbers for each frame), or a .npy or .npz file. Pixel centres are at integers.
        frames: the chosen frames: picks the matrices that belong to them and checks their number.

    Raises:
        MediaError: unreadable, wrong shape, numbers that are no pinhole camera, or a number that does not match.
    """
    text = os.fspath(source)
    if isinstance(source, str) and "," in text and not Path(text).exists():
        try:
            values = np.array([float(item) for item in text.split(",")])
        except ValueError as error:
            raise MediaError(f"intrinsics: expected a file or four numbers fx,fy,cx,cy, got {text!r}") from error
        matrices = _to_matrices(values, "intrinsics")
    else:
        path = Path(source)
        if path.suffix.lower() == ".json":
            content = _read_json(path)
            if isinstance(content, dict) and {"fx", "fy", "cx", "cy"} <= content.keys():
                content = [content[key] for key in ("fx", "fy", "cx", "cy")]
            matrices = _to_matrices(_numbers(_unwrap(content, _K_KEYS, path), path), path)
        else:
            matrices = _to_matrices(_read_table_or_array(path, _K_KEYS), path)
        text = str(path)
    _check_pinhole(matrices, text)
    if matrices.ndim == 3 and len(matrices) == 1:
        matrices = matrices[0]
    if frames is not None and matrices.ndim == 3:
        matrices = matrices[frames.select(len(matrices), f"{text}: number of intrinsics")]
    return matrices


def load_poses(path: PathLike, frames: Frames | None = None) -> npt.NDArray[np.float64]:
    """Read camera-to-world poses, [V, 4, 4], translations in metres, OpenCV cameras (right, down, forward).

    Args:
        path: .npy or .npz [V, 4, 4] or [V, 3, 4]; .txt with a row for each frame, of 8 numbers (TUM: timestamp
            tx ty tz qx qy qz qw), 12 (KITTI: a row-major 3x4) or 16; or .json, a list of matrices, also under the
            key `camera_poses` or `poses`. Rows belong to frames by their order; TUM's timestamps are not used.
        frames: the chosen frames: picks the poses that belong to them and checks their number.

    Raises:
        MediaError: unreadable, wrong shape, not finite, not rigid, or a number that does not match the frames.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        values = _numbers(_unwrap(_read_json(path), _POSE_KEYS, path), path)
    else:
        values = _read_table_or_array(path, _POSE_KEYS)
    poses = _to_poses(values, path)
    _check_rigid(poses, path)
    if frames is not None:
        poses = poses[frames.select(len(poses), f"{path}: number of poses")]
    return poses


def _depth_files(folder: Path) -> list[Path]:
    entries = [item for item in folder.iterdir() if item.is_file() and not item.name.startswith(".")]
    suffixes = IMAGE_SUFFIXES | {".npy"}
    files = sorted((e for e in entries if e.suffix.lower() in suffixes), key=lambda item: natural_key(item.name))
    if not files:
        raise MediaError(
            f"{folder}: no depth maps in this folder; expected 16-bit .png in millimetres or .npy in metres"
        )
    return files


def _read_depth_map(file: Path) -> npt.NDArray[np.float32]:
    if file.suffix.lower() == ".npy":
        depth = _as_metres(_read_array(file, _DEPTH_KEYS), file)
        depth = depth[..., 0] if depth.ndim == 3 and depth.shape[-1] == 1 else depth
        if depth.ndim != 2:
            raise MediaError(f"{file}: expected one depth map [H, W], got shape {list(depth.shape)}")
        return depth
    raw = load_raw_array(file)
    if raw.dtype == np.uint8 or raw.dtype == np.bool_ or raw.dtype.kind not in "ui":
        raise MediaError(f"{file}: expected 16-bit depth in millimetres, got {raw.dtype} pixels; save metres as .npy")
    return _as_metres(raw.astype(np.float32) / 1000, file)


def _as_metres(depth: Array, path: Path) -> npt.NDArray[np.float32]:
    if depth.dtype.kind != "f":
        raise MediaError(
            f"{path}: expected floating-point metres, got {depth.dtype}; divide millimetres by 1000 before saving"
        )
    with np.errstate(over="ignore"):
        metres = depth.astype(np.float32)
    metres[~np.isfinite(metres)] = 0
    if metres.size and metres.min() < 0:
        raise MediaError(f"{path}: negative depth ({metres.min():g} m); unknown depth is 0 or NaN")
    return metres


def _size(depth: Array) -> str:
    return f"{depth.shape[1]}x{depth.shape[0]}"


def _read_array(path: Path, keys: tuple[str, ...]) -> Array:
    """One array from a .npy file, or from a .npz file under the first of `keys` that it has, or its only key."""
    if path.suffix.lower() not in (".npy", ".npz"):
        raise MediaError(f"{path}: expected .npy or .npz, got {path.suffix or 'no suffix'}")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            present = [key for key in keys if key in loaded.files] or (loaded.files if len(loaded.files) == 1 else [])
            if not present:
                raise MediaError(f"{path}: expected a key {' or '.join(keys)}, got {', '.join(loaded.files) or 'none'}")
            array: Array = loaded[present[0]]
            return array
    except FileNotFoundError as error:
        raise MediaError(f"{path}: no such file") from error
    except MediaError:
        raise
    # A damaged archive shows as OSError, ValueError, EOFError, zipfile.BadZipFile or zlib.error.
    except Exception as error:
        raise MediaError(f"{path}: truncated, damaged or not a NumPy file of plain numbers ({error})") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise MediaError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise MediaError(f"{path}: cannot be read as text ({error})") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise MediaError(f"{path}: is not valid JSON ({error})") from error


def _unwrap(content: Any, keys: tuple[str, ...], path: Path) -> Any:
    if not isinstance(content, dict):
        return content
    present = [key for key in keys if key in content]
    if not present:
        raise MediaError(f"{path}: expected a key {' or '.join(keys)}, got {', '.join(map(str, content)) or 'none'}")
    return content[present[0]]


def _numbers(content: Any, path: Path) -> npt.NDArray[np.float64]:
    try:
        return np.asarray(content, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise MediaError(f"{path}: expected lists of numbers, all of one length ({error})") from error


def _read_table_or_array(path: Path, keys: tuple[str, ...]) -> npt.NDArray[np.float64]:
    if path.suffix.lower() in (".npy", ".npz"):
        return _numbers(_read_array(path, keys), path)
    rows = []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        fields = re.split(r"[\s,]+", line.partition("#")[0].strip())
        if fields == [""]:
            continue
        try:
            rows.append([float(item) for item in fields])
        except ValueError as error:
            raise MediaError(f"{path}: line {number}: expected numbers, got {line.strip()[:60]!r}") from error
        if len(rows[-1]) != len(rows[0]):
            raise MediaError(f"{path}: line {number}: expected {len(rows[0])} numbers as above, got {len(rows[-1])}")
    if not rows:
        raise MediaError(f"{path}: holds no numbers")
    return np.array(rows)


def _to_matrices(values: npt.NDArray[np.float64], path: PathLike) -> npt.NDArray[np.float64]:
    if values.shape[-2:] == (3, 3) and values.ndim in (2, 3) and values.size:
        return values
    if values.ndim in (1, 2) and values.size and values.shape[-1] == 9:
        return values.reshape(*values.shape[:-1], 3, 3)
    if values.ndim in (1, 2) and values.size and values.shape[-1] == 4:
        matrices = np.zeros((*values.shape[:-1], 3, 3))
        matrices[..., 0, 0], matrices[..., 1, 1] = values[..., 0], values[..., 1]
        matrices[..., 0, 2], matrices[..., 1, 2] = values[..., 2], values[..., 3]
        matrices[..., 2, 2] = 1
        return matrices
    raise MediaError(
        f"{path}: expected a 3x3 matrix or fx, fy, cx, cy (or one for every frame), got shape {list(values.shape)}"
    )


def _check_pinhole(matrices: npt.NDArray[np.float64], name: str) -> None:
    for index, matrix in enumerate(matrices.reshape(-1, 3, 3)):
        where = f"{name}: matrix {index}" if matrices.ndim == 3 else name
        if not np.isfinite(matrix).all():
            raise MediaError(f"{where}: holds NaN or infinite numbers")
        if matrix[0, 0] <= 0 or matrix[1, 1] <= 0:
            raise MediaError(f"{where}: focal lengths must be positive, got fx={matrix[0, 0]:g}, fy={matrix[1, 1]:g}")
        if not np.allclose(matrix[2], (0, 0, 1)) or abs(matrix[1, 0]) > 1e-6:
            raise MediaError(f"{where}: expected rows [fx, 0, cx], [0, fy, cy], [0, 0, 1], got {matrix.tolist()}")
        if abs(matrix[0, 1]) > 1e-3 * matrix[0, 0]:
            raise MediaError(f"{where}: skew ({matrix[0, 1]:g}) is not supported; rectify the images first")


def _to_poses(values: npt.NDArray[np.float64], path: Path) -> npt.NDArray[np.float64]:
    if values.ndim == 2 and values.shape == (4, 4):
        values = values[None]
    if values.ndim == 2 and values.shape[1] == 8:
        return _from_tum(values, path)
    if values.ndim == 2 and values.shape[1] in (12, 16):
        values = values.reshape(len(values), -1, 4)
    if values.ndim != 3 or values.shape[1:] not in ((3, 4), (4, 4)) or not len(values):
        raise MediaError(
            f"{path}: expected poses [V, 4, 4], or rows of 8 (TUM), 12 (KITTI) or 16 numbers, got shape "
            f"{list(values.shape)}"
        )
    if values.shape[1] == 3:
        bottom = np.broadcast_to(np.array([0.0, 0.0, 0.0, 1.0]), (len(values), 1, 4))
        return np.concatenate([values, bottom], axis=1)
    return values


def _from_tum(rows: npt.NDArray[np.float64], path: Path) -> npt.NDArray[np.float64]:
    quats = rows[:, 4:8]
    norms = np.linalg.norm(quats, axis=1)
    bad = np.flatnonzero(~(np.abs(norms - 1) < 0.01))
    if len(bad):
        raise MediaError(f"{path}: row {bad[0]}: expected a unit quaternion qx qy qz qw, got length {norms[bad[0]]:g}")
    if len(rows) > 1 and (np.diff(rows[:, 0]) <= 0).any():
        warnings.warn(f"{path}: timestamps do not increase; poses are taken in the file's order", stacklevel=4)
    x, y, z, w = (quats / norms[:, None]).T
    poses = np.zeros((len(rows), 4, 4))
    poses[:, 0, :3] = np.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)], axis=1)
    poses[:, 1, :3] = np.stack([2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)], axis=1)
    poses[:, 2, :3] = np.stack([2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)], axis=1)
    poses[:, :3, 3] = rows[:, 1:4]
    poses[:, 3, 3] = 1
    return poses


def _check_rigid(poses: npt.NDArray[np.float64], path: Path) -> None:
    for index, pose in enumerate(poses):
        if not np.isfinite(pose).all():
            raise MediaError(f"{path}: pose {index} holds NaN or infinite numbers")
        if not np.allclose(pose[3], (0, 0, 0, 1), atol=1e-6):
            raise MediaError(f"{path}: pose {index}: expected a last row [0, 0, 0, 1], got {pose[3].tolist()}")
        rotation = pose[:3, :3]
        # Files with few decimals: a rotation written with 4 digits is orthonormal to about 1e-4.
        if np.abs(rotation @ rotation.T - np.eye(3)).max() > 1e-3 or np.linalg.det(rotation) < 0:
            raise MediaError(
                f"{path}: pose {index} is not rigid (its 3x3 part is no rotation); expected camera-to-world poses "
                "without scaling or mirroring"
            )
