"""Sweep attention's launch configurations on one GPU: numbers first, then time, beside cuDNN and FlashAttention.

    python benchmarks/sweep_attention.py sweep.csv [--only TEXT] [--seconds 120]

Every configuration is compiled and checked against the float64 oracle in its own or a shared worker process (a
miscompiled one may hang; it is then reported as such), on several seeds and lengths. Those that pass are timed in
one process: device events, rotating inputs, medians. The CSV has one line a configuration and size; the best of every
size are printed last. A winner goes into `kernels/_attention_tiles.py` by hand.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from any4d_fast.kernels import attention as forward_kernels
from any4d_fast.kernels import attention_backward as backward_kernels
from any4d_fast.kernels._attention_tiles import BackwardTiles, ForwardTile, HopperTile, KeyTile, QueryTile
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from any4d_fast.reference.attention import Segments
from any4d_fast.reference.attention import attention as reference
from any4d_fast.testing import ROUNDING, gradients, relative_error

HEAD_DIM = 64
SCALE = HEAD_DIM**-0.5
CASES = {
    "global 36409x12": (Segments.global_(1, 36_409), 36_409, 12),
    "global 7105x12": (Segments.global_(1, 7_105), 7_105, 12),
    "global 1777x12": (Segments.global_(1, 1_777), 1_777, 12),
    "frame 41x888x12": (Segments.frame(1, 41, 888), 36_409, 12),
    "encoder 41x889x16": (Segments.batched(41, 889), 36_449, 16),
}
CHECKS = [
    *((Segments.global_(1, n), n) for n in (1, 63, 65, 1_777, 4_099)),
    (Segments.frame(2, 3, 887), 5_324),
    (Segments.batched(4, 889), 3_556),
]
SEEDS = 3
WORKERS = 8


def forward_variants() -> dict[str, ForwardTile]:
    """Configurations of the forward kernel worth a measurement at head dim 64."""
    tiles = [
        *(ForwardTile(128, 64, 8, s) for s in (2, 3, 4)),
        *(ForwardTile(128, 64, 8, s, tma=True) for s in (2, 3, 4)),
        *(ForwardTile(128, 128, 8, s, tma=True) for s in (2, 3)),
        ForwardTile(128, 128, 8, 2),
        *(ForwardTile(64, 64, 4, s) for s in (3, 4)),
        *(ForwardTile(64, 64, 4, s, tma=True) for s in (3, 4)),
        *(ForwardTile(64, 128, 4, 2, tma=tma) for tma in (False, True)),
        ForwardTile(128, 64, 4, 3, tma=True),
        *(ForwardTile(128, 64, 8, 3, tma=True, lazy=lazy, polynomial=True) for lazy in (False, True)),
        ForwardTile(128, 64, 8, 3, tma=True, lazy=True),
        ForwardTile(128, 64, 8, 3, polynomial=True),
        ForwardTile(128, 128, 8, 2, tma=True, polynomial=True),
        ForwardTile(64, 64, 4, 3, tma=True, polynomial=True),
    ]
    return {f"fwd {describe(tile)}": tile for tile in tiles}


def backward_variants() -> dict[str, BackwardTiles]:
    """Configurations of the backward kernels worth a measurement at head dim 64."""
    query = QueryTile(128, 64, 8, 3)
    fast = QueryTile(128, 64, 8, 3, tma=True)
    best_key = KeyTile(64, 128, 8, 2, tma=True)
    pairs = [
        (KeyTile(64, 128, 8, 2), query),
        *((KeyTile(64, 128, 8, s, tma=True), fast) for s in (2, 3)),
        (KeyTile(64, 64, 4, 2, tma=True), fast),
        (KeyTile(128, 64, 8, 2, tma=True), fast),
        (best_key, QueryTile(64, 64, 4, 3, tma=True)),
        (best_key, QueryTile(64, 128, 4, 2, tma=True)),
        (best_key, QueryTile(128, 128, 8, 2, tma=True)),
        (best_key, QueryTile(128, 64, 8, 2, tma=True)),
        (best_key, QueryTile(128, 64, 8, 4, tma=True)),
    ]
    singles = [
        KeyTile(64, 128, 8, 2, single=True),
        *(KeyTile(64, 128, 8, s, tma=True, single=True) for s in (2, 3)),
        *(KeyTile(64, 128, 8, s, tma=True, single=True, reduce=True) for s in (1, 2, 3)),
        KeyTile(64, 64, 4, 2, tma=True, single=True, reduce=True),
        KeyTile(64, 64, 4, 2, tma=True, single=True),
        KeyTile(128, 64, 8, 2, tma=True, single=True, reduce=True),
        KeyTile(64, 128, 8, 2, single=True, reduce=True),
    ]
    tiles = [*(BackwardTiles(k, q) for k, q in pairs), *(BackwardTiles(k, query) for k in singles)]
    return {f"bwd {describe(t.key)}" + ("" if t.key.single else f" | {describe(t.query)}"): t for t in tiles}


def hopper_variants() -> dict[str, HopperTile]:
    """Configurations of the warp-specialised forward."""
    tiles = [
        *(HopperTile(2, 64, 128, 2, overlap=o, polynomial=p) for o in (False, True) for p in (False, True)),
        *(HopperTile(3, 64, 128, 2, overlap=o, polynomial=p) for o in (False, True) for p in (False, True)),
        HopperTile(2, 64, 128, 4),
        HopperTile(3, 64, 128, 3),
        HopperTile(3, 64, 64, 4),
        HopperTile(3, 64, 64, 4, polynomial=True),
        HopperTile(2, 64, 64, 4, overlap=False),
        HopperTile(2, 128, 64, 4, overlap=False),
        HopperTile(2, 128, 64, 4),
        HopperTile(2, 128, 128, 2, overlap=False),
    ]
    return {f"hopper {describe(tile)}": tile for tile in tiles}


def describe(tile: Any) -> str:
    """Sizes and flags of a tile, short."""
    sizes, flags = [], []
    for name, value in vars(tile).items():
        if isinstance(value, bool):
            flags += [name] if value else []
        elif value is not None:
            sizes.append(str(value))
    return " ".join(["x".join(sizes), *flags])


def run_forward(tile: ForwardTile | HopperTile, qkv: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp by one configuration."""
    return forward_kernels.forward(qkv, segments.as_list(), SCALE, tile)


def run_backward(
    tiles: BackwardTiles, grad: Tensor, qkv: Tensor, saved: tuple[Tensor, Tensor], segments: Segments
) -> Tensor:
    """Gradient by one configuration, from the forward's output and log-sum-exp."""
    return backward_kernels.backward(grad, None, qkv, *saved, segments.as_list(), SCALE, False, tiles)


def inputs(rows: int, heads: int, seed: int) -> tuple[Tensor, Tensor]:
    """qkv and the gradient of the output, bfloat16."""
    generator = torch.Generator("cuda").manual_seed(seed)
    qkv = torch.randn(rows, 3, heads, HEAD_DIM, generator=generator, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(rows, heads, HEAD_DIM, generator=generator, device="cuda", dtype=torch.bfloat16)
    return qkv, grad


@dataclass
class Oracle:
    """One check: inputs, exact results, and the errors that are allowed."""

    segments: Segments
    qkv: Tensor
    grad: Tensor
    exact: list[Tensor]  # out, lse, dq, dk, dv
    budget: list[float]


def oracles() -> Iterator[Oracle]:
    """Every check, its budget twice PyTorch's own error plus one rounding step."""
    for segments, rows in CHECKS:
        for seed in range(SEEDS):
            qkv, grad = inputs(rows, 2, seed)
            exact = list(reference(qkv.double(), segments, SCALE, return_lse=True))
            exact += gradients(lambda x, s=segments: reference(x, s, SCALE), [qkv.double()], [grad])[0].unbind(1)
            found = [reference(qkv, segments, SCALE)]
            found += gradients(lambda x, s=segments: reference(x, s, SCALE), [qkv], [grad])[0].unbind(1)
            base = [relative_error(a, b) for a, b in zip(found, [exact[0], *exact[2:]], strict=True)]
            allowed = [2 * e + ROUNDING[torch.bfloat16] for e in base]
            # 1e-4: the polynomial exponential's error, far below what bfloat16 resolves.
            yield Oracle(segments, qkv, grad, exact, [allowed[0], 1e-4, *allowed[1:]])


def worst(found: list[Tensor], exact: list[Tensor], budget: list[float]) -> float:
    """Largest ratio of error and budget; infinite for NaN."""
    ratios = [relative_error(a, b) / limit for a, b, limit in zip(found, exact, budget, strict=True)]
    return max(r if r == r else float("inf") for r in ratios)


def check(names: list[str]) -> None:
    """Worker: compile and check the named configurations, printing one JSON line each."""
    variants = all_variants()
    prepared = list(oracles())
    for name in names:
        began, ratio, note = time.time(), 0.0, ""
        try:
            for o in prepared:
                ratio = max(ratio, check_one(variants[name], o))
        except Exception as error:  # a configuration that cannot run is a result, not a failure of the sweep
            ratio, note = float("inf"), f"{type(error).__name__}: {str(error)[:160]}"
        print(json.dumps({"name": name, "ratio": ratio, "note": note, "seconds": time.time() - began}), flush=True)


def check_one(tile: Any, o: Oracle) -> float:
    """Ratio of error and budget of one configuration on one check."""
    if isinstance(tile, BackwardTiles):
        saved = forward_kernels.forward(o.qkv, o.segments.as_list(), SCALE)
        grad = run_backward(tile, o.grad, o.qkv, saved, o.segments)
        return worst(list(grad.unbind(1)), o.exact[2:], o.budget[2:])
    return worst(list(run_forward(tile, o.qkv, o.segments)), o.exact[:2], o.budget[:2])


def all_variants() -> dict[str, Any]:
    """Every configuration by name."""
    hopper = hopper_variants() if torch.cuda.get_device_capability()[0] == 9 else {}
    return {**forward_variants(), **backward_variants(), **hopper}


def check_all(names: list[str], seconds: float) -> dict[str, dict[str, Any]]:
    """Check in worker processes, Hopper configurations alone (their barriers can hang), within a time limit."""
    alone = [[n] for n in names if n.startswith("hopper")]
    shared = [n for n in names if not n.startswith("hopper")]
    groups = [shared[i::WORKERS] for i in range(WORKERS) if shared[i::WORKERS]] + alone
    deadline = time.time() + seconds
    waiting, running, results = list(groups), [], {}
    while waiting or running:
        while waiting and len(running) < 2 * WORKERS:
            command = [sys.executable, os.path.abspath(__file__), "-", "--check", json.dumps(waiting.pop(0))]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True))
        time.sleep(0.2)
        expired = time.time() > deadline
        for process in [p for p in running if expired or p.poll() is not None]:
            running.remove(process)
            if process.poll() is None:
                process.kill()
            for line in process.communicate()[0].splitlines():
                with suppress(ValueError, KeyError):
                    entry = json.loads(line)
                    results[entry["name"]] = entry
        if expired:
            break
    missing = {"ratio": float("inf"), "note": "hung, crashed or out of time", "seconds": float("nan")}
    return {name: results.get(name, {"name": name, **missing}) for name in names}


def median_ms(calls: list[Callable[[], Any]], budget_ms: float = 250.0) -> float:
    """Median device time of the calls in turn, after a warm-up."""
    calls[0]()
    calls[-1]()
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < budget_ms and len(times) < 30):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        calls[len(times) % len(calls)]()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def library_calls(
    backend: SDPBackend, data: list[tuple[Tensor, Tensor]], segments: Segments, backward: bool
) -> list[Callable[[], Any]]:
    """PyTorch's fused attention on views of the same buffers, no copies for a single group."""
    calls: list[Callable[[], Any]] = []
    for qkv, grad in data:
        rows = qkv[: segments.total * segments.length].unflatten(0, (segments.total, segments.length))
        q, k, v = (x.detach().requires_grad_(backward) for x in rows.permute(2, 0, 3, 1, 4).unbind(0))

        def forward(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, scale=SCALE)

        if not backward:
            calls.append(forward)
            continue
        out = forward()
        g = grad[: segments.total * segments.length].unflatten(0, (segments.total, segments.length)).transpose(1, 2)
        calls.append(lambda out=out, leaves=(q, k, v), g=g: torch.autograd.grad(out, leaves, g, retain_graph=True))
    return calls


def time_case(case: str, good: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Time every configuration and library on one size."""
    segments, rows, heads = CASES[case]
    data = [inputs(rows, heads, seed) for seed in range(3)]
    saved = [forward_kernels.forward(qkv, segments.as_list(), SCALE) for qkv, _ in data]
    flops = 4 * segments.length**2 * HEAD_DIM * heads * segments.total
    for direction, factor in (("fwd", 1.0), ("bwd", 2.5)):
        backward = direction == "bwd"
        calls = {
            "cudnn": lambda b=backward: library_calls(SDPBackend.CUDNN_ATTENTION, data, segments, b),
            "flash": lambda b=backward: library_calls(SDPBackend.FLASH_ATTENTION, data, segments, b),
        }
        for name, tile in good.items():
            if backward and isinstance(tile, BackwardTiles):
                calls[name] = lambda t=tile: [
                    lambda g=g, x=x, s=s: run_backward(t, g, x, s, segments)
                    for (x, g), s in zip(data, saved, strict=True)
                ]
            elif not backward and not isinstance(tile, BackwardTiles):
                calls[name] = lambda t=tile: [lambda x=x: run_forward(t, x, segments) for x, _ in data]
        for name, make in calls.items():
            try:
                ms = median_ms(make())
            except RuntimeError as error:
                print(f"{case} {name}: {str(error)[:120]}")
                continue
            yield {"case": case, "direction": direction, "name": name, "ms": ms, "tflops": flops * factor / ms / 1e9}


def main() -> None:
    """Check, time, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", help="where the measurements go")
    parser.add_argument("--only", default="", help="configurations whose name contains this text")
    parser.add_argument("--seconds", type=float, default=120.0, help="time limit of compiling and checking")
    parser.add_argument("--check", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.check:
        check(json.loads(arguments.check))
        return
    variants = {n: t for n, t in all_variants().items() if arguments.only in n}
    began = time.time()
    checks = check_all(list(variants), arguments.seconds)
    print(f"checked {len(checks)} configurations in {time.time() - began:.0f} s")
    for name, entry in checks.items():
        if not entry["ratio"] <= 1:
            print(f"REJECTED {name}: error {entry['ratio']:.2g} x budget {entry['note']}")
    good = {n: t for n, t in variants.items() if checks[n]["ratio"] <= 1}
    lines = [line for case in CASES for line in time_case(case, good)]
    with open(arguments.csv, "w", newline="") as file:
        writer = csv.DictWriter(
            file, ["case", "direction", "name", "ms", "tflops", "error_over_budget", "gpu", "torch"]
        )
        writer.writeheader()
        stamp = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        for line in lines:
            ratio = checks[line["name"]]["ratio"] if line["name"] in checks else ""
            writer.writerow({**line, "error_over_budget": ratio, **stamp})
    for case in CASES:
        for direction in ("fwd", "bwd"):
            ranked = sorted(
                (x for x in lines if (x["case"], x["direction"]) == (case, direction)), key=lambda x: x["ms"]
            )
            print(f"{case} {direction}")
            for line in ranked[:6] + [x for x in ranked[6:] if x["name"] in ("cudnn", "flash")]:
                print(f"  {line['tflops']:6.0f} TFLOP/s {line['ms']:8.3f} ms  {line['name']}")
    print(f"total {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
