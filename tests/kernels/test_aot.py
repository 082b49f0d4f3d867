"""Every production configuration of every kernel compiles for every architecture, within its shared memory.

Runs in a process without the interpreter and needs no GPU.
"""

from __future__ import annotations

import functools
import importlib
import os
from pathlib import Path

import any4d_fast.kernels
import pytest

from any4d_fast import backends

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(backends.triton_missing() is not None, reason="triton is not installed"),
    pytest.mark.skipif(backends.interpreting(), reason="the interpreter replaces the compiler (TRITON_INTERPRET=1)"),
]

TARGETS = (80, 90, 100)


def kernel_modules() -> list[str]:
    """Names of the kernel modules that list production configurations."""
    folder = Path(next(iter(any4d_fast.kernels.__path__)))
    return sorted(p.stem for p in folder.glob("*.py") if "def aot_cases" in p.read_text())


@functools.cache
def cases(module: str) -> dict[str, object]:
    found = importlib.import_module(f"any4d_fast.kernels.{module}").aot_cases()
    return {case.name: case for case in found}


def test_every_op_with_kernels_lists_its_configurations() -> None:
    folder = Path(next(iter(any4d_fast.kernels.__path__)))
    ops = {p.stem for p in (Path(backends.__file__).parent / "ops").glob("[!_]*.py")}
    with_kernels = {p.stem for p in folder.glob("*.py")} & ops
    assert with_kernels <= set(kernel_modules())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("module", kernel_modules())
def test_production_configurations_compile(module: str, target: int, capsys: pytest.CaptureFixture[str]) -> None:
    """All cases of a module for one target; what they take is printed, and bounded where the case bounds its spills."""
    from concurrent.futures import ThreadPoolExecutor

    from any4d_fast.kernels.aot import SHARED_MEMORY, AotCase, compile_case

    chosen = [c for c in cases(module).values() if isinstance(c, AotCase) and target in c.targets]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        usages = list(pool.map(lambda case: compile_case(case, target), chosen))
    lines = []
    for case, usage in zip(chosen, usages, strict=True):
        lines.append(
            f"sm_{target} {case.name}: {usage.registers} registers, {usage.spills} spills, {usage.shared} B shared"
        )
        assert usage.shared <= SHARED_MEMORY[target], lines[-1]
        assert usage.spills <= case.max_spills, lines[-1]
    with capsys.disabled():
        print("", *lines, sep="\n")
