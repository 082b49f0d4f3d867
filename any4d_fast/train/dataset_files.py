"""One clip of the folder format of docs/dataset.md: which files it has, and what is in each of them."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import roma
import torch
from torch import Tensor

from ..io.errors import MediaError
from ..io.images import IMAGE_SUFFIXES, load_raw_array, natural_key
from ..io.sensors import load_intrinsics, load_poses

Array = npt.NDArray[Any]

LARGEST = 1e6
"""Depth, motion and camera distance beyond this are a sensor's overflow value or a wrong unit, not a length."""

ASPECT_TOLERANCE = 0.01
"""Depth, masks and flow may have another resolution than the image, but must show the same field of view."""

_ARRAY_SUFFIXES = frozenset({".npy", ".npz"})
_MAP_SUFFIXES = IMAGE_SUFFIXES | _ARRAY_SUFFIXES
_MATRIX_SUFFIXES = (".json", ".txt", ".npy", ".npz")
_FOLDERS = frozenset({"images", "depth", "masks", "flow"})
_FILES = frozenset({"poses", "intrinsics", "rays"})
_INFO = "clip.json"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClipInfo:
    """What clip.json says; a file that is not there says the defaults.

    Attributes:
        is_metric: lengths are metres; else they share one unknown unit.
        static: nothing moves in the clip: its scene flow is zero and needs no files.
        depth: "z" along the optical axis, or "along_ray" from the camera centre.
        depth_unit: length of one step of integer depth.
        frames: number of frames, so that lost images are noticed.
        frame_rate: frames a second; not used, kept for the reader.
        source: free text; not used.
    """

    is_metric: bool = True
    static: bool = False
    depth: str = "z"
    depth_unit: float = 0.001
    frames: int | None = None
    frame_rate: float | None = None
    source: str = ""


@dataclass(frozen=True)
class Clip:
    """The files of a clip; nothing of the size of a picture has been read. N: number of frames.

    Attributes:
        folder: the clip's.
        info: what clip.json says.
        names: [N] frame names: the images' file names without suffix, in natural order.
        images: [N] files.
        depth, masks: files by frame name.
        flow: files by the reference frame's name and the target frame's.
        rays: a file of ray directions.
        intrinsics: [N, 3, 3] float64 pixels of the stored images.
        poses: [N, 4, 4] float64 camera-to-world, exactly rigid.
    """

    folder: Path
    info: ClipInfo
    names: tuple[str, ...]
    images: tuple[Path, ...]
    depth: Mapping[str, Path]
    masks: Mapping[str, Path]
    flow: Mapping[str, Mapping[str, Path]]
    rays: Path | None
    intrinsics: Tensor | None
    poses: Tensor | None

    @property
    def with_flow(self) -> list[int]:
        """Frames that flow starts from."""
        return [index for index, name in enumerate(self.names) if name in self.flow]


def is_clip(entries: Collection[str]) -> bool:
    """Whether a folder with these entries is meant to be a clip, even a broken one."""
    stems = {Path(entry).stem for entry in entries if Path(entry).suffix.lower() in _MATRIX_SUFFIXES}
    return _INFO in entries or not _FOLDERS.isdisjoint(entries) or not _FILES.isdisjoint(stems)


def read_clip(folder: Path) -> Clip:
    """Find the files of a clip and read its small ones.

    Raises:
        MediaError: no images, a file that belongs to no image, or intrinsics, poses or clip.json that cannot be right.
    """
    info = _read_info(folder / _INFO)
    images = _files_by_name(folder / "images", IMAGE_SUFFIXES)
    if not images:
        raise MediaError(f"{folder / 'images'}: no images; expected a folder of files such as 000000.png or 000000.jpg")
    if info.frames not in (None, len(images)):
        raise MediaError(
            f"{folder / 'images'}: holds {len(images)} images, expected {info.frames} as clip.json says; restore the "
            "lost images or correct clip.json"
        )
    count = len(images)
    intrinsics_file, rays = _only(folder, "intrinsics"), _only(folder, "rays", (".npy", ".npz"))
    if intrinsics_file is not None and rays is not None:
        raise MediaError(f"{rays}: the clip has {intrinsics_file.name} too; expected one of them")
    if info.static and (folder / "flow").exists():
        raise MediaError(f"{folder / 'flow'}: clip.json says that the clip is static; expected no flow")
    clip = Clip(
        folder=folder,
        info=info,
        names=tuple(images),
        images=tuple(images.values()),
        depth=_of_frames(folder / "depth", _MAP_SUFFIXES, images),
        masks=_of_frames(folder / "masks", _MAP_SUFFIXES, images),
        flow=_read_flow_files(folder / "flow", images),
        rays=rays,
        intrinsics=None if intrinsics_file is None else _read_intrinsics(intrinsics_file, count),
        poses=_read_poses(folder, count),
    )
    if clip.depth and info.depth == "z" and intrinsics_file is None and rays is None:
        _logger.warning("%s: depth along the optical axis is of no use without intrinsics or rays", folder)
    return clip


def _read_info(file: Path) -> ClipInfo:
    if not file.exists():
        return ClipInfo()
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MediaError(f"{file}: is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise MediaError(f"{file}: expected an object with keys such as is_metric, got a {type(content).__name__}")
    known = [field.name for field in dataclasses.fields(ClipInfo)]
    unknown = sorted(set(content) - set(known))
    if unknown:
        raise MediaError(f"{file}: unknown {', '.join(unknown)}; expected keys among {', '.join(known)}")
    content = {key: value for key, value in content.items() if value is not None}
    number = (int, float)
    for key, kinds, right, expected in (
        ("is_metric", bool, lambda v: True, "true or false"),
        ("static", bool, lambda v: True, "true or false"),
        ("depth", str, lambda v: v in ("z", "along_ray"), '"z" or "along_ray"'),
        ("depth_unit", number, lambda v: 0 < v < LARGEST, "a positive length"),
        ("frames", int, lambda v: v > 0, "a positive whole number"),
        ("frame_rate", number, lambda v: 0 < v < LARGEST, "positive frames a second"),
        ("source", str, lambda v: True, "text"),
    ):
        value = content.get(key)
        bad_kind = not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool)
        if value is not None and (bad_kind or not right(value)):
            raise MediaError(f"{file}: {key}: expected {expected}, got {value!r}")
    return ClipInfo(**content)


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, hidden entries aside, in natural order; nothing where there is no such folder."""
    try:
        found = [folder / entry for entry in os.listdir(folder) if not entry.startswith(".")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise MediaError(f"{folder}: expected a folder that can be read ({error.strerror or error})") from error
    return sorted(found, key=lambda item: natural_key(item.name))


def _files_by_name(folder: Path, suffixes: Collection[str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for entry in _entries(folder):
        if entry.suffix.lower() not in suffixes:
            continue
        if entry.stem in files:
            raise MediaError(f"{entry}: {files[entry.stem].name} is of the same frame; expected one file a frame")
        files[entry.stem] = entry
    return files


def _of_frames(folder: Path, suffixes: Collection[str], images: Mapping[str, Path]) -> dict[str, Path]:
    files = _files_by_name(folder, suffixes)
    for name, file in files.items():
        if name not in images:
            raise MediaError(
                f"{file}: there is no image of this name; expected the name of one of the {len(images)} images, such "
                f"as {next(iter(images))}"
            )
    if not files and folder.exists():
        kinds = " or ".join(sorted(_ARRAY_SUFFIXES)) + (" or pictures" if ".png" in suffixes else "")
        raise MediaError(f"{folder}: holds nothing that can be read; expected {kinds}, or no such folder")
    return files


def _read_flow_files(folder: Path, images: Mapping[str, Path]) -> dict[str, dict[str, Path]]:
    flow = {}
    for reference in _entries(folder):
        if not reference.is_dir():
            raise MediaError(f"{reference}: expected flow/REFERENCE/TARGET.npz, got a file in {folder.name}/")
        if reference.name not in images:
            raise MediaError(f"{reference}: there is no image {reference.name}; expected the reference frame's name")
        flow[reference.name] = _of_frames(reference, _ARRAY_SUFFIXES, images)
    return flow


def _only(folder: Path, name: str, suffixes: Collection[str] = _MATRIX_SUFFIXES) -> Path | None:
    entries = [entry for entry in _entries(folder) if entry.stem == name]
    found = [entry for suffix in suffixes for entry in entries if entry.suffix.lower() == suffix]
    if len(found) > 1:
        raise MediaError(f"{found[1]}: the clip has {found[0].name} too; expected one of them")
    return found[0] if found else None


def _read_intrinsics(file: Path, count: int) -> Tensor:
    matrices = torch.from_numpy(np.array(load_intrinsics(file)))
    if matrices.ndim == 3 and len(matrices) != count:
        raise MediaError(f"{file}: holds {len(matrices)} matrices, expected 1 or {count}, one for each image")
    return matrices.expand(count, 3, 3)


def _read_poses(folder: Path, count: int) -> Tensor | None:
    file = _only(folder, "poses")
    if file is None:
        return None
    poses = torch.from_numpy(np.array(load_poses(file)))
    if len(poses) != count:
        raise MediaError(f"{file}: holds {len(poses)} poses, expected {count}, one for each image")
    # Few decimals in a file leave rotations that are orthonormal only nearly, and inverses that are wrong by as much.
    poses[:, :3, :3] = roma.special_procrustes(poses[:, :3, :3])
    return poses


def read_arrays(file: Path, key: str, *, mapped: bool = False) -> dict[str, Array]:
    """The arrays of an .npz file, which must have `key` or one array only; an .npy file is one array named `key`.

    `mapped` reads of an .npy file only what is then looked at.

    Raises:
        MediaError: unreadable, or not that.
    """
    try:
        loaded = np.load(file, allow_pickle=False, mmap_mode="r" if mapped else None)
        if isinstance(loaded, np.ndarray):
            return {key: loaded}
        with loaded:
            arrays = {name: loaded[name] for name in loaded.files}
    except FileNotFoundError as error:
        raise MediaError(f"{file}: no such file") from error
    # A damaged archive shows as OSError, ValueError, EOFError, zipfile.BadZipFile or zlib.error.
    except Exception as error:
        raise MediaError(f"{file}: truncated, damaged or not a NumPy file of plain numbers ({error})") from error
    if len(arrays) == 1:
        return {key: next(iter(arrays.values()))}
    if key not in arrays:
        raise MediaError(f"{file}: expected a key {key}, got {', '.join(arrays) or 'none'}")
    return arrays


def read_depth(file: Path, unit: float) -> Tensor:
    """A depth map, [h, w] float32, 0 where unknown: not finite, not positive, or beyond `LARGEST`.

    Args:
        file: floats in metres, or integers of at least 16 bits in `unit`; an array or a picture.
        unit: length of one step of integers.

    Raises:
        MediaError: unreadable or not a depth map.
    """
    depth = _read_map(file, "depth", "a depth map")
    kind = depth.dtype
    if kind.kind not in "fiu" or (kind.kind != "f" and kind.itemsize < 2):
        raise MediaError(f"{file}: expected floats in metres or integers of 16 bits, got {kind}")
    with np.errstate(over="ignore", invalid="ignore"):
        values = depth.astype(np.float32) if kind.kind == "f" else (depth * np.float64(unit)).astype(np.float32)
        known = np.isfinite(values) & (values > 0) & (values <= LARGEST)
    return torch.from_numpy(np.where(known, values, np.float32(0)))


def read_mask(file: Path) -> Tensor:
    """A mask, [h, w] bool: everything but 0 is True.

    Raises:
        MediaError: unreadable or not a mask.
    """
    mask = _read_map(file, "mask", "a mask")
    if mask.dtype.kind not in "biu":
        raise MediaError(f"{file}: expected booleans or integers, got {mask.dtype}")
    return torch.from_numpy(np.asarray(mask != 0))


def _read_map(file: Path, key: str, what: str) -> Array:
    values = read_arrays(file, key)[key] if file.suffix.lower() in _ARRAY_SUFFIXES else load_raw_array(file)
    values = values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values
    if values.ndim != 2 or 0 in values.shape:
        raise MediaError(f"{file}: expected {what} [H, W], got shape {list(values.shape)}")
    return values


def read_flow(file: Path) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scene flow [h, w, 3] float32, where it is known [h, w] bool, and what moves [h, w] bool if the file says.

    Raises:
        MediaError: unreadable or not scene flow.
    """
    arrays = read_arrays(file, "flow")
    flow = arrays["flow"]
    if flow.ndim != 3 or flow.shape[-1] != 3 or 0 in flow.shape or flow.dtype.kind != "f":
        raise MediaError(f"{file}: expected flow [H, W, 3] of floats, got {list(flow.shape)} {flow.dtype}")
    unknown = sorted(arrays.keys() - {"flow", "valid", "dynamic"})
    if unknown:
        raise MediaError(f"{file}: unknown {', '.join(unknown)}; expected keys among flow, valid, dynamic")
    masks: dict[str, Tensor] = {}
    for key in arrays.keys() - {"flow"}:
        mask = arrays[key]
        if mask.shape != flow.shape[:2] or mask.dtype.kind not in "biu":
            raise MediaError(
                f"{file}: {key}: expected {list(flow.shape[:2])} booleans, got {list(mask.shape)} {mask.dtype}"
            )
        masks[key] = torch.from_numpy(mask != 0)
    with np.errstate(over="ignore", invalid="ignore"):
        values = torch.from_numpy(flow.astype(np.float32))
    valid = (values.abs() <= LARGEST).all(-1)
    if "valid" in masks:
        valid = valid & masks["valid"]
    return torch.where(valid[..., None], values, 0.0), valid, masks.get("dynamic")


def read_rays(file: Path, frame: int, count: int, image_hw: tuple[int, int]) -> Tensor:
    """Unit ray directions of one frame, [H, W, 3] float64, from a file of one map for all `count` frames or one each.

    Raises:
        MediaError: unreadable, another shape, or not directions.
    """
    rays = read_arrays(file, "rays", mapped=True)["rays"]
    if rays.shape[-3:] != (*image_hw, 3) or rays.ndim not in (3, 4) or rays.dtype.kind != "f":
        expected = f"[{image_hw[0]}, {image_hw[1]}, 3] or [{count}, {image_hw[0]}, {image_hw[1]}, 3] floats"
        raise MediaError(f"{file}: expected {expected} as the images, got {list(rays.shape)} {rays.dtype}")
    if rays.ndim == 4 and len(rays) not in (1, count):
        raise MediaError(f"{file}: holds {len(rays)} ray maps, expected 1 or {count}, one for each image")
    if rays.ndim == 4:
        rays = rays[frame if len(rays) > 1 else 0]
    values = torch.from_numpy(rays.astype(np.float64))
    length = values.norm(dim=-1, keepdim=True)
    if not bool(((length > 1e-8) & (length < LARGEST)).all()):
        raise MediaError(f"{file}: ray directions of frame {frame} hold zeros, NaN or infinite numbers")
    return values / length


def check_same_view(file: Path, values: Tensor, image_hw: tuple[int, int]) -> None:
    """Raise unless a map [h, w, ...] has the aspect ratio of the images.

    Raises:
        MediaError: it has not.
    """
    height, width = values.shape[:2]
    if abs(width * image_hw[0] / (height * image_hw[1]) - 1) > ASPECT_TOLERANCE:
        raise MediaError(
            f"{file}: is {width}x{height} but the images are {image_hw[1]}x{image_hw[0]}; expected the same field of "
            "view, in the images' size or another of the same aspect ratio"
        )
