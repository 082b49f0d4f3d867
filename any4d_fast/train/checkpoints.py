"""Checkpoints of a run: a folder a step, complete or absent, and read only where it is whole.

    checkpoints/step-00002000/
        weights.safetensors   the model, with its configuration (as `Any4D.from_pretrained` reads it)
        average.safetensors   its moving average, likewise
        optimizer.pt          AdamW's tensors by parameter; plain tensors, read with weights_only=True
        manifest.json         step, counters, the run's configuration, and size and CRC-32 of the files

A folder is written under another name, flushed to the disk and renamed, so that a process that dies leaves either all
of it or a leftover that the next one removes. A file that was damaged later does not fit the manifest: then the
checkpoint before it is taken.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import read_state_dict, save_safetensors, writing
from ..config import Any4DConfig
from ..io.atomic import flush

logger = logging.getLogger("any4d_fast.train")

WEIGHTS, AVERAGE, OPTIMIZER, MANIFEST = "weights.safetensors", "average.safetensors", "optimizer.pt", "manifest.json"
_NAME = re.compile(r"step-(\d{8})")
_PARTIAL = ".partial-"


@dataclass(frozen=True)
class Snapshot:
    """A run after some steps.

    Attributes:
        step: optimizer steps taken.
        weights, average: the model's tensors by key, aliases left out.
        optimizer: AdamW's tensors by parameter.
        counters: numbers that go on counting, such as skipped steps.
        settings: the run's configuration as tables.
    """

    step: int
    weights: Mapping[str, Tensor]
    average: Mapping[str, Tensor]
    optimizer: Mapping[str, Mapping[str, Tensor]]
    counters: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


class CheckpointFolder:
    """The checkpoints of a run."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, snapshot: Snapshot, config: Any4DConfig, canonical: Mapping[str, str]) -> Path:
        """Write a checkpoint, then remove the oldest ones beyond `keep` and damaged later ones; returns its folder.

        Raises:
            OSError: it cannot be written; the ones before it are as they were.
        """
        target = self.folder / f"step-{snapshot.step:08d}"
        partial = self.folder / f"{_PARTIAL}{target.name}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        partial.mkdir()
        writers: dict[str, Callable[[Path], object]] = {
            WEIGHTS: lambda path: save_safetensors(snapshot.weights, canonical, config, path),
            AVERAGE: lambda path: save_safetensors(snapshot.average, canonical, config, path),
            OPTIMIZER: lambda path: _save_tensors(snapshot.optimizer, path),
        }
        files: dict[str, dict[str, int]] = {}
        try:
            with writing(target):
                for name, write in writers.items():
                    write(partial / name)
                    files[name] = _fingerprint(partial / name)
                manifest = {
                    "step": snapshot.step,
                    "counters": dict(snapshot.counters),
                    "files": files,
                    "torch": torch.__version__,
                    "settings": dict(snapshot.settings),
                }
                (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
                for path in (*partial.iterdir(), partial):
                    flush(path)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
            raise
        if target.exists():  # damaged, or the run would have gone on from it
            shutil.rmtree(target)
        os.replace(partial, target)
        flush(self.folder)
        steps = self.steps()
        # Later ones are damaged, or the run would have gone on from them: they must not count among those to keep.
        kept = [step for step in steps if step <= snapshot.step][-self.keep :]
        for other in set(steps) - set(kept):
            shutil.rmtree(self.folder / f"step-{other:08d}")
        return target

    def steps(self) -> list[int]:
        """Steps that there is a folder of, oldest first."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def latest(self) -> tuple[Snapshot, Path] | None:
        """The newest checkpoint that is whole, and its folder; None where there is none."""
        for step in reversed(self.steps()):
            folder = self.folder / f"step-{step:08d}"
            why_not = damage(folder)
            if why_not is None:
                return _load(folder), folder
            logger.warning("%s is not used: %s", folder, why_not)
        return None

    def _sweep(self) -> None:
        """Remove what a process left that died while it wrote."""
        for path in self.folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(path)


def damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be read, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = {name: dict(manifest["files"][name]) for name in (WEIGHTS, AVERAGE, OPTIMIZER)}
        step, _ = int(manifest["step"]), dict(manifest["settings"])
        int(manifest["counters"]["skipped"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    if folder.name != f"step-{step:08d}":
        return f"{MANIFEST} is damaged: it is of step {step}"
    for name, expected in files.items():
        try:
            found = _fingerprint(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != expected:
            return f"{name} is damaged: its size and CRC-32 are {list(found.values())}, not {list(expected.values())}"
    return None


def _load(folder: Path) -> Snapshot:
    manifest = json.loads((folder / MANIFEST).read_text())
    return Snapshot(
        step=int(manifest["step"]),
        weights=read_state_dict(folder / WEIGHTS),
        average=read_state_dict(folder / AVERAGE),
        optimizer=torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True),
        counters=manifest["counters"],
        settings=manifest["settings"],
    )


def _save_tensors(tensors: Mapping[str, Mapping[str, Tensor]], path: Path) -> None:
    on_host = {name: {key: value.detach().cpu() for key, value in item.items()} for name, item in tensors.items()}
    torch.save(on_host, path)


def _fingerprint(path: Path) -> dict[str, int]:
    """Size and CRC-32 of a file."""
    size = checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return {"bytes": size, "crc32": checksum}
