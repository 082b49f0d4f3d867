"""README's tables of training, of accelerated models, of `tiny`, and of what runs in 8 bits, from made-up rows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from any4d_fast.train import evaluate
from benchmarks import bench_accelerate, results, tables, train_parity, train_tables
from benchmarks.harness import Sizes
from benchmarks.results import Row


def lines_of(table: str) -> list[str]:
    """Lines of a table below its heading, without the spaces around cells."""
    return [re.sub(r" *\| *", "|", line) for line in table.split("\n")[2:]]


def heading_of(table: str) -> list[str]:
    return [cell.strip() for cell in table.split("\n")[0].strip("|").split("|")]


def step(provider: str, backend: str, ms: float, peak_gb: float) -> Row:
    place: dict[str, Any] = {"views": 4, "size": "168x126 batch 32"}
    return Row("train", "tiny", "step", provider, backend, ms=ms, peak_gb=peak_gb, **place)


def steps() -> list[Row]:
    return [
        step("eager", "", 100.0, 8.0),
        step("compile", "", 60.0, 6.0),
        step("compile", "reduce-overhead", 50.0, 7.0),
        step("any4d_fast", "nograph", 40.0, 5.0),
        step("any4d_fast", "auto", 20.0, 4.0),
    ]


def accelerated() -> list[Row]:
    found = []
    for name, direction, scale in (("b bf16, 10 patches", "fwd", 1.0), ("a tf32, 5 patches", "fwd", 2.0)):
        for provider, ms in (("eager", 6.0), ("compile", 4.0), ("any4d_fast", 3.0)):
            values: dict[str, Any] = {"ms": scale * ms, "error": 1e-3 * ms, "views": 8, "size": name}
            found.append(Row("accelerate", "accelerate", direction, provider, **values))
    found.append(Row("accelerate", "accelerate", "step", "any4d_fast", views=8, size="b bf16, 10 patches", ms=9.0))
    return found


def test_steps_by_provider() -> None:
    table = train_tables.train_table(steps())
    assert heading_of(table)[5:] == ["against eager", "against the faster compile", "memory, of eager's"]
    assert lines_of(table)[0] == "|`tiny`, 168x126 batch 32, 4 views|eager|10.0|100|8.00|1.00x|0.500x|100 %|"
    assert lines_of(table)[2].endswith("|compile (reduce-overhead)|20.0|50.0|7.00|2.00x|1.00x|87.5 %|")
    assert lines_of(table)[4].endswith("|**any4d_fast (auto)**|50.0|20.0|4.00|5.00x|2.50x|50.0 %|")
    alone = lines_of(train_tables.train_table(steps()[4:]))  # what PyTorch has no memory for
    assert alone[0].endswith("|50.0|20.0|4.00|-|-|-|")
    about, _ = train_tables.parts(steps())
    assert about.startswith("Training: ") and "one CUDA graph" in about
    assert "CUDA graph" not in train_tables.parts(steps()[:4])[0]


def test_accelerated_models_have_a_table_of_their_own() -> None:
    table = train_tables.accelerate_table(accelerated())
    assert heading_of(table)[2:5] == ["original ms", "torch.compile ms", "accelerated ms"]
    assert lines_of(table) == [
        "|a tf32, 5 patches, 8 views|fwd|12.0|8.00|**6.00**|2.00x|3.0e-03 / 6.0e-03|",
        "|b bf16, 10 patches, 8 views|fwd|6.00|4.00|**3.00**|2.00x|3.0e-03 / 6.0e-03|",
        "|b bf16, 10 patches, 8 views|step|-|-|**9.00**|-|- / -|",
    ]
    without = train_tables.accelerate_table([row for row in accelerated() if row.provider != "compile"])
    assert "torch.compile ms" not in heading_of(without)
    assert not tables.op_rows(accelerated()) and not tables.model_rows(accelerated())
    assert len(train_tables.parts(steps() + accelerated())) == 4 and train_tables.parts([]) == []


def test_the_accelerate_bench_records_its_own_suite() -> None:
    sizes = Sizes(views=(3, 2, 1), height=28, width=42, device="cpu")
    assert {case.suite for case in bench_accelerate.cases(sizes)} == {"accelerate"}


def metrics(scale: float) -> dict[str, float]:
    return {
        "depth_abs_rel": 0.05 * scale,
        "depth_delta_1_25": 0.9,
        "flow_epe_dynamic": 0.02 * scale,
        "flow_epe_dynamic_of_zero": 0.25 * scale,
        "rotation_degrees": 1.5,
        "translation_error": float("nan"),
        "pose_auc_5": 0.4,
        "pose_auc_15": 0.6,
        "pose_auc_30": 0.8,
        "scale_error": 0.031,
        "track_apd": 0.7,
    }


def write_held_out(folder: Path) -> None:
    """As `any4d-fast evaluate` writes it."""
    rows: list[dict[str, Any]] = [
        {"inputs": name, **metrics(1.0 / i)} for i, name in enumerate(evaluate.INPUT_SETS, start=1)
    ]
    about: dict[str, str | int] = {"weights": "tiny", "clips": 200, "seed": 0, "views": 4, "size": "168x126"}
    evaluate.write_table(rows, folder / train_tables.HELD_OUT, about)


def write_parity(folder: Path) -> None:
    base = np.linspace(2.0, 1.0, 40)
    shares = dict(zip(train_parity.RUNS, (1.01, 1.01, 1.0, 1.02, 0.96), strict=True))
    train_parity.write({name: share * base for name, share in shares.items()}, folder)


def test_held_out_clips_by_set_of_inputs(tmp_path: Path) -> None:
    write_held_out(tmp_path)
    rows = train_tables.read_table(tmp_path / train_tables.HELD_OUT)
    table = train_tables.held_out_table(rows)
    assert [line.split("|")[1] for line in lines_of(table)] == list(evaluate.INPUT_SETS)
    assert len(heading_of(table)) == 1 + len(train_tables.METRICS)
    assert lines_of(table)[1] == (
        "|images + K|0.0250|90.0 %|0.0100|12.5 %|1.50|-|40.0 % / 60.0 % / 80.0 %|3.10 %|"
    )  # NaN is a dash
    shorter = [{"inputs": "images", "depth_abs_rel": "0.1"}]
    assert train_tables.held_out_table(shorter).split("\n")[0] == "| inputs | depth AbsRel |"
    names = {name for _, names, _ in train_tables.METRICS for name in names}
    assert set(evaluate.SHOWN) - {"track_apd"} <= names


def test_parity_is_one_sentence(tmp_path: Path) -> None:
    write_parity(tmp_path)
    path = tmp_path / train_tables.PARITY
    assert list(train_parity.read(path)) == list(train_parity.RUNS)
    sentence = train_tables.parity_sentence(path)
    assert "Over 40 training steps" in sentence
    assert "lie 1 % and 1 % from" in sentence and "lie 2 % and 4 % from them (device " in sentence
    path.write_text("step,fused\n0,1.0\n")
    with pytest.raises(ValueError, match="expected a column for each of fused, .*reference, rotated order missing"):
        train_parity.read(path)


def test_the_section_of_training_leaves_out_what_is_not_there(tmp_path: Path) -> None:
    folder, readme = tmp_path / "train", tmp_path / "README.md"
    assert train_tables.training(folder, readme) == []
    write_held_out(folder)
    (section,) = train_tables.training(folder, readme)
    assert "weights tiny; clips 200; seed 0; views 4; size 168x126; device " in section and "steps" not in section
    write_parity(folder)
    assert "train_parity.png" not in train_tables.training(folder, readme)[0]
    (folder / "train_parity.png").touch()
    (section,) = train_tables.training(folder, readme)
    assert section.endswith("\n\n![train_parity](train/train_parity.png)") and section.count("\n\n") == 3
    (folder / train_tables.HELD_OUT).unlink()
    assert train_tables.training(folder, readme)[0].startswith("Over 40 training steps")


def model(provider: str, backend: str, views: int, ms: float, size: str = "518x336", **values: Any) -> list[Row]:
    """A timed row of the model, and its row of one output."""
    place: dict[str, Any] = {"views": views, "size": size, **values}
    name = place.pop("case", "any4d")
    rows = [Row("model", name, "fwd", provider, backend, ms=ms, peak_gb=2.0, **place)]
    return [*rows, Row("model", f"{name}.conf", "fwd", provider, backend, error=ms * 1e-4, **place)]


def model_rows(fp8: dict[str, Any]) -> list[Row]:
    rows = [*model("eager", "", 8, 30.0), *model("any4d_fast", "auto", 8, 15.0)]
    rows += [*model("any4d_fast", "packed", 8, 14.0), *model("any4d_fast", "cuda", 8, 16.0)]
    rows += [*model("any4d_fast", "auto", 8, 12.0, **fp8), *model("any4d_fast", "nograph", 8, 13.0, **fp8)]
    rows += model("any4d_fast", "auto", 8, 17.0, "518x336 all inputs")
    return rows + model("any4d_fast", "auto", 1000, 9000.0, "518x336 host to host")[:1]


@pytest.mark.parametrize(
    "fp8", [{"precision": "fp8"}, {"size": "518x336 fp8"}, {"case": "any4d fp8"}, {"case": "any4d_fp8"}]
)
def test_eight_bits_stand_beside_the_exact_rows(fp8: dict[str, Any], tmp_path: Path) -> None:
    rows = model_rows(fp8)
    table = tables.model_table(rows)
    assert heading_of(table)[1:7] == [
        "eager ms / GB",
        *(f"any4d_fast exact ({name}) ms / GB" for name in ("auto", "packed", "cuda")),
        *(f"any4d_fast fp8 ({name}) ms / GB" for name in ("auto", "nograph")),
    ]
    times = "|30.0 / 2.00|15.0 / 2.00|14.0 / 2.00|16.0 / 2.00|12.0 / 2.00|13.0 / 2.00|"
    assert lines_of(table) == [
        f"|8 views, 518x336, fwd{times}-|2.00x|",  # ours as it chooses by itself, not the fastest of ours
        "|8 views, 518x336, all inputs, fwd|-|17.0 / 2.00|-|-|-|-|-|-|",
        "|1,000 views, 518x336, host to host, fwd|-|9,000 / 2.00|-|-|-|-|-|-|",
    ]
    assert lines_of(tables.accuracy_table(rows)) == ["|`conf`|1.5e-03 / 1.2e-03 / 3.0e-03|"]
    text = tables.section(rows, [], tmp_path / "README.md", ["MORE"])
    assert "in float32, ours exact / ours fp8 / plain bfloat16 autocast:" in text and text.endswith("|\n\nMORE")
    assert "packed: float32 weights in host memory; host to host: from images in host memory" in text


def test_without_eight_bits_two_errors_share_a_cell() -> None:
    rows = [row for row in model_rows({"precision": "fp8"}) if row.precision == "exact"]
    assert list(tables.accuracy_columns(rows).values()) == ["ours", "plain bfloat16 autocast"]
    assert lines_of(tables.accuracy_table(rows)) == ["|`conf`|1.5e-03 / 3.0e-03|"]


def test_operators_in_eight_bits_are_compared_with_what_they_replace(tmp_path: Path) -> None:
    def row(case: str, provider: str, backend: str, ms: float, precision: str = "exact") -> Row:
        values: dict[str, Any] = {"views": 41, "size": "s", "tflops": 500.0, "percent_of_ceiling": 60.0}
        return Row("op", case, "fwd", provider, backend, precision, ms=ms, **values)

    rows = [
        row("linear_fp8", "eager", "", 9.0),
        row("linear_fp8", "any4d_fast", "triton", 2.0, "fp8"),
        row("linear_fp8", "any4d_fast", "cublas", 1.0, "fp8"),
        row("attention_fp8", "eager", "", 50.0),
        row("attention_fp8", "any4d_fast", "cuda 16 bit", 3.0),
        row("attention_fp8", "any4d_fast", "cuda", 4.0),
    ]
    assert lines_of(tables.op_table(rows)) == [
        "|`attention_fp8` fwd|s, 41 views|50.0|-|3.00 (ours in 16 bits)|**4.00**|500 TFLOP/s|60 %|0.750x|- / -|",
        "|`linear_fp8` fwd|s, 41 views|9.00|-|1.00 (cublas)|**2.00**|500 TFLOP/s|60 %|0.500x|- / -|",
    ]
    (note,) = tables.op_notes(rows)
    assert note.startswith("Eager `attention_fp8`, `linear_fp8`: ") and "; `linear_fp8` counts" in note
    assert tables.op_notes(rows[3:])[0].endswith("Ceilings are those of 16 bits.") and not tables.op_notes([])


def test_files_of_training_are_no_results_of_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="charts need the extra viz")
    from benchmarks import plots

    place = {name: name.upper() for name in ("driver", "torch", "triton", "cuda", "commit", "date")}
    monkeypatch.setattr(results, "environment", lambda: {"gpu": "Test GPU", **place})
    monkeypatch.setenv("ANY4D_FAST_RESULTS", str(tmp_path / "results"))
    folder, readme = tmp_path / "results" / "train", tmp_path / "README.md"
    write_held_out(folder)
    write_parity(folder)
    readme.write_text(f"{tables.BEGIN}\n{tables.END}\n")
    assert plots.main(["--readme", str(readme)]) == 0
    assert readme.read_text().startswith(f"{tables.BEGIN}\n`tiny` on clips of the synthetic stream")
    results.record(steps() + accelerated() + model_rows({"precision": "fp8"}))
    assert plots.main(["--readme", str(readme)]) == 0
    text = readme.read_text()
    order = ["Test GPU; ", "The whole model", "Training: ", "Other people's models", "![test-gpu-model]", "`tiny` on"]
    assert sorted(order, key=text.index) == order and "test-gpu-ops" not in text
    assert [path.name for path in tmp_path.rglob("*.png")] == ["test-gpu-model.png"]
    capsys.readouterr()
    assert plots.main(["--readme", str(readme)]) == 0 and "README.md: unchanged" in capsys.readouterr().out
