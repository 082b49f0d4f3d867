"""What a run changes about its process, and gives back at its end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch

from ..switches import cudnn_tf32, matmul_tf32


@contextlib.contextmanager
def stop_signals() -> Iterator[Any]:
    """SIGTERM, and Ctrl-C once, ask the run to stop after its step; yields whether they have."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: Any) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Only algorithms that give the same bits every time."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


@contextlib.contextmanager
def tensor_float(allowed: bool) -> Iterator[None]:
    """TF32, where it is allowed, for what autocast leaves in float32: the heads, as upstream trains them."""
    with matmul_tf32(allowed), cudnn_tf32(allowed):
        yield


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """A stream that is not the default one: a CUDA graph cannot be captured there."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        yield
