"""The benchmark suites without a GPU: results, tables, the correctness gate, and every provider at tiny sizes."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_model, harness, results, run, tables
from benchmarks.harness import Case, Row, Sizes, op_case
from tests.kernels_common import GPU, INTERPRETING

ROOT = Path(__file__).resolve().parents[1]
TINY = Sizes(views=(3, 2, 1), height=28, width=42, device="cpu")
OPS = [name for name in run.names() if name != "model"]
TINIEST = Sizes(views=(2, 1, 1), height=14, width=28, device="cpu")  # the interpreter takes seconds for a kernel
NEEDS_CUDA = ("cudnn", "flash2", "flash_attn", "flash4")

# The columns that the design lists, in its order.
COLUMNS = (
    "suite case direction provider backend precision views size ms ms_p20 ms_p80 tflops tbps percent_of_ceiling "
    "peak_gb error error_budget gpu driver torch triton cuda commit date"
).split()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Measuring without a GPU: fixed times, small layers, results in a temporary folder."""
    place = {name: name.upper() for name in ("driver", "torch", "triton", "cuda", "commit", "date")}
    monkeypatch.setattr(harness, "time_ms", lambda function, head_start=True: (function(), (2.0, 1.5, 3.0))[1])
    monkeypatch.setattr(harness, "peak_gb", lambda make: (make(), 0.25))
    monkeypatch.setattr(harness, "reserved_gb", lambda: 0.0)
    monkeypatch.setattr(harness, "copy_tbps", lambda: 4.0)
    monkeypatch.setattr(harness, "matmul_tflops", lambda dtype=None: 800.0)
    monkeypatch.setattr(harness, "COMPILER", "eager")
    monkeypatch.setattr(results, "environment", lambda: {"gpu": "Test GPU", **place})
    monkeypatch.setenv("ANY4D_FAST_RESULTS", str(tmp_path))
    for op, name, value in (
        ("attention", "LONG_VIEWS", 4),
        ("attention", "SAMPLED_FROM", 20),
        ("attention", "SAMPLED_QUERIES", 3),
        ("tokenize", "CHANNELS", 32),
        ("unshuffle_conv", "WIDTH", 16),
        ("linear", "WIDTHS", (32, 48)),
        ("linear_gelu", "WIDTHS", (32, 48)),
        ("linear_fp8", "LAYERS", {"qkv": (32, 48, False), "fc1": (48, 64, True)}),
        ("dense_maps", "VIEWS", 2),
        ("dense_maps", "CHANNELS", 32),
        ("resize_bilinear", "CHANNELS", 16),
        ("resize_conv", "CHANNELS", 32),
        ("resize_conv", "HIDDEN", 16),
    ):
        monkeypatch.setattr(importlib.import_module(f"benchmarks.bench_{op}"), name, value)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    yield tmp_path
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before


def cases_of(op: str, sizes: Sizes = TINY) -> list[Case]:
    found: list[Case] = importlib.import_module(f"benchmarks.bench_{op}").cases(sizes)
    return found


def case_with(error: float, provider: str, **options: Any) -> Case:
    """A case whose `provider` errs by `error` and whose baseline is exact."""
    x = torch.ones(4)
    providers = {"eager": lambda given: lambda: x, provider: lambda given: lambda: x * (1 + error)}
    return Case("op", "fwd", "4", list, providers, lambda given: [x.double()], **options)


def row(case: str = "layer_norm", provider: str = "eager", ms: float = 1.0, **values: Any) -> Row:
    return Row("op", case, "fwd", provider, ms=ms, **values)


def test_columns_are_those_of_the_design() -> None:
    assert list(results.COLUMNS) == COLUMNS


def test_results_survive_a_round_trip(tiny: Path) -> None:
    rows = [row(ms=0.12345, views=41, size="a, b", error=1e-3), row(provider="compile", peak_gb=2.5)]
    results.record(rows)
    found = results.read(tiny / "test-gpu.csv")
    assert found == rows
    assert (found[0].views, found[0].ms, found[0].tflops, found[0].commit) == (41, 0.12345, "", "COMMIT")
    assert (tiny / "test-gpu.csv").read_text().split("\n")[0] == ",".join(COLUMNS)
    assert not list(tiny.glob("*.tmp"))


def test_a_row_replaces_the_earlier_one_of_the_same_thing(tiny: Path) -> None:
    results.record([row(ms=1.0), row(provider="compile", ms=2.0)])
    results.record([row(ms=3.0), row(ms=4.0, size="other")])
    found = results.read(tiny / "test-gpu.csv")
    assert [(r.provider, r.size, r.ms) for r in found] == [
        ("eager", "", 3.0),
        ("compile", "", 2.0),
        ("eager", "other", 4.0),
    ]


def test_other_columns_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected the columns suite,case"):
        results.read(tmp_path / "x.csv")
    assert results.read(tmp_path / "missing.csv") == []


def test_text_table() -> None:
    lines = results.table([row(ms=1.5, peak_gb=0.25), row(case="compose_factors")]).split("\n")
    assert lines[0].split()[:3] == ["case", "direction", "size"] and "compose_factors" in lines[2]
    assert lines[1].index("fwd") == lines[2].index("fwd")


def test_ours_outside_its_budget_raises(tiny: Path) -> None:
    with pytest.raises(AssertionError, match=r"op fwd 4 any4d_fast:triton: error 1.00e-02 exceeds 5.96e-08"):
        harness.measure(case_with(1e-2, "any4d_fast:triton"))
    with pytest.raises(AssertionError, match="error nan exceeds"):
        harness.measure(case_with(float("nan"), "any4d_fast:triton"))


def test_a_peer_outside_the_budget_is_listed_without_a_time(tiny: Path) -> None:
    rows = harness.measure(case_with(1e-2, "compile"))
    assert rows[0].ms == 2.0 and (rows[1].ms, rows[1].error) == ("", 0.01)
    assert harness.measure(case_with(1e-2, "compile", budgets=lambda *_: [8e-3], peer_slack=2.0))[1].ms == 2.0


def test_few_numbers_get_no_budget_from_a_lucky_baseline() -> None:
    maps, scalar = torch.zeros(64), torch.zeros(1)
    assert harness.op_budgets([1e-3, 0.0, 1e-3], [maps, scalar, maps])[1] == pytest.approx(2e-3, rel=1e-3)
    assert harness.op_budgets([1e-3, 0.0, 1e-3], [maps, maps, maps])[1] == 2.0**-24


def test_rates_and_percent_of_the_slower_ceiling(tiny: Path) -> None:
    case = case_with(0.0, "any4d_fast:triton", flops=8e11, bytes=2e9)  # 1 ms of products, 0.5 ms of traffic
    found = harness.measure(case, ["any4d_fast:triton"])[0]
    assert (found.provider, found.backend) == ("any4d_fast", "triton")
    assert (found.tflops, found.tbps, found.percent_of_ceiling) == (400.0, 1.0, 50.0)
    assert (found.ms, found.ms_p20, found.ms_p80, found.peak_gb) == (2.0, 1.5, 3.0, 0.25)


def test_pooled_errors_are_judged_by_their_geometric_mean(tiny: Path) -> None:
    exact = [torch.ones(4), torch.ones(4)]
    case = harness.Case(
        "op", "step", "2 clips", lambda: None,
        {"eager": lambda _: lambda: [1.01 * exact[0], 1.04 * exact[1]], "any4d_fast:a": lambda _: lambda: exact},
        lambda _: exact, budgets=bench_model.gradient_budgets, pooled=True,
    )  # fmt: skip
    session = harness.Session(case)
    ((error, budget),) = session.check("eager")
    assert error == pytest.approx(0.02, rel=1e-3) and budget == pytest.approx(1.1 * 0.02, rel=1e-3)


def test_a_gate_is_checked_in_place_of_the_timed_size(tiny: Path) -> None:
    gate = case_with(1e-2, "any4d_fast:triton")
    case = case_with(0.0, "any4d_fast:triton", gate=gate)
    with pytest.raises(AssertionError, match="exceeds"):
        harness.measure(case)


def test_named_outputs_have_rows_of_their_own(tiny: Path) -> None:
    case = case_with(0.0, "compile", outputs=("points",))
    assert [(r.case, r.ms) for r in harness.measure(case)] == [("op", 2.0), ("op.points", "")] * 2


def test_backward_cases_compare_every_gradient(tiny: Path) -> None:
    def wrong(x: Tensor, weight: Tensor) -> Tensor:
        return x * weight.detach() + 0 * weight

    functions: dict[str, Callable[..., Any]] = {"eager": torch.mul, "any4d_fast": wrong}
    case = op_case(
        "mul", "bwd", "", inputs=lambda: [torch.ones(3), torch.full((3,), 2.0)], functions=functions, exact=torch.mul
    )
    with pytest.raises(AssertionError, match="error 1.00e"):
        harness.measure(case)
    with pytest.raises(ValueError, match="direction: expected 'fwd' or 'bwd'"):
        op_case("mul", "both", "", inputs=list, functions=functions)


def test_relative_error_agrees_with_the_tests_measure() -> None:
    from any4d_fast.testing import relative_error

    a, b = torch.randn(3, 5), torch.randn(5, 3).mT.double()
    assert harness.relative_error(a, b) == pytest.approx(relative_error(a, b), rel=1e-12)
    assert harness.relative_error(a, torch.zeros_like(b)) == pytest.approx(a.norm().item(), rel=1e-6)
    with pytest.raises(AssertionError, match="differs from the oracle's"):
        harness.relative_error(a, b[:2])


def test_every_row_of_the_targets_has_a_case() -> None:
    found = {op: [str(case) for case in cases_of(op, harness.FULL)] for op in OPS}
    for size in (
        "global 88801x12x64",
        "global 36409x12x64",
        "global 7105x12x64",
        "global 1777x12x64",
        "frame 36409x12x64",
        "encoder 36449x16x64",
    ):
        for direction in ("fwd", "bwd"):
            assert f"attention {direction} {size} bf16" in found["attention"]
    assert len(found["compose_factors"]) == 4 and len(found["unproject"]) == 2
    for op in ("layer_norm", "residual_norm"):
        assert found[op] == [f"{op} {d} 36409x{c}" for c in (768, 1024) for d in ("fwd", "bwd")]
    assert "linear_gelu fwd 36409x768x3072" in found["linear_gelu"]
    assert "linear_gelu fwd 36449x1024x4096" in found["linear_gelu"]
    assert all(found[op] for op in ("fuse_tokens", "tokenize", "unshuffle_conv", "normalize_depth", "resize_conv"))


@pytest.mark.parametrize("op", OPS)
def test_cases_are_distinct_and_have_peers_and_work(op: str) -> None:
    cases = cases_of(op, harness.FULL)
    assert len({str(case) for case in cases}) == len(cases)
    for case in cases:
        names = [provider.partition(":")[0] for provider in case.providers]
        assert case.op == op and case.baseline == names[0] == "eager" and harness.OURS in names
        assert case.bytes > 0 and (case.oracle is not None or case.gate is not None)


def test_floors_of_the_design() -> None:
    """Composition at 41 views: about 0.17 ms at 4.26 TB/s; attention at 36,409 tokens: 4.07 TFLOP."""
    compose = cases_of("compose_factors", harness.FULL)[0]
    (attention,) = (c for c in cases_of("attention", harness.FULL) if str(c).startswith("attention fwd global 36409x"))
    assert compose.bytes / 4.26e12 * 1e3 == pytest.approx(0.17, rel=0.06)
    assert attention.flops == 4 * 36_409**2 * 768


@pytest.mark.parametrize("op", OPS)
def test_peers_run_at_tiny_sizes(op: str, tiny: Path) -> None:
    for case in cases_of(op):
        peers = [p for p in case.providers if not p.startswith((*NEEDS_CUDA, harness.OURS))]
        rows = harness.measure(case, peers)
        assert [r.ms for r in rows] == [2.0] * len(peers), (str(case), rows)
        assert all(r.percent_of_ceiling for r in rows)


@pytest.mark.interpret
@pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("op", OPS)
def test_triton_providers_run_at_tiny_sizes(op: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from any4d_fast.kernels import render_clips

    # A picture is one block, since the interpreter's time is that of its blocks.
    monkeypatch.setattr(render_clips, "CONFIG", render_clips.CONFIG._replace(block=128))
    for case in cases_of(op, TINIEST):
        if "any4d_fast:triton" in case.providers:  # attention in 8 bits exists in CUDA C++ only
            assert harness.measure(case, ["any4d_fast:triton"])[0].ms == 2.0


def test_model_cases_run_at_tiny_sizes(tiny: Path) -> None:
    forward, step = model_cases()
    rows = harness.measure(forward, ["eager", "any4d_fast:auto"])
    assert [r.case for r in rows[:2]] == ["any4d", "any4d.pts3d"] and len(rows) == 2 * (1 + 10)
    assert rows[0].error != 0 != rows[11].error and rows[0].ms == rows[11].ms == 2.0
    assert rows[0].peak_gb == pytest.approx(0.25 + sum(p.numel() for p in tiny_model().parameters()) * 4e-9, rel=1e-2)
    (first, ours) = harness.measure(step, ["eager", "any4d_fast:auto"])
    assert first.direction == "step" and first.error == ours.error != 0
    assert all(p.grad is None for p in tiny_model().parameters())
    (again,) = harness.measure(forward, ["any4d_fast:auto"])[:1]
    assert again.error == rows[11].error and not tiny_model().training, "what is measured next is no training"


def model_cases() -> tuple[Case, Case]:
    sizes = Sizes(views=(2, 2, 1), height=28, width=28, device="cpu")
    cases = bench_model.cases(sizes, "tiny", training_views=1, between=(), many=(3,))
    exact = [c for c in cases if c.precision == "exact"]
    assert [(c.views, c.direction, "inputs" in c.size) for c in exact] == [
        (1, "fwd", False), (2, "fwd", False), (1, "fwd", True), (2, "fwd", True), (1, "step", False), (3, "fwd", False),
    ]  # fmt: skip
    assert [(c.views, c.direction, c.precision) for c in cases[6:]] == [(v, "fwd", "fp8") for v in (1, 2, 3)]
    return cases[1], cases[4]


def test_model_cases_of_the_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANY4D_FAST_BENCH_VIEWS", "1000")
    found = {str(case): case for case in bench_model.cases()}
    for views in (2, 8, 24, 41, 100, 200):
        providers = found[f"any4d fwd 518x336, {views} views"].providers
        assert {"eager", "any4d_fast:auto", "any4d_fast:triton", "any4d_fast:cuda"} <= set(providers)
        assert ("compile" in providers) == (views in (2, 8, 41))
        assert ("any4d_fast:nograph" in providers) == (views <= 24)
    assert list(found["any4d fwd 518x336, 1000 views"].providers) == ["any4d_fast:auto"]
    assert all(f"any4d fwd 518x336 all inputs, {views} views" in found for views in (2, 8, 41))
    assert "any4d step 518x336, 24 views" in found
    assert found["any4d fwd 518x336, 200 views"].gate.views == 8  # type: ignore[union-attr]
    images, given = (bench_model.flops(41, harness.FULL, "any4d", given) for given in (False, True))
    assert given / images == pytest.approx(1.06, abs=0.02)


def test_model_with_all_inputs_and_a_gate_at_another_size(tiny: Path) -> None:
    sizes = Sizes(views=(2, 2, 1), height=28, width=28, device="cpu")
    cases = bench_model.cases(sizes, "tiny", training_views=1, between=(), many=(3,))
    for case in (cases[2], cases[5]):
        rows = harness.measure(case, ["eager", "any4d_fast:auto", "any4d_fast:nograph"])
        assert len(rows) == 3 * (1 if case.gate else 11)
        assert all(row.error != "" for row in rows)


def tiny_model() -> torch.nn.Module:
    return bench_model.load("tiny", "cpu")


def test_flops_of_the_model() -> None:
    """The floors of the design are 3.6, 16 and 132 ms at 790 TFLOP/s."""
    floors = [bench_model.flops(views, harness.FULL, "any4d") / 790e9 for views in (2, 8, 41)]
    assert floors == pytest.approx([3.6, 16, 132], rel=0.01)


def test_an_upstream_that_is_not_there_is_skipped_with_its_reason(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ANY4D_FAST_UPSTREAM", str(tiny))
    case, _ = model_cases()
    rows, failures = run.run_case(case, run.parse(["--providers", "eager,upstream"]))
    assert {r.provider for r in rows} == {"eager"} and not failures
    assert "upstream: skipped: " in capsys.readouterr().out


def test_run_goes_on_after_a_failure(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = case_with(1.0, "any4d_fast:triton")
    case.providers = {**case.providers, "compile": lambda given: 1 / 0, "cudnn": case.providers["eager"]}  # type: ignore[dict-item]
    rows, failures = run.run_case(case, run.parse([]))
    assert [r.provider for r in rows] == ["eager", "cudnn"]
    assert failures == ["op fwd 4 any4d_fast:triton", "op fwd 4 compile"]
    captured = capsys.readouterr()
    assert "ZeroDivisionError" in captured.err and "compile: FAILED" in captured.out
    assert len(results.read(tiny / "test-gpu.csv")) == 2


def test_run_lists_chooses_and_refuses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run.main(["--list", "--ops", "attention,layer_norm", "--only", "bwd"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 + 2 and all(" bwd " in line and ": eager, " in line for line in lines)
    with pytest.raises(SystemExit):
        run.main(["--ops", "nothing"])
    assert "--ops: expected some of accelerate, attention, " in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--ops", "layer_norm"]) == 2
    assert run.names()[-1] == "model"
    assert not run.wanted(run.parse(["--no-compile"]), "compile")
    assert run.wanted(run.parse(["--providers", "any4d_fast"]), "any4d_fast:triton")


def test_run_measures_and_reports(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    module = importlib.import_module("benchmarks.bench_layer_norm")
    monkeypatch.setattr(module, "cases", lambda: [module.case(TINY, 768, "fwd"), module.case(TINY, 768, "bwd")])
    assert run.main(["--ops", "layer_norm", "--providers", "eager", "--budget-seconds", "1e9"]) == 0
    assert len(results.read(tiny / "test-gpu.csv")) == 4 + 2
    out = capsys.readouterr().out
    assert out.rstrip().split("\n")[-1].split()[:4] == ["layer_norm", "bwd", "19x768", "eager"]
    assert run.main(["--ops", "layer_norm", "--budget-seconds", "-1"]) == 0
    assert "left out, layer_norm has used its -1 s" in capsys.readouterr().out


def recorded() -> list[Row]:
    """Results with every kind of row."""
    rows = [
        Row("op", "matmul", "fwd", "eager", "cublas", size="8192 bf16", tflops=800.0),
        Row("op", "copy", "fwd", "eager", size="1 GiB", tbps=4.0),
        row(ms=0.05, size="a", views=41, tbps=2.0, percent_of_ceiling=50.0, peak_gb=0.1),
        row(provider="compile", ms=0.04, size="a", views=41, tbps=2.5, percent_of_ceiling=62.5, peak_gb=0.1),
        row(provider="any4d_fast", backend="triton", ms=0.025, size="a", views=41, tbps=4.0, percent_of_ceiling=100.0),
    ]
    for provider, ms, tflops in (("eager", 10.0, 400.0), ("cudnn", 9.0, 444.4), ("any4d_fast", 8.0, 500.0)):
        rows.append(
            row("attention", provider, ms, size="b", views=41, tflops=tflops, tbps=0.1, percent_of_ceiling=50.0)
        )
    for views in (2, 41):
        for provider, backend in (("eager", ""), ("any4d_fast", "auto")):
            values = {"views": views, "size": "518x336", "backend": backend, "error": 1e-3}
            rows.append(Row("model", "any4d", "fwd", provider, ms=views + 1.0, peak_gb=2.5, **values))  # type: ignore[arg-type]
            rows.append(Row("model", "any4d.pts3d", "fwd", provider, error_budget=2e-3, **values))  # type: ignore[arg-type]
    return rows


def test_tables_come_from_the_rows() -> None:
    rows = recorded()
    lines = tables.op_table(rows).split("\n")
    assert "copy" not in "".join(lines[2:]) and len(lines) == 2 + 2
    assert re.sub(r" *\| *", "|", lines[2]) == (
        "|`attention` fwd|b, 41 views|10.0|-|9.00 (cudnn)|**8.00**|500 TFLOP/s|50 %|1.12x|- / -|"
    )
    assert "| 0.0500 | 0.0400 | - | **0.0250** | 4.00 TB/s | 100 % | 1.60x | - / 0.100 |" in lines[3]
    assert "| 41 views, 518x336, fwd | 42.0 / 2.50 | 42.0 / 2.50 | - | 1.00x |" in tables.model_table(rows)
    assert "| `pts3d` | 1.0e-03 / 1.0e-03 | 1.0e-03 / 1.0e-03 |" in tables.accuracy_table(rows)


def test_rewriting_readme_is_idempotent(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="charts need the extra viz")
    from benchmarks import plots

    readme = tiny / "README.md"
    readme.write_text(f"# Title\n\n{tables.BEGIN}\nold\n{tables.END}\n\n## Credit\n")
    assert plots.main(["--readme", str(readme)]) == 0 and tables.NOTHING in readme.read_text()
    results.record(recorded())
    assert plots.main(["--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n\n<!--") and text.endswith("-->\n\n## Credit\n") and "old" not in text
    assert "Test GPU; driver DRIVER;" in text and "| `attention` fwd |" in text
    for name in ("ops", "roofline", "model"):
        assert f"![test-gpu-{name}](test-gpu-{name}.png)" in text
        assert (tiny / f"test-gpu-{name}.png").stat().st_size > 10_000
    capsys.readouterr()
    assert plots.main(["--readme", str(readme)]) == 0 and readme.read_text() == text
    assert "README.md: unchanged" in capsys.readouterr().out
    readme.write_text("no markers")
    assert plots.main(["--readme", str(readme)]) == 1 and readme.read_text() == "no markers"


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the benchmarks")
def test_pytest_collects_the_benchmarks_and_skips_them_without_a_gpu() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-only", "-p", "no:cacheprovider"]
    # A process of pytest-xdist's would hand its name down, and benchmarks refuse to run beside others.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command.append("benchmarks/bench_layer_norm.py")
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 skipped" in done.stdout and "need a CUDA device" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device (make test-gpu)")
def test_device_times_and_peak_memory() -> None:
    a = torch.randn(1024, 1024, device="cuda")
    middle, low, high = harness.time_ms(lambda: a @ a)
    assert 0 < low <= middle <= high < 10
    _, peak = harness.peak_gb(lambda: lambda: torch.empty(100 << 20, dtype=torch.int8, device="cuda"))
    assert peak == pytest.approx((100 << 20) / 1e9, rel=0.05)
    assert 0.1 < harness.copy_tbps() < 20 and harness.matmul_tflops() > 10


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device (make test-gpu)")
def test_a_case_on_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ANY4D_FAST_RESULTS", str(tmp_path))
    assert run.main(["--ops", "layer_norm", "--only", "768", "--no-compile"]) == 0
    (path,) = tmp_path.glob("*.csv")
    rows = [r for r in results.read(path) if r.case == "layer_norm"]
    assert len(rows) == 4 and all(r.number("ms") for r in rows) and rows[0].gpu == torch.cuda.get_device_name()


def test_gpu_test_reports_are_counted_by_file(tmp_path: Path) -> None:
    from benchmarks.gpu_tests import count

    report = tmp_path / "report.xml"
    report.write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.kernels.test_a" name="x" time="1.5"/>
        <testcase classname="tests.kernels.test_a.TestReal" name="y" time="0.5"><failure message="no"/></testcase>
        <testcase classname="tests.test_b" name="z" time="0"><skipped message="why"/></testcase>
        </testsuite></testsuites>"""
    )
    found = count([report])
    assert found["tests/kernels/test_a.py"] == {"passed": 1, "failed": 1, "milliseconds": 2000}
    assert found["tests/test_b.py"] == {"skipped": 1, "milliseconds": 0}
