"""CUDA graphs of the model's inference: captured once for a kind of call, replayed with other inputs and weights.

With few views a call is bound by hundreds of kernel launches; a graph launches them all at once. `Any4D.forward` and
`infer` use one by themselves for calls without gradients on a GPU, up to `graph_calls.MAX_TOKENS` patch tokens (more
tokens keep the device busy longer than Python needs to launch). The first call of a kind runs without and is the
warm-up, the second captures. `cuda_graphs=True` as an argument takes any size and captures at once, False takes none;
`with cuda_graphs(False):` and the environment variable ANY4D_FAST_CUDA_GRAPHS=0 or 1 do the same for all calls inside.

A graph belongs to one model, one kind of call (`call_key`) and fixed memory. So that nobody notices:

- inputs are copied into buffers of the graph's own, and outputs out of it: nothing that a caller holds is overwritten;
- parameters are read where they are; what is derived from them (`modules.derived`) is renewed in place; where a
  parameter or module was exchanged, every graph of the model is dropped;
- all graphs of a model share one memory pool, so that their calls follow one another, on whatever streams; the calls of
  two models do not wait for each other;
- at most `MAX_GRAPHS` graphs and `MAX_BYTES` of memory are kept, the least recently used ones go first.

A call that cannot be captured runs without a graph, and the log says why, once.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .graph_calls import (
    Body,
    Outputs,
    Views,
    call_key,
    cuda_graphs,
    decided,
    fill,
    reasons,
    static_copies,
    tensors_of,
    wanted,
)
from .graph_devices import CapturedGraph, CudaDevice, GraphDevice
from .modules.derived import Kept, Recording, recording

__all__ = ["GraphCache", "Walk", "call_key", "cuda_graphs", "decided", "reasons", "wanted"]

logger = logging.getLogger("any4d_fast")

MAX_GRAPHS = 16
MAX_BYTES = 4 << 30  # static inputs and outputs, and the shared pool
MAX_SEEN = 256  # kinds of calls that are remembered without a graph


@dataclass
class Walk:
    """What a graph assumes of its model besides numbers: modules and their modes, where parameters are, no listeners.

    The model itself is not held, so that it goes when its last user lets it go; its own hooks run around the graph.
    """

    modules: list[nn.Module] = field(default_factory=list)
    modes: list[bool] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)
    storages: list[Any] = field(default_factory=list)
    hooked: bool = False

    @staticmethod
    def of(model: nn.Module, hold: bool = False) -> Walk:
        """Look at a model; with `hold`, keep its parameters' memory from being reused at the same address, unseen."""
        everywhere = nn.modules.module
        found = Walk(hooked=bool(everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks))
        seen: set[int] = set()
        found._look(model, hold)
        stack = list(model._modules.values())
        while stack:
            module = stack.pop()
            if module is None or id(module) in seen:
                continue
            seen.add(id(module))
            found.modules.append(module)
            found.modes.append(module.training)
            found.hooked = found.hooked or bool(module._forward_hooks or module._forward_pre_hooks)
            found._look(module, hold)
            stack.extend(module._modules.values())
        return found

    def _look(self, module: nn.Module, hold: bool) -> None:
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    self.addresses.append(tensor.data_ptr())
                    if hold:
                        self.storages.append(tensor.untyped_storage())

    def same(self, other: Walk) -> bool:
        return self.addresses == other.addresses and self.modes == other.modes and self.modules == other.modules


@dataclass
class _Entry:
    """One captured graph with the memory that it reads and writes."""

    graph: CapturedGraph
    inputs: list[Tensor]
    outputs: _Outputs
    recorded: Recording


class _Outputs:
    """The graph's outputs, and fresh copies of them: whole allocations, so that views of a tensor share one again."""

    def __init__(self, outputs: Outputs) -> None:
        self.flat: list[Tensor] = []
        self._plan: list[dict[str, tuple[int, torch.Size, tuple[int, ...], int]]] = []
        index: dict[tuple[int, torch.dtype], int] = {}
        for view in outputs:
            plan = {}
            for name, tensor in view.items():
                where = (tensor.untyped_storage().data_ptr(), tensor.dtype)
                if where not in index:
                    index[where] = len(self.flat)
                    self.flat.append(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
                    self.flat[-1].set_(tensor.untyped_storage())
                plan[name] = (index[where], tensor.shape, tensor.stride(), int(tensor.storage_offset()))
            self._plan.append(plan)

    def fresh(self) -> Outputs:
        """Copies, made on the current stream."""
        copies = [torch.empty_like(flat) for flat in self.flat]
        for dtype in dict.fromkeys(flat.dtype for flat in self.flat):
            which = [i for i, flat in enumerate(self.flat) if flat.dtype == dtype]
            torch._foreach_copy_([copies[i] for i in which], [self.flat[i] for i in which])
        return [
            {name: copies[i].as_strided(size, stride, offset) for name, (i, size, stride, offset) in plan.items()}
            for plan in self._plan
        ]


class GraphCache:
    """The graphs of one model."""

    def __init__(self, make_device: Callable[[torch.device], GraphDevice] = CudaDevice) -> None:
        self.max_graphs, self.max_bytes = MAX_GRAPHS, MAX_BYTES
        self._make_device = make_device
        self._device: GraphDevice | None = None
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._seen: OrderedDict[Hashable, list[Kept]] = OrderedDict()
        self._failed: OrderedDict[Hashable, str] = OrderedDict()
        self._walk: Walk | None = None
        self._pool_bytes = 0
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphCache:
        return GraphCache(self._make_device)

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphCache, ()

    def failures(self) -> list[str]:
        """Why calls that should have been captured were not."""
        return list(dict.fromkeys(self._failed.values()))

    def clear(self) -> None:
        """Drop every graph and give their memory back."""
        with self._lock:
            if self._device is not None:
                self._device.finish()
                for entry in self._entries.values():
                    entry.graph.reset()
            self._entries.clear()
            self._seen.clear()
            self._walk = None
            self._device = None
            self._pool_bytes = 0

    def bytes(self) -> int:
        """Device memory that the graphs hold."""
        return self._pool_bytes + sum(t.nbytes for entry in self._entries.values() for t in entry.inputs)

    def drop_stale(self, model: nn.Module) -> None:
        """Drop all graphs if the model's modules or its parameters' memory were exchanged."""
        with self._lock:
            if self._walk is not None and not Walk.of(model).same(self._walk):
                self.clear()
            for key, used in list(self._seen.items()):
                if not all(kept.in_place() for kept in used):
                    del self._seen[key]

    def run(self, model: nn.Module, key: Hashable, views: Views, body: Body, at_once: bool = False) -> Outputs:
        """`body(views)`, from a graph where there is one or it is time to capture one.

        Args:
            model: whose parameters and modules `body` reads.
            key: kind of call; all that the launched kernels depend on, but the numbers in tensors.
            views: inputs; tensors under `INPUT_KEYS` are copied into the graph's own.
            body: the computation; it must not change its inputs, nor wait for the device (`derived.defer`).
            at_once: capture at the first call already.
        """
        device = views[0]["img"].device
        with self._lock, _on(device):
            entry = self._entries.get(key)
            if entry is None and key not in self._failed:
                if not at_once and key not in self._seen:
                    return self._warm_up(key, views, body)
                entry = self._capture(model, key, views, body, device)
            found = None if entry is None else self._replay(model, key, entry, views)
        return body(views) if found is None else found

    def _warm_up(self, key: Hashable, views: Views, body: Body) -> Outputs:
        with recording() as recorded:
            outputs = body(views)
        self._seen[key] = recorded.used
        while len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        return outputs

    def _replay(self, model: nn.Module, key: Hashable, entry: _Entry, views: Views) -> Outputs | None:
        """Fresh outputs, or None when the graph no longer describes the model.

        The graph is launched first and its assumptions are looked at while it runs: it reads old numbers at worst, in
        memory that the cache keeps alive, and what it made of them is not returned.
        """
        assert self._device is not None and self._walk is not None
        self._entries.move_to_end(key)
        outputs: Outputs | None = None
        with self._device.ordered():
            for kept in entry.recorded.used:
                kept.wait()
            fill(entry.inputs, tensors_of(views))
            entry.graph.replay()
            walk = Walk.of(model)
            same = walk.same(self._walk)
            if same and not walk.hooked:
                if any([kept.refresh() for kept in entry.recorded.used]):
                    entry.graph.replay()
                outputs = entry.outputs.fresh()
        if not same:
            self.clear()
        elif outputs is not None and any(bool(flag) for flag in entry.recorded.flags):
            return None
        return outputs

    def _capture(
        self, model: nn.Module, key: Hashable, views: Views, body: Body, device: torch.device
    ) -> _Entry | None:
        """Capture `body`; None, and a reason in the log, when that fails."""
        walk = Walk.of(model, hold=True)
        if walk.hooked:
            return None
        if self._walk is not None and not walk.same(self._walk):
            self.clear()
        used = self._seen.get(key)
        if used is None:
            with recording() as warm:
                body(views)
            used = warm.used
        for attempt in range(2):
            try:
                entry = self._captured(used, views, body, device)
            except Exception as error:  # whatever a kernel, a library or the driver objects to during a capture
                self._give_up(key, f"{type(error).__name__}: {error}".split("\n")[0])
                return None
            self._entries[key] = entry
            if self.bytes() <= self._limit():
                self._walk = walk
                while len(self._entries) > self.max_graphs:
                    self._evict()
                return entry
            alone = len(self._entries) == 1
            del entry
            self.clear()  # a pool only grows: start again with an empty one
            if alone or attempt:
                break
        self._give_up(key, f"one graph of this size takes more than {self.max_bytes / 2**30:.1f} GiB")
        return None

    def _evict(self) -> None:
        """Drop the graph that was not used for longest."""
        assert self._device is not None
        self._device.finish()
        self._entries.popitem(last=False)[1].graph.reset()

    def _captured(self, used: list[Kept], views: Views, body: Body, device: torch.device) -> _Entry:
        self._device = self._device or self._make_device(device)
        with torch.inference_mode(False), torch.no_grad():
            copies, inputs = static_copies(views, device)
        for kept in used:
            kept.refresh()
        with recording(capturing=True) as recorded, _uncached_autocast(device):
            graph, outputs, grown = self._device.capture(lambda: body(copies))
        entry = _Entry(graph, inputs, _Outputs(outputs), recorded)
        self._pool_bytes += grown
        return entry

    def _give_up(self, key: Hashable, reason: str) -> None:
        if reason not in self._failed.values():
            logger.warning("CUDA graphs: not used for a call, which runs without: %s", reason)
        self._failed[key] = reason
        while len(self._failed) > MAX_SEEN:
            self._failed.popitem(last=False)
        if self._device is not None and not self._entries:
            self._device = None  # with a new pool and stream next time

    def _limit(self) -> int:
        return self.max_bytes if self._device is None else min(self.max_bytes, self._device.limit())


@contextlib.contextmanager
def _uncached_autocast(device: torch.device) -> Iterator[None]:
    """The caller's autocast, but for its cache of weights: a graph must not read what goes away with the context."""
    enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    with torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=False):
        yield


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
