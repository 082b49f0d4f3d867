"""The stage profile, on a CPU with a tiny model and as a user runs it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from any4d_fast import Any4D, use_backend, work
from any4d_fast.cli import app
from any4d_fast.precision import PrecisionError
from any4d_fast.profile import Profile, Row, profile, render
from any4d_fast.work import MODALITIES, STAGES


@pytest.fixture(scope="module")
def tiny() -> Any4D:
    torch.manual_seed(0)
    return Any4D.from_preset("tiny").eval()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_stage_that_runs_has_a_time(tiny: Any4D, dtype: str) -> None:
    found = profile(tiny, 2, (28, 42), modalities=MODALITIES, dtype=dtype, runs=1)
    assert [row.stage for row in found.rows] == list(STAGES)
    for row in found.rows:
        assert row.ms is not None and row.ms > 0, row
        assert row.flops + row.bytes > 0 and row.floor_ms is None
    assert found.clock == "wall time" and found.whole_ms and found.whole_graph_ms is None
    assert found.why_no_graph == ["images are not on a CUDA device"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.modules())


def test_images_only_run_no_tokenizer(tiny: Any4D) -> None:
    found = {row.stage: row for row in profile(tiny, 1, (28, 28), runs=1).rows}
    assert found[work.TOKENIZERS].ms is None and found[work.TOKENIZERS].flops == 0
    assert len(tiny.encoder.model.derived) >= 3  # timed with the inference weights


def test_eight_bits_are_profiled_as_the_model_runs_them(tiny: Any4D, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    run = Any4D.run

    def spied(*args: Any, **options: Any) -> Any:
        taken.append(options["precision"])
        return run(*args, **options)

    monkeypatch.setattr(Any4D, "run", spied)
    with use_backend("eager"):  # the same roundings, emulated
        found = profile(tiny, 1, (28, 28), precision="fp8", runs=1)
    assert set(taken) == {"fp8"} and "bf16 and fp8" in render(found)
    assert all(row.ms for row in found.rows if row.flops and row.stage != work.TOKENIZERS)
    with pytest.raises(PrecisionError, match="CUDA"):
        profile(tiny, 1, (28, 28), precision="fp8", runs=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (make test-gpu)")
def test_on_a_gpu_stages_add_up_and_have_floors() -> None:
    with torch.device("cuda"):
        model = Any4D.from_preset("any4d").eval()
    found = profile(model, 8, (336, 518), runs=3)
    print(render(found))
    assert found.why_no_graph == [] and found.whole_graph_ms is not None and found.whole_ms is not None
    measured = sum(row.ms for row in found.rows if row.ms is not None)
    # The graph's copies of inputs and outputs are not in the stages; caches are warmer in the graph.
    assert 0.7 * measured < found.whole_graph_ms < 1.5 * measured
    floors = [row for row in found.rows if row.flops + row.bytes > 0 and row.stage != work.SMALL_HEADS]
    assert all(row.percent_of_floor is not None and 0 < row.percent_of_floor < 130 for row in floors)


def test_table() -> None:
    rows = [Row("a", 2.0, 4e12, 1e9, 1.0, 50.0), Row("b", None, 0.0, 0.0)]
    text = render(
        Profile(
            "H200",
            2,
            1,
            336,
            518,
            "bf16",
            "exact",
            ["rays"],
            "device events",
            rows,
            3.0,
            2.5,
            [],
            {"16-bit": 750.0},
            4.2,
        )
    )
    assert "2e+03" in text and "50 %" in text and "750 TFLOP/s" in text and "images + rays" in text
    assert text.splitlines()[-4].startswith("sum") and "2.500 ms" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype"),
        ({"size": (30, 28)}, "multiples of 14"),
        ({"size": (28, -14)}, "got .* 28 x -14"),
        ({"modalities": ("radar",)}, "radar"),
    ],
)
def test_wrong_options_are_named(tiny: Any4D, options: dict[str, object], message: str) -> None:
    given = {"size": (28, 28), "runs": 1, **options}
    with pytest.raises(ValueError, match=message):
        profile(tiny, 1, **given)  # type: ignore[arg-type]


def test_the_command_prints_a_table_or_json() -> None:
    arguments = ["profile", "--preset", "tiny", "--device", "cpu", "--views", "1", "--size", "28x28", "--runs", "1"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "CPU wall time" in done.output and "geometry head" in done.output
    done = CliRunner().invoke(app, [*arguments, "--json", "--modalities", "all", "--dtype", "fp32"])
    found = json.loads(done.stdout)
    assert found["dtype"] == "fp32" and len(found["rows"]) == len(STAGES) and found["modalities"] == list(MODALITIES)
    assert CliRunner().invoke(app, [*arguments[:-4], "--size", "518"]).exit_code == 2
