"""An endless stream of synthetic clips for training: every step's batch is drawn and rendered where it is needed.

A clip is a pure function of (config, seed, its number); step s of rank r has the numbers from (s * world_size + r) *
batch_size on. So a run resumes by asking for its next step, and no two ranks or steps see the same clip. Scenes are
drawn on the host in float64: devices of different types agree but for rounding in what is rendered from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ..ops.render_clips import render_clips
from .batch import Batch
from .stream_config import StreamConfig
from .stream_draw import draw_scenes
from .stream_random import Draws
from .stream_tables import Packed, make_tables, pack

__all__ = ["Stream", "StreamConfig", "held_out"]

# The upper half of a stream's 128-bit key. The lower half is the seed.
_TRAINING, _HELD_OUT, _SIZES = 1, 2, 3


def _check_int(name: str, value: int, least: int, most: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        bound = f"an int of at least {least}" if most == math.inf else f"an int from {least} to {most}"
        raise ValueError(f"{name}: expected {bound}, got {value!r}")


class Stream:
    """Batches of synthetic clips by step, with complete ground truth.

    Args:
        config: what to draw from.
        batch_size: B, clips of this process's batch.
        device: where batches are rendered and lie.
        seed: 0 to 2^64 - 1; streams of different seeds are independent.
        rank, world_size: this process among those of the run; ranks see different clips of the same size.
        backend: of the renderer: "triton", "eager" or None for the fastest that can run.
        ahead: draw the next step's scenes in a thread while this one is trained on; None: on a GPU. What comes out
            does not depend on it.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        config: StreamConfig,
        batch_size: int,
        device: str | torch.device = "cpu",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        *,
        backend: str | None = None,
        ahead: bool | None = None,
    ) -> None:
        _check_int("batch_size", batch_size, 1)
        _check_int("seed", seed, 0, 2**64 - 1)
        _check_int("world_size", world_size, 1)
        _check_int("rank", rank, 0, world_size - 1)
        self.config, self.batch_size, self.device = config, batch_size, torch.device(device)
        self.seed, self.rank, self.world_size, self.backend = seed, rank, world_size, backend
        self.ahead = self.device.type == "cuda" if ahead is None else ahead
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="any4d_fast stream") if self.ahead else None
        self._next: tuple[int, Future[Packed]] | None = None

    def size(self, step: int) -> tuple[int, int]:
        """(height, width) of a step's pictures, the same for every rank and batch size."""
        sizes = self.config.sizes
        return sizes[int(Draws((_SIZES << 64) | self.seed, step, 1).integer(0, len(sizes) - 1)[0])]

    def batch(self, step: int) -> Batch:
        """The batch of a step, 0 or later: always the same. Waits for nothing on the device.

        Raises:
            ValueError: a negative step.
        """
        _check_int("step", step, 0)
        expected, future = self._next or (None, None)
        self._next = None
        packed = future.result() if future is not None and expected == step else self._draw(step)
        if self._thread is not None:
            self._next = step + 1, self._thread.submit(self._draw, step + 1)
        return _render(packed, self.config, self.size(step), self.device, self.backend)

    def _draw(self, step: int) -> Packed:
        first = (step * self.world_size + self.rank) * self.batch_size
        draws = Draws((_TRAINING << 64) | self.seed, first, self.batch_size)
        return pack(draw_scenes(draws, self.config, *self.size(step)))


def held_out(
    config: StreamConfig,
    count: int,
    batch_size: int,
    device: str | torch.device = "cpu",
    seed: int = 0,
    *,
    backend: str | None = None,
) -> Iterator[Batch]:
    """Clips that no training stream ever contains, whatever its seed; all of the first of `config.sizes`.

    Clip i is the same for every batch size.

    Args:
        config: what to draw from.
        count: how many clips in all.
        batch_size: most clips of a batch; the last one has what is left.
        device: where batches are rendered and lie.
        seed: 0 to 2^64 - 1, another one for another set.
        backend: of the renderer.

    Raises:
        ValueError: an argument outside its range.
    """
    _check_int("count", count, 1)
    _check_int("batch_size", batch_size, 1)
    _check_int("seed", seed, 0, 2**64 - 1)
    key, size, target = (_HELD_OUT << 64) | seed, config.sizes[0], torch.device(device)

    def batch(first: int) -> Batch:
        draws = Draws(key, first, min(batch_size, count - first))
        return _render(pack(draw_scenes(draws, config, *size)), config, size, target, backend)

    return (batch(first) for first in range(0, count, batch_size))


def _render(
    packed: Packed, config: StreamConfig, size: tuple[int, int], device: torch.device, backend: str | None
) -> Batch:
    tables, poses = make_tables(packed, device)
    found = render_clips(tables, *size, samples=config.supersampling, shadows=config.shadows, backend=backend)
    known = torch.ones(len(poses), dtype=torch.bool, device=device)
    return Batch(
        images=found.images,
        ray_directions=found.rays,
        depth_along_ray=found.depth,
        camera_poses=poses,
        scene_flow=found.flow,
        depth_mask=found.hit,
        flow_mask=found.flow_mask,
        dynamic_mask=found.dynamic_mask,
        surface_mask=found.hit,
        has_rays=known,
        has_poses=known,
        has_surface=known,
        is_metric=known,
    )
