"""Moving finished outputs to pinned host memory while the GPU computes the next ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from . import host_pages
from .head_loop import Outputs

ALIGNMENT = 512  # bytes: any dtype, and whole lines of a copy
AHEAD = 2  # chunks that may wait for their copy: the device holds the outputs of so many, and of the one computed
# Bytes pinned at once: some 18 views of 518 x 336, so that whoever keeps one view keeps no more than these, and a
# power of two, to which PyTorch rounds up.
BLOCK = 1 << 28
# PyTorch keeps what it pinned, so that calls one after the other pin once. Of more (some 400 views) that would be a
# large part of the host's memory, and would stay there.
KEPT = 1 << 32


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
        runs = adjoining({id(t): t for view in outputs for t in view.values()}.values())
        whole = [joined(run) for run in runs]
        if not self._memory.expects:
            self._memory.expect(sum(map(padded, whole)) * self._views // len(outputs))
        copies: dict[int, Tensor] = {}
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for run, source, target in zip(runs, whole, self._memory.take(whole), strict=True):
                target.copy_(source, non_blocking=True)
                source.record_stream(self._stream)  # its memory is not reused before the copy is done
                parts = target.view(-1).split([t.numel() for t in run])
                copies.update((id(t), part.view(t.shape)) for t, part in zip(run, parts, strict=True))
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


def adjoining(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors in runs that lie one behind the other in one storage: outputs of a chunk's views are cut from its maps.

    A tensor that is not contiguous, or empty, is a run of its own.
    """
    runs: list[list[Tensor]] = []
    flat: list[Tensor] = []
    for tensor in tensors:
        if tensor.is_contiguous() and tensor.numel():
            flat.append(tensor)
        else:
            runs.append([tensor])
    last: tuple[int, int, torch.dtype] | None = None  # the last run's storage, address behind it, and dtype
    for tensor in sorted(flat, key=lambda t: (t.untyped_storage().data_ptr(), t.data_ptr())):
        storage, start = tensor.untyped_storage().data_ptr(), tensor.data_ptr()
        if last != (storage, start, tensor.dtype):
            runs.append([])
        runs[-1].append(tensor)
        last = storage, start + tensor.numel() * tensor.element_size(), tensor.dtype
    return runs


def joined(run: Sequence[Tensor]) -> Tensor:
    """A run of `adjoining` as one flat tensor; a single one as it is."""
    first = run[0]
    return first if len(run) == 1 else first.as_strided((sum(t.numel() for t in run),), (1,))


def padded(tensor: Tensor) -> int:
    """Bytes of a tensor's place in a block."""
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT


class HostMemory:
    """Host memory in blocks, which a thread allocates ahead of their use.

    The host is seconds ahead of the GPU when the first outputs are added, because nothing before waits for the GPU. Of
    many views, the pages of all memory (`host_pages`) are there when the transformer is done; pinned by PyTorch, 10 GB
    kept the GPU idle for 4.6 s after it.

    Args:
        device: where copies come from: memory is pinned for a GPU, and pageable for a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[Tensor] = []  # ends of blocks
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: deque[Future[Tensor]] = deque()

    @property
    def expects(self) -> bool:
        """Whether `expect` was called."""
        return self._thread is not None

    def expect(self, size: int) -> None:
        """Begin to allocate whole blocks of so many bytes; `take` allocates what is missing in the end."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="any4d_fast pinning")
        pages = size > KEPT and self._device.type == "cuda"
        allocate = self._allocate_pages if pages else self._allocate
        self._ahead.extend(self._thread.submit(allocate, BLOCK) for _ in range(size // BLOCK))

    def take(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Uninitialised contiguous tensors of the shapes and dtypes of others."""
        sizes = [padded(tensor) for tensor in like]
        left, found = sum(sizes), []
        for tensor, size in zip(like, sizes, strict=True):
            place = self._place(size, left)[: tensor.numel() * tensor.element_size()]
            found.append(place.view(tensor.dtype).view(tensor.shape))
            left -= size
        return found

    def _place(self, size: int, left: int) -> Tensor:
        """So many bytes at the first end of a block that has them, or of the next block; `left` bytes are wanted."""
        at = next((i for i, end in enumerate(self._free) if len(end) >= size), None)
        if at is None:
            at = len(self._free)
            ready = self._ahead and size <= BLOCK
            self._free.append(self._ahead.popleft().result() if ready else self._allocate(left))
        place, self._free[at] = self._free[at][:size], self._free[at][size:]
        if not len(self._free[at]):
            del self._free[at]
        return place

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

    def _allocate_pages(self, size: int) -> Tensor:
        with torch.cuda.device(self._device):
            block = host_pages.pinned(size)
        return self._allocate(size) if block is None else block
