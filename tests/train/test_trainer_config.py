"""The trainer's configuration: TOML, assignments, and errors that say what is known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from any4d_fast.config import ConfigError, preset
from any4d_fast.train import toml
from any4d_fast.train.__main__ import main
from any4d_fast.train.config import CONFIGS, TrainConfig, differences
from any4d_fast.train.parallel import start
from any4d_fast.train.trainer import train


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.toml")))
def test_packaged_configurations_survive_toml(name: str, tmp_path: Path) -> None:
    path_given = ["data.path=clips"] if name == "finetune" else []
    config = TrainConfig.load(name, path_given)
    written = tmp_path / "again.toml"
    written.write_text(config.to_toml())
    assert TrainConfig.load(written) == config
    preset(config.model.preset)


def test_assignments() -> None:
    values = ["optimizer.lr=1e-5", "optimizer.parts.encoder=0.1", "data.stream.sizes=[[14, 28]]", "run.output=a b"]
    config = TrainConfig.load("smoke", [*values, "run.compile=reduce-overhead"], init="w.pth")
    assert config.optimizer.lr == 1e-5 and config.optimizer.parts == {"encoder": 0.1}
    assert config.data.stream.sizes == ((14, 28),) and config.run.output == "a b"
    assert config.run.compile == "reduce-overhead" and config.model.init == "w.pth"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("schedule.stepz=3", r"\[schedule\]: unknown stepz; known: steps, warmup, final, accumulate, ema"),
        ("trainer.steps=3", r"unknown trainer; known: model, data, inputs, loss, optimizer, schedule, run"),
        ("schedule.steps=many", r"schedule\.steps: expected int, got 'many'"),
        ("schedule.steps=true", r"schedule\.steps: expected int, got True"),
        ("run.precision=fp8", r"run\.precision: expected one of 'bf16', 'fp32', got 'fp8'"),
        ("optimizer.betas=[0.9]", r"optimizer\.betas: expected 2 values"),
        ("optimizer.parts.decoder=1", r"optimizer\.parts: expected names among encoder, .*, got \['decoder'\]"),
        ("model.preset=huge", r"model\.preset: expected one of any4d, .*tiny, .*got 'huge'"),
        ("inputs.given=['imu']", r"inputs\.given: expected different names among rays, depth, poses"),
        ("inputs.depth_prob=2.0", r"inputs\.depth_prob: expected a probability between 0 and 1, got 2\.0"),
        ("data.source=folder", r"data\.path: expected a folder, got None"),
        ("data.stream.num_views=0", r"StreamConfig\.num_views"),
        ("data=3", r"data: expected a table \[data\], got 3"),
        ("schedule.warmup=11", r"schedule\.warmup: expected between 0 and schedule\.steps, got 11"),
        ("loss.rays=-1", r"LossConfig\.rays: expected a weight, 0 or more, got -1\.0"),
        ("loss.flow=nan", r"LossConfig\.flow: expected a weight, 0 or more, got nan"),
        ("loss.dynamic_weight=-3", r"LossConfig\.dynamic_weight"),
        ("loss.confidence_alpha=inf", r"LossConfig\.confidence_alpha"),
        ("loss.robust_alpha=2", r"LossConfig\.robust_alpha: expected a number above 0 and below 2, got 2\.0"),
        ("loss.robust_scale=0", r"LossConfig\.robust_scale"),
        ("loss.backend=cudnn", r"LossConfig\.backend"),
        ("optimizer.lr=inf", r"optimizer\.lr: expected a number above 0, got inf"),
        ("optimizer.eps=-1", r"optimizer\.eps"),
        ("optimizer.weight_decay=inf", r"optimizer\.weight_decay"),
        ("optimizer.parts.pose=nan", r"optimizer\.parts: expected factors of at least 0"),
        ("run.seed=-1", r"run\.seed: expected a number from 0 to 2\^64 - 1, got -1"),
        ("run.seed=18446744073709551616", r"run\.seed"),
        ("run.validation_batch=0", r"run\.validation_batch: expected at least 1, got 0"),
        ("run.pictures=-1", r"run\.pictures"),
        ("run.output=", r"run\.output: expected a folder, got ''"),
        ("data.held_out=clips", r"data\.held_out: expected none for a stream, got 'clips'"),
        ("schedule", r"--set: expected key=value"),
        ("data.batch_size.x=1", r"--set: data\.batch_size\.x: 'batch_size' is a value"),
    ],
)
def test_configuration_errors(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.load("smoke", [assignment])


def test_a_loss_needs_a_term() -> None:
    names = ("rays", "rotation", "translation", "depth", "points", "flow", "scale", "mask")
    with pytest.raises(ConfigError, match="loss: expected at least one weight above 0"):
        TrainConfig.load("smoke", [f"loss.{name}=0" for name in names])


def test_what_only_this_machine_can_refuse(tmp_path: Path) -> None:
    output = f"run.output={tmp_path}"
    for assignment, message in (
        ("run.compile=banana", r"run\.compile: expected a mode of torch\.compile, got 'banana' \(.*reduce-overhead"),
        ("run.device=meta", r"run\.device: expected cuda, cuda:N or cpu, got 'meta'"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(TrainConfig.load("smoke", [output, assignment]), progress=False)


def test_graph_needs_one_plain_process() -> None:
    with pytest.raises(ConfigError, match=r"run\.cuda_graph"):
        TrainConfig.load("smoke", ["run.cuda_graph=true", "run.parallel=ddp"])
    with pytest.raises(ConfigError, match=r"schedule\.accumulate: expected 1 with run\.cuda_graph, got 2"):
        TrainConfig.load("smoke", ["run.cuda_graph=true", "schedule.accumulate=2"])


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere.toml: cannot read"):
        TrainConfig.load(tmp_path / "nowhere.toml")
    (tmp_path / "bad.toml").write_text("[run\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        TrainConfig.load(tmp_path / "bad.toml")


def test_toml_texts() -> None:
    table = {"a": 1, "b": [1.5, math.inf], "c": 'say "hi"', "d": True, "e": {"f": [], "g": {"h": "ä"}}}
    assert toml.tomllib.loads(toml.dumps(table)) == table


def test_differences_leave_out_what_does_not_matter() -> None:
    one, two = TrainConfig.load("smoke"), TrainConfig.load("smoke", ["run.output=x", "run.keep=5", "schedule.steps=11"])
    assert differences(toml.as_table(one), toml.as_table(two)) == ["schedule.steps: 10 -> 11"]


def test_command_line_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["smoke", "--set", "schedule.stepz=1"]) == 2
    assert main(["smoke", "--init", str(tmp_path / "no.pth"), "--output", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)


def test_processes_need_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node"):
        start("ddp", "cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun started several processes"):
        start("none", "cpu")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"run\.device"):
        start("none", "cuda:99")
