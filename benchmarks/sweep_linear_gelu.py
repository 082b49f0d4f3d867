"""Check and time layouts of the linear kernels on a GPU: `python -m benchmarks.sweep_linear_gelu [results.csv [rows]]`.

Every layout is compared with the float64 oracle at two lengths and two seeds before it is timed, because a compiler
may miscompile one layout and not another. Peers (cuBLAS alone, cuBLAS + GELU, torch.compile) and the matmul ceiling are
measured in the same run. Layouts with a specialised load warp come last: if one hangs, everything else is written.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from any4d_fast.kernels._linear import LinearTile, default_tile
from any4d_fast.kernels._rows import RowTile
from any4d_fast.kernels.linear_gelu import BACKWARD_TILE, gelu_backward, linear_gelu_forward
from any4d_fast.kernels.linear_residual import linear_residual_forward
from torch import Tensor

from any4d_fast import testing
from any4d_fast.reference.linear_gelu import linear_gelu, linear_residual
from any4d_fast.testing import relative_error
from benchmarks.sweep_norms import shown
from benchmarks.timing import copy_tbps, matmul_tflops, time_ms

ROWS = int(sys.argv[2]) if len(sys.argv) > 2 and sys.argv[2].isdigit() else 36409

TILES = [
    LinearTile(128, 128, 64, 4, 3, parts=2, programs=2, tma=True),
    LinearTile(128, 128, 64, 4, 3, parts=2, programs=2, group=16, tma=True),
    LinearTile(128, 128, 64, 4, 3, parts=2, programs=2, group=4, tma=True),
    LinearTile(128, 128, 32, 4, 6, parts=2, programs=2, tma=True),
    LinearTile(128, 128, 64, 4, 2, parts=1, programs=2, tma=True),
    LinearTile(128, 128, 64, 8, 3, parts=2, programs=2, tma=True),
    LinearTile(64, 256, 64, 4, 2, parts=2, programs=2, tma=True),
    LinearTile(128, 256, 64, 8, 3, parts=1, tma=True),
    LinearTile(128, 256, 64, 8, 3, parts=2, tma=True),
    LinearTile(128, 256, 64, 8, 4, parts=2, tma=True),
    LinearTile(256, 128, 64, 8, 3, parts=2, tma=True),
    LinearTile(128, 128, 64, 8, 4, parts=2, tma=True),
    LinearTile(64, 128, 64, 4, 4, parts=2, programs=2, tma=True),
    LinearTile(64, 256, 64, 4, 4, parts=2, programs=1, tma=True),
    LinearTile(128, 128, 64, 8, 5, parts=2, tma=True),
    LinearTile(128, 64, 64, 4, 4, parts=1, programs=2, tma=True),
    LinearTile(128, 128, 64, 8, 3, parts=2),
    LinearTile(128, 256, 64, 8, 3, parts=2),
]
SPECIALIZED = [
    LinearTile(128, 128, 64, 4, 3, parts=1, tma=True, specialize=True),
    LinearTile(128, 256, 64, 4, 3, parts=1, tma=True, specialize=True),
]
BACKWARD = [
    BACKWARD_TILE,
    RowTile(4, 256, 4, stages=2, programs=8),
    RowTile(8, 256, 4, stages=1, programs=8),
    RowTile(8, 256, 4, stages=3, programs=4),
    RowTile(16, 256, 8, stages=2, programs=2),
    RowTile(4, 512, 4, stages=2, programs=4),
    RowTile(8, 128, 4, stages=2, programs=8),
]

Lines = list[dict[str, Any]]


def _inputs(rows: int, k: int, n: int, seed: int) -> tuple[Tensor, ...]:
    """x, weight, bias, residual, gamma."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x, weight, bias, residual, gamma = (
        torch.randn(*s, device="cuda", generator=generator) for s in ((rows, k), (n, k), (n,), (rows, n), (n,))
    )
    return x.bfloat16(), (weight * k**-0.5).bfloat16(), bias, residual, gamma


def _name(tile: LinearTile, default: LinearTile) -> str:
    flags = f"{' tma' if tile.tma else ''}{' specialised' if tile.specialize else ''}"
    label = f"{tile.m}x{tile.n}x{tile.k} w{tile.warps} s{tile.stages} /{tile.parts} p{tile.programs} g{tile.group}"
    return label + flags + (" (default)" if tile == default else "")


def _add(lines: Lines, problem: str, layout: str, function: Callable[[], Any], flops: float, moved: float) -> None:
    ms, low, high = time_ms(function)
    tflops, tbps = flops / ms / 1e9, moved / ms / 1e9
    ceiling = flops / matmul_tflops() / 1e9 if flops else moved / copy_tbps() / 1e9
    line = {"problem": problem, "layout": layout, "ms": round(ms, 4), "p20": round(low, 4), "p80": round(high, 4)}
    lines.append(
        {**line, "tflops": round(tflops, 1), "tbps": round(tbps, 3), "of_ceiling": round(100 * ceiling / ms, 1)}
    )


class Check:
    """Inputs, oracles and budgets at two lengths and two seeds, computed once a problem."""

    def __init__(self, reference: Callable[..., list[Tensor]], k: int, n: int) -> None:
        self.cases = []
        for rows, seed in ((887, 0), (ROWS, 1)):
            inputs = _inputs(rows, k, n, seed)
            oracle = reference(*(t.double() for t in inputs))
            errors = [(relative_error(e, o), e.dtype) for e, o in zip(reference(*inputs), oracle, strict=True)]
            budgets = [2 * error + testing.ROUNDING[dtype] for error, dtype in errors]
            self.cases.append((inputs, oracle, budgets))

    def __call__(self, run: Callable[..., list[Tensor]], tile: LinearTile) -> str:
        """Empty when every output is within its budget, else what is not."""
        for inputs, oracle, budgets in self.cases:
            for found, exact, budget in zip(run(*inputs, tile=tile), oracle, budgets, strict=True):
                error = relative_error(found, exact)
                if not error <= budget:
                    return f"{found.shape[0]} rows: error {error:.2e} exceeds {budget:.2e}"
        return ""


def _tiles(
    lines: Lines,
    problem: str,
    tiles: list[LinearTile],
    size: tuple[int, int],
    run: Callable[..., list[Tensor]],
    reference: Callable[..., list[Tensor]],
) -> None:
    k, n = size
    inputs, check = _inputs(ROWS, k, n, 2), Check(reference, k, n)
    major = torch.cuda.get_device_capability()[0]
    default = default_tile(torch.bfloat16, major, "residual" in problem)
    for tile in tiles:
        name = _name(tile, default)
        try:
            wrong = check(run, tile)
        except Exception as error:  # a layout that does not fit the machine is a result, not a failure
            print(f"{problem} {name}: {type(error).__name__}: {str(error)[:100]}", flush=True)
            continue
        if wrong:
            print(f"{problem} {name}: WRONG, {wrong}", flush=True)
            continue
        _add(lines, problem, name, lambda tile=tile: run(*inputs, tile=tile), 2.0 * ROWS * k * n, 0)
        print(f"{problem} {name}: {lines[-1]['ms']} ms, {lines[-1]['tflops']} TFLOP/s", flush=True)


def _gelu_run(*inputs: Tensor, tile: LinearTile, keep: bool = False, exact: bool | None = None) -> list[Tensor]:
    out, pre = linear_gelu_forward(*inputs[:3], keep, tile=tile, exact=exact)
    return [out, pre] if keep else [out]


def _gelu_reference(*inputs: Tensor) -> list[Tensor]:
    return [linear_gelu(*inputs[:3])]


def _training_reference(*inputs: Tensor) -> list[Tensor]:
    x, weight, bias = inputs[:3]
    pre = F.linear(x, weight, bias.to(x.dtype))
    return [F.gelu(pre), pre]


def _residual_run(*inputs: Tensor, tile: LinearTile) -> list[Tensor]:
    x, weight, bias, residual, gamma = inputs
    return [linear_residual_forward(x, weight, bias, residual, gamma, None, 1, tile=tile)]


def _residual_reference(*inputs: Tensor) -> list[Tensor]:
    x, weight, bias, residual, gamma = inputs
    return [linear_residual(x, weight, bias, residual, gamma)]


def peers(lines: Lines, k: int, n: int) -> None:
    """cuBLAS and torch.compile at one size of the model."""
    x, weight, bias, residual, gamma = _inputs(ROWS, k, n, 2)
    short = bias.bfloat16()
    flops = 2.0 * ROWS * k * n
    problem = f"linear_gelu {k}-{n}" if n > k else f"linear_residual {k}-{n}"

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if n > k:
            return F.gelu(F.linear(x, weight, bias))
        return linear_residual(x, weight, bias, residual, gamma)

    compiled = torch.compile(plain, dynamic=False)
    compiled(x, weight, short)
    _add(lines, problem, "eager", lambda: plain(x, weight, short), flops, 0)
    _add(lines, problem, "torch.compile", lambda: compiled(x, weight, short), flops, 0)
    _add(lines, problem, "cuBLAS alone, with bias", lambda: F.linear(x, weight, short), flops, 0)


def backward(lines: Lines) -> None:
    """The elementwise half of the backward pass."""
    n = 3072
    grad, pre = (torch.randn(ROWS, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    wide = pre.double().requires_grad_()
    (exact,) = torch.autograd.grad(F.gelu(wide), wide, grad.double())
    moved = 6.0 * ROWS * n
    for tile in BACKWARD:
        name = f"{tile.rows}x{tile.chunk} w{tile.warps} s{tile.stages} p{tile.programs}"
        found, sums = gelu_backward(grad, pre, torch.float32, tile)
        errors = relative_error(found, exact), relative_error(sums, exact.sum(0))
        if not (errors[0] < testing.ROUNDING[torch.bfloat16] and errors[1] < 1e-5):  # float32 sums of 36,409 terms
            print(f"gelu_backward {name}: WRONG, errors {errors}")
            continue
        _add(
            lines, f"gelu_backward {n}", name, lambda tile=tile: gelu_backward(grad, pre, torch.float32, tile), 0, moved
        )

    def eager() -> Tensor:
        return torch.ops.aten.gelu_backward(grad, pre).sum(0)

    _add(lines, f"gelu_backward {n}", "eager", eager, 0, moved)


def write(lines: Lines) -> None:
    """The CSV at the path given, if one is given."""
    lines.sort(key=lambda line: (line["problem"], line["ms"]))
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w", newline="") as file:
            writer = csv.DictWriter(file, lines[0])
            writer.writeheader()
            writer.writerows(lines)


def main() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    print(f"matmul {matmul_tflops():.0f} TFLOP/s, copy {copy_tbps():.3f} TB/s", flush=True)
    lines: Lines = []
    for k, n in ((768, 3072), (1024, 4096), (3072, 768)):
        peers(lines, k, n)
    backward(lines)

    def training(*a: Tensor, tile: LinearTile) -> list[Tensor]:
        return _gelu_run(*a, tile=tile, keep=True)

    def erf(*a: Tensor, tile: LinearTile) -> list[Tensor]:
        return _gelu_run(*a, tile=tile, exact=True)

    size, wide = (768, 3072), (1024, 4096)
    _tiles(lines, "linear_gelu 768-3072", TILES, size, _gelu_run, _gelu_reference)
    _tiles(lines, "linear_gelu erf 768-3072", TILES[:1], size, erf, _gelu_reference)
    _tiles(lines, "linear_gelu training 768-3072", TILES[:10], size, training, _training_reference)
    _tiles(lines, "linear_gelu 1024-4096", TILES[:16], wide, _gelu_run, _gelu_reference)
    _tiles(lines, "linear_residual 3072-768", TILES, (3072, 768), _residual_run, _residual_reference)
    write(lines)
    _tiles(lines, "linear_gelu 768-3072", SPECIALIZED, size, _gelu_run, _gelu_reference)
    _tiles(lines, "linear_gelu 1024-4096", SPECIALIZED, wide, _gelu_run, _gelu_reference)
    write(lines)
    for line in shown(lines):
        rate = f"{line['tflops']:6.1f} TFLOP/s" if line["tflops"] else f"{line['tbps']:6.3f} TB/s"
        print(f"{line['problem']:30s} {line['layout']:48s} {line['ms']:8.4f} ms {rate} {line['of_ceiling']:5.1f}%")


if __name__ == "__main__":
    main()
