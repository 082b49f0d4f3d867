"""Rendering of synthetic clips for training: the renderer alone, and a whole batch of the stream.

`python benchmarks/bench_render.py` prints clips a second and milliseconds a batch, of the device and of the host, for
every launch configuration.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from any4d_fast.ops.render_clips import render_clips
from any4d_fast.reference.render_clips import ClipTables
from any4d_fast.train.stream import Stream, StreamConfig
from any4d_fast.train.stream_draw import draw_scenes
from any4d_fast.train.stream_random import Draws
from any4d_fast.train.stream_tables import make_tables, pack
from benchmarks.harness import FULL, Case, Maker, Sizes, time_ms

CLIPS, VIEWS, HEIGHT, WIDTH = 64, 4, 126, 168
BYTES = 12 + 12 + 4 + 12 + 4
"""Written for each pixel: colours, ray, depth, flow, and four bytes of slot and masks. The tables are below 1 MB."""

OUTLINES = 1e-2
"""Error allowed beside plain PyTorch's: on outlines, a few pixels in 100,000, rounding decides what is seen."""

CONFIGURATIONS = ((32, 1), (64, 1), (128, 1), (64, 2), (128, 4), (256, 4))


def batch_of(sizes: Sizes) -> tuple[int, StreamConfig]:
    """A training batch, or fewer clips of smaller pictures where sizes are tiny."""
    if sizes.height >= HEIGHT and sizes.width >= WIDTH:
        return CLIPS, StreamConfig(num_views=VIEWS, sizes=((HEIGHT, WIDTH),))
    return 1, StreamConfig(num_views=2, sizes=((sizes.height // 2, sizes.width // 2),))


def tables_of(clips: int, config: StreamConfig, device: str) -> ClipTables:
    """Clips of a stream of the benchmark's own, the same every time."""
    scenes = draw_scenes(Draws(1 << 100, 0, clips), config, *config.sizes[0])
    return make_tables(pack(scenes), torch.device(device))[0]


def _render(backend: str, shadows: bool, size: tuple[int, int]) -> Maker:
    return lambda tables: lambda: render_clips(ClipTables(*tables), *size, shadows=shadows, backend=backend)


def _batches(backend: str, clips: int, config: StreamConfig, device: str) -> Maker:
    """Batches of consecutive steps, as a trainer asks for them."""

    def make(_: Any) -> Callable[[], Any]:
        stream, steps = Stream(config, clips, device, backend=backend), itertools.count()
        return lambda: stream.batch(next(steps))

    return make


def cases(sizes: Sizes = FULL) -> list[Case]:
    clips, config = batch_of(sizes)
    height, width = size = config.sizes[0]
    views = config.num_views
    name = f"{clips} clips of {width}x{height}"
    pixels = clips * views * height * width

    def case(shadows: bool) -> Case:
        def oracle(tables: list[Tensor]) -> list[Tensor]:
            wide = ClipTables(*(t.double() for t in tables))
            exact = render_clips(wide, *size, shadows=shadows, backend="eager")
            return [exact.images, exact.rays, exact.depth, exact.flow]

        return Case(
            "render", "fwd", name if shadows else f"{name} without shadows",
            lambda: list(tables_of(clips, config, sizes.device)),
            {b: _render(b.split(":")[-1], shadows, size) for b in ("eager", "any4d_fast:triton")},
            oracle,
            bytes=pixels * BYTES,
            views=views,
            budgets=lambda errors, _: [2 * error + OUTLINES for error in errors],
        )  # fmt: skip

    whole = Case(
        "render", "fwd", f"{name} drawn and rendered", list,
        {b: _batches(b.split(":")[-1], clips, config, sizes.device) for b in ("eager", "any4d_fast:triton")},
        bytes=pixels * BYTES,
        views=views,
        gate=case(True),
    )  # fmt: skip
    return [case(True), case(False), whole]


def test_render(case: Case, provider: str, bench: Callable[[Case, str], None]) -> None:
    bench(case, provider)


def main() -> None:
    """Times of every configuration on this GPU, then of the stream as a trainer sees it."""
    from any4d_fast.kernels import render_clips as kernels

    clips, config = batch_of(FULL)
    tables = tables_of(clips, config, "cuda")
    print(f"{torch.cuda.get_device_name()}: {clips} clips of {VIEWS} views of {WIDTH} x {HEIGHT}")
    chosen = kernels.CONFIG
    for block, warps in CONFIGURATIONS:
        kernels.CONFIG = kernels.Config(block, warps)
        for samples, shadows in ((2, True), (2, False), (1, True)):
            run = functools.partial(render_clips, tables, *config.sizes[0], samples=samples, shadows=shadows)
            ms = time_ms(run)[0]
            what = f"block {block:3} warps {warps} samples {samples}x{samples} shadows {shadows!s:5}"
            print(f"render {what}: {ms:6.3f} ms, {clips / ms * 1e3:8.0f} clips/s", flush=True)
    kernels.CONFIG = chosen
    for ahead in (True, False):
        _time_stream(Stream(config, clips, "cuda", ahead=ahead), clips)


def _time_stream(stream: Stream, clips: int, steps: int = 60) -> None:
    for step in range(5):
        stream.batch(step)
    torch.cuda.synchronize()
    host, begun = [], time.perf_counter()
    for step in range(5, 5 + steps):
        before = time.perf_counter()
        stream.batch(step)
        host.append(time.perf_counter() - before)
    torch.cuda.synchronize()
    wall = (time.perf_counter() - begun) / steps * 1e3
    busy = []
    for step in range(5 + steps, 15 + steps):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(40_000_000)  # about 20 ms: the host has queued everything before the device begins
        start.record()
        stream.batch(step)
        end.record()
        torch.cuda.synchronize()
        busy.append(start.elapsed_time(end))
    ms = statistics.median(busy), statistics.median(host) * 1e3, wall
    how = "ahead" if stream.ahead else "in line"
    print("stream drawn {}: {:.3f} ms of the device, {:.2f} of the host, {:.2f} back to back".format(how, *ms), end="")
    print(f", {clips / wall * 1e3:.0f} clips/s")


if __name__ == "__main__":
    main()
