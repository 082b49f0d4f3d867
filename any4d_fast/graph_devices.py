"""What `graphs` needs of a device: capture, replay, the order of calls on streams, and the memory that it takes."""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

_CAPTURING = threading.Lock()  # one capture at a time in the process: the allocator's and the driver's wish


class CapturedGraph(Protocol):
    """A recorded sequence of kernels on fixed memory."""

    def replay(self) -> None: ...

    def reset(self) -> None: ...


class GraphDevice(Protocol):
    """One device, one memory pool, one order of calls."""

    def capture(self, body: Callable[[], Any]) -> tuple[CapturedGraph, Any, int]:
        """Record what `body` launches, without running it.

        Returns:
            The graph, the result in the pool's memory, and how many bytes the pool grew by.
        """

    def ordered(self) -> contextlib.AbstractContextManager[None]:
        """What is launched inside, on whatever stream, follows what was launched in the last such block."""

    def finish(self) -> None:
        """Wait on the host for the last block: its memory may be given back then."""

    def limit(self) -> int:
        """Bytes that graphs may take on a device of this size."""


class CudaDevice:
    """A CUDA device. Captures on a stream of its own, into a pool of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._last = torch.cuda.Event()

    def capture(self, body: Callable[[], Any]) -> tuple[CapturedGraph, Any, int]:
        graph = torch.cuda.CUDAGraph()
        with _CAPTURING, _no_collection():
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()  # what is cached cannot be given back during a capture, should memory run short
            before = torch.cuda.memory_reserved(self._device)
            with torch.cuda.stream(self._stream):
                # Other threads may allocate meanwhile ("global" would fail them).
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    result = body()
                except BaseException:
                    self._abandon(graph)
                    raise
                try:
                    graph.capture_end()
                except BaseException:
                    self._close_pool()
                    raise
            grown = torch.cuda.memory_reserved(self._device) - before
        return graph, result, max(grown, 0)

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture whose body failed: driver, allocator and random numbers must all forget it."""
        try:
            graph.capture_end()
            graph.reset()
        except Exception:  # the driver says that the capture is broken, which is known
            self._close_pool()
            with contextlib.suppress(Exception):
                torch._C._cuda_releasePool(self._stream.device_index, self._pool)
            self._restore_generator()

    def _close_pool(self) -> None:
        # When the driver refuses to end a capture, `capture_end` leaves before the allocator is told.
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(self._stream.device_index, self._pool)

    def _restore_generator(self) -> None:
        """The default generator thinks that it is captured until a capture ends well: let an empty one."""
        scratch = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(self._device)
        with contextlib.suppress(Exception), warnings.catch_warnings(), torch.cuda.stream(stream):
            warnings.simplefilter("ignore")
            scratch.capture_begin(capture_error_mode="thread_local")
            scratch.capture_end()

    @contextlib.contextmanager
    def ordered(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._last)
        try:
            yield
        finally:
            self._last.record(current)

    def finish(self) -> None:
        self._last.synchronize()

    def limit(self) -> int:
        return torch.cuda.get_device_properties(self._device).total_memory // 5


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection inside: freeing an old graph or an event is not allowed during a capture."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
