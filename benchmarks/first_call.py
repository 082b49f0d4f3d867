"""Seconds of every op's first call in a new process with an empty Triton cache, and of later calls with other numbers
of views, which must compile nothing: `python -m benchmarks.first_call --jobs 8`.

A call is the forward or, after it in the same process, the backward pass at the model's sizes: two registered
operators, timed one by one. What Triton sets up once in a new cache, whatever is launched first, is a row of its own
(`triton`, a kernel that writes one number) and is there when an op is called. Kernels are counted by the binaries in
Triton's cache. Rows go to `benchmarks/results/first_call/<gpu>.csv`; the exit code is 1 when a first call took longer
than the limit, a later one compiled something, or anything failed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks import results, run
from benchmarks.harness import OURS, Case, Sizes, Unavailable

LIMIT_SECONDS = 3.0
SKIPPED = 3  # exit code of a process whose provider cannot run


@dataclass(frozen=True)
class Call:
    """One call: the first of its process, or a later one."""

    case: str
    size: str
    direction: str
    provider: str
    backend: str
    call: int
    views: int
    seconds: float
    kernels: int


KEY = ("case", "size", "direction", "provider", "backend", "call")
SET_UP = "triton"  # the case of Triton's own set-up


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    ops = [name for name in run.names() if name != "model"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--ops", default=",".join(ops), help="comma-separated; all by default")
    parser.add_argument("--providers", default=OURS, help=f"comma-separated providers; {OURS} by default")
    parser.add_argument("--views", type=int, default=41, help="number of views of the first call")
    parser.add_argument("--later", default="24,13", help="numbers of views of the later calls, even and odd")
    parser.add_argument("--height", type=int, default=336)
    parser.add_argument("--width", type=int, default=518)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once; they take each other's processor time")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds that a first call may take")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="no new process after this long")
    parser.add_argument("--only", default="", help="op:index:provider to measure in this process (used internally)")
    options = parser.parse_args(arguments)
    for name in ("ops", "providers"):
        setattr(options, name, [value for value in getattr(options, name).split(",") if value])
    options.later = [int(views) for views in str(options.later).split(",") if views]
    unknown = sorted(set(options.ops) - set(ops))
    if unknown:
        parser.error(f"--ops: expected some of {', '.join(ops)}, got {', '.join(unknown)}")
    return options


def cases(op: str, views: int, options: argparse.Namespace) -> list[Case]:
    """The cases of an op at a number of views; their order does not depend on it."""
    sizes = Sizes(
        views=(views, max(1, views // 5), 2), height=options.height, width=options.width, device=options.device
    )
    found: list[Case] = importlib.import_module(f"benchmarks.bench_{op}").cases(sizes)
    return found


def jobs(options: argparse.Namespace) -> list[str]:
    """`op:index:provider` for every size of every op: of a case in both directions the backward, which runs both."""
    found = []
    for op in options.ops:
        listed = of_the_clip(cases(op, options.views, options), options.views)
        both = {case.size for _, case in listed if case.direction == "bwd"}
        for index, case in listed:
            if case.direction == "bwd" or case.size not in both:
                names = [p for p in case.providers if {p, p.partition(":")[0]} & set(options.providers)]
                found += [f"{op}:{index}:{name}" for name in names]
    return found


def of_the_clip(listed: Sequence[Case], views: int) -> list[tuple[int, Case]]:
    """Cases of the whole clip with their places; in a direction that has none, those of the most views."""
    found = []
    for direction in ("fwd", "bwd"):
        own = [(i, case) for i, case in enumerate(listed) if case.direction == direction]
        most = views if any(c.views == views for _, c in own) else max((int(c.views) for _, c in own), default=0)
        found += [(i, case) for i, case in own if case.views == most]
    return sorted(found, key=lambda pair: pair[0])


def compiled_kernels(cache: Path) -> int:
    """Kernels in a Triton cache."""
    return sum(1 for _ in cache.rglob("*.cubin"))


def timed(call: Callable[[], Any], synchronize: Callable[[], None], cache: Path) -> tuple[float, int]:
    """Seconds of a call until the device is done, and how many kernels it compiled."""
    synchronize()
    before, start = compiled_kernels(cache), time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start, compiled_kernels(cache) - before


def set_up(options: argparse.Namespace, cache: Path) -> Call:
    """Triton's first launch in this process."""
    import torch

    from . import triton_set_up

    torch.zeros(1, device=options.device)
    seconds, kernels = timed(triton_set_up.launch, torch.cuda.synchronize, cache)
    return Call(SET_UP, "one number", "fwd", "triton", "", 1, 1, results.short(seconds), kernels)


def measure(job: str, options: argparse.Namespace, cache: Path) -> list[Call]:
    """The calls of one job, in this process; of a backward case also the forward pass that comes before it."""
    import torch

    op, index, name = job.split(":", 2)
    provider, _, backend = name.partition(":")
    on_gpu = options.device == "cuda"
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    first = [set_up(options, cache)] if on_gpu else []
    found = []
    for number, views in enumerate([options.views, *options.later], start=1):
        case = cases(op, views, options)[int(index)]
        inputs = case.inputs()
        made: list[Callable[[], Any]] = []
        # Making a backward provider's run is its forward pass; a forward provider's does nothing.
        prepare = timed(lambda c=case, given=inputs, to=made: to.append(c.providers[name](given)), synchronize, cache)
        own = timed(made[0], synchronize, cache)
        parts = {"fwd": prepare, "bwd": own} if case.direction == "bwd" else {"fwd": own}
        for direction, (seconds, kernels) in parts.items():
            shown = results.short(seconds)
            found.append(Call(op, case.size, direction, provider, backend, number, views, shown, kernels))
    # A later call has another size; the row belongs to the first one's.
    return first + [Call(**{**asdict(call), "size": found[0].size}) for call in found]


def start(job: str, arguments: Sequence[str]) -> list[Call] | str:
    """The calls of one job in a process of its own with an empty cache, or why there are none."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-m", "benchmarks.first_call", *arguments, "--only", job]
        root = Path(__file__).resolve().parents[1]
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    lines = done.stdout.strip().split("\n")
    if done.returncode == SKIPPED:
        return f"skipped: {lines[-1]}"
    if done.returncode:
        return f"FAILED: {done.stderr.strip()[-2000:]}"
    return [Call(**values) for values in json.loads(lines[-1])]


def problems(calls: Sequence[Call], limit: float) -> list[str]:
    """What the calls show that they should not."""
    found = []
    for call in calls:
        name = f"{call.case} {call.direction} {call.size} {call.provider}:{call.backend}"
        if call.call == 1 and call.seconds > limit:
            found.append(f"{name}: the first call took {call.seconds:g} s, more than {limit:g} s")
        if call.call > 1 and call.kernels:
            found.append(f"{name}: a call with {call.views} views compiled {call.kernels} kernels more")
    return found


def record(calls: Sequence[Call]) -> None:
    """Write the rows; a row replaces the earlier one of the same call."""
    where, path = results.environment(), results.results_path("first_call")
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [*(f.name for f in fields(Call)), *where]
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    if path.exists():
        with open(path, newline="") as file:
            rows = {tuple(row[k] for k in KEY): row for row in csv.DictReader(file)}
    for call in calls:
        row = {**asdict(call), **where}
        rows[tuple(str(row[k]) for k in KEY)] = row
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for _, row in sorted(rows.items()))


def measure_all(options: argparse.Namespace, arguments: Sequence[str]) -> tuple[list[Call], list[str]]:
    """Every call, recorded as soon as it is there, and what failed."""
    begun, failures, calls = time.monotonic(), [], []

    def one(job: str) -> list[Call] | str:
        if time.monotonic() - begun > options.budget_seconds:
            return f"skipped: {options.budget_seconds:g} s have passed"
        return start(job, arguments)

    listed = jobs(options)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for job, found in zip(listed, pool.map(one, listed), strict=True):
            if isinstance(found, str):
                print(f"{job}: {found}", flush=True)
                failures += [job] if found.startswith("FAILED") else []
                continue
            calls += found
            record(found)
            own = [c for c in found if c.case != SET_UP]
            shown = ", ".join(f"{c.direction} {c.views} views {c.seconds:g} s ({c.kernels} kernels)" for c in own)
            print(f"{job} {own[0].size}: {shown}", flush=True)
    return calls, failures


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    if options.only:
        try:
            calls = measure(options.only, options, Path(os.environ["TRITON_CACHE_DIR"]))
        except Unavailable as reason:
            print(str(reason).replace("\n", " "))
            return SKIPPED
        print(json.dumps([asdict(call) for call in calls]))
        return 0
    if options.device == "cuda":
        from any4d_fast import _ext

        _ext.missing()  # a build of the CUDA extension is once a machine, not once a process
    calls, failures = measure_all(options, arguments)
    wrong = [*problems(calls, options.limit), *(f"{job}: failed" for job in failures)]
    if calls:
        print(f"recorded in {results.results_path('first_call')}")
    for line in wrong:
        print(line)
    return int(bool(wrong) or not calls)


if __name__ == "__main__":
    sys.exit(main())
