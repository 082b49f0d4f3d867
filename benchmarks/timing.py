"""Device times, peak memory, and the ceilings that this device reaches in the same process."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import torch

from any4d_fast.switches import matmul_tf32

FLUSH_BYTES = 256 << 20  # several times the 60 MB of L2 on Hopper
# About 1 ms: more than an op's launches take, so that the queue never runs dry. With a quarter of it the medians of
# some autograd calls were the host's: their 20th and 80th percentiles lay a factor of two and more apart.
HEAD_START_CYCLES = 2_000_000
WARMUP_SECONDS, TIMED_SECONDS, MIN_RUNS, MAX_RUNS = 0.05, 0.2, 7, 200
LONG_MS = 500  # of a run so long three are enough: nothing of the host's is left in it

Function = Callable[[], Any]


def time_ms(function: Function, head_start: bool = True) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of the device time of one run, in milliseconds.

    The L2 cache is flushed before every run, by reading: lines that a flush has written are written back during the
    run, at its cost (50 MB, 5 us of the 67 of a small op, where calls one behind the other take 60). With `head_start`
    the device spins for a moment before the first event, so that Python's launches are queued by then and only work on
    the device is timed; a whole model is timed without.
    """
    flush = torch.zeros(FLUSH_BYTES // 4, device="cuda")
    function()
    torch.cuda.synchronize()

    def run(count: int) -> list[float]:
        starts = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
        for start, end in zip(starts, ends, strict=True):
            flush.sum()
            if head_start:
                torch.cuda._sleep(HEAD_START_CYCLES)
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return [s.elapsed_time(e) for s, e in zip(starts, ends, strict=True)]

    first = run(1)[0]
    if first > LONG_MS:
        times = sorted([first, *run(2)])
        return times[1], times[0], times[2]
    estimate = max(sorted([first, *run(2)])[1], 1e-3)
    if WARMUP_SECONDS * 1e3 > estimate:
        run(min(MAX_RUNS, int(WARMUP_SECONDS * 1e3 / estimate)))
    times = sorted(run(min(MAX_RUNS, max(MIN_RUNS, int(TIMED_SECONDS * 1e3 / estimate)))))
    pick = [times[int(q * (len(times) - 1))] for q in (0.5, 0.2, 0.8)]
    return pick[0], pick[1], pick[2]


@functools.cache
def copy_tbps() -> float:
    """Device-to-device copy bandwidth, bytes read plus bytes written, TB/s."""
    source = torch.randint(0, 100, (1 << 30,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / time_ms(lambda: target.copy_(source))[0] / 1e9


@functools.cache
def matmul_tflops(dtype: torch.dtype = torch.bfloat16) -> float:
    """Matmul rate at 8192 on random data, TFLOP/s; float32 in TF32."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    with matmul_tf32(True):
        return 2 * 8192**3 / time_ms(lambda: a @ b)[0] / 1e9


def peak_gb(make: Callable[[], Function]) -> tuple[Function, float]:
    """A provider's run, and the memory that making and running it once take beyond what is allocated, GB.

    Making the run of a backward pass runs the forward pass, so what that one keeps is counted.
    """
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function = make()
    function()
    torch.cuda.synchronize()
    return function, (torch.cuda.max_memory_allocated() - before) / 1e9


def reserved_gb() -> float:
    """Memory that the process holds on the device when everything unused is given back, GB."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() / 1e9
