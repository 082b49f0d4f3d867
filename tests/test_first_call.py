"""`benchmarks.first_call` without a GPU: its processes on the CPU, its counts, and what it finds wrong."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import first_call, results
from benchmarks.first_call import Call

TINY = "--device cpu --height 28 --width 42 --views 3 --later 2".split()


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(results, "environment", lambda: {"gpu": "Test GPU", "commit": "abc"})
    monkeypatch.setenv("ANY4D_FAST_RESULTS", str(tmp_path))
    return tmp_path / "first_call" / "test-gpu.csv"


def call(number: int = 1, seconds: float = 1.0, kernels: int = 0, **values: str) -> Call:
    named = {"case": "op", "size": "big", "direction": "bwd", "provider": "any4d_fast", "backend": "triton", **values}
    return Call(**named, call=number, views=41, seconds=seconds, kernels=kernels)


def test_every_op_has_jobs_at_the_clip_length() -> None:
    found = first_call.jobs(first_call.parse([]))
    assert {job.partition(":")[0] for job in found} == {name for name in first_call.run.names() if name != "model"}
    assert len(set(found)) == len(found)
    attention = [job for job in found if job.startswith("attention:")]
    assert len(attention) == 2 * 3  # Triton and CUDA; global, frame and encoder
    for job in found:
        op, index, name = job.split(":", 2)
        first, later = (first_call.cases(op, views, first_call.parse([]))[int(index)] for views in (41, 13))
        assert name in first.providers and first.direction == later.direction
        kinds = [[word for word in case.size.split() if not word[0].isdigit()] for case in (first, later)]
        assert kinds[0] == kinds[1]


def test_kernels_are_counted_by_the_binaries_in_the_cache(tmp_path: Path) -> None:
    waits = []

    def compiles() -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "kernel.cubin").touch()
            (tmp_path / name / "kernel.json").touch()

    seconds, kernels = first_call.timed(compiles, lambda: waits.append(1), tmp_path)
    assert kernels == 2 and seconds > 0 and len(waits) == 2
    assert first_call.timed(lambda: None, lambda: None, tmp_path)[1] == 0


def test_what_is_wrong() -> None:
    fine = [call(1, 2.9, 5), call(2, 9.0, 0)]
    assert first_call.problems(fine, 3.0) == []
    assert first_call.problems([call(1, 3.1, 5), call(2, 0.1, 2)], 3.0) == [
        "op bwd big any4d_fast:triton: the first call took 3.1 s, more than 3 s",
        "op bwd big any4d_fast:triton: a call with 41 views compiled 2 kernels more",
    ]


def test_rows_replace_those_of_the_same_call(folder: Path) -> None:
    first_call.record([call(1, 1.0), call(2, 0.5)])
    first_call.record([call(1, 2.0), call(1, 3.0, backend="cuda"), call(1, 4.0, direction="fwd")])
    with open(folder, newline="") as file:
        rows = [(row["direction"], row["backend"], row["call"], row["seconds"]) for row in csv.DictReader(file)]
    assert rows == [
        ("bwd", "cuda", "1", "3.0"), ("bwd", "triton", "1", "2.0"), ("bwd", "triton", "2", "0.5"),
        ("fwd", "triton", "1", "4.0"),
    ]  # fmt: skip


def test_processes_on_the_cpu(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--ops", "layer_norm,normalize_depth", "--providers", "eager", "--jobs", "2", "--limit", "60"]
    assert first_call.main(arguments) == 0
    with open(folder, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["direction"], row["call"], row["views"]) for row in rows] == [
        *[
            ("layer_norm", direction, number, views)
            for _ in range(2)
            for direction in ("bwd", "fwd")
            for number, views in (("1", "3"), ("2", "2"))
        ],
        *[("normalize_depth", "fwd", number, views) for number, views in (("1", "3"), ("2", "2"))],
    ]
    assert all(float(row["seconds"]) > 0 and row["kernels"] == "0" for row in rows)
    assert "recorded in" in capsys.readouterr().out


def test_what_cannot_run_is_skipped_and_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--ops", "attention", "--providers", "flash4"]
    options = first_call.parse(arguments)
    job = first_call.jobs(options)[0]
    found = first_call.start(job, arguments)
    assert isinstance(found, str) and found.startswith(
        "skipped: attention: backend='flash_attn_4' cannot run this call"
    )
    broken = first_call.start("layer_norm:99:eager", arguments)
    assert isinstance(broken, str) and broken.startswith("FAILED") and "IndexError" in broken
    assert first_call.main([*arguments, "--budget-seconds", "-1"]) == 1
    assert "skipped: -1 s have passed" in capsys.readouterr().out
    assert not folder.exists()
