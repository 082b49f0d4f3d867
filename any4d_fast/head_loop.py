"""Heads and composition over chunks of views, so that full-resolution maps exist for one chunk only."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import head_precision
from .graph_calls import intercepted
from .memory import GPU_FINE_IMAGES, STREAM, balanced, head_chunk
from .modules import factors
from .modules.dense_training import HEAD_PARTS, dense_head, plain_head
from .modules.dpt import DPTFeatures, DPTRegressor, to_head_dtype, token_maps, token_rows
from .modules.heads import POSE_PARTS
from .modules.host_weights import head_parameters, resident
from .modules.plain import plain_parts
from .ops import dense_maps
from .switches import float32_sums, matmul_allows_tf32, matmul_tf32

if TYPE_CHECKING:
    from .model import Any4D

logger = logging.getLogger("any4d_fast")

PARALLEL_PATCHES = 8_192
"""Patches of a call (9 views of 518 x 336) up to which its heads run side by side on a GPU.

Coarse maps of few views are fewer tiles than there are multiprocessors, and every kernel leaves some idle at its end.
More patches fill the GPU, and the maps of all heads would take memory at once.
"""

Outputs = dict[str, Tensor]
Finish = Callable[[int, list[Outputs]], list[Outputs]]
"""Takes the first view's index and a chunk's outputs, one dictionary a view, and returns what is kept of them."""


def check_minibatch(minibatch_size: int | None) -> None:
    """Raise unless the heads can take so many views at once.

    Raises:
        ValueError: it is no whole number, or less than one.
    """
    if minibatch_size is not None and (minibatch_size < 1 or minibatch_size % 1):
        raise ValueError(f"minibatch_size: expected at least 1 view, or None, got {minibatch_size}")


def run_heads(
    model: Any4D,
    tokens: list[Tensor],
    num_views: int,
    grid: tuple[int, int],
    minibatch_size: int | None,
    finish: Finish | None = None,
    memory_budget: float | None = None,
    flags: head_precision.Flags | None = None,
) -> list[Outputs] | None:
    """From the four token buffers to every output of the model, in 16 bits where `head_precision` allows.

    Args:
        model: the model.
        tokens: four buffers [B, V*T + 1, C] for the dense heads, the last one for pose and scale too.
        num_views: V.
        grid: rows and columns of patches.
        minibatch_size: views at once; None chooses by memory (all with gradients).
        finish: applied to every chunk as soon as it is there; called again for all if the heads have to run again.
        memory_budget: GiB, see `memory.head_chunk`.
        flags: those that the tokens' producer was given, if it was given some.

    Returns:
        One dictionary a view; None where `flags.inputs` was raised: the tokens are wrong.
    """
    last = tokens[-1]
    mixed = torch.is_autocast_enabled(last.device.type)
    dtype = dtype_of_heads(model, last)
    narrow = dtype in head_precision.NARROW
    step = minibatch_size
    if step is None:
        step = num_views
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            step = head_chunk(
                model.config, last.shape[0], num_views, grid, last.device,
                itemsize=dtype.itemsize if narrow else max(STREAM, last.element_size()),
                memory_budget=memory_budget, keeps_outputs=finish is None,
            )  # fmt: skip
    few = pays_side_by_side(last.shape[0] * num_views * grid[0] * grid[1], last)
    # Whoever limits memory, or takes views one after the other, does not want the maps of all heads at once.
    parallel = narrow and few and step >= num_views and memory_budget is None
    trained = torch.is_grad_enabled() and last.numel() > 0
    trained_in = head_precision.training_dtype(last, mixed) if trained else torch.float32
    loop = _HeadLoop(model, tokens, num_views, grid, finish, parallel, trained_in)
    if narrow:
        flags = flags or head_precision.Flags(last.device)
        with float32_sums():
            outputs = loop.run(step, dtype, flags.heads)
        inputs_left, heads_left = flags.left_range()
        if inputs_left:
            return None
        if not heads_left:
            return outputs
        del outputs
        step = max(1, min(step, GPU_FINE_IMAGES) // 2)  # all levels of a chunk at once, and maps take twice as much
    with resident(head_parameters(model), last.device):
        return loop.run(step, None, None)


def dtype_of_heads(model: Any4D, like: Tensor) -> torch.dtype:
    """`head_precision.head_dtype`, but float32 where a head is more than its weights: an adapter, a hook inside."""
    dtype = head_precision.head_dtype(like, torch.is_autocast_enabled(like.device.type))
    if dtype not in head_precision.NARROW:
        return dtype
    dense = (
        model.dpt_feature_head,
        model.dpt_regressor_head,
        model.scene_flow_dpt_feature_head,
        model.scene_flow_dpt_regressor_head,
    )
    ours = all(plain_parts(head, *HEAD_PARTS) for head in dense)
    pose = not model.config.scene.pose_head or plain_parts(model.pose_head, *POSE_PARTS)
    return dtype if ours and pose else torch.float32


class _HeadLoop:
    def __init__(
        self,
        model: Any4D,
        tokens: list[Tensor],
        num_views: int,
        grid: tuple[int, int],
        finish: Finish | None,
        parallel: bool,
        trained_in: torch.dtype,
    ) -> None:
        self.model = model
        self.parallel = parallel
        self.trained_in = trained_in  # of the dense heads, with gradients
        self.tokens = tokens
        self.num_views = num_views
        self.grid = grid
        self.finish = finish
        patch = model.encoder.patch_size
        self.size = (grid[0] * patch, grid[1] * patch)
        self.log_scale: Tensor | None = None  # [B, 1]

    def run(self, step: int, dtype: torch.dtype | None, flag: Tensor | None) -> list[Outputs]:
        """All views, `step` at once, fewer where memory runs out; in 16 bits with a dtype and a flag."""
        results: list[Outputs] = []
        while len(results) < self.num_views:
            first = len(results)
            views = slice(first, min(first + step, self.num_views))
            found = self._attempt(views, dtype, flag)
            if found is None:
                # Outside of the handler, whose traceback would keep the failed chunk's maps alive.
                step = max(1, (views.stop - views.start) // 2)
                logger.warning("the dense heads ran out of memory; they go on with %d views at once", step)
                if self.tokens[-1].is_cuda:
                    torch.cuda.empty_cache()
                continue
            results += found
        return results

    def _attempt(self, views: slice, dtype: torch.dtype | None, flag: Tensor | None) -> list[Outputs] | None:
        """One chunk, or None where memory ran out and fewer views might fit."""
        try:
            outputs = self._chunk(views, dtype, flag)
            return outputs if self.finish is None else self.finish(views.start, outputs)
        except torch.OutOfMemoryError:
            if views.stop - views.start == 1 or torch.is_grad_enabled():
                raise
            if self.tokens[-1].is_cuda and torch.cuda.is_current_stream_capturing():
                raise
            return None

    def _chunk(self, views: slice, dtype: torch.dtype | None, flag: Tensor | None) -> list[Outputs]:
        scene = self.model.config.scene
        with full_precision(self.tokens[-1].device.type):
            geometry, flow, log_scale, pose = self._raw(views, dtype, flag)
            stacked = factors.compose(scene, geometry, flow, pose, log_scale)
        batch = log_scale.shape[0]
        scale = stacked.pop("metric_scaling_factor")
        # One split for all views: its gradient is one concatenation, a slice's a map of zeros of all views' size.
        parts = {key: value.split(batch) for key, value in stacked.items()}
        return [
            {**{key: part[i] for key, part in parts.items()}, "metric_scaling_factor": scale}
            for i in range(views.stop - views.start)
        ]

    def _raw(
        self, views: slice, dtype: torch.dtype | None, flag: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Channels of the geometry and flow heads, logarithms of the scale, and poses."""
        model = self.model
        if dtype is None or flag is None:
            maps = [token_maps(t, views, self.grid, self.num_views) for t in self.tokens]
            maps = maps if self.trained_in in head_precision.NARROW else to_head_dtype(maps)
            last = to_head_dtype(maps[-1:])[0]
        else:
            maps = self._narrow_maps(views, dtype, flag)
            last = maps[-1]
        rows = last.permute(0, 2, 3, 1).flatten(1, 2)  # [views * B, T, C]

        def geometry() -> list[Tensor]:
            return [self._dense(model.dpt_feature_head, model.dpt_regressor_head, maps, flag)]

        def flow() -> list[Tensor]:
            head = model.scene_flow_dpt_feature_head, model.scene_flow_dpt_regressor_head
            return [self._dense(*head, maps, flag)]

        def small() -> list[Tensor]:
            scale = self._scale()
            return [scale, model.pose_head(rows, flag)] if model.config.scene.pose_head else [scale]

        parts = (geometry, flow, small)
        found = side_by_side(parts, rows.device) if self.parallel and flag is not None else [part() for part in parts]
        (dense,), (moved,), others = found
        return dense, moved, others[0], others[1] if len(others) > 1 else None

    def _scale(self) -> Tensor:
        """[B, 1] of all views: once a call."""
        if self.log_scale is None:
            self.log_scale = self.model.scale_head(to_head_dtype([self.tokens[-1][:, -1]])[0])
        return self.log_scale

    def _dense(self, features: DPTFeatures, regressor: DPTRegressor, maps: list[Tensor], flag: Tensor | None) -> Tensor:
        """[N, H, W, channels] of one head."""
        if flag is None and self.trained_in in head_precision.NARROW:
            if plain_head(features, regressor):
                wait = head_precision.waits()
                raw, left_range = dense_head(features, regressor, maps, self.size, self.trained_in, wait=wait)
                if not (wait and bool(left_range)):
                    return raw
                head_precision.warn_of_heads()
            maps = to_head_dtype(maps)
        if flag is None and regressor.doubles:
            wide: Tensor = regressor(features(maps, double=False), self.size, double=True)
            return wide
        images = maps[0].shape[0]
        if flag is None or images <= GPU_FINE_IMAGES:
            raw = regressor(features(maps, flag), self.size, flag)
            return raw
        # Coarse maps of few images are too small for a GPU, fine ones of many take memory for nothing.
        coarse = features(maps, flag, coarse_only=True)
        parts = []
        step = balanced(images, GPU_FINE_IMAGES)
        for first in range(0, images, step):
            part = slice(first, first + step)
            finest = features([m[part] for m in maps], flag, coarse=coarse[part])
            parts.append(regressor(finest, self.size, flag))
            del finest
        return torch.cat(parts)

    def _narrow_maps(self, views: slice, dtype: torch.dtype, flag: Tensor) -> list[Tensor]:
        """The four maps [N, C, h, w] in 16 bits and channels-last memory, converted once for all heads."""
        kept: dict[int, Tensor] = {}
        for tokens in self.tokens:
            if id(tokens) not in kept:
                rows = dense_maps.narrow(token_rows(tokens, views, self.grid, self.num_views), dtype, flag)
                kept[id(tokens)] = rows.unflatten(1, self.grid).permute(0, 3, 1, 2)
        return [kept[id(tokens)] for tokens in self.tokens]


def pays_side_by_side(patches: int, like: Tensor) -> bool:
    """Whether parts of a call of so many patches should run `side_by_side` where `like` is."""
    return like.is_cuda and patches <= PARALLEL_PATCHES and not intercepted()


@functools.cache
def _side_streams(device: torch.device, main: int, count: int) -> list[torch.cuda.Stream]:
    """Streams beside the one with handle `main`: always the same, because freed memory stays with its stream."""
    return [torch.cuda.Stream(device) for _ in range(count)]


def side_by_side(parts: Sequence[Callable[[], list[Tensor]]], device: torch.device) -> list[list[Tensor]]:
    """What the parts return, each launched on a stream of its own; the current stream goes on after all of them.

    The streams start after what the current one was given before, and it waits for them before anything that the parts
    read can be freed. What they return is marked as in use on the current stream.
    """
    current = torch.cuda.current_stream(device)
    others = _side_streams(device, current.cuda_stream, len(parts) - 1)
    for stream in others:
        stream.wait_stream(current)
    found: list[list[Tensor]] = []
    try:
        for part, stream in zip(parts, (current, *others), strict=True):
            with torch.cuda.stream(stream):
                found.append(part())
    finally:
        for stream in others:
            current.wait_stream(stream)
    for tensor in itertools.chain(*found[1:]):
        tensor.record_stream(current)
    return found


@contextlib.contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Heads run outside autocast, with TF32 matmuls where the caller asked for mixed precision (as upstream)."""
    mixed = torch.is_autocast_enabled(device_type)
    with matmul_tf32(matmul_allows_tf32() or mixed), torch.autocast(device_type, enabled=False):
        yield
