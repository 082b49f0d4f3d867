"""Moving finished outputs to pinned host memory while the GPU computes the next ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from .head_loop import Outputs

ALIGNMENT = 512  # bytes: any dtype, and whole lines of a copy
AHEAD = 2  # chunks that may wait for their copy: the device holds the outputs of so many, and of the one computed
# Bytes pinned at once: some 18 views of 518 x 336, so that whoever keeps one view keeps no more than these, and a
# power of two, to which PyTorch rounds up.
BLOCK = 1 << 28


class HostCopies:
    """Copies on a stream of their own. The result of `add` is valid after `wait`.

    Outputs that are added one after the other share blocks of pinned memory; a block is freed when the last tensor in
    it is.

    Args:
        device: where the outputs come from; on a CPU they are handed through.
        views: dictionaries to come.
    """

    def __init__(self, device: torch.device, views: int) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._memory = HostMemory(device)
        self._views = views
        self._events: list[torch.cuda.Event] = []

    def add(self, outputs: Sequence[Outputs]) -> list[Outputs]:
        """The same dictionaries with tensors in host memory; a tensor that occurs twice is copied once."""
        if self._stream is None:
            return [dict(view) for view in outputs]
        unique = list({id(t): t for view in outputs for t in view.values()}.values())
        if not self._memory.expects:
            self._memory.expect(sum(map(padded, unique)) * self._views // len(outputs))
        copies = dict(zip(map(id, unique), self._memory.take(unique), strict=True))
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for tensor in unique:
                copies[id(tensor)].copy_(tensor, non_blocking=True)
                tensor.record_stream(self._stream)  # its memory is not reused before the copy is done
        self._events.append(self._stream.record_event())
        if len(self._events) > AHEAD:
            self._events.pop(0).synchronize()
        return [{key: copies[id(tensor)] for key, tensor in view.items()} for view in outputs]

    def wait(self) -> None:
        """Wait until everything added is there."""
        while self._events:
            self._events.pop(0).synchronize()

    def __enter__(self) -> HostCopies:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._memory.close()


def padded(tensor: Tensor) -> int:
    """Bytes of a tensor's place in a block."""
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT


class HostMemory:
    """Host memory in blocks, which a thread allocates ahead of their use.

    The host is seconds ahead of the GPU when the first outputs are added, because nothing before waits for the GPU: of
    many views, all memory is pinned while the transformer still runs. Pinning takes the driver half a second a GB, and
    launches wait for it meanwhile.

    Args:
        device: where copies come from: memory is pinned for a GPU, and pageable for a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free = torch.empty(0, dtype=torch.uint8)
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: deque[Future[Tensor]] = deque()

    @property
    def expects(self) -> bool:
        """Whether `expect` was called."""
        return self._thread is not None

    def expect(self, size: int) -> None:
        """Begin to allocate whole blocks of so many bytes; `take` allocates what is missing in the end."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="any4d_fast pinning")
        self._ahead.extend(self._thread.submit(self._allocate, BLOCK) for _ in range(size // BLOCK))

    def take(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Uninitialised contiguous tensors of the shapes and dtypes of others."""
        sizes = [padded(tensor) for tensor in like]
        left, found = sum(sizes), []
        for tensor, size in zip(like, sizes, strict=True):
            if size > self._free.numel():
                ready = self._ahead and size <= BLOCK
                self._free = self._ahead.popleft().result() if ready else self._allocate(left)
            place, self._free = self._free[:size], self._free[size:]
            found.append(place[: tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape))
            left -= size
        return found

    def close(self) -> None:
        """Allocate no more ahead."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
        self._ahead.clear()

    def _allocate(self, size: int) -> Tensor:
        if self._device.type != "cuda":
            return torch.empty(size, dtype=torch.uint8)
        with torch.cuda.device(self._device):
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
