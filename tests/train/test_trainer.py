"""The trainer as a whole, on a CPU with a model of milliseconds: tests/trainer_cases.py."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from any4d_fast import Any4D, head_precision
from any4d_fast.config import PRESETS, ConfigError
from any4d_fast.train import parallel, sources
from any4d_fast.train.checkpoints import OPTIMIZER, CheckpointFolder
from any4d_fast.train.dataset import ClipArrays, write_clip
from any4d_fast.train.stream import held_out
from any4d_fast.train.trainer import Trainer, TrainingError, opened, train
from tests import trainer_cases as cases
from tests.clip_folders import small

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in the same order here and in the processes that are started."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def small_preset() -> Iterator[None]:
    """The preset that `cases.settings` adds is gone afterwards."""
    yield
    PRESETS.pop("small", None)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from the first to the last step."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("unbroken")
    result = train(cases.settings(folder), progress=False)
    assert result.finished and result.step == cases.STEPS and result.skipped == 0
    return folder


def assert_same_run(found: Path, expected: Path) -> None:
    """Every weight, average and optimizer state, and every logged loss, to the bit."""
    ours, theirs = cases.final_state(found), cases.final_state(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert cases.losses(found) == cases.losses(expected)


def test_writes_everything(unbroken: Path) -> None:
    assert {p.name for p in unbroken.iterdir()} >= {"config.toml", "metrics.csv", "validation.csv", "model.safetensors"}
    lines = cases.losses(unbroken)
    assert [line.split(",")[0] for line in lines] == ["step", *map(str, range(1, cases.STEPS + 1))]
    assert lines[0].startswith("step,loss,rays,")
    assert CheckpointFolder(unbroken / "checkpoints").steps() == [4, 6]  # `keep` is 2
    header, row = (unbroken / "validation.csv").read_text().splitlines()
    assert "images/depth_abs_rel" in header and "all/flow_epe" in header and row.startswith(f"{cases.STEPS},")


def test_export_is_the_average(unbroken: Path) -> None:
    model = Any4D.from_pretrained(unbroken / "model.safetensors")
    assert model.config.name == "small"
    state = cases.final_state(unbroken)
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, state[f"average/{name}"]), name
    assert not all(torch.equal(state[f"average/{n}"], state[f"weights/{n}"]) for n, _ in model.named_parameters())


def test_tokenizer_without_its_input_stays_silent(unbroken: Path) -> None:
    state = cases.final_state(unbroken)
    silent = [t for name, t in state.items() if name.startswith("weights/scene_flow_encoder.")]
    assert silent and all(not t.any() for t in silent)
    assert not any(name.startswith("optimizer/scene_flow_encoder.") for name in state)


def test_stopped_by_sigterm_and_resumed(unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Trainer._take_step

    def interrupted(self: Trainer) -> None:
        before(self)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_take_step", interrupted)
    handler = signal.getsignal(signal.SIGTERM)
    stopped = train(cases.settings(tmp_path), progress=False)
    assert not stopped.finished and stopped.step == 3 and stopped.weights is None
    assert signal.getsignal(signal.SIGTERM) is handler
    monkeypatch.undo()
    torch.rand(5)  # the state of the caller's generator does not matter
    assert train(cases.settings(tmp_path), progress=False).finished
    assert_same_run(tmp_path, unbroken)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_leaves_a_checkpoint(number: int, tmp_path: Path) -> None:
    """Ctrl-C in a terminal reaches the processes that read clips too."""
    for clip in range(2):
        write_clip(tmp_path / "clips" / f"clip{clip}", small(3, hw=cases.SIZE))
    folder = {"views": 2, "sizes": [list(cases.SIZE)], "stride": [1, 1], "split": "all"}
    data = {"source": "folder", "path": str(tmp_path / "clips"), "workers": 2, "folder": folder}
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from tests import trainer_cases as cases\n"
        "from any4d_fast.train.trainer import train\n"
        f"config = cases.settings({str(tmp_path / 'run')!r}, data={data!r}, schedule={{'steps': 10_000}})\n"
        "raise SystemExit(0 if train(config).finished else 75)\n"
    )
    command, environment = [sys.executable, "-c", code], {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    assert child.stderr is not None
    lines: list[str] = []
    while not lines or not lines[-1].startswith("step "):
        lines.append(child.stderr.readline())
        assert lines[-1], lines
    os.killpg(child.pid, number)
    lines += child.stderr
    assert child.wait(60) == 75, lines


@pytest.mark.parametrize("where", ["step", "checkpoint"])
def test_killed_and_resumed(where: str, unbroken: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.trainer_cases", where, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    assert checkpoints.steps() == [2]
    assert (where == "checkpoint") == any(checkpoints.folder.glob(".partial-*"))
    assert train(cases.settings(tmp_path), progress=False).finished
    assert not any(checkpoints.folder.glob(".partial-*"))
    assert_same_run(tmp_path, unbroken)


def test_damaged_checkpoint_is_not_taken(unbroken: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(cases.settings(tmp_path), progress=False)
    newest = tmp_path / "checkpoints" / "step-00000006" / OPTIMIZER
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    newest.write_bytes(content)
    (tmp_path / "model.safetensors").unlink()
    for _ in range(2):  # the second finds nothing left to do
        assert train(cases.settings(tmp_path), progress=False).finished
        assert (tmp_path / "validation.csv").read_text() == (unbroken / "validation.csv").read_text()
    assert "step-00000006 is not used: optimizer.pt is damaged" in caplog.text
    assert_same_run(tmp_path, unbroken)


def test_time_limit_stops_with_a_checkpoint(tmp_path: Path) -> None:
    result = train(cases.settings(tmp_path, run={"max_seconds": 1e-6, "checkpoint_every": 0}), progress=False)
    assert not result.finished and result.step == 1
    assert CheckpointFolder(tmp_path / "checkpoints").steps() == [1]


def test_other_settings_are_refused(unbroken: Path) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.lr: 0\.001 -> 0\.002"):
        train(cases.settings(unbroken, optimizer={"lr": 2e-3}), progress=False)


def always(config_inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """Inputs without draws."""
    names = ("overall_prob", "ray_dirs_prob", "depth_prob", "cam_prob")
    never = ("dropout_prob", "sparse_depth_prob", "metric_scale_hidden_prob")
    return {**dict.fromkeys(names, 1.0), **dict.fromkeys(never, 0.0), **(config_inputs or {})}


class OneBatch(sources.StreamSource):
    """The same clips at every step."""

    def make(self, index: int) -> sources.Fed:
        return super().make(0)


def test_loss_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "StreamSource", OneBatch)
    config = cases.settings(tmp_path, inputs=always(), schedule={"steps": 60}, run={"checkpoint_every": 0})
    train(config, progress=False)
    column = [float(line.split(",")[1]) for line in cases.losses(tmp_path)[1:]]
    assert column[-1] < 0.7 * column[0]


class BrokenBatch(sources.StreamSource):
    """One batch with an image that is not a number."""

    broken = (2,)

    def make(self, index: int) -> sources.Fed:
        fed = super().make(index)
        if index in self.broken:
            fed.batch.images[0, 1, 0, 3, 3] = float("nan")
        return fed


def test_step_without_finite_gradient_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "StreamSource", BrokenBatch)
    seen: list[list[Tensor]] = []
    before = Trainer._take_step

    def recorded(self: Trainer) -> None:
        before(self)
        state = [t.clone() for s in self.optimizer.state().values() for t in s.values()]
        averages = [t.clone() for t in self.average.tensors.values()]
        seen.append([*(p.detach().clone() for p in self.model.parameters()), *averages, *state])

    monkeypatch.setattr(Trainer, "_take_step", recorded)
    result = train(cases.settings(tmp_path, schedule={"steps": 4}), progress=False)
    assert result.skipped == 1
    same = [all(map(torch.equal, a, b)) for a, b in zip(seen, seen[1:], strict=False)]
    assert same == [False, True, False]
    assert all(t.isfinite().all() for t in seen[-1])
    lines = cases.losses(tmp_path)
    names = lines[0].split(",")
    row = dict(zip(names, lines[3].split(","), strict=True))
    assert row["skipped_steps"] == "1" and row["loss"] == "nan"


def test_nothing_but_broken_steps_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "StreamSource", BrokenBatch)
    monkeypatch.setattr(BrokenBatch, "broken", range(100))
    with pytest.raises(TrainingError, match="no gradient of the last 10 steps"):
        train(cases.settings(tmp_path, schedule={"steps": 20}, run={"log_every": 10}), progress=False)


@pytest.mark.parametrize(("broken", "ends"), [(range(5, 15), False), (range(100), True)])
def test_a_validation_within_a_logging_period_hides_no_steps(
    broken: range, ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "StreamSource", BrokenBatch)
    monkeypatch.setattr(BrokenBatch, "broken", broken)
    run = {"log_every": 25, "validate_every": 15, "checkpoint_every": 0}
    config = cases.settings(tmp_path, schedule={"steps": 26}, run=run)
    with pytest.raises(TrainingError, match="of the last 25 steps") if ends else contextlib.nullcontext():
        assert train(config, progress=False).skipped == 10


def test_fine_tuning_starts_from_upstreams_file(tmp_path: Path) -> None:
    torch.manual_seed(3)
    cases.settings(tmp_path)  # knows the preset
    model = Any4D.from_preset("small")
    torch.save({"model": model.state_dict()}, tmp_path / "upstream.pth")
    config = cases.settings(
        tmp_path / "run", model={"init": str(tmp_path / "upstream.pth")}, optimizer={"parts": {"encoder": 0.0}}
    )
    with opened(config, progress=False) as trainer:
        for (name, ours), theirs in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(ours, theirs), name
        assert not any(p.requires_grad for p in trainer.model.encoder.parameters())


def test_gradient_accumulation_is_the_larger_batch(tmp_path: Path) -> None:
    """Every clip has everything, so that the mean over clips is the mean of the means."""
    one = {"steps": 2, "warmup": 0}
    whole = cases.settings(tmp_path / "a", data={"batch_size": 2}, inputs=always(), schedule=one)
    parts = cases.settings(tmp_path / "b", inputs=always(), schedule={**one, "accumulate": 2})
    config = [train(c, progress=False) and cases.final_state(Path(c.run.output)) for c in (whole, parts)]
    assert_close_updates(*config)


def assert_close_updates(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The gradients' averages are the same within rounding (AdamW's steps would blow it up)."""
    keys = [key for key in expected if key.endswith("/exp_avg")]
    assert keys
    for key in keys:
        scale = expected[key].abs().max().clamp(min=1e-4)
        assert (found[key] - expected[key]).abs().max() <= 2e-3 * scale, key


def test_clips_of_a_folder(tmp_path: Path) -> None:
    """One of them without poses: its samples supervise what they can, and batches with it are given no poses."""
    clips = [next(held_out(cases.settings(tmp_path).data.stream, 1, 1, seed=seed)) for seed in range(2)]
    write_clip(tmp_path / "clips" / "whole", clips[0])
    without = dataclasses.replace(ClipArrays.from_batch(clips[1], 0), camera_poses=None, scene_flow=None)
    write_clip(tmp_path / "clips" / "unposed", dataclasses.replace(without, flow_mask=None, dynamic_mask=None))
    size = [list(cases.SIZE)]
    config = cases.settings(
        tmp_path / "run",
        data={
            "source": "folder", "path": str(tmp_path / "clips"), "workers": 0, "held_out": str(tmp_path / "clips"),
            "folder": {"views": 2, "sizes": size, "stride": [1, 1], "split": "all"},
        },
        schedule={"steps": 4},
    )  # fmt: skip
    result = train(config, progress=False)
    assert result.finished and result.skipped == 0
    assert result.metrics["images/depth_abs_rel"] > 0
    rows = [line.split(",") for line in cases.losses(tmp_path / "run")]
    column = rows[0].index("rotation")
    assert {row[column] == "0" for row in rows[1:]} == {True, False}


def test_validation_clips_of_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As many as asked for, and never clips that are trained on."""
    for number in range(5):
        write_clip(tmp_path / "clips" / f"clip{number}", small(3, hw=cases.SIZE))
    folder = {"views": 2, "sizes": [list(cases.SIZE)], "stride": [1, 1]}
    base = {"source": "folder", "path": str(tmp_path / "clips"), "workers": 0}
    world = parallel.start("none", "cpu")

    def source(**more: Any) -> sources.FolderSource:
        data = cases.settings(tmp_path, data={**base, **more}).data
        return sources.FolderSource(data, (), 0, world, 0)

    given = source(held_out=str(tmp_path / "clips"), folder={**folder, "split": "all"})
    for count, batches in ((4, [2, 2]), (3, [2, 1]), (1, [1]), (9, [2, 2, 1])):
        assert [len(fed.batch) for fed in given.held_out(count, 2)] == batches
    split = source(folder={**folder, "held_out": 0.5})
    assert split._held_out is not None and 0 < len(split._held_out) < 5
    assert "no validation" not in caplog.text
    for name in ("all", "held_out"):
        assert list(source(folder={**folder, "held_out": 0.5, "split": name}).held_out(2, 1)) == []
        assert f"no validation: data.folder.split is {name!r}" in caplog.text


def in_two_processes(code: str, folder: Path) -> None:
    """Run code under torchrun, with the folder as its argument."""
    script = folder.with_suffix(".py")
    script.write_text(code)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_processes_whose_clips_have_other_parts(kind: str, tmp_path: Path) -> None:
    """At every step one process has a clip without geometry. They stop together, too, although nothing is logged."""
    clip = ClipArrays.from_batch(next(held_out(cases.settings(tmp_path).data.stream, 1, 1)), 0)
    write_clip(tmp_path / "clips" / "whole", clip)
    write_clip(tmp_path / "clips" / "bare", ClipArrays(clip.images))
    data = {
        "source": "folder", "path": str(tmp_path / "clips"), "workers": 0, "held_out": str(tmp_path / "clips"),
        "folder": {"views": 2, "sizes": [list(cases.SIZE)], "stride": [1, 1], "split": "all"},
    }  # fmt: skip
    code = (
        "import os, sys, torch; torch.set_num_threads(1)\n"
        "from tests import trainer_cases as cases\n"
        "from any4d_fast.train import trainer\n"
        "torch.distributed.init_process_group('gloo')\n"
        "trainer._AGREE_EVERY = 2\n"
        "def config(**more):\n"
        f"    run = {{'parallel': {kind!r}, 'log_every': 0, **more}}\n"
        f"    return cases.settings(sys.argv[1], data={data!r}, schedule={{'steps': 4}}, run=run)\n"
        "assert trainer.train(config(max_seconds=1e-6), progress=False).step == 2\n"
        "result = trainer.train(config(), progress=False)\n"
        "assert result.finished and result.skipped == 0\n"
        "os._exit(0)\n"
    )
    in_two_processes(code, tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_are_the_larger_batch(kind: str, tmp_path: Path) -> None:
    """Stopped after the first step, too, and gone on with from a checkpoint that is whole in one file."""
    schedule = {"steps": 2, "warmup": 0}
    code = (
        "import os, sys, torch; torch.set_num_threads(1)\n"
        "from tests import trainer_cases as cases\n"
        "from tests.train.test_trainer import always\n"
        "from any4d_fast.train.trainer import train\n"
        "torch.distributed.init_process_group('gloo')\n"
        "def config(**more):\n"
        f"    run = {{'parallel': {kind!r}, **more}}\n"
        f"    return cases.settings(sys.argv[1], inputs=always(), schedule={schedule!r}, run=run)\n"
        "assert train(config(max_seconds=1e-6), progress=False).step == 1\n"
        "assert train(config(), progress=False).finished\n"
        "os._exit(0)\n"  # Gloo's threads may wait for the interpreter's lock where it ends
    )
    in_two_processes(code, tmp_path / "two")
    config = cases.settings(tmp_path / "one", data={"batch_size": 2}, inputs=always(), schedule=schedule)
    train(config, progress=False)
    assert_close_updates(cases.final_state(tmp_path / "two"), cases.final_state(tmp_path / "one"))


def test_steps_never_wait_for_the_heads_range(tmp_path: Path) -> None:
    """A step out of range has no finite gradient, which is skipped; and `run.heads` says who computes in TF32."""
    like, seen = torch.zeros(1), []
    for heads, dtype in (("fp16", None), ("tf32", torch.float32)):
        with opened(cases.settings(tmp_path / heads, run={"heads": heads}), progress=False):
            seen.append((head_precision.waits(), head_precision._CHOSEN.get() == dtype))
    assert seen == [(False, True)] * 2
    assert head_precision.waits()
    assert head_precision.training_dtype(like, mixed=True) == torch.float32  # no GPU


def test_a_head_out_of_range_is_a_skipped_step(tmp_path: Path) -> None:
    """In 16 bits on any device, as on a GPU under autocast."""
    config = cases.settings(tmp_path / "run")
    with opened(config, progress=False) as trainer, head_precision.use_head_dtype(torch.float16):
        with torch.no_grad():
            trainer.model.scene_flow_dpt_feature_head.scratch.layer2_rn.weight.mul_(1e5)
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.runner.run([trainer.source.make(0)], 0)
        assert int(trainer.optimizer.skipped) == 1
        assert all(torch.equal(p, old) for p, old in zip(trainer.model.parameters(), before, strict=True))
