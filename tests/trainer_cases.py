"""A training run of a very small model that takes a second, here and in processes that the tests start."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from any4d_fast.config import PRESETS
from any4d_fast.train import checkpoints, optimizer, toml
from any4d_fast.train.checkpoints import CheckpointFolder
from any4d_fast.train.config import TrainConfig
from any4d_fast.train.trainer import train
from tests.small_models import small_config

SIZE = (28, 28)
STEPS = 6


def settings(output: Path | str, **tables: dict[str, Any]) -> TrainConfig:
    """Six steps with every draw, a checkpoint every second one; `tables` change single values."""
    PRESETS.setdefault("small", small_config())
    base: dict[str, dict[str, Any]] = {
        "model": {"preset": "small"},
        "data": {
            "batch_size": 1,
            "stream": {"num_views": 2, "sizes": [list(SIZE)], "supersampling": 1, "moving_objects": [2, 3]},
        },
        "optimizer": {"lr": 1e-3},
        "schedule": {"steps": STEPS, "warmup": 2, "ema": 0.9},
        "run": {
            "output": str(output), "device": "cpu", "precision": "fp32", "deterministic": True, "log_every": 1,
            "validation_clips": 1, "pictures": 0, "checkpoint_every": 2,
        },
    }  # fmt: skip
    for name, table in tables.items():
        base[name] = {**base.get(name, {}), **table}
    return toml.build(TrainConfig, base)


def final_state(output: Path) -> dict[str, Tensor]:
    """Everything that the newest checkpoint of a run holds, flat."""
    found = CheckpointFolder(output / "checkpoints").latest()
    assert found is not None
    snapshot = found[0]
    flat = {f"weights/{name}": tensor for name, tensor in snapshot.weights.items()}
    flat |= {f"average/{name}": tensor for name, tensor in snapshot.average.items()}
    for name, state in snapshot.optimizer.items():
        flat |= {f"optimizer/{name}/{key}": tensor for key, tensor in state.items()}
    return {**flat, "step": torch.tensor(snapshot.step)}


def losses(output: Path) -> list[str]:
    """metrics.csv without what depends on the clock."""
    lines = (output / "metrics.csv").read_text().splitlines()
    skipped = [i for i, name in enumerate(lines[0].split(",")) if name == "steps_per_second"]
    return [",".join(v for i, v in enumerate(line.split(",")) if i not in skipped) for line in lines]


def die() -> None:
    """As if the machine took the process away: nothing is flushed and nobody is told."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_in(where: str) -> None:
    """Arrange for this process to die in its fourth step, or while it writes its second checkpoint."""
    count = 0
    norm, save = optimizer.Optimizer._norm, checkpoints._save_tensors

    def dying_norm(*args: Any) -> Tensor:
        nonlocal count
        count += 1
        if count == 4:  # gradients are there, nothing is updated
            die()
        return norm(*args)

    def dying_save(tensors: Any, path: Path) -> None:
        nonlocal count
        count += 1
        save(tensors, path)
        if count == 2:  # weights are written, and half of the optimizer's state
            with open(path, "r+b") as file:
                file.truncate(path.stat().st_size // 2)
            die()

    if where == "step":
        optimizer.Optimizer._norm = dying_norm  # type: ignore[method-assign,assignment]
    else:
        checkpoints._save_tensors = dying_save


if __name__ == "__main__":
    torch.set_num_threads(1)
    die_in(sys.argv[1])
    train(settings(sys.argv[2]), progress=False)
