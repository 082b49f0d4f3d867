"""Rows of `benchmarks/results/<gpu>.csv`: what was measured, where and when."""

from __future__ import annotations

import csv
import functools
import importlib.metadata
import os
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"

_KEY = ("suite", "case", "direction", "provider", "backend", "precision", "views", "size")


@dataclass
class Row:
    """One line of the results; empty where a quantity does not apply. Memory is in 1e9 bytes."""

    suite: str
    case: str
    direction: str
    provider: str
    backend: str = ""
    precision: str = "exact"
    views: int | str = ""
    size: str = ""
    ms: float | str = ""
    ms_p20: float | str = ""
    ms_p80: float | str = ""
    tflops: float | str = ""
    tbps: float | str = ""
    percent_of_ceiling: float | str = ""
    peak_gb: float | str = ""
    error: float | str = ""
    error_budget: float | str = ""
    gpu: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    cuda: str = ""
    commit: str = ""
    date: str = ""

    def key(self) -> tuple[str, ...]:
        """What a later measurement of the same thing replaces."""
        return tuple(str(getattr(self, name)) for name in _KEY)

    def number(self, name: str) -> float | None:
        """A quantity, or None where it does not apply."""
        value = getattr(self, name)
        return None if value == "" else float(value)


COLUMNS = tuple(f.name for f in fields(Row))


def short(value: float) -> float:
    """Five significant digits: no timer is better."""
    return float(f"{value:.5g}")


def _output_of(*command: str) -> str:
    """First line that a command prints; empty where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return ""
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else ""


def _commit() -> str:
    commit = os.environ.get("ANY4D_FAST_COMMIT") or _output_of("git", "rev-parse", "--short", "HEAD")
    changed = not os.environ.get("ANY4D_FAST_COMMIT") and _output_of(
        "git", "status", "--porcelain", "--untracked-files=no", "--", "../any4d_fast", "../kernels", "../csrc"
    )
    return f"{commit}+" if changed else commit


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def environment() -> dict[str, str]:
    """GPU, driver, versions, commit (with a `+` when the code has changed since) and date of this run.

    ANY4D_FAST_COMMIT names the commit where the checkout has no git folder.
    """
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": str(torch.version.cuda),
        "commit": _commit(),
        "date": date.today().isoformat(),
    }


def clocks() -> str:
    """Clocks, power and temperature of the GPU at this moment, as text."""
    query = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    return _output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")


def results_folder() -> Path:
    """Where the results lie; ANY4D_FAST_RESULTS names another folder."""
    return Path(os.environ.get("ANY4D_FAST_RESULTS", RESULTS))


def results_path(kind: str = "") -> Path:
    """The CSV of this GPU; of one `kind` of results, in the folder of that name."""
    return results_folder() / kind / (environment()["gpu"].lower().replace(" ", "-") + ".csv")


def record(rows: Iterable[Row]) -> None:
    """Add rows to the results; a row replaces the earlier one of the same thing."""
    path = results_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {row.key(): row for row in read(path)}
    for row in rows:
        for name, value in environment().items():
            setattr(row, name, value)
        known[row.key()] = row
    whole = path.with_suffix(".tmp")  # an interrupted run must not leave half a file
    with open(whole, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in known.values())
    whole.replace(path)


def read(path: Path) -> list[Row]:
    """Rows of a results file; none when there is no file.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.exists():
        return []
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: expected the columns {','.join(COLUMNS)}, got {reader.fieldnames}")
        return [_typed(line) for line in reader]


def _typed(line: dict[str, Any]) -> Row:
    kinds = {f.name: str(f.type) for f in fields(Row)}
    converted: dict[str, Any] = {}
    for name, text in line.items():
        kind = kinds[name]
        converted[name] = text if kind == "str" or text == "" else float(text) if "float" in kind else int(text)
    return Row(**converted)


def table(rows: Iterable[Row]) -> str:
    """Rows as aligned text, for the end of a log."""
    names = (
        *("case", "direction", "size", "provider", "backend", "ms", "tflops", "tbps"),
        *("percent_of_ceiling", "peak_gb", "error", "error_budget"),
    )
    cells = [names, *(tuple(str(getattr(row, n)) for n in names) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)
