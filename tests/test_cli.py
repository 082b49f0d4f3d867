"""The command, as a user runs it."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from any4d_fast import checkpoint
from any4d_fast.cli import app
from any4d_fast.demo import FILES
from any4d_fast.io import load_npz


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "frames"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (42, 56, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def invoke(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def test_reconstruct_writes_and_reports(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    done = invoke("reconstruct", images, "-o", out, "--preset", "tiny", "--device", "cpu", "--reference", "1")
    assert done.exit_code == 0, done.output
    for word in ("frames", "56 x 42", "transformer", "peak memory", "metric scale", "synthetic rooms alone"):
        assert word in done.output
    assert "random" not in done.output
    written = load_npz(out)
    assert written.num_views == 3 and written.reference == 1


def test_reconstruct_takes_image_files_and_several_outputs(images: Path, tmp_path: Path) -> None:
    done = invoke(
        "reconstruct", images / "0.png", images / "2.png", "-o", tmp_path / "a.npz", "-o", tmp_path / "a.ply",
        "--preset", "tiny", "--device", "cpu", "--intrinsics", "50,50,28,21", "--size", "28x42",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert load_npz(tmp_path / "a.npz").images.shape == (2, 28, 42, 3)
    assert (tmp_path / "a.ply").stat().st_size > 0


def test_convert_and_reconstruct_from_the_result(images: Path, tmp_path: Path) -> None:
    from any4d_fast import Any4D

    torch.save({"model": Any4D.from_preset("tiny").state_dict()}, tmp_path / "in.pth")
    done = invoke("convert", tmp_path / "in.pth", tmp_path / "out.safetensors", "--preset", "tiny")
    assert done.exit_code == 0 and "tensors" in done.output
    done = invoke(
        "reconstruct", images, "-o", tmp_path / "b.npz", "--checkpoint", tmp_path / "out.safetensors", "--device", "cpu"
    )
    assert done.exit_code == 0, done.output
    assert "random" not in done.output


def test_random_weights_are_called_random(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "PACKAGED", tmp_path / "nothing")
    done = invoke("reconstruct", images, "-o", tmp_path / "out.npz", "--preset", "tiny", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "The weights are random" in done.output and "synthetic" not in done.output


def test_demo_takes_the_packaged_weights(tmp_path: Path) -> None:
    done = invoke("demo", "-o", tmp_path, "--device", "cpu")
    assert done.exit_code == 0, done.output
    for word in ("336 x 252", "depth AbsRel", "depth scale", "predicting no motion", "rotation error"):
        assert word in done.output
    assert "random" not in done.output
    assert load_npz(tmp_path / "demo.npz").num_views == 4
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)


def test_evaluate_takes_the_packaged_weights(tmp_path: Path) -> None:
    done = invoke("evaluate", "-o", tmp_path / "heldout.csv", "--clips", "1", "--device", "cpu")
    assert done.exit_code == 0, done.output
    with open(tmp_path / "heldout.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["weights"], row["size"], row["views"]) for row in rows} == {("tiny", "336x252", "4")}


def test_info_runs() -> None:
    done = invoke("info")
    assert done.exit_code == 0 and "torch" in done.output


BAD = {
    "no such input": (["reconstruct", "{tmp}/nowhere", "-o", "x.npz", "--preset", "tiny"], "nowhere"),
    "empty folder": (["reconstruct", "{tmp}/empty", "-o", "x.npz", "--preset", "tiny"], "empty"),
    "unknown format": (["reconstruct", "{images}", "-o", "x.obj", "--preset", "tiny"], ".obj"),
    "no model": (["reconstruct", "{images}", "-o", "x.npz"], "checkpoint"),
    "unknown preset": (["reconstruct", "{images}", "-o", "x.npz", "--preset", "huge"], "huge"),
    "no such checkpoint": (["reconstruct", "{images}", "-o", "x.npz", "--checkpoint", "no.pth"], "no.pth"),
    "not a checkpoint": (["reconstruct", "{images}", "-o", "x.npz", "--checkpoint", "{tmp}/bad.pth"], "bad.pth"),
    "bad size": (["reconstruct", "{images}", "-o", "x.npz", "--preset", "tiny", "--size", "big"], "--size"),
    "size not of 14": (["reconstruct", "{images}", "-o", "x.npz", "--preset", "tiny", "--size", "28x40"], "14"),
    "bad intrinsics": (
        ["reconstruct", "{images}", "-o", "x.npz", "--preset", "tiny", "--intrinsics", "1,2"],
        "intrinsics",
    ),
    "reference out of range": (
        ["reconstruct", "{images}", "-o", "x.npz", "--preset", "tiny", "--reference", "9"],
        "reference",
    ),
    "depth without intrinsics": (
        ["reconstruct", "{images}", "-o", "x.npz", "--preset", "tiny", "--depth", "{tmp}/depth.npy"],
        "depth_z",
    ),
    "poses that do not fit": (
        ["reconstruct", "{images}", "-o", "x.npz", "--preset", "tiny", "--poses", "{tmp}/poses.npy"],
        "poses",
    ),
    "frames below 1": (["reconstruct", "{images}", "-o", "x.npz", "--preset", "tiny", "--frames", "0"], "frames"),
    "convert to another format": (["convert", "{tmp}/bad.pth", "{tmp}/out.pth"], "safetensors"),
    "no such GPU": (
        ["reconstruct", "{images}", "-o", "x.npz", "--preset", "tiny", "--device", "cuda:99"],
        "device",
    ),
    "unknown device": (["reconstruct", "{images}", "-o", "x.npz", "--preset", "tiny", "--device", "abacus"], "device"),
    "no device of ours": (["reconstruct", "{images}", "-o", "x.npz", "--preset", "tiny", "--device", "meta"], "device"),
    "no 8 bits on a CPU": (
        ["profile", "--preset", "tiny", "--size", "28x28", "--device", "cpu", "--precision", "fp8"],
        "8-bit layers run on CUDA devices",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line_and_leaves_no_file(
    case: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.pth").write_bytes(b"not a checkpoint")
    np.save(tmp_path / "depth.npy", np.ones((3, 42, 56), np.float32))
    np.save(tmp_path / "poses.npy", np.tile(np.eye(4), (5, 1, 1)))
    (tmp_path / "x.npz").write_bytes(b"earlier result")
    arguments, word = BAD[case]
    done = invoke(*(a.format(tmp=tmp_path, images=images) for a in arguments))
    assert done.exit_code == 2, done.output
    assert word in done.output and "Traceback" not in done.output
    assert (tmp_path / "x.npz").read_bytes() == b"earlier result"
    assert not list(tmp_path.glob(".tmp-*"))


def test_names_of_files_are_no_markup(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("reconstruct", images, "-o", "a[bold].npz", "-o", "b[/x].npz", "--preset", "tiny", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "a[bold].npz" in done.output and "b[/x].npz" in done.output


def test_evaluate_asks_for_its_file_before_it_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("any4d_fast.train.evaluate.evaluate_file", lambda *_, **__: pytest.fail("it measured"))
    (tmp_path / "file").touch()
    for path, word in ((tmp_path, "is a folder"), (tmp_path / "file" / "heldout.csv", "not a folder")):
        done = invoke("evaluate", "-o", path, "--device", "cpu")
        assert done.exit_code == 2 and word in done.output, done.output


@pytest.mark.parametrize("command", ["reconstruct", "evaluate", "train"])
def test_an_unknown_backend_is_one_clear_line(
    command: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ANY4D_FAST_BACKEND", "trition")
    done = {
        "reconstruct": lambda: invoke("reconstruct", images, "-o", tmp_path / "x.npz", "--preset", "tiny"),
        "evaluate": lambda: invoke("evaluate", "-o", tmp_path / "x.csv", "--clips", "1", "--device", "cpu"),
        "train": lambda: invoke("train", "--config", "smoke", "--output", tmp_path / "run"),
    }[command]()
    printed = done.output + capfd.readouterr().err
    assert done.exit_code == 2 and "Traceback" not in printed, printed
    assert "ANY4D_FAST_BACKEND" in printed and "got 'trition'" in printed, printed


def test_help_lists_the_commands() -> None:
    done = invoke("--help")
    assert all(name in done.output for name in ("reconstruct", "demo", "convert", "info"))
    assert done.exit_code == 0
