"""Seconds by stage of a model call, and progress while it runs."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .model import Any4D

STAGES = {
    "encoder": ("encoder",),
    "geometric inputs": ("ray_dirs_encoder", "depth_encoder", "scene_flow_encoder"),
    "transformer": ("info_sharing",),
    "dense heads": (
        "dpt_feature_head",
        "dpt_regressor_head",
        "scene_flow_dpt_feature_head",
        "scene_flow_dpt_regressor_head",
    ),
    "pose and scale heads": ("pose_head", "scale_head"),
}
"""Stage name -> the model's modules whose time it is."""


@dataclass
class StageTimes:
    """Seconds by stage, in the order in which the stages first ran."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


@contextlib.contextmanager
def timed(times: StageTimes, stage: str, device: torch.device | None = None) -> Iterator[None]:
    """Time a block as one stage; waits for the device before and after."""
    _wait(device)
    start = time.perf_counter()
    yield
    _wait(device)
    times.add(stage, time.perf_counter() - start)


@contextlib.contextmanager
def watched(model: Any4D, times: StageTimes, on_step: Callable[[str], None] | None = None) -> Iterator[None]:
    """Time the model's stages through hooks; `on_step(stage)` is called after each module and transformer block."""
    device = next(model.parameters()).device
    starts: dict[int, float] = {}
    handles = []

    def before(module: nn.Module, *_: Any) -> None:
        _wait(device)
        starts[id(module)] = time.perf_counter()

    def after(stage: str) -> Callable[..., None]:
        def hook(module: nn.Module, *_: Any) -> None:
            _wait(device)
            times.add(stage, time.perf_counter() - starts.pop(id(module)))
            if on_step:
                on_step(stage)

        return hook

    def tick(stage: str) -> Callable[..., None]:
        return lambda *_: on_step(stage) if on_step else None

    for stage, names in STAGES.items():
        for name in names:
            module = getattr(model, name, None)
            if module is not None:
                handles.append(module.register_forward_pre_hook(before))
                handles.append(module.register_forward_hook(after(stage)))
    for stage, blocks in (("encoder", model.encoder.model.blocks), ("transformer", _transformer_blocks(model))):
        handles.extend(block.register_forward_hook(tick(stage)) for block in blocks)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def steps(model: Any4D) -> int:
    """How often `on_step` is called at least in one call without geometric inputs and one chunk of views."""
    heads = 6 if hasattr(model, "pose_head") else 5
    return len(model.encoder.model.blocks) + len(_transformer_blocks(model)) + 2 + heads


def _transformer_blocks(model: Any4D) -> nn.ModuleList:
    return model.info_sharing.self_attention_blocks


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of PyTorch's allocator on a GPU, of this process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux's getrusage starts at the parent process's peak
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
