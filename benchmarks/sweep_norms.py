"""Check and time layouts of the LayerNorm kernels on a GPU: `python -m benchmarks.sweep_norms [results.csv]`.

Every layout is compared with the float64 oracle before it is timed. Peers (eager, torch.compile) and the copy bandwidth
are measured in the same run; the table at the end is sorted by time.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config
from any4d_fast.kernels import layer_norm as layer_norm_kernels
from any4d_fast.kernels import residual_norm as residual_norm_kernels
from any4d_fast.kernels._rows import RowTile, column_sums
from torch import Tensor

from any4d_fast import testing
from any4d_fast.reference.layer_norm import layer_norm
from any4d_fast.reference.residual_norm import residual_norm
from benchmarks.timing import copy_tbps, time_ms

ROWS, EPS = 36409, 1e-6

FORWARD = [
    RowTile(4, 256, 4),
    RowTile(8, 256, 8),
    RowTile(8, 256, 4),
    RowTile(1, 256, 1),
    RowTile(4, 128, 4),
    RowTile(2, 512, 4),
    RowTile(1, 1024, 4),
    RowTile(2, 1024, 4),
    RowTile(4, 1024, 8),
    RowTile(4, 256, 4, stages=1, programs=4),
    RowTile(4, 256, 4, stages=2, programs=4),
]
BACKWARD = [
    RowTile(4, 256, 4, stages=2, programs=2),
    RowTile(4, 256, 4, stages=2, programs=3),
    RowTile(4, 256, 8, stages=2, programs=1),
    RowTile(4, 256, 8, stages=2, programs=2),
    RowTile(2, 256, 4, stages=2, programs=3),
    RowTile(1, 256, 2, stages=2, programs=6),
    RowTile(2, 512, 4, stages=2, programs=4),
    RowTile(1, 512, 4, stages=1, programs=5),
    RowTile(1, 512, 4, stages=2, programs=4),
    RowTile(1, 512, 4, stages=2, programs=5),
    RowTile(1, 512, 4, stages=3, programs=4),
    RowTile(2, 512, 8, stages=2, programs=2),
    RowTile(1, 1024, 4, stages=2, programs=4),
    RowTile(2, 1024, 8, stages=2, programs=2),
]


@dataclass
class Problem:
    """One kernel at one size: what runs it with a layout, what it must equal, and the bytes that must move."""

    name: str
    bytes: int
    tiles: list[RowTile]
    default: RowTile
    run: Callable[[RowTile], list[Tensor]]
    oracle: list[Tensor]
    eager: Callable[[], list[Tensor]]
    compiled: Callable[[], Any] | None


def _compiled_backward(function: Callable[..., Any], leaves: list[Tensor], grads: Any) -> Callable[[], Any]:
    outputs = torch.compile(function, dynamic=False)(*leaves)
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


def _randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def layer_norm_problems(channels: int, x_dtype: torch.dtype, peers: bool) -> list[Problem]:
    """Forward and backward for [36409, channels] of one input dtype, bfloat16 out."""
    x, grad = _randn(ROWS, channels, dtype=x_dtype), _randn(ROWS, channels, dtype=torch.bfloat16)
    weight, bias = _randn(channels), _randn(channels)
    _, mean, rstd = layer_norm_kernels.layer_norm_forward(x, weight, bias, EPS, torch.bfloat16)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    wide = [t.double().requires_grad_() for t in (x, weight, bias)]
    exact = layer_norm(*wide)
    exact_grads = torch.autograd.grad(exact, wide, grad.double())

    def plain(*a: Tensor) -> Tensor:
        return layer_norm(*a, out_dtype=torch.bfloat16)

    graph = plain(*leaves)
    dtypes = (torch.float32, torch.float32)
    label = f"{channels} {str(x_dtype)[6:]}"
    elements, size = ROWS * channels, x.element_size()
    return [
        Problem(
            f"layer_norm fwd {label}",
            elements * (size + 2),
            FORWARD,
            layer_norm_kernels.forward_tile(channels),
            lambda tile: [layer_norm_kernels.layer_norm_forward(x, weight, bias, EPS, torch.bfloat16, tile)[0]],
            [exact.detach()],
            lambda: [plain(x, weight, bias)],
            torch.compile(lambda: plain(x, weight, bias), dynamic=False) if peers else None,
        ),
        Problem(
            f"layer_norm bwd {label}",
            elements * (2 * size + 2),
            BACKWARD,
            layer_norm_kernels.backward_tile(channels),
            lambda tile: list(layer_norm_kernels.layer_norm_backward(grad, x, weight, mean, rstd, True, *dtypes, tile)),
            list(exact_grads),
            lambda: list(torch.autograd.grad(graph, leaves, grad, retain_graph=True)),
            _compiled_backward(plain, leaves, grad) if peers else None,
        ),
    ]


def residual_norm_problems(channels: int, peers: bool) -> list[Problem]:
    """Forward and backward for a float32 stream and a bfloat16 branch, with LayerScale."""
    residual, branch = _randn(ROWS, channels), _randn(ROWS, channels, dtype=torch.bfloat16)
    gamma, weight, bias = (_randn(channels) for _ in range(3))
    grads = [_randn(ROWS, channels), _randn(ROWS, channels, dtype=torch.bfloat16)]
    plain = (EPS, None, 1, True, torch.bfloat16)
    inputs = (residual, branch, gamma, weight, bias)
    new, _, mean, rstd = residual_norm_kernels.residual_norm_forward(*inputs, *plain)
    wide = [t.double().requires_grad_() for t in inputs]
    exact = residual_norm(*wide)
    exact_grads = torch.autograd.grad(exact, wide, [g.double() for g in grads])
    leaves = [t.clone().requires_grad_() for t in inputs]
    graph = residual_norm(*leaves)
    dtypes: list[torch.dtype | None] = [t.dtype for t in inputs]
    elements = ROWS * channels
    return [
        Problem(
            f"residual_norm fwd {channels}",
            elements * (4 + 2 + 4 + 2),
            FORWARD,
            residual_norm_kernels.forward_tile(channels),
            lambda tile: list(residual_norm_kernels.residual_norm_forward(*inputs, *plain, tile=tile)[:2]),
            [t.detach() for t in exact if t is not None],
            lambda: [t for t in residual_norm(*inputs) if t is not None],
            torch.compile(lambda: residual_norm(*inputs), dynamic=False) if peers else None,
        ),
        Problem(
            f"residual_norm bwd {channels}",
            elements * (4 + 2 + 4 + 2 + 4 + 2),
            BACKWARD,
            residual_norm_kernels.backward_tile(channels),
            lambda tile: residual_norm_kernels.residual_norm_backward(
                *grads, new, branch, gamma, weight, None, 1, mean, rstd, dtypes, tile
            ),
            list(exact_grads),
            lambda: list(torch.autograd.grad(graph, leaves, grads, retain_graph=True)),
            _compiled_backward(residual_norm, leaves, grads) if peers else None,
        ),
    ]


def sweep(problem: Problem) -> list[dict[str, Any]]:
    """Every layout that is within its budget, timed; and the peers."""
    eager = problem.eager()
    budgets = [
        2 * testing.relative_error(e, o) + testing.ROUNDING[e.dtype] for e, o in zip(eager, problem.oracle, strict=True)
    ]
    lines = []

    def add(layout: str, function: Callable[[], Any], error: float | str = "") -> None:
        ms, low, high = time_ms(function)
        tbps = problem.bytes / ms / 1e9
        line = {"problem": problem.name, "layout": layout, "ms": round(ms, 4), "p20": round(low, 4)}
        line |= {"p80": round(high, 4), "tbps": round(tbps, 3), "of_copy": round(100 * tbps / copy_tbps(), 1)}
        lines.append({**line, "error": error})

    for tile in problem.tiles:
        name = f"{tile.rows}x{tile.chunk} w{tile.warps} s{tile.stages} p{tile.programs}"
        name += " (default)" if tile == problem.default else ""
        try:
            found = problem.run(tile)
        except Exception as error:  # a layout that does not fit the machine is a result, not a failure
            print(f"{problem.name} {name}: {type(error).__name__}: {str(error)[:100]}", flush=True)
            continue
        errors = [testing.relative_error(f, o) for f, o in zip(found, problem.oracle, strict=True)]
        if all(e <= b for e, b in zip(errors, budgets, strict=True)):
            add(name, lambda tile=tile: problem.run(tile), f"{max(errors):.1e}")
        else:
            print(f"{problem.name} {name}: WRONG, errors {errors}, budgets {budgets}", flush=True)
    add("eager", problem.eager)
    if problem.compiled is not None:
        problem.compiled()
        add("torch.compile", problem.compiled)
    return lines


def shown(lines: list[dict[str, Any]], best: int = 4) -> list[dict[str, Any]]:
    """Of sorted lines, the best of every problem, its default layout and its peers."""
    ranks: dict[str, int] = {}
    chosen = []
    for line in lines:
        ranks[line["problem"]] = ranks.get(line["problem"], 0) + 1
        always = "default" in line["layout"] or line["layout"].startswith(("eager", "torch.compile", "cuBLAS"))
        if always or ranks[line["problem"]] <= best:
            chosen.append(line)
    return chosen


def main() -> None:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch._functorch.config.donated_buffer = False  # compiled graphs run backward many times
    print(f"copy {copy_tbps():.3f} TB/s", flush=True)
    lines = []
    for channels in (768, 1024):
        peers = channels == 768  # torch.compile takes seconds a graph; one width is enough to compare with
        problems = residual_norm_problems(channels, peers) + layer_norm_problems(channels, torch.bfloat16, peers)
        if channels == 768:
            problems += layer_norm_problems(channels, torch.float32, peers=False)[:1]
        for problem in problems:
            lines += sweep(problem)
            print(f"{problem.name}: done", flush=True)
        del problems
        torch.cuda.empty_cache()
    partials = torch.randn(2, 3 * processors(), 1024, device="cuda")
    small = time_ms(lambda: column_sums(partials, [torch.float32] * 2))[0]
    print(f"column_sums 2 x {partials.shape[1]} x 1024: {small * 1e3:.1f} us")
    lines.sort(key=lambda line: (line["problem"], line["ms"]))
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w", newline="") as file:
            writer = csv.DictWriter(file, lines[0])
            writer.writeheader()
            writer.writerows(lines)
    for line in shown(lines):
        print("{problem:30s} {layout:26s} {ms:8.4f} ms {tbps:6.3f} TB/s {of_copy:5.1f}% {error}".format(**line))


def processors() -> int:
    """Multiprocessors of the current device."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


if __name__ == "__main__":
    main()
