"""Parts of the trainer: configuration, schedule, optimizer, average, inputs, checkpoints, logs, evaluation."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from any4d_fast.config import ConfigError
from any4d_fast.train import evaluate
from any4d_fast.train.batch import INPUTS, Batch
from any4d_fast.train.checkpoints import CheckpointFolder, Snapshot, damage
from any4d_fast.train.config import (
    InputOptions,
    OptimizerOptions,
    ScheduleOptions,
)
from any4d_fast.train.ema import Average
from any4d_fast.train.inputs import training_views
from any4d_fast.train.logging import Bar, Board, CsvLog
from any4d_fast.train.optimizer import Optimizer, decayed, part_of
from any4d_fast.train.parallel import start
from any4d_fast.train.pictures import draw
from any4d_fast.train.schedule import ema_decay, learning_rate_factor, step_seed
from any4d_fast.train.settings import tensor_float
from any4d_fast.train.step import Statistics
from any4d_fast.train.stream import StreamConfig, held_out
from benchmarks import train_parity
from tests.small_models import small_config, small_model

SMALL_STREAM = StreamConfig(num_views=2, sizes=((28, 42),), supersampling=1, moving_objects=(2, 3))


def test_learning_rate() -> None:
    options = ScheduleOptions(steps=11, warmup=2, final=0.1)
    found = [learning_rate_factor(step, options) for step in range(11)]
    assert found[:3] == [1 / 3, 2 / 3, 1.0]
    assert found[6] == pytest.approx(0.55)  # half-way between steps 2 and 10
    assert found[4] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert found[10] == pytest.approx(0.1)
    assert learning_rate_factor(0, ScheduleOptions(steps=1, warmup=0)) == 0.0


def test_ema_decay() -> None:
    options = ScheduleOptions(ema=0.9)
    assert [ema_decay(step, options) for step in (0, 8, 80, 1000)] == [0.1, 0.5, 0.9, 0.9]


def test_average_by_hand() -> None:
    parameter = nn.Parameter(torch.tensor([2.0, -1.0]))
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    average = Average([("a", parameter), ("b", frozen)])
    with torch.no_grad():
        parameter += 1
    for changed in (True, False):  # a step that changed nothing does not count
        average.update(0.75, torch.tensor(changed))
        assert average.tensors.keys() == {"a"}
        assert average.tensors["a"].tolist() == [2.25, -0.75]
    with average.applied():
        assert parameter.tolist() == [2.25, -0.75]
    assert parameter.tolist() == [3.0, 0.0]


def test_seeds_differ() -> None:
    seeds = {step_seed(seed, rank, step) for seed in range(8) for rank in range(8) for step in range(8)}
    assert len(seeds) == 512 and all(0 <= seed < 2**63 for seed in seeds)


def parameters() -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)

    def new(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=generator))

    return [("encoder.w", new(3, 2)), ("encoder.b", new(3)), ("pose_head.w", new(2, 2)), ("scale_token", new(4))]


def test_parts_and_decay() -> None:
    model = small_model()
    parts = {part_of(name) for name, _ in model.named_parameters()}
    assert parts == {"encoder", "tokenizers", "transformer", "heads", "pose", "scale"}
    undecayed = {name for name, p in model.named_parameters() if p.ndim >= 2 and not decayed(name, p)}
    assert undecayed == {"encoder.model.cls_token", "encoder.model.pos_embed"}
    assert not any(decayed(name, p) for name, p in model.named_parameters() if name.endswith(("bias", "gamma")))


def test_step_is_clipped_adamw() -> None:
    options = OptimizerOptions(lr=0.1, parts={"encoder": 0.5}, weight_decay=0.2, clip=0.7)
    ours, theirs = parameters(), parameters()
    optimizer = Optimizer(ours, options, sharded=False)
    rows = [(0, 0.05, 0.2), (1, 0.05, 0.0), (2, 0.1, 0.2), (3, 0.1, 0.0)]
    groups = [{"params": [theirs[i][1]], "lr": lr, "weight_decay": decay} for i, lr, decay in rows]
    reference = torch.optim.AdamW(groups, betas=options.betas, eps=options.eps)
    for step in range(4):
        for (_, a), (_, b) in zip(ours, theirs, strict=True):
            a.grad = torch.sin(a.detach() * (step + 1))
            b.grad = a.grad.clone()
        norm = nn.utils.clip_grad_norm_([p for _, p in theirs], options.clip)
        optimizer.set_rate(0.5)
        for group, (_, lr, _) in zip(reference.param_groups, rows, strict=True):
            group["lr"] = 0.5 * lr
        optimizer.step()
        reference.step()
        assert torch.allclose(optimizer.norm, norm)
    for (name, a), (_, b) in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_broken_gradient_changes_nothing(value: float) -> None:
    named = parameters()
    optimizer = Optimizer(named, OptimizerOptions(), sharded=False)

    def step(broken: bool) -> list[Tensor]:
        for _, p in named:
            p.grad = torch.ones_like(p)
        if broken:
            assert named[2][1].grad is not None
            named[2][1].grad[0, 1] = value
        optimizer.step()
        states = [t.clone() for state in optimizer.state().values() for t in state.values()]
        return [*(p.detach().clone() for _, p in named), *states]

    before, after = step(False), step(True)
    assert all(map(torch.equal, before, after))
    assert optimizer.skipped.item() == 1
    assert not any(map(torch.equal, after, step(False)))
    assert optimizer.skipped.item() == 1


def test_nothing_to_train_is_an_error() -> None:
    frozen = [(name, parameter.requires_grad_(False)) for name, parameter in parameters()]
    with pytest.raises(ConfigError, match=r"optimizer\.parts: expected a part of the model that is trained, got \{'"):
        Optimizer(frozen, OptimizerOptions(parts={"encoder": 0.0}), sharded=False)


def test_optimizer_state_is_of_these_parameters() -> None:
    optimizer = Optimizer(parameters(), OptimizerOptions(), sharded=False)
    with pytest.raises(ValueError, match="of other parameters, beginning with"):
        optimizer.load_state({"somebody": {}})


def test_statistics_leave_out_broken_steps() -> None:
    statistics, world = Statistics(), start("none", "cpu")
    assert statistics.take(world) == {}
    for loss, norm in ((1.0, 2.0), (math.nan, math.nan), (3.0, 4.0)):
        statistics.add({"loss": torch.tensor(loss)}, torch.tensor(norm))
    assert statistics.take(world) == {"loss": 2.0, "gradient_norm": 3.0}
    assert math.isnan(statistics.take(world)["loss"])


@pytest.fixture(scope="module")
def batch() -> Batch:
    return next(iter(held_out(SMALL_STREAM, 3, 3)))


def test_sparse_depth_and_hidden_scale(batch: Batch) -> None:
    options = InputOptions(sparse_depth_prob=1.0, sparsification_removal_percent=0.9, metric_scale_hidden_prob=1.0)
    torch.manual_seed(0)
    views = training_views(batch, "dinov2", INPUTS, options)
    known = torch.stack([view["depth_along_ray"][..., 0] > 0 for view in views], 1)
    assert not (known & ~batch.depth_mask).any()
    assert 0.07 < known.sum() / batch.depth_mask.sum() < 0.13
    assert not any(view["is_metric_scale"].any() for view in views)
    untouched = training_views(batch, "dinov2", INPUTS, InputOptions(sparse_depth_prob=0, metric_scale_hidden_prob=0))
    for view, plain in zip(untouched, batch.views("dinov2", INPUTS), strict=True):
        assert view["is_metric_scale"].all()
        assert torch.equal(view["depth_along_ray"], plain["depth_along_ray"])


def test_model_draws_the_rest() -> None:
    drawn = InputOptions(depth_prob=0.25).drawn_by_model()
    assert (drawn.depth_prob, drawn.ray_dirs_prob, drawn.overall_prob, drawn.dropout_prob) == (0.25, 0.5, 0.9, 0.05)
    # These two would be drawn on the host.
    assert drawn.sparse_depth_prob == drawn.depth_scale_norm_all_prob == drawn.pose_scale_norm_all_prob == 0


def snapshot(step: int) -> Snapshot:
    tensors = {"weight": torch.full((2, 3), float(step))}
    state = {"weight": {"step": torch.tensor(float(step)), "exp_avg": torch.zeros(2, 3)}}
    return Snapshot(step, tensors, tensors, state, {"skipped": 1}, {"run": {"seed": 0}})


def save(folder: CheckpointFolder, step: int) -> Path:
    return folder.save(snapshot(step), small_config(), {"weight": "weight"})


def test_checkpoints_come_back(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    assert folder.latest() is None
    for step in (1, 2, 3):
        save(folder, step)
    assert folder.steps() == [2, 3]
    found = folder.latest()
    assert found is not None
    assert found[0].step == 3 and found[0].counters == {"skipped": 1} and found[0].settings == {"run": {"seed": 0}}
    assert torch.equal(found[0].weights["weight"], torch.full((2, 3), 3.0))
    assert torch.equal(found[0].optimizer["weight"]["step"], torch.tensor(3.0))


@pytest.mark.parametrize("name", ["weights.safetensors", "average.safetensors", "optimizer.pt", "manifest.json"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_half_a_checkpoint_is_not_taken(name: str, how: str, tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    save(folder, 1)
    path = save(folder, 2) / name
    if how == "gone":
        path.unlink()
    else:
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size // 2)
    assert name in str(damage(path.parent))
    found = folder.latest()
    assert found is not None and found[0].step == 1
    save(folder, 2)  # takes the damaged one's place
    again = folder.latest()
    assert again is not None and again[0].step == 2


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_later_checkpoints_do_not_push_out_whole_ones(keep: int, tmp_path: Path) -> None:
    """A run that went on from before a damaged checkpoint stops again before it reaches that step."""
    for step in (10, 20):
        path = save(CheckpointFolder(tmp_path), step)
    (path / "optimizer.pt").write_bytes(b"")
    folder = CheckpointFolder(tmp_path, keep)
    save(folder, 15)
    assert folder.steps() == [10, 15][-keep:]
    found = folder.latest()
    assert found is not None and found[0].step == 15


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(step=7),  # of another step than its folder says
        lambda manifest: manifest.update(files={}),
        lambda manifest: manifest["files"].update({"optimizer.pt": 3}),
        *(lambda manifest, key=key: manifest.pop(key) for key in ("step", "files", "counters", "settings")),
    ],
)
def test_a_manifest_of_something_else_is_not_taken(change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    save(folder, 1)
    path = save(folder, 2) / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    assert "manifest.json" in str(damage(path.parent))
    found = folder.latest()
    assert found is not None and found[0].step == 1


def test_failed_write_leaves_the_checkpoints_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder(tmp_path)
    save(folder, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("any4d_fast.train.checkpoints._save_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        save(folder, 2)
    monkeypatch.undo()
    assert folder.steps() == [1] and not list(tmp_path.glob(".partial-*"))
    save(folder, 2)


@pytest.mark.parametrize("room", [100, 600, 1500])
def test_a_full_disk_is_an_error_that_names_the_checkpoint(room: int, tmp_path: Path) -> None:
    """In the first file, in the optimizer's, each of which another library writes."""
    folder = CheckpointFolder(tmp_path)
    save(folder, 1)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "step-00000001").iterdir()}
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1][1]))
    try:
        with pytest.raises(OSError, match=r"step-00000002: cannot be written \(.*"):
            save(folder, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[1])
        signal.signal(signal.SIGXFSZ, before[0])
    assert max(sizes.values()) > room and folder.steps() == [1] and not list(tmp_path.glob(".partial-*"))


def test_csv_log(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    log = CsvLog(path)
    log.add(1, {"loss": 2.0})
    log.add(2, {"loss": 1.0, "rate": 3.0})  # a new column
    log.add(3, {"loss": 0.5, "rate": 4.0})
    assert path.read_text() == "step,loss,rate\n1,2,\n2,1,3\n3,0.5,4\n"
    resumed = CsvLog(path, resumed_at=2)
    resumed.add(3, {"loss": 0.25, "rate": 4.0})
    assert path.read_text() == "step,loss,rate\n1,2,\n2,1,3\n3,0.25,4\n"
    with open(path, "a") as file:
        file.write("4,0.")  # a machine that failed
    CsvLog(path, resumed_at=3).add(4, {"loss": 0.125, "rate": 1.0})
    assert path.read_text().splitlines()[-2:] == ["3,0.25,4", "4,0.125,1"]
    with open(path, "a") as file:
        file.write("5,0.6,0.5,1\n7,0.5,1\n")  # a disk that was full in between
    CsvLog(path, resumed_at=7)
    assert path.read_text().splitlines()[-2:] == ["4,0.125,1", "7,0.5,1"]


def test_no_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    caplog.set_level("INFO", "any4d_fast.train")
    board = Board(tmp_path)
    board.scalars(1, {"loss": 1.0}, "train")
    board.close()
    assert "TensorBoard is not installed" in caplog.text and not any(tmp_path.iterdir())


def test_progress_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar(10, 0, shown=True)
    bar.step(1)
    bar.log(5, {"loss": 1.25})
    bar.say("hello")
    bar.close()
    assert "step 5/10  loss 1.25" in (text := capsys.readouterr().err) and "hello" in text
    Bar(10, 0, shown=False).log(5, {"loss": 1.25})
    assert capsys.readouterr().err == ""


def test_picture(batch: Batch) -> None:
    outputs = small_model()(batch.views())
    height, width = batch.images.shape[-2:]
    assert draw([{k: v.detach() for k, v in o.items()} for o in outputs], batch, 1).shape == (
        5 * height,
        2 * width,
        3,
    )
    unknown = dataclasses.replace(
        batch, depth_mask=torch.zeros_like(batch.depth_mask), flow_mask=torch.zeros_like(batch.flow_mask)
    )
    assert draw(outputs, unknown, 0).shape == (height, 2 * width, 3)


def test_held_out_table(tmp_path: Path) -> None:
    model = small_model()
    rows = evaluate.held_out_table(model, SMALL_STREAM, clips=3, batch_size=2, precision="fp32")
    assert [row["inputs"] for row in rows] == list(evaluate.INPUT_SETS)
    first = rows[0]
    assert first["flow_epe_dynamic_of_zero"] == pytest.approx(
        float(first["flow_epe_dynamic"]) / float(first["flow_epe_dynamic_zero"])
    )
    assert rows[1]["depth_abs_rel"] != first["depth_abs_rel"]
    assert len({row["flow_epe_dynamic_zero"] for row in rows}) == 1
    evaluate.write_table(rows, tmp_path / "out.csv", {"clips": 3, "seed": 0})
    with open(tmp_path / "out.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows) and lines[0]["inputs"] == "images" and lines[0]["clips"] == "3"
    assert {"commit", "torch", "device", "date"} <= lines[0].keys()
    assert evaluate.as_text(rows).splitlines()[0].startswith("inputs")


def test_the_commit_is_of_this_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of a project that it is installed in."""
    monkeypatch.delenv("ANY4D_FAST_COMMIT", raising=False)

    def git(*arguments: str) -> str:
        command = ("git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments)
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "somebody's")
    installed = tmp_path / "site-packages" / "evaluate.py"
    installed.parent.mkdir()
    installed.touch()
    monkeypatch.setattr(evaluate, "__file__", str(installed))
    assert evaluate.environment()["commit"] == ""
    git("add", "-f", str(installed))
    assert evaluate.environment()["commit"] == git("rev-parse", "--short", "HEAD")


def test_zero_flow_is_the_baseline(batch: Batch) -> None:
    class Still(nn.Module):
        encoder = small_model().encoder

        def forward(self, views: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
            shape = (*views[0]["img"].shape[:1], *views[0]["img"].shape[2:], 3)
            return [{"scene_flow": torch.zeros(shape), "pts3d": torch.ones(shape)} for _ in views]

    found = evaluate.evaluate_model(Still(), [batch])  # type: ignore[arg-type]
    assert found["flow_epe_dynamic"] == pytest.approx(found["flow_epe_dynamic_zero"])


def test_distance_of_training_curves() -> None:
    base = np.linspace(2.0, 1.0, 20)
    curves = {"fused": base * 1.01, "reference": base, "reference, opposite order": base * 0.98}
    fused, references = train_parity.mean_distances(curves)
    assert fused == pytest.approx([0.01]) and references == pytest.approx([0.02])
    assert all(curve == pytest.approx(curve[0]) for curve in train_parity.distances(curves).values())


def test_reordered_clips(batch: Batch) -> None:
    turned = train_parity.ordered(batch, "opposite")
    assert torch.equal(turned.images, batch.images.flip(0)) and torch.equal(turned.is_metric, batch.is_metric)
    assert torch.equal(train_parity.ordered(batch, "rotated").images[1:], batch.images[:-1])


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_allowed_for_the_run_alone(allowed: bool) -> None:
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    with tensor_float(allowed):
        assert [flag.allow_tf32 for flag in flags] == [allowed, allowed]
    assert [flag.allow_tf32 for flag in flags] == before
