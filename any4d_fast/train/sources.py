"""Batches by step, on the device that trains: rendered there, or read from a folder and copied there ahead of time."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from .. import backends
from ..config import ConfigError
from ..io.errors import MediaError
from .batch import Batch
from .config import DataOptions, RunOptions
from .parallel import World

if TYPE_CHECKING:
    from .dataset import ClipFolder

logger = logging.getLogger("any4d_fast.train")

PATCH = 14
VALIDATION_SEED = 1  # 0 is the final evaluation's: nobody has looked at those clips before
AHEAD = 2
"""Batches that are prepared while a step runs on a GPU."""


class Fed(NamedTuple):
    """A batch and the geometric inputs that every sample of it has, of those asked for."""

    batch: Batch
    given: tuple[str, ...]


class Source(Protocol):
    """Where batches come from."""

    def make(self, index: int) -> Fed:
        """The batch of an index; indices follow one another from the one that the source was started at."""

    def held_out(self, count: int, batch_size: int) -> Iterator[Fed]:
        """The same clips at every call, which training never sees; none where there are none."""

    def notes(self) -> dict[str, float]:
        """Numbers for the log."""

    def close(self) -> None:
        """End what runs in the background."""


class StreamSource:
    """Clips rendered on the device."""

    def __init__(self, data: DataOptions, given: tuple[str, ...], seed: int, world: World) -> None:
        from .stream import Stream

        # The reference backend is for what is trained; what it is trained on stays the same, and fast.
        ready = world.device.type == "cuda" and backends.triton_missing() is None
        self._backend = "triton" if ready else None
        self._config, self._device, self._given = data.stream, world.device, given
        self._stream = Stream(
            data.stream, data.batch_size, world.device, seed, world.rank, world.size, backend=self._backend
        )

    def make(self, index: int) -> Fed:
        return Fed(self._stream.batch(index), self._given)

    def held_out(self, count: int, batch_size: int) -> Iterator[Fed]:
        from .stream import held_out

        for batch in held_out(self._config, count, batch_size, self._device, VALIDATION_SEED, backend=self._backend):
            yield Fed(batch, self._given)

    def notes(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


class FolderSource:
    """Clips read from a folder by worker processes (`dataset.loader`)."""

    def __init__(self, data: DataOptions, given: tuple[str, ...], seed: int, world: World, first: int) -> None:
        from .dataset import ClipFolder, loader

        assert data.path is not None
        self._data, self._device, self._given = data, world.device, given
        self._pinned = world.device.type == "cuda"
        self._next = first
        self._held_out = self._find_held_out()
        self._batches = loader(
            ClipFolder(data.path, data.folder), data.batch_size, seed=seed, rank=world.rank, world_size=world.size,
            start_step=first, num_workers=data.workers, pin_memory=self._pinned,
        )  # fmt: skip

    def _find_held_out(self) -> ClipFolder | None:
        """The clips for validation; found at the start, since a run should not fail at its end."""
        from .dataset import ClipFolder

        data = self._data
        if data.held_out is not None:
            return ClipFolder(data.held_out, dataclasses.replace(data.folder, split="all"))
        assert data.path is not None
        if data.folder.split != "train":
            logger.warning(
                "no validation: data.folder.split is %r, so that training sees the clips that are held out; "
                "name a folder of others in data.held_out", data.folder.split,
            )  # fmt: skip
            return None
        try:
            return ClipFolder(data.path, dataclasses.replace(data.folder, split="held_out"))
        except MediaError as error:
            logger.warning("no validation: %s", error)
            return None

    def make(self, index: int) -> Fed:
        if index != self._next:
            raise ValueError(f"index: expected {self._next}, the next one, got {index}")
        self._next += 1
        return self._fed(next(self._batches))

    def held_out(self, count: int, batch_size: int) -> Iterator[Fed]:
        from .dataset import loader

        if self._held_out is None:
            return
        size = min(batch_size, count)
        batches = loader(
            self._held_out, size, epochs=1, shuffle=False, num_workers=self._data.workers, pin_memory=self._pinned
        )
        for first, batch in zip(range(0, count, size), batches, strict=False):
            wanted = min(size, count - first)
            yield self._fed(Batch(**{name: tensor[:wanted] for name, tensor in batch._tensors().items()}))

    def notes(self) -> dict[str, float]:
        return {"skipped_clips": float(self._batches.skipped)}

    def close(self) -> None:
        self._batches.close()

    def _fed(self, batch: Batch) -> Fed:
        """What every sample has is known on the host, before the batch goes to the device."""
        has = {"rays": batch.has_rays.all(), "poses": batch.has_poses.all(), "depth": torch.tensor(True)}
        given = tuple(name for name in self._given if bool(has[name]))
        return Fed(batch.to(self._device, non_blocking=self._pinned), given)


def open_source(
    data: DataOptions, given: tuple[str, ...], run: RunOptions, world: World, first: int
) -> StreamSource | FolderSource:
    """The source of a run whose next batch is number `first`.

    Raises:
        ConfigError, MediaError: the data is not there.
    """
    if data.source == "stream":
        bad = [size for size in data.stream.sizes if size[0] % PATCH or size[1] % PATCH]
        if bad:
            raise ConfigError(f"data.stream.sizes: expected multiples of {PATCH}, got {list(bad[0])}")
        return StreamSource(data, given, run.seed, world)
    return FolderSource(data, given, run.seed, world, first)


class Ahead:
    """Batches in order, the next ones prepared by a thread on a stream of its own; at once where there is no GPU."""

    def __init__(self, source: Source, first: int, last: int, device: torch.device) -> None:
        self._source, self._last = source, last
        self._threaded = device.type == "cuda"
        self._waiting: list[Future[tuple[Fed, torch.cuda.Event]]] = []
        self._next = first
        if self._threaded:
            self._pool = ThreadPoolExecutor(1, "any4d-fast-data")
            self._stream = torch.cuda.Stream(device)

    def __call__(self) -> Fed:
        """The next batch, ready for what is launched on the current stream from now on."""
        if not self._threaded:
            self._next += 1
            return self._source.make(self._next - 1)
        self._fill()
        fed, ready = self._waiting.pop(0).result()
        self._fill()
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_event(ready)
        for tensor in fed.batch._tensors().values():
            tensor.record_stream(current)
        return fed

    def quiet(self) -> None:
        """Wait until the thread does nothing."""
        for future in self._waiting:
            future.exception()

    def close(self) -> None:
        """Drop what is prepared."""
        if self._threaded:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _fill(self) -> None:
        while len(self._waiting) < AHEAD and self._next < self._last:
            self._waiting.append(self._pool.submit(self._prepare, self._next))
            self._next += 1

    def _prepare(self, index: int) -> tuple[Fed, torch.cuda.Event]:
        with torch.cuda.stream(self._stream):
            fed = self._source.make(index)
            ready = torch.cuda.Event()
            ready.record(self._stream)
        return fed, ready
