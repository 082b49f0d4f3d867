"""Check and time layouts of the 8-bit product and its neighbours: `python -m benchmarks.sweep_linear_fp8 [out.csv]`.

Every layout is compared with float64 on the same e4m3 numbers before it is timed. Peers at the same sizes: cuBLAS in
bfloat16, and torch._scaled_mm with scales of rows, with sums in the tensor cores and with float32 sums. Layouts with a
specialised load warp come last: if one hangs, everything else is written.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from any4d_fast.kernels import linear_fp8 as kernels
from any4d_fast.kernels._linear import LinearTile
from any4d_fast.kernels._rows import RowTile
from torch import Tensor

from any4d_fast import ops
from any4d_fast.ops.linear_fp8 import Rows8
from any4d_fast.testing import relative_error
from benchmarks.timing import copy_tbps, matmul_tflops, time_ms

ROWS = (36_409, 7_105)
SIZES = {  # inputs, outputs, GELU
    "qkv 768-2304": (768, 2304, False),
    "fc1 768-3072": (768, 3072, True),
    "fc2 3072-768": (3072, 768, False),
    "proj 768-768": (768, 768, False),
    "encoder qkv 1024-3072": (1024, 3072, False),
    "encoder fc1 1024-4096": (1024, 4096, True),
    "encoder fc2 4096-1024": (4096, 1024, False),
}
TILES = [
    (kernels.TILE, False),
    (LinearTile(128, 128, 128, 4, 3, parts=2, programs=2, group=16, tma=True), False),
    (LinearTile(128, 128, 128, 4, 3, parts=1, programs=2, tma=True), False),
    (LinearTile(128, 128, 64, 4, 6, parts=2, programs=2, tma=True), False),
    (LinearTile(128, 128, 128, 8, 3, parts=2, programs=2, tma=True), False),
    (LinearTile(128, 256, 128, 8, 3, parts=2, tma=True), False),
    (LinearTile(128, 256, 128, 8, 4, parts=2, tma=True), False),
    (LinearTile(256, 128, 128, 8, 4, parts=2, tma=True), False),
    (LinearTile(128, 256, 64, 8, 6, parts=2, tma=True), False),
    (LinearTile(64, 256, 128, 4, 2, parts=2, programs=2, tma=True), False),
    (LinearTile(128, 128, 256, 8, 3, parts=2, tma=True), False),
    (kernels.PROMOTING_TILE, True),
    (LinearTile(128, 128, 128, 8, 3, parts=2, programs=2, tma=True), True),
    (LinearTile(128, 128, 128, 8, 5, parts=2, tma=True), True),
]
SPECIALIZED = [
    (LinearTile(128, 128, 128, 4, 3, parts=1, tma=True, specialize=True), False),
    (LinearTile(128, 256, 128, 4, 3, parts=1, tma=True, specialize=True), False),
]
BUDGET, E4M3_BUDGET = 5e-3, 0.03  # rounding to bfloat16 and sums of 14 bits; rounding to e4m3

Lines = list[dict[str, Any]]


def _inputs(rows: int, k: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(rows + k + n)
    x, weight, bias = (torch.randn(*s, device="cuda", generator=generator) for s in ((rows, k), (n, k), (n,)))
    x8, weight8 = ops.quantize_rows(x), ops.quantize_rows(weight * k**-0.5)
    assert x8.scale is not None and weight8.scale is not None
    return *x8, *weight8, bias, torch.ones(n, device="cuda")  # type: ignore[return-value]


def _add(lines: Lines, problem: str, layout: str, run: Callable[[], Any], flops: float, moved: float) -> None:
    ms, low, high = time_ms(run)
    line = {"problem": problem, "layout": layout, "ms": round(ms, 4), "p20": round(low, 4), "p80": round(high, 4)}
    lines.append({**line, "tflops": round(flops / ms / 1e9, 1), "tbps": round(moved / ms / 1e9, 3)})
    print(lines[-1], flush=True)


def _tiles(lines: Lines, problem: str, rows: int, tiles: list[tuple[LinearTile, bool]]) -> None:
    k, n, gelu = SIZES[problem]
    x, x_scale, weight, weight_scale, bias, inverse = _inputs(rows, k, n)
    exact = F.linear(Rows8(x, x_scale).wide().double(), Rows8(weight, weight_scale).wide().double(), bias.double())
    exact = F.gelu(exact) if gelu else exact
    moved = float(rows * k + n * k + rows * n * (1 if gelu else 2))
    for tile, promote in tiles:
        flags = f"{' float32 sums' if promote else ''}{' specialised' if tile.specialize else ''}"
        name = f"{tile.m}x{tile.n}x{tile.k} w{tile.warps} s{tile.stages} /{tile.parts} p{tile.programs} g{tile.group}"

        def run(tile: LinearTile = tile, promote: bool = promote) -> Tensor:
            scaled = (x, x_scale, weight, weight_scale, bias, inverse if gelu else None, torch.bfloat16)
            return kernels.linear_fp8(*scaled, tile=tile, promote=promote)

        try:
            error = relative_error(run().float(), exact)
        except Exception as problem_found:  # a layout that does not fit the machine is a result, not a failure
            print(f"{problem} {name}: {type(problem_found).__name__}: {str(problem_found)[:100]}", flush=True)
            continue
        if not error <= (E4M3_BUDGET if gelu else BUDGET):
            print(f"{problem} {name}{flags}: WRONG, error {error:.2e}", flush=True)
            continue
        label = f"{name}{flags} error {error:.1e}"
        _add(lines, f"{problem} {rows}", label, run, 2.0 * rows * k * n, moved)


def peers(lines: Lines, problem: str, rows: int) -> None:
    """cuBLAS in bfloat16, `torch._scaled_mm`, and what the model computes with instead of this layer."""
    k, n, gelu = SIZES[problem]
    x, x_scale, weight, weight_scale, bias, _ = _inputs(rows, k, n)
    flops = 2.0 * rows * k * n
    wide, wide_weight, short = Rows8(x, x_scale).wide().bfloat16(), Rows8(weight, weight_scale).wide().bfloat16(), bias
    label = f"{problem} {rows}"
    _add(lines, label, "cuBLAS bfloat16", lambda: F.linear(wide, wide_weight, short.bfloat16()), flops, 0)
    if gelu:
        _add(lines, label, "linear_gelu bfloat16", lambda: ops.linear_gelu(wide, wide_weight, bias), flops, 0)
    for fast in (True, False):
        scales = {"scale_a": x_scale[:, None], "scale_b": weight_scale[None], "bias": bias.bfloat16()}

        def run(fast: bool = fast, scales: dict[str, Any] = scales) -> Tensor:
            return torch._scaled_mm(x, weight.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=fast)

        try:
            run()
        except RuntimeError as error:
            print(f"{label} _scaled_mm fast={fast}: {str(error)[:100]}", flush=True)
            continue
        _add(lines, label, f"_scaled_mm {'fast' if fast else 'float32'} sums", run, flops, 0)


def around(lines: Lines, rows: int) -> None:
    """The kernels that make e4m3 rows, and the one that corrects the bias."""
    for channels, outputs in ((768, 3072), (1024, 4096), (3072, 768), (4096, 1024)):
        x = torch.randn(rows, channels, device="cuda", dtype=torch.bfloat16)
        label = f"{rows}x{channels}"
        for tile in (RowTile(8, 256, 4), RowTile(2, 1024, 4), RowTile(1, 1024, 4), RowTile(4, 512, 4)):
            if channels <= 1024 or tile.rows == 1:
                name = f"{tile.rows}x{tile.chunk} w{tile.warps}"
                moved = 3.0 * rows * channels
                _add(lines, f"quantize_rows {label}", name, lambda t=tile, x=x: kernels.quantize_rows(x, t), 0, moved)
        rounded, lost = ops.quantize_rows(x), ops.quantize_rows(torch.randn(outputs, channels, device="cuda"))
        bias = torch.randn(outputs, device="cuda")
        moved = float(outputs * channels)
        _add(lines, f"correct_bias {label}", "", lambda r=rounded, e=lost, b=bias: ops.correct_bias(r, e, b), 0, moved)
        if channels > 1024:
            continue
        stream, vector = torch.randn(rows, channels, device="cuda"), torch.randn(channels, device="cuda")
        vectors = (vector, vector, vector)
        for name, run, size in (
            ("bfloat16", lambda s=stream, x=x, v=vectors: ops.residual_norm(s, x, *v, inplace=True), 12.0),
            ("e4m3", lambda s=stream, x=x, v=vectors: ops.residual_norm_fp8(s, x, *v), 11.0),
        ):
            with torch.no_grad():
                _add(lines, f"residual_norm {label}", name, run, 0, size * rows * channels)


def write(lines: Lines) -> None:
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w", newline="") as file:
            writer = csv.DictWriter(file, lines[0])
            writer.writeheader()
            writer.writerows(lines)


@torch.no_grad()
def main() -> None:
    print(f"matmul bfloat16 {matmul_tflops():.0f} TFLOP/s, copy {copy_tbps():.3f} TB/s", flush=True)
    lines: Lines = []
    for rows in ROWS:
        around(lines, rows)
        for problem in SIZES:
            peers(lines, problem, rows)
            _tiles(lines, problem, rows, TILES)
            write(lines)
    for problem in SIZES:
        _tiles(lines, problem, ROWS[0], SPECIALIZED)
    write(lines)


if __name__ == "__main__":
    main()
