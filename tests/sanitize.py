"""Run compute-sanitizer over the calls of `tests/sanitize_cases.py`: `make sanitize`, on a GPU.

`python -m tests.sanitize --jobs 4 --tool racecheck --op unproject` runs a part. Every tool watches every op in a
process of its own, with PyTorch's caching allocator off, so that every tensor is an allocation whose ends are known.
Prints a table, records it in `benchmarks/results/sanitize/<gpu>.csv`, and exits with 1 if anything was found.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from any4d_fast import _toolkit
from tests.sanitize_cases import SWEEPS

ROOT = Path(__file__).resolve().parents[1]
# Only our kernels are watched, but by initcheck, which must see PyTorch's write what ours read.
OURS = ("--kernel-name", "kernel_substring=any4d")
TOOLS = {
    # PyTorch tries calls of CUDA that may fail; our launchers' errors raise.
    "memcheck": (*OURS, "--report-api-errors", "no", "--padding", "512"),
    "racecheck": OURS,
    "initcheck": (),
}
PRINTED = 500
COMMON = (
    "--target-processes", "application-only", "--show-backtrace", "device", "--print-limit", str(PRINTED),
    "--launch-timeout", "120",  # seconds until the process has a context: importing PyTorch may take longer than the 10
)  # fmt: skip

_BLOCK = re.compile(r"^=+ (?=\S)", re.MULTILINE)
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")
_REMARK = re.compile(
    r"COMPUTE-SANITIZER|ERROR SUMMARY|RACECHECK SUMMARY|Target application returned|Error: process|Note:"
)


@dataclass(frozen=True)
class Result:
    """What one tool found in one op."""

    tool: str
    op: str
    cases: int
    errors: int
    seconds: float
    problem: str
    """Why the run does not count, if it does not; else the first finding."""

    @property
    def clean(self) -> bool:
        return self.cases > 0 and self.errors == 0 and not self.problem

    def row(self) -> str:
        return f"{self.tool:<10} {self.op:<18} {self.cases:>6} {self.errors:>7} {self.seconds:>8.1f}  {self.problem}"


def find_sanitizer() -> Path:
    """compute-sanitizer of CUDA_HOME, on PATH, in /usr/local/cuda, or of pip's nvidia-cuda-sanitizer-api.

    Raises:
        FileNotFoundError: there is none.
    """
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [Path(home) / "bin" / "compute-sanitizer" for home in homes if home]
    candidates += [path for folder in _toolkit._pip_folders() for path in folder.glob("cu*/bin/compute-sanitizer")]
    on_path = shutil.which("compute-sanitizer")
    for path in ([Path(on_path)] if on_path else []) + candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(
        "compute-sanitizer is not on PATH, in CUDA_HOME or in /usr/local/cuda; "
        "it comes with the CUDA toolkit, and in the package nvidia-cuda-sanitizer-api"
    )


def findings(text: str) -> tuple[list[str], int]:
    """Findings that concern us in what a tool printed, and how many more it counted without printing them."""
    blocks = [block for block in _BLOCK.split(text)[1:] if not _REMARK.match(block)]
    ours = [block for block in blocks if not _elsewhere(block)]
    match = _SUMMARY.search(text)
    if match is None:
        raise ValueError("the tool did not finish: it printed no summary")
    return ours, max(0, int(match[1] or match[2]) - len(blocks))


def _elsewhere(block: str) -> bool:
    """Whether a finding is in a kernel that is not ours; one of the host's (a copy of what nobody wrote) is ours."""
    places = re.findall(r"\bat (?!0x)(.*)", block)
    return bool(places) and not any("any4d" in place for place in places)


def run(
    sanitizer: Path, tool: str, op: str, arguments: Sequence[str], folder: Path, timeout: float, port: int
) -> Result:
    """One tool over one op's cases."""
    log = folder / f"{tool}-{op}.log"
    command = [str(sanitizer), "--tool", tool, *COMMON, *TOOLS[tool], "--port", str(port), "--log-file", str(log)]
    command += [sys.executable, "-m", "tests.sanitize_cases", op, *arguments]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return Result(tool, op, 0, 0, time.monotonic() - start, f"not done in {timeout:.0f} s")
    seconds = time.monotonic() - start
    (folder / f"{tool}-{op}.out").write_text(done.stdout + done.stderr)
    return judge(tool, op, done, log.read_text(errors="replace") if log.is_file() else "", seconds)


def judge(tool: str, op: str, done: subprocess.CompletedProcess[str], log: str, seconds: float) -> Result:
    """The result of a run that has ended."""
    count = re.search(r"^cases (\d+)", done.stdout, re.MULTILINE)
    cases = int(count[1]) if count else 0
    try:
        ours, hidden = findings(log)
    except ValueError as error:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no output"]
        return Result(tool, op, cases, 0, seconds, f"{error}; {last[0]}")
    # What was not printed is taken for ours.
    errors = len(ours) + hidden
    if ours:
        problem = " ".join(" ".join(ours[0].replace("=", " ").split())[:160].split())
    elif cases == 0:
        problem = ((done.stderr or done.stdout).strip().splitlines()[-1:] or ["no case ran"])[0]
    else:
        problem = f"{hidden} findings were not printed" if hidden else ""
    return Result(tool, op, cases, errors, seconds, problem)


def record(results: Sequence[Result], version: str) -> Path:
    """Write the results to the GPU's CSV; what was not run this time keeps the line of its last run."""
    from benchmarks.results import environment, results_path

    where = {"sanitizer": version, **environment()}
    path = results_path("sanitize")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines: dict[tuple[str, str], list[str]] = {}
    if path.exists():
        with open(path, newline="") as file:
            lines = {(line[0], line[1]): line for line in list(csv.reader(file))[1:]}
    for one in results:
        values = [one.tool, one.op, one.cases, one.errors, round(one.seconds, 1), *where.values()]
        lines[one.tool, one.op] = [str(value) for value in values]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["tool", "op", "cases", "errors", "seconds", *where])
        writer.writerows(line for _, line in sorted(lines.items()))
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=__doc__)
    parser.add_argument("--tool", action="append", choices=list(TOOLS), help="all by default; may be repeated")
    parser.add_argument("--op", action="append", choices=list(SWEEPS), help="all by default; may be repeated")
    parser.add_argument("--jobs", type=int, default=4, help="processes that share the GPU (4)")
    parser.add_argument("--every", type=int, default=1, help="run one of so many cases (1); such a run is not recorded")
    parser.add_argument("--only", default="", help="run the cases whose name holds this; such a run is not recorded")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one tool and op (1800)")
    parser.add_argument("--logs", type=Path, help="folder for what the tools print; a temporary one by default")
    options = parser.parse_args(arguments)

    from any4d_fast import _ext

    missing = _ext.missing()
    if missing:
        print(f"the CUDA extension is missing: {missing}", file=sys.stderr)
        return 2
    sanitizer = find_sanitizer()
    printed = _toolkit.output_of(str(sanitizer), "--version")
    version = (re.search(r"Version (\S+)", printed) or [printed, "unknown"])[1]
    folder = options.logs or Path(tempfile.mkdtemp(prefix="any4d-sanitize-"))
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(tool, op) for tool in options.tool or TOOLS for op in options.op or SWEEPS]
    forwarded = [*(["--only", options.only] if options.only else []), "--every", str(options.every)]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(
            pool.map(
                lambda item: run(sanitizer, *item[1], forwarded, folder, options.timeout, 49152 + 16 * item[0]),
                enumerate(pairs),
            )
        )
    print(f"compute-sanitizer {version}; logs in {folder}")
    print(f"{'tool':<10} {'op':<18} {'cases':>6} {'errors':>7} {'seconds':>8}")
    for one in results:
        print(one.row())
    if not options.only and options.every == 1:
        print(record([one for one in results if one.cases > 0], version))
    return int(not all(one.clean for one in results))


if __name__ == "__main__":
    raise SystemExit(main())
