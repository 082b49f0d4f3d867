"""The script behind `make sanitize`: what it reads from the tools, and that its sweep misses no kernel."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from any4d_fast import _ext, backends, ops
from tests import sanitize, sanitize_cases

OUT_OF_BOUNDS = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at void any4d::(anonymous namespace)::forward_kernel<float>(any4d::Args)+0x90 in unproject.cu:42
=========     by thread (3,0,0) in block (0,0,0)
=========     Address 0x7f is out of bounds
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<4>(int)+0x70
=========     by thread (0,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 2 errors
"""
RACE = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at any4d::kernel(float *)+0xe0 in compose_factors.cu:8
=========     and Read access at any4d::kernel(float *)+0x1c0 in compose_factors.cu:9 [512 hazards]
=========
========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)
"""
COPY = """\
========= COMPUTE-SANITIZER
========= Host API uninitialized memory access
=========     Access of size 16 bytes on access by cudaMemcpyAsync source
=========
========= ERROR SUMMARY: 1 error
"""
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"


def done(stdout: str = "cases 12 values 345\n", stderr: str = "", status: int = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], status, stdout, stderr)


@pytest.mark.parametrize(("log", "ours", "hidden"), [(OUT_OF_BOUNDS, 1, 0), (RACE, 1, 2), (COPY, 1, 0), (CLEAN, 0, 0)])
def test_findings(log: str, ours: int, hidden: int) -> None:
    found, more = sanitize.findings(log)
    assert (len(found), more) == (ours, hidden)


def test_clean_run() -> None:
    result = sanitize.judge("memcheck", "unproject", done(), CLEAN, 1.0)
    assert result.clean and (result.cases, result.errors) == (12, 0)


@pytest.mark.parametrize(
    ("process", "log", "problem"),
    [
        (done(), OUT_OF_BOUNDS, "Invalid __global__ read of size 4 bytes at void any4d::"),
        (done(), RACE, "Error: Race reported between Write access"),
        (
            done(stderr="Traceback\nRuntimeError: unproject: no", stdout="", status=1),
            CLEAN,
            "RuntimeError: unproject: no",
        ),
        (done(stdout="", status=1), "", "the tool did not finish: it printed no summary; no output"),
    ],
)
def test_run_that_is_not_clean(process: subprocess.CompletedProcess[str], log: str, problem: str) -> None:
    result = sanitize.judge("memcheck", "unproject", process, log, 1.0)
    assert not result.clean
    assert result.problem.startswith(problem)


def test_every_kernel_is_swept() -> None:
    assert ops.__all__  # registers every op
    with_kernels = {op for op, table in backends._REGISTRY.items() if "cuda" in table}
    assert with_kernels == set(sanitize_cases.SWEEPS)


@pytest.mark.parametrize("op", list(sanitize_cases.SWEEPS))
def test_cases_are_valid_calls(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case, with the eager backend on the CPU in the place of the kernel."""
    monkeypatch.setattr(sanitize_cases, "DEVICE", "cpu")
    monkeypatch.setattr(sanitize_cases, "BACKEND", "eager")
    cases = [case for case in sanitize_cases.SWEEPS[op]() if not case.name.endswith("mma.sync")]
    assert len({case.name for case in cases}) == len(cases) > 30
    assert sum(case.run() for case in cases[:: 1 if op != "attention" else 4]) > 0


def test_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """End to end with a compute-sanitizer that only starts what it is given."""
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(
        "#!/bin/bash\n"
        'if [ "$1" = --version ]; then echo "Version 2025.9.9 (build 1)"; exit; fi\n'
        'log=$(echo "$*" | sed -E "s/.*--log-file ([^ ]+) .*/\\1/")\n'
        'printf "========= COMPUTE-SANITIZER\\n========= ERROR SUMMARY: 0 errors\\n" > "$log"\n'
        '[ "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 ] && echo "cases 7 values 8"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    monkeypatch.setattr(_ext, "missing", lambda: None)
    monkeypatch.setattr("benchmarks.results.results_folder", lambda: tmp_path)
    monkeypatch.setattr("benchmarks.results.environment", lambda: {"gpu": "NVIDIA Test", "commit": "abc"})
    assert sanitize.main(["--op", "unproject", "--op", "tokenize", "--tool", "memcheck"]) == 0
    assert "memcheck   unproject               7       0" in capsys.readouterr().out
    lines = (tmp_path / "sanitize" / "nvidia-test.csv").read_text().splitlines()
    assert lines[0] == "tool,op,cases,errors,seconds,sanitizer,gpu,commit"
    assert [line.split(",")[:4] for line in lines[1:]] == [
        ["memcheck", "tokenize", "7", "0"],
        ["memcheck", "unproject", "7", "0"],
    ]
    assert lines[1].endswith("2025.9.9,NVIDIA Test,abc")


def test_without_an_extension(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_ext, "missing", lambda: "no CUDA compiler")
    assert sanitize.main([]) == 2
    assert "the CUDA extension is missing: no CUDA compiler" in capsys.readouterr().err
