"""Layouts of the linear kernels for few views, beside cuBLAS: `python -m benchmarks.sweep_small_rows [results.csv]`.

With 2 views a matrix product is one or two waves of tiles: the layout that is fastest at 36,409 rows may leave a third
of the multiprocessors idle. Every layer of the model is timed as the model runs it: in a CUDA graph, one launch behind
the other, with activations in L2 and every launch's weight from memory. The short tables come last, and under them the
lines for `_BY_ROWS` in kernels/_linear.py.
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from any4d_fast.kernels._linear import MANY_ROWS, LinearTile, default_tile, launch
from torch import Tensor

from any4d_fast.testing import ROUNDING, relative_error
from benchmarks.timing import matmul_tflops

ROWS = (888, 1777, 1778, 3553, 7105)
COLD_BYTES = 160 << 20  # of weights in turn: more than the L2 of any GPU
MIN_COPIES, MAX_COPIES, RUNS = 12, 64, 25
KEPT = 1.02  # a layout that wins by less is not worth another line

TILES = [
    LinearTile(128, 128, 64, 4, 3, parts=2, programs=2, tma=True),
    LinearTile(128, 128, 64, 8, 4, parts=2, tma=True),
    LinearTile(128, 256, 64, 8, 3, parts=2, tma=True),
    LinearTile(256, 128, 64, 8, 3, parts=2, tma=True),
    LinearTile(64, 256, 64, 4, 3, parts=2, programs=1, tma=True),
    LinearTile(64, 128, 64, 4, 4, parts=2, programs=2, tma=True),
    LinearTile(64, 128, 128, 4, 2, parts=2, programs=2, tma=True),
    LinearTile(128, 64, 64, 4, 4, parts=1, programs=2, tma=True),
    LinearTile(128, 64, 128, 4, 2, parts=1, programs=2, tma=True),
    LinearTile(64, 64, 64, 4, 4, parts=1, programs=3, tma=True),
    LinearTile(64, 64, 128, 4, 3, parts=1, programs=2, tma=True),
]


class Layer(NamedTuple):
    """A linear layer of the model, and how many of it a call runs."""

    name: str
    inputs: int
    outputs: int
    calls: int
    gelu: bool = False


LAYERS = (
    Layer("encoder qkv", 1024, 3072, 24),
    Layer("encoder proj", 1024, 1024, 24),
    Layer("encoder fc1", 1024, 4096, 24, gelu=True),
    Layer("encoder fc2", 4096, 1024, 24),
    Layer("transformer qkv", 768, 2304, 24),
    Layer("transformer proj", 768, 768, 24),
    Layer("transformer fc1", 768, 3072, 24, gelu=True),
    Layer("transformer fc2", 3072, 768, 24),
    Layer("transformer input", 1024, 768, 1),
)

Run = Callable[[Tensor, Tensor, Tensor, Tensor], Any]
Times = dict[tuple[Layer, int], dict[str, float]]


def label(tile: LinearTile) -> str:
    return f"{tile.m}x{tile.n}x{tile.k} w{tile.warps} s{tile.stages} /{tile.parts} p{tile.programs}"


def ours(layer: Layer, tile: LinearTile) -> Run:
    def run(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
        launch(x, weight, bias, out, tile=tile, activate=layer.gelu)

    return run


def vendor(layer: Layer) -> Run:
    """What the model calls without Triton; its bias has the weight's dtype."""

    def run(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
        found = F.linear(x, weight, bias.to(x.dtype))
        return F.gelu(found) if layer.gelu else found

    return run


def made(layer: Layer, rows: int) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """x, weights to take in turn, bias in bf16 values, out."""
    generator = torch.Generator("cuda").manual_seed(rows + layer.outputs)
    count = COLD_BYTES // (2 * layer.inputs * layer.outputs)
    count = min(MAX_COPIES, max(MIN_COPIES, count))
    x, bias = (torch.randn(*s, device="cuda", generator=generator) for s in ((rows, layer.inputs), (layer.outputs,)))
    weight = torch.randn(layer.outputs, layer.inputs, device="cuda", generator=generator) * layer.inputs**-0.5
    weights = [weight.bfloat16() for _ in range(count)]
    out = torch.empty(rows, layer.outputs, device="cuda", dtype=torch.bfloat16)
    return x.bfloat16(), weights, bias.bfloat16(), out


def wrong(layer: Layer, run: Run, given: tuple[Tensor, list[Tensor], Tensor, Tensor]) -> str:
    """Empty when a layout is right, at its rows: twice plain PyTorch's error and a rounding step."""
    x, weights, bias, out = given
    exact = F.linear(x.double(), weights[0].double(), bias.double())
    exact = F.gelu(exact) if layer.gelu else exact
    base = relative_error(vendor(layer)(x, weights[0], bias, out), exact)
    out.fill_(float("nan"))
    run(x, weights[0], bias, out)
    error, budget = relative_error(out, exact), 2 * base + ROUNDING[torch.bfloat16]
    return "" if error <= budget else f"error {error:.2e} exceeds {budget:.2e}"


def microseconds(run: Run, given: tuple[Tensor, list[Tensor], Tensor, Tensor]) -> float:
    """Median time of one launch inside a CUDA graph of as many as there are weights."""
    x, weights, bias, out = given

    def everything() -> None:
        for weight in weights:
            run(x, weight, bias, out)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        everything()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        everything()
    times = []
    for _ in range(RUNS + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(weights))
    graph.reset()
    return statistics.median(times[5:])


def measure(layer: Layer, rows: int, tiles: Sequence[LinearTile]) -> dict[str, float]:
    """Microseconds by layout; "cuBLAS" among them."""
    given = made(layer, rows)
    found = {"cuBLAS": microseconds(vendor(layer), given)}
    for tile in tiles:
        run = ours(layer, tile)
        try:
            reason = wrong(layer, run, given)
            if not reason:
                found[label(tile)] = microseconds(run, given)
        except Exception as error:  # a layout that does not fit the machine is a result, not a failure
            reason = f"{type(error).__name__}: {str(error)[:100]}"
        if reason:
            print(f"{layer.name} {rows} {label(tile)}: left out, {reason}", flush=True)
    return found


def best(times: dict[str, float]) -> tuple[str, float]:
    """The fastest of our layouts."""
    found = {name: us for name, us in times.items() if name != "cuBLAS"}
    name = min(found, key=found.__getitem__)
    return name, found[name]


def table(found: Times, default: str, rate: float) -> list[str]:
    lines = [f"{'layer':<18}{'rows':>6}{'floor us':>10}{'cuBLAS':>9}{'default':>9}{'best':>9}  layout; gain a call, us"]
    for (layer, rows), times in found.items():
        floor = 2e-6 * rows * layer.inputs * layer.outputs / rate
        name, us = best(times)
        used = times[default] if layer.gelu else times["cuBLAS"]
        lines.append(
            f"{layer.name:<18}{rows:>6}{floor:>10.1f}{times['cuBLAS']:>9.1f}{times[default]:>9.1f}{us:>9.1f}"
            f"  {name}; {layer.calls * (used - us):.0f}"
        )
    return lines


def by_rows(found: Times, tiles: Sequence[LinearTile], default: LinearTile) -> list[tuple[int, LinearTile]]:
    """For every number of rows the layout with the least time over both layers with a GELU; neighbours are joined."""
    chosen: list[tuple[int, LinearTile]] = []
    for rows in sorted({rows for _, rows in found}):
        here = [times for (layer, at), times in found.items() if at == rows and layer.gelu]
        sums = {t: sum(times[label(t)] for times in here) for t in tiles if all(label(t) in times for times in here)}
        fastest = min(sums, key=sums.__getitem__)
        tile = fastest if sums[fastest] * KEPT < sums[default] else default
        if chosen and chosen[-1][1] == tile:
            chosen.pop()
        chosen.append((rows, tile))
    if chosen and chosen[-1][1] == default:
        chosen.pop()
    return [*chosen, (MANY_ROWS, default)]


def write(found: Times, path: str) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("layer", "inputs", "outputs", "rows", "layout", "us"))
        for (layer, rows), times in found.items():
            for name, us in times.items():
                writer.writerow((layer.name, layer.inputs, layer.outputs, rows, name, round(us, 2)))


def main() -> None:
    rate = matmul_tflops()
    default = default_tile(torch.bfloat16, torch.cuda.get_device_capability()[0], residual=False)
    tiles = list(dict.fromkeys([default, *TILES]))
    found: Times = {}
    with torch.no_grad():
        for layer in LAYERS:
            for rows in ROWS:
                found[layer, rows] = measure(layer, rows, tiles)
                print(f"{layer.name} {rows}: {best(found[layer, rows])}", flush=True)
            if len(sys.argv) > 1:
                write(found, sys.argv[1])
    print(f"\nmatmul {rate:.0f} TFLOP/s; default {label(default)}; a gain is against what the model uses now")
    print("\n".join(table(found, label(default), rate)))
    print("\n_BY_ROWS = (")
    for most, tile in by_rows(found, tiles, default):
        print(f"    ({'MANY_ROWS' if most == MANY_ROWS else most}, {tile}),")
    print(")")


if __name__ == "__main__":
    main()
