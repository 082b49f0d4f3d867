"""Registers, spills, stack and static shared memory of every kernel, read from what ptxas prints, and their bounds."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from any4d_fast import _build

RELEASE = (13, 0)
"""The CUDA release whose ptxas the bounds are for; another one allocates registers differently."""


@dataclass(frozen=True)
class Usage:
    """Of one kernel on one architecture; where templates are made several times, the most of each."""

    source: str
    kernel: str
    architecture: str
    registers: int
    spill: int
    """Bytes of spill stores and loads."""
    stack: int
    shared: int
    """Bytes, static."""
    instances: int = 1

    def row(self) -> str:
        numbers = (self.instances, self.registers, self.spill, self.stack, self.shared)
        return f"{self.source:<34} {self.kernel:<40} {self.architecture:>5}" + "".join(f" {n:>9}" for n in numbers)


@dataclass(frozen=True)
class Bound:
    """What a kernel may use at most."""

    registers: int = 128
    """512 threads on a multiprocessor, enough to hide memory's latency in a kernel that streams."""
    spill: int = 0
    stack: int = 0
    shared: int = 48 * 1024
    """More than this is dynamic shared memory, which ptxas does not see."""


ALLOWANCES: list[tuple[str, str, Bound, str]] = [
    (
        "attention_sm90.cu",
        "attention_forward_kernel",
        Bound(spill=192, stack=32),
        "once a tile of queries, outside the loop over keys (test_no_loop_of_matrix_products_spills)",
    ),
    (
        "fuse_tokens_backward.cu",
        "fuse_tokens_backward_kernel",
        Bound(registers=255),
        "sums for weight, bias and every vector stay in registers; 8 warps with 16 loads each keep memory busy",
    ),
]
"""(source pattern, kernel pattern, bound, reason): the first that fits a kernel replaces the default bound."""

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_SERIALIZED = re.compile(r"Potential Performance Loss: (.*?) in the function '(\w+)'")


def bound_of(usage: Usage) -> Bound:
    for source, kernel, bound, _ in ALLOWANCES:
        if fnmatch.fnmatch(usage.source, source) and fnmatch.fnmatch(usage.kernel, kernel):
            return bound
    return Bound()


def violations(usages: Iterable[Usage]) -> list[str]:
    """What exceeds its bound, in words."""
    found = []
    for usage in usages:
        bound = bound_of(usage)
        for name in ("registers", "spill", "stack", "shared"):
            own, most = getattr(usage, name), getattr(bound, name)
            if own > most:
                found.append(f"{usage.source} {usage.kernel} sm_{usage.architecture}: {name} {own}, expected <= {most}")
    return found


def table(usages: Iterable[Usage]) -> str:
    numbers = ("instances", "registers", "spill B", "stack B", "shared B")
    head = f"{'source':<34} {'kernel':<40} {'sm_':>5}" + "".join(f" {name:>9}" for name in numbers)
    return "\n".join([head, *(usage.row() for usage in usages)])


def read(plan: _build.Plan, folder: Path) -> list[Usage]:
    """Of every kernel of a plan whose objects were compiled in `folder`, one a kernel and architecture."""
    most: dict[tuple[str, str, str], Usage] = {}
    for source, log in _logs(plan, folder):
        for usage in parse(source, log):
            key = (usage.source, usage.kernel, usage.architecture)
            most[key] = _merge(most[key], usage) if key in most else usage
    order = {name: i for i, name in enumerate(_build.ARCHITECTURES)}
    return sorted(most.values(), key=lambda usage: (usage.source, usage.kernel, order[usage.architecture]))


def serialized(plan: _build.Plan, folder: Path) -> list[str]:
    """Kernels whose asynchronous matrix products ptxas waits for one by one, and its reason."""
    found = set()
    for source, log in _logs(plan, folder):
        matches = _SERIALIZED.findall(log)
        names = demangle([name for _, name in matches])
        found |= {f"{source} {short_name(names[name])}: {reason}" for reason, name in matches}
    return sorted(found)


def _logs(plan: _build.Plan, folder: Path) -> Iterator[tuple[str, str]]:
    for step in plan.steps:
        if step.rule == "nvcc":
            yield step.source.name, (folder / f"{step.object}.log").read_text(errors="replace")


def _merge(a: Usage, b: Usage) -> Usage:
    most = {name: max(getattr(a, name), getattr(b, name)) for name in ("registers", "spill", "stack", "shared")}
    return replace(a, **most, instances=a.instances + b.instances)


def parse(source: str, log: str) -> list[Usage]:
    """The kernels in what `nvcc -Xptxas=-v` printed for one source."""
    entries: list[tuple[str, str, int, int, int, int]] = []
    for block in re.split(r"(?=Compiling entry function)", log)[1:]:
        entry, frame, used = _ENTRY.search(block), _FRAME.search(block), _USED.search(block)
        if entry is None or frame is None or used is None:
            raise ValueError(f"{source}: ptxas printed something new: {block[:300]!r}")
        shared = _SHARED.search(block[used.start() :].splitlines()[0])
        spill = int(frame[2]) + int(frame[3])
        entries.append((entry[1], entry[2], int(used[1]), spill, int(frame[1]), int(shared[1]) if shared else 0))
    names = demangle([entry[0] for entry in entries])
    return [Usage(source, short_name(names[entry[0]]), *entry[1:]) for entry in entries]


def demangle(names: list[str]) -> dict[str, str]:
    if not names or shutil.which("c++filt") is None:
        return {name: name for name in names}
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def short_name(name: str) -> str:
    """Of "void any4d::(anonymous namespace)::kernel<float, 2>(Arguments)": kernel."""
    plain = name.replace("(anonymous namespace)", "")
    match = re.search(r"(\w+)\s*[<(]", plain)
    return match[1] if match else plain
