"""Writing a reconstruction in the format that a file name asks for."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from ..reconstruction import Reconstruction
from .errors import MediaError

# Suffix -> (module, function, package it needs beyond the ordinary ones, what it holds).
_WRITERS: dict[str, tuple[str, str, str | None, str]] = {
    ".npz": ("npz", "save_npz", None, "every factor"),
    ".ply": ("ply", "save_ply", "trimesh", "points"),
    ".glb": ("glb", "save_glb", "trimesh", "points and cameras"),
    ".rrd": ("rrd", "save_rrd", "rerun", "Rerun recording"),
    ".png": ("sheet", "save_sheet", "matplotlib", "contact sheet"),
}
SUPPORTED_SUFFIXES = tuple(_WRITERS)


def check_output(path: str | os.PathLike[str]) -> None:
    """Whether `save` could write this file, to be asked before the minutes that a reconstruction takes.

    Raises:
        MediaError: unknown suffix, `path` is a folder, or a file is where its folder should be or the folder cannot
            be written.
        ImportError: the format's package is not installed.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _WRITERS:
        known = ", ".join(f"{name} ({entry[3]})" for name, entry in _WRITERS.items())
        raise MediaError(f"{path}: unknown output format {suffix or '(no suffix)'}; use one of {known}")
    check_place(path)
    package = _WRITERS[suffix][2]
    if package is not None and importlib.util.find_spec(package) is None:
        raise ImportError(f"{path}: writing {suffix} needs {package}; run `pip install any4d-fast[viz]`")


def check_place(path: Path) -> None:
    """Whether a file could be written here.

    Raises:
        MediaError: `path` is a folder, or a file is where its folder should be or the folder cannot be written.
    """
    if path.is_dir():
        raise MediaError(f"{path}: is a folder; give the name of a file to write")
    folder = path.resolve().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise MediaError(f"{path}: {folder} is a file, not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise MediaError(f"{path}: no permission to write in {folder}")


def save(reconstruction: Reconstruction, path: str | os.PathLike[str], **options: Any) -> None:
    """Write a reconstruction; the suffix chooses the format: .npz, .ply, .glb, .rrd or .png (contact sheet).

    Missing folders are created. An existing file is replaced only by a complete one.

    Args:
        reconstruction: what to write.
        path: the file.
        options: passed to the format's own function (`save_npz`, `save_ply`, `save_glb`, `save_rrd`, `save_sheet`).

    Raises:
        MediaError: unknown suffix, or the file cannot be written.
        ImportError: the format's package is not installed.
    """
    check_output(path)
    module, function, _, _ = _WRITERS[Path(path).suffix.lower()]
    getattr(importlib.import_module(f".{module}", __package__), function)(reconstruction, path, **options)
