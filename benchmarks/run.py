"""All benchmarks, or those of some ops, in one process without pytest: `python benchmarks/run.py --ops attention`.

Rows are recorded as they are measured, so that an interrupted run keeps what it has. ANY4D_FAST_RESULTS names another
folder for the CSV. The exit code is 1 when anything failed.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

FOLDER = Path(__file__).resolve().parent
if str(FOLDER.parent) not in sys.path:
    sys.path.insert(0, str(FOLDER.parent))  # `python benchmarks/run.py` finds only the script's own folder

if TYPE_CHECKING:
    from benchmarks.harness import Case, Row


def names() -> list[str]:
    """Names of the bench files, the whole model last: it takes longest."""
    found = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
    return sorted(found, key=lambda name: name == "model")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ops", default="", help=f"comma-separated, of: {', '.join(names())}; all by default")
    parser.add_argument("--providers", default="", help="comma-separated providers, e.g. eager,any4d_fast")
    parser.add_argument("--only", default="", help="cases with this text (or one of several between |) in their name")
    parser.add_argument("--budget-seconds", type=float, default=math.inf, help="no new case after this long")
    parser.add_argument("--views", type=int, default=0, help="add a forward pass of so many views to the model's cases")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--upstream", default="", metavar="PATH", help="checkout of the original code")
    parser.add_argument("--dinov2", default="", metavar="PATH", help="checkout of DINOv2 for --upstream")
    parser.add_argument("--list", action="store_true", help="print the cases and their providers, measure nothing")
    options = parser.parse_args(arguments)
    options.ops = [op for op in options.ops.split(",") if op] or names()
    options.providers = [p for p in options.providers.split(",") if p]
    unknown = sorted(set(options.ops) - set(names()))
    if unknown:
        parser.error(f"--ops: expected some of {', '.join(names())}, got {', '.join(unknown)}")
    return options


def wanted(options: argparse.Namespace, provider: str) -> bool:
    name = provider.partition(":")[0]
    if options.no_compile and name == "compile":
        return False
    return not options.providers or name in options.providers or provider in options.providers


def run_case(case: Case, options: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """Rows of a case and what failed, each provider on its own."""
    from benchmarks.harness import Session, Unavailable, record, table

    rows: list[Row] = []
    failures: list[str] = []
    session = Session(case)
    for provider in case.providers:
        if not wanted(options, provider):
            continue
        try:
            found, function = session.measure(provider)
        except Unavailable as reason:
            print(f"{case} {provider}: skipped: {reason}", flush=True)
            continue
        except Exception:
            failures.append(f"{case} {provider}")
            print(f"{case} {provider}: FAILED", flush=True)
            traceback.print_exc()
            continue
        if function is None:
            print(f"{case} {provider}: not timed, error {found[0].error} exceeds {found[0].error_budget}", flush=True)
        del function
        record(found)
        rows += found
        print(table(found[:1]).split("\n")[1], flush=True)
    session.close()
    return rows, failures


def run_op(op: str, options: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """Rows of one bench file and what failed."""
    rows: list[Row] = []
    failures: list[str] = []
    start = time.monotonic()
    for case in importlib.import_module(f"benchmarks.bench_{op}").cases():
        if not any(text in str(case) for text in options.only.split("|")):
            continue
        if time.monotonic() - start > options.budget_seconds:
            print(f"{case}: left out, {op} has used its {options.budget_seconds:g} s", flush=True)
            continue
        if options.list:
            print(f"{case}: {', '.join(case.providers)}")
            continue
        found, failed = run_case(case, options)
        rows += found
        failures += failed
    if not options.list:
        print(f"{op}: {time.monotonic() - start:.1f} s", flush=True)
    return rows, failures


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    for name in ("upstream", "dinov2"):
        if getattr(options, name):
            os.environ[f"ANY4D_FAST_{name.upper()}"] = getattr(options, name)
    if options.views:
        os.environ["ANY4D_FAST_BENCH_VIEWS"] = str(options.views)
    import torch

    from benchmarks import results
    from benchmarks.harness import ceilings

    rows: list[Row] = []
    failures: list[str] = []
    if not options.list:
        if not torch.cuda.is_available():
            print("benchmarks need a CUDA device, and PyTorch sees none", file=sys.stderr)
            return 2
        print(results.environment(), results.clocks(), flush=True)
        rows += ceilings()
        results.record(rows)
    for op in options.ops:
        try:
            found, failed = run_op(op, options)
        except Exception:
            traceback.print_exc()
            found, failed = [], [op]
        rows += found
        failures += failed
    if options.list:
        return 0
    print(results.clocks())
    for failure in failures:
        print(f"FAILED: {failure}")
    print(f"recorded in {results.results_path()}\n\n{results.table(rows)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
