"""Compile kernels ahead of time for named targets, with no GPU, and read what the compiler made of them.

Every kernel module lists its production configurations in `aot_cases()`; the tests compile each of them for
sm_80, sm_90 and sm_100 and bound shared memory and spills.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that one thread block may use, by compute capability (CUDA C++ programming guide)."""


@dataclass(frozen=True)
class AotCase:
    """One production configuration of one kernel.

    `types` maps argument names to Triton signature types ('*bf16', 'i32', 'fp32'), `constants` to constexpr values,
    `aligned` names the pointer and integer arguments that are divisible by 16, as they are at run time. More spilled
    loads and stores than `max_spills` fail the tests; a case that needs any says why.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    targets: tuple[int, ...] = (80, 90, 100)
    max_spills: int = 0


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes: registers a thread, spilled instructions, bytes of shared memory."""

    registers: int
    spills: int
    shared: int
    warps: int
    instructions: Mapping[str, int]


def compile_case(case: AotCase, capability: int) -> Usage:
    """Compile one case for one compute capability (80, 90, 100) and report its resources."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {n: "constexpr" if n in case.constants else case.types[n] for n in names}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in case.aligned}
    kind = ASTSource
    if case.kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        kind = GluonASTSource
    source = kind(case.kernel, signature, constexprs=dict(case.constants), attrs=attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(case.options))
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", cubin.name)
        sass = _run(tools / "nvdisasm", "-c", cubin.name)
    registers = re.search(r"REG:(\d+)", usage)
    wanted = ("HGMMA", "HMMA", "UTCHMMA", "UTMALDG", "LDGSTS", "MUFU", "FFMA")
    counts = {op: len(re.findall(rf"\b{op}\b", sass)) for op in wanted}
    return Usage(
        registers=int(registers[1]) if registers else 0,
        spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        shared=built.metadata.shared,
        warps=built.metadata.num_warps,
        instructions={op: n for op, n in counts.items() if n},
    )


def _run(tool: Path, *args: str) -> str:
    return subprocess.run([str(tool), *args], capture_output=True, text=True, check=True).stdout
