"""Tensors derived from parameters (cast, padded, resized), kept until a parameter changes and then renewed in place.

They live beside a module's parameters as a plain attribute: no state dict has them, copies and pickles of a module
start without. Renewing writes into the same memory, so that a captured CUDA graph goes on reading the right numbers; a
graph records what it read (`recording`) and has it renewed when it is replayed.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .host_weights import home

Sources = Callable[[], Sequence[Tensor]]
Recipe = Callable[[], Iterable[Tensor]]

LIMIT = 16  # kept results a module: dtypes times sizes of the patch grid


class CaptureError(RuntimeError):
    """Something happened during the capture of a CUDA graph that must not become part of it."""


@dataclass
class Recording:
    """What a run read that replaying it must look after.

    Attributes:
        used: derived tensors.
        flags: [] bool tensors on the device; a replay whose flags are not all false is thrown away and run eagerly.
        capturing: whether the run is being captured, so that nothing may be derived or read back in it.
    """

    capturing: bool = False
    used: list[Kept] = field(default_factory=list)
    flags: list[Tensor] = field(default_factory=list)


class _Active(threading.local):
    recording: Recording | None = None


_ACTIVE = _Active()


@contextlib.contextmanager
def recording(capturing: bool = False) -> Iterator[Recording]:
    """Note the derived tensors that this thread reads."""
    before, _ACTIVE.recording = _ACTIVE.recording, Recording(capturing)
    try:
        yield _ACTIVE.recording
    finally:
        _ACTIVE.recording = before


def deferring() -> bool:
    """Whether `defer` would put a host read off."""
    return _ACTIVE.recording is not None and _ACTIVE.recording.capturing


def defer(flag: Tensor) -> bool:
    """Whether a host read of `flag` is put off: during a capture, whoever replays the graph reads it afterwards.

    Code that must look at a value on the device (`if bool(overflow): fall back`) asks here first, and takes the branch
    of a false flag when the answer is True.
    """
    active = _ACTIVE.recording
    if active is None or not active.capturing:
        return False
    active.flags.append(flag)
    return True


def signature(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Addresses and versions: changed by an assignment and by an in-place operation.

    An in-place change through `.data` bypasses PyTorch's version counter and is not seen, nor is one by a replayed CUDA
    graph: `Any4D.train()` or `Any4D.refresh()` makes up for it.
    """
    return [t.data_ptr() for t in tensors], [t._version for t in tensors]


class Kept:
    """One set of derived tensors and how it came about."""

    def __init__(self, sources: Sources, recipe: Recipe, store: Derived, key: Hashable) -> None:
        self.sources = sources
        self.recipe = recipe
        self.tensors: list[Tensor] = []
        # Weakly: no cycle must keep a model's memory when its last user lets it go.
        self._store = weakref.ref(store)
        self._key = key
        self._signature: tuple[list[int], list[int]] | None = None
        # Held, so that memory of a replaced parameter is not reused at the same address, unseen.
        self._held: list[Any] = []
        self._ready: torch.cuda.Event | None = None
        self._stream: Any = None
        self._lock = threading.Lock()

    def invalidate(self) -> None:
        """Derive anew at the next use, whatever the versions say."""
        self._signature = None

    def in_place(self) -> bool:
        """Whether the sources lie where they lay when the tensors were derived."""
        return [t.data_ptr() for t in self._held] == [t.data_ptr() for t in self.sources()]

    def refresh(self) -> bool:
        """Renew the tensors if a source changed; returns whether anything was written.

        Tensors stay where they are in memory unless their device, dtype or shape changed.
        """
        with self._lock:
            sources = list(self.sources())
            found = signature(sources)
            if found == self._signature:
                self.wait()
                return False
            device = home(sources)
            self._signature = None  # until all are written
            # Normal tensors, exact arithmetic: whatever mode the caller is in must not reach what is kept.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
                self._derive()
            self._signature = found
            self._held = [t.detach() for t in sources]
            self._record(device)
        store = self._store()
        if store is not None:  # again, should it have been dropped there while a graph went on using it
            store._insert(self._key, self)
        return True

    def _derive(self) -> None:
        before, self.tensors = self.tensors, []
        for i, value in enumerate(self.recipe()):
            old = before[i] if i < len(before) else None
            if old is not None and (old.shape, old.dtype, old.device) == (value.shape, value.dtype, value.device):
                self.tensors.append(old.copy_(value))
            else:
                self.tensors.append(value.detach().clone() if _shares_memory(value, self.sources()) else value.detach())

    def _record(self, device: torch.device) -> None:
        if device.type == "cuda":
            self._stream = torch.cuda.current_stream(device)
            self._ready = self._ready or torch.cuda.Event()
            self._ready.record(self._stream)

    def wait(self) -> None:
        """The current stream goes on after the stream on which the tensors were written."""
        if self._ready is None or torch.cuda.is_current_stream_capturing():
            return
        current = torch.cuda.current_stream(self._stream.device)
        if current != self._stream:
            current.wait_event(self._ready)


def _shares_memory(value: Tensor, sources: Sequence[Tensor]) -> bool:
    return any(value.untyped_storage().data_ptr() == s.untyped_storage().data_ptr() for s in sources)


class Derived:
    """The derived tensors of one module, by key."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Kept] = OrderedDict()
        self._lock = threading.RLock()

    def get(self, key: Hashable, sources: Sources, recipe: Recipe) -> list[Tensor]:
        """Tensors of `recipe`, as they were derived when a source last changed.

        Args:
            key: what the recipe depends on beside the parameters, such as the dtype; the device belongs to it.
            sources: returns the parameters, at least one; asked at every call, because modules may be given new ones.
                It and `recipe` are kept: they hold the module that this store belongs to by a weak reference at most.
            recipe: yields the tensors in the same order at every call; runs without gradients and autocast.

        Raises:
            CaptureError: a source changed or the key is new while a CUDA graph is captured.
        """
        active = _ACTIVE.recording
        with self._lock:
            kept = self._kept.get(key)
            if active is not None and active.capturing:
                if kept is None or signature(list(kept.sources())) != kept._signature:
                    raise CaptureError("weights changed between the eager run and its capture")
            elif kept is None:
                kept = Kept(sources, recipe, self, key)
                kept.refresh()
            else:
                kept.refresh()
                self._kept.move_to_end(key)
        if active is not None and kept not in active.used:
            active.used.append(kept)
        return kept.tensors

    def _insert(self, key: Hashable, kept: Kept) -> None:
        with self._lock:
            self._kept[key] = kept
            while len(self._kept) > LIMIT:
                self._kept.popitem(last=False)

    def invalidate(self) -> None:
        """Derive everything anew at its next use."""
        with self._lock:
            everything = list(self._kept.values())
        for kept in everything:
            kept.invalidate()

    def clear(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._kept.clear()

    def drop_stale(self) -> None:
        """Let go of what was derived from parameters that were moved or replaced."""
        with self._lock:
            for key, kept in list(self._kept.items()):
                if not kept.in_place():
                    del self._kept[key]

    def __len__(self) -> int:
        return len(self._kept)

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived:
        return Derived()

    def __reduce__(self) -> tuple[Any, ...]:
        return Derived, ()


def derivable(*tensors: Tensor | None) -> bool:
    """Whether changes of these can be seen: parameters that count their versions.

    Tensors in a parameter's place are made anew for every call: by a parametrization, or for a replica of DataParallel.
    """
    return all(t is None or (type(t) is nn.Parameter and not t.is_inference()) for t in tensors)


def caching() -> bool:
    """Whether derived tensors may be used now: without gradients, and not while PyTorch traces."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing())  # type: ignore[attr-defined]
