"""Writing clips in the folder format of docs/dataset.md."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..geometry import rays_from_intrinsics
from ..io.atomic import flush
from ..io.errors import MediaError
from ..ops.recover_intrinsics import recover_intrinsics
from .batch import Batch
from .dataset_files import ASPECT_TOLERANCE, read_clip
from .synthetic import SyntheticClip

Array = npt.NDArray[Any]
Maps = Array | Mapping[tuple[int, int], Array]
"""One map for each frame, from frame 0, as [V, h, w, ...]; or maps [h, w, ...] by (reference frame, target frame)."""

_MILLIMETRE = 0.001
_PINHOLE_ERROR = 1e-5  # of a unit ray: a hundredth of a pixel of a 1,000-pixel focal length, float32's rounding aside


@dataclass
class ClipArrays:
    """A clip of V frames as arrays or CPU tensors; everything but `images` may be missing.

    `[h, w]` may differ from the images' `[H, W]` but must have its aspect ratio. Units and frames: docs/dataset.md.

    Attributes:
        images: [V, H, W, 3] sRGB, uint8 or floats from 0 to 1.
        depth_z: [V, h, w] or [V, h, w, 1] along the optical axis; 0, negative or not finite: unknown.
        depth_along_ray: the same from the camera centre, instead of `depth_z`.
        intrinsics: [3, 3] or [V, 3, 3] pixels of `images`.
        ray_directions: [H, W, 3] or [V, H, W, 3] camera frame, instead of `intrinsics`, for any lens.
        camera_poses: [V, 4, 4] camera-to-world, any world.
        scene_flow: see `Maps`; [h, w, 3] motion of the points of the reference frame's pixels until the target
            frame's time, along the axes of the reference frame's camera.
        flow_mask: as `scene_flow`, [h, w] bool: flow is known; None: wherever it is finite.
        dynamic_mask: as `scene_flow`, [h, w] bool: the reference frame's pixel is of something that moves.
        surface_mask: [V, h, w] bool: something is seen.
        is_metric, static, frame_rate, source: see `ClipInfo`.
    """

    images: Array
    depth_z: Array | None = None
    depth_along_ray: Array | None = None
    intrinsics: Array | None = None
    ray_directions: Array | None = None
    camera_poses: Array | None = None
    scene_flow: Maps | None = None
    flow_mask: Maps | None = None
    dynamic_mask: Maps | None = None
    surface_mask: Array | None = None
    is_metric: bool = True
    static: bool = False
    frame_rate: float | None = None
    source: str = ""

    @classmethod
    def from_synthetic(cls, clip: SyntheticClip) -> ClipArrays:
        """Everything that a synthetic clip knows and the format holds."""
        hit = clip.valid_mask
        interval = float(clip.timestamps[1] - clip.timestamps[0]) if clip.num_views > 1 else 0.0
        return cls(
            images=_array(clip.images),
            depth_z=_array(clip.depth_z),
            intrinsics=_array(clip.intrinsics),
            camera_poses=_array(clip.camera_poses),
            scene_flow=_array(clip.scene_flow),
            flow_mask=_array(hit[:1].expand_as(hit)),
            dynamic_mask=_array(clip.moving_mask[:1].expand_as(hit)),
            surface_mask=_array(hit),
            frame_rate=1 / interval if interval > 0 else None,
            source=f"any4d_fast.train.synthetic, seed {clip.seed}",
        )

    @classmethod
    def from_batch(cls, batch: Batch, sample: int = 0) -> ClipArrays:
        """One sample of a batch. Rays become intrinsics where a pinhole has them."""
        depth, poses, flow = batch.depth_along_ray[sample], batch.camera_poses[sample], batch.scene_flow[sample]
        depth_mask, flow_mask = batch.depth_mask[sample], batch.flow_mask[sample]
        known_flow = [view for view in range(1, batch.num_views) if bool(flow_mask[view].any())]
        intrinsics, rays = None, None
        if bool(batch.has_rays[sample]):
            rays = batch.ray_directions[sample].cpu()
            intrinsics = _pinhole(rays)
            rays = rays if intrinsics is None else None

        def of_views(maps: Tensor) -> dict[tuple[int, int], Array] | None:
            return {(0, view): _array(maps[view]) for view in known_flow} or None

        return cls(
            images=_array(batch.images[sample].movedim(1, -1)),
            depth_along_ray=_array(depth.where(depth_mask[..., None], 0)) if bool(depth_mask.any()) else None,
            intrinsics=None if intrinsics is None else _array(intrinsics),
            ray_directions=None if rays is None else _array(rays),
            camera_poses=_array(poses) if bool(batch.has_poses[sample]) else None,
            scene_flow=of_views(flow),
            flow_mask=of_views(flow_mask),
            dynamic_mask=of_views(batch.dynamic_mask[sample]),
            surface_mask=_array(batch.surface_mask[sample]) if bool(batch.has_surface[sample]) else None,
            is_metric=bool(batch.is_metric[sample]),
        )


def write_clip(
    folder: str | os.PathLike[str],
    clip: ClipArrays | SyntheticClip | Batch,
    *,
    depth_format: str = "npy",
    overwrite: bool = False,
) -> Path:
    """Write a clip; it appears at once and complete, or not at all.

    It is written into a hidden folder beside `folder`, flushed to the disk, read back for what the reader would refuse
    (its images, depth and flow by their shapes only), and renamed. A process that dies leaves at most that hidden
    folder, `.tmp-*`, which `ClipFolder` does not see and which may be deleted.

    Args:
        folder: the clip's; its parent is the dataset, and is created.
        clip: of a `Batch`, its only sample; else give `ClipArrays.from_batch(batch, sample)`.
        depth_format: "npy": float32, exact; "png": 16 bits in millimetres, up to 65.535 m, about a tenth of the size.
        overwrite: replace a clip that is there.

    Returns:
        The folder.

    Raises:
        ValueError: arrays whose shapes or types do not fit together.
        MediaError: the folder exists, cannot be written, or a value cannot be right (poses that are not rigid, ...).
    """
    target = Path(folder)
    if depth_format not in ("npy", "png"):
        raise ValueError(f"depth_format: expected 'npy' or 'png', got {depth_format!r}")
    if target.exists() and not overwrite:
        raise MediaError(f"{target}: already exists; give another name, or overwrite=True")
    arrays = _to_arrays(clip)
    temporary = target.parent / f".tmp-{secrets.token_hex(8)}"
    try:
        temporary.mkdir(parents=True)
        _write(temporary, arrays, depth_format)
        read_clip(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            flush(path)
        _rename(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise MediaError(f"{target}: cannot write here ({error.strerror or error})") from error
        if isinstance(error, MediaError):
            raise MediaError(str(error).replace(str(temporary), str(target))) from error
        raise
    return target


def _to_arrays(clip: ClipArrays | SyntheticClip | Batch) -> ClipArrays:
    if isinstance(clip, SyntheticClip):
        return ClipArrays.from_synthetic(clip)
    if not isinstance(clip, Batch):
        return clip
    if len(clip) != 1:
        raise ValueError(f"clip: expected a batch of one sample, got {len(clip)}; give ClipArrays.from_batch(batch, i)")
    return ClipArrays.from_batch(clip)


def _rename(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
    else:
        old = target.parent / f".tmp-{secrets.token_hex(8)}"
        target.rename(old)
        try:
            temporary.rename(target)
        except BaseException:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(OSError):
        # Some file systems cannot flush a folder; the clip is complete either way.
        flush(target.parent)


def _array(values: Any) -> Array:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _pinhole(rays: Tensor) -> Tensor | None:
    """Intrinsics [V, 3, 3] float64 of unit rays [V, H, W, 3], or None where no pinhole has such rays."""
    height, width = rays.shape[1:3]
    if min(height, width) < 2:
        return None
    intrinsics = recover_intrinsics(rays.double())
    if not bool((intrinsics[:, 0, 0] > 0).all() and (intrinsics[:, 1, 1] > 0).all()):
        return None
    error = (rays_from_intrinsics(intrinsics, height, width) - rays).abs().max()
    return intrinsics if error < _PINHOLE_ERROR else None


def _write(folder: Path, clip: ClipArrays, depth_format: str) -> None:
    from PIL import Image

    images = _images(clip.images)
    count, hw = len(images), images.shape[1:3]
    names = [f"{frame:06d}" for frame in range(count)]
    (folder / "images").mkdir()
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image).save(folder / "images" / f"{name}.png")
    if clip.depth_z is not None and clip.depth_along_ray is not None:
        raise ValueError("depth_z, depth_along_ray: expected one of them, got both")
    along = clip.depth_along_ray is not None
    depth = clip.depth_along_ray if along else clip.depth_z
    if depth is not None:
        maps = _maps(depth, "depth_along_ray" if along else "depth_z", count, hw, "f")
        (folder / "depth").mkdir()
        for name, values in zip(names, maps, strict=True):
            _write_depth(folder / "depth" / f"{name}.{depth_format}", values.astype(np.float32))
    if clip.surface_mask is not None:
        (folder / "masks").mkdir()
        for name, mask in zip(names, _maps(clip.surface_mask, "surface_mask", count, hw, "b"), strict=True):
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"{name}.png")
    if clip.intrinsics is not None:
        matrices = _array(clip.intrinsics).astype(np.float64).tolist()
        (folder / "intrinsics.json").write_text(json.dumps({"intrinsics": matrices}))
    if clip.ray_directions is not None:
        rays = _array(clip.ray_directions)
        if rays.shape not in ((*hw, 3), (count, *hw, 3)):
            raise ValueError(f"ray_directions: expected {[*hw, 3]} or {[count, *hw, 3]}, got {list(rays.shape)}")
        np.save(folder / "rays.npy", rays)
    if clip.camera_poses is not None:
        np.save(folder / "poses.npy", _array(clip.camera_poses).astype(np.float64))
    _write_flow(folder / "flow", clip, names, hw)
    info = {
        "is_metric": clip.is_metric,
        "static": clip.static,
        "depth": "along_ray" if along else "z",
        "depth_unit": _MILLIMETRE,
        "frames": count,
        "frame_rate": clip.frame_rate,
        "source": clip.source,
    }
    (folder / "clip.json").write_text(json.dumps(info, indent=2) + "\n")


def _images(values: Any) -> npt.NDArray[np.uint8]:
    images = _array(values)
    kinds = images.dtype == np.uint8 or images.dtype.kind == "f"
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape or not kinds:
        raise ValueError(
            f"images: expected [V, H, W, 3] uint8 or floats from 0 to 1, got {list(images.shape)} {images.dtype}"
        )
    if images.dtype == np.uint8:
        return images
    low, high = float(images.min()), float(images.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(f"images: expected floats from 0 to 1, got {low:g} to {high:g}; divide by 255, or give uint8")
    return np.rint(images.clip(0, 1) * 255).astype(np.uint8)


def _maps(values: Any, name: str, count: int, hw: tuple[int, ...], kinds: str) -> Array:
    maps = _array(values)
    maps = maps[..., 0] if maps.ndim == 4 and maps.shape[-1] == 1 else maps
    if maps.ndim != 3 or len(maps) != count or maps.dtype.kind not in kinds:
        what = "booleans" if kinds == "b" else "floats"
        raise ValueError(f"{name}: expected [{count}, h, w] {what}, got {list(maps.shape)} {maps.dtype}")
    _check_aspect(name, maps.shape[1:], hw)
    return maps


def _check_aspect(name: str, shape: tuple[int, ...], hw: tuple[int, ...]) -> None:
    if 0 in shape or abs(shape[1] * hw[0] / (shape[0] * hw[1]) - 1) > ASPECT_TOLERANCE:
        raise ValueError(f"{name}: expected the images' {hw[0]}x{hw[1]} or its aspect ratio, got {shape[0]}x{shape[1]}")


def _write_depth(file: Path, depth: npt.NDArray[np.float32]) -> None:
    from PIL import Image

    if file.suffix == ".npy":
        np.save(file, depth)
        return
    steps = np.rint(np.where(np.isfinite(depth) & (depth > 0), depth, 0).astype(np.float64) / _MILLIMETRE)
    if steps.max() > np.iinfo(np.uint16).max:
        raise ValueError(f'depth_format: "png" holds up to 65.535, got depth of {depth.max():g}; write "npy"')
    Image.fromarray(steps.astype(np.uint16)).save(file)


def _write_flow(folder: Path, clip: ClipArrays, names: list[str], hw: tuple[int, ...]) -> None:
    if clip.scene_flow is None:
        return
    count = len(names)
    flow = _by_pair(clip.scene_flow, "scene_flow", count)
    masks = {
        key: _by_pair(values, name, count)
        for key, name, values in (
            ("valid", "flow_mask", clip.flow_mask),
            ("dynamic", "dynamic_mask", clip.dynamic_mask),
        )
        if values is not None
    }
    _check_masks(masks, flow)
    for (reference, target), values in flow.items():
        if values.ndim != 3 or values.shape[-1] != 3 or values.dtype.kind != "f":
            raise ValueError(f"scene_flow: expected [h, w, 3] floats, got {list(values.shape)} {values.dtype}")
        _check_aspect("scene_flow", values.shape[:2], hw)
        if not (0 <= reference < count and 0 <= target < count):
            raise ValueError(f"scene_flow: expected frames 0 to {count - 1}, got {(reference, target)}")
        pair = (reference, target)
        extra: dict[str, Any] = {key: by_pair[pair] for key, by_pair in masks.items() if pair in by_pair}
        file = folder / names[reference] / f"{names[target]}.npz"
        file.parent.mkdir(parents=True, exist_ok=True)
        # Compressed: what stands still is exactly zero and takes no room.
        np.savez_compressed(file, flow=values.astype(np.float32), **extra)


def _check_masks(masks: Mapping[str, Mapping[tuple[int, int], Array]], flow: Mapping[tuple[int, int], Array]) -> None:
    """Raise unless every mask is one of flow that is there, as the reader wants it."""
    for key, by_pair in masks.items():
        name = "flow_mask" if key == "valid" else "dynamic_mask"
        for pair, mask in by_pair.items():
            if pair not in flow:
                raise ValueError(f"{name}: frames {pair}: expected scene_flow for them too, got none")
            if mask.shape != flow[pair].shape[:2] or mask.dtype.kind not in "biu":
                size = list(flow[pair].shape[:2])
                raise ValueError(
                    f"{name}: frames {pair}: expected {size} booleans as the flow, got {list(mask.shape)} {mask.dtype}"
                )


def _by_pair(values: Maps, name: str, count: int) -> dict[tuple[int, int], Array]:
    """Maps by (reference, target); from frame 0 to itself there is nothing to say."""
    if isinstance(values, Mapping):
        return {pair: _array(item) for pair, item in values.items()}
    maps = _array(values)
    if len(maps) != count:
        raise ValueError(f"{name}: expected one map for each of the {count} frames, got {list(maps.shape)}")
    return {(0, frame): maps[frame] for frame in range(1, count)}
