"""Reading clips and sensor data, and writing reconstructions. Light to import: names load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .atomic import atomic_path
    from .errors import MediaError
    from .export import SUPPORTED_SUFFIXES, check_output, save
    from .frames import Frames, load_frames
    from .glb import save_glb
    from .images import is_image, list_images, load_image
    from .npz import load_npz, save_npz
    from .ply import save_ply
    from .rrd import save_rrd
    from .sensors import load_depth, load_intrinsics, load_poses
    from .sheet import contact_sheet, save_sheet
    from .video import VideoFrame, is_video, iter_frames, read_frames

_LAZY = {
    "atomic_path": "atomic",
    "MediaError": "errors",
    "SUPPORTED_SUFFIXES": "export",
    "check_output": "export",
    "save": "export",
    "Frames": "frames",
    "load_frames": "frames",
    "save_glb": "glb",
    "is_image": "images",
    "list_images": "images",
    "load_image": "images",
    "load_npz": "npz",
    "save_npz": "npz",
    "save_ply": "ply",
    "save_rrd": "rrd",
    "load_depth": "sensors",
    "load_intrinsics": "sensors",
    "load_poses": "sensors",
    "contact_sheet": "sheet",
    "save_sheet": "sheet",
    "VideoFrame": "video",
    "is_video": "video",
    "iter_frames": "video",
    "read_frames": "video",
}
__all__ = [
    "SUPPORTED_SUFFIXES",
    "Frames",
    "MediaError",
    "VideoFrame",
    "atomic_path",
    "check_output",
    "contact_sheet",
    "is_image",
    "is_video",
    "iter_frames",
    "list_images",
    "load_depth",
    "load_frames",
    "load_image",
    "load_intrinsics",
    "load_npz",
    "load_poses",
    "read_frames",
    "save",
    "save_glb",
    "save_npz",
    "save_ply",
    "save_rrd",
    "save_sheet",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
