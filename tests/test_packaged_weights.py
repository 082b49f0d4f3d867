"""The trained weights of `tiny` that come with the package."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from any4d_fast import Any4D, checkpoint
from any4d_fast.checkpoint import CheckpointError, packaged_weights
from any4d_fast.config import PRESETS, preset
from any4d_fast.pipeline import load_model
from any4d_fast.train.config import TrainConfig
from any4d_fast.train.evaluate import evaluate_model
from any4d_fast.train.metrics import depth_errors, masked_median
from any4d_fast.train.stream import held_out


@pytest.fixture(scope="module")
def path() -> Path:
    found = packaged_weights("tiny")
    assert found is not None
    return found


@pytest.fixture(scope="module")
def model() -> Any4D:
    return load_model(None, "tiny", "cpu")[0]


@pytest.fixture
def packaged(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, in a package of our own, and the working folder another one."""
    folder, elsewhere = tmp_path / "weights", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    monkeypatch.setattr(checkpoint, "PACKAGED", folder)
    monkeypatch.chdir(elsewhere)
    return Path(shutil.copy(path, folder))


def same_weights(first: Any4D, second: Any4D) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def same_outputs(first: list[dict[str, Tensor]], second: list[dict[str, Tensor]]) -> bool:
    pairs = list(zip(first, second, strict=True))
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


def test_they_are_half_precision_and_say_what_they_are(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}
    assert kinds == {"F16"}
    assert {checkpoint.CONFIG_KEY, checkpoint.STEPS_KEY} <= set(metadata)
    assert checkpoint.stored_config(path) == preset("tiny")


def test_every_way_of_loading_is_the_same(path: Path, model: Any4D) -> None:
    state = torch.random.get_rng_state()
    _, trained = load_model(None, "tiny", "cpu")
    assert trained and torch.equal(torch.random.get_rng_state(), state)
    by_name, by_path = Any4D.from_pretrained("tiny"), Any4D.from_pretrained(path)
    assert not model.training and not by_name.training
    assert same_weights(model, by_path) and same_weights(by_name, by_path)
    assert not same_weights(Any4D.from_preset("tiny"), by_path)
    batch = next(held_out(TrainConfig.load("smoke").data.stream, 1, 1))
    views = batch.views(model.encoder.data_norm_type)
    with torch.no_grad():
        outputs = model(views)
        assert same_outputs(outputs, model(views))
        assert same_outputs(outputs, by_path(views))
    assert all(torch.isfinite(value).all() for output in outputs for value in output.values())


def test_a_file_or_folder_of_that_name_comes_first(packaged: Path) -> None:
    assert checkpoint.find_checkpoint("tiny") == packaged
    Path("tiny").mkdir()
    with pytest.raises(CheckpointError, match="tiny: expected one file of .* in the folder, found none"):
        Any4D.from_pretrained("tiny")
    assert load_model(None, "tiny", "cpu")[1], "a preset is no path"
    mine = Path(shutil.copy(packaged, "tiny"))
    assert checkpoint.find_checkpoint("tiny") == mine


def test_without_the_file(packaged: Path) -> None:
    packaged.unlink()
    assert packaged_weights("tiny") is None
    with pytest.raises(CheckpointError, match="tiny: no such file; give a .* or a Hugging Face id"):
        Any4D.from_pretrained("tiny")
    model, trained = load_model(None, "tiny", "cpu")
    torch.manual_seed(0)
    assert not trained and same_weights(model, Any4D.from_preset("tiny"))


@pytest.mark.parametrize("name", ["any4d", "nothing", "../weights/tiny", ""])
def test_other_names_have_none(name: str, packaged: Path) -> None:
    assert packaged_weights(name) is None


def test_weights_of_an_older_preset_are_refused(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = preset("tiny")
    encoder = dataclasses.replace(now.encoder, keep_first_n_layers=2)
    monkeypatch.setitem(PRESETS, "tiny", dataclasses.replace(now, encoder=encoder))
    message = "another configuration than the preset 'tiny': encoder.keep_first_n_layers 1 instead of 2; train them"
    with pytest.raises(CheckpointError, match=message):
        load_model(None, "tiny", "cpu")
    with pytest.raises(CheckpointError, match=message):
        Any4D.from_pretrained("tiny")
    assert Any4D.from_pretrained(packaged).config == now, "by its path, the file is what it says"


def test_a_damaged_file_is_an_error(packaged: Path) -> None:
    packaged.write_bytes(packaged.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not a readable safetensors file, or truncated"):
        load_model(None, "tiny", "cpu")


def test_they_beat_trivial_predictions(path: Path, model: Any4D) -> None:
    with safe_open(path, framework="pt") as file:
        if file.metadata().get(checkpoint.STEPS_KEY) == "0":
            pytest.skip("the packaged weights are a stand-in that was not trained: 0 steps in the file's header")
    stream = dataclasses.replace(TrainConfig.load("tiny").data.stream, supersampling=1)
    (batch,) = held_out(stream, 6, 6)
    found = evaluate_model(model, [batch])
    depth, mask = batch.depth_along_ray[..., 0], batch.depth_mask
    constant = masked_median(depth, mask)[:, None, None, None].expand_as(depth)
    assert found["depth_abs_rel"] < depth_errors(constant, depth, mask)[0].mean()
    assert found["flow_epe_dynamic"] < 0.95 * found["flow_epe_dynamic_zero"]
    assert found["rotation_degrees"] < 0.7 * found["rotation_degrees_zero"]
    assert found["translation_error"] < 0.8 * found["translation_error_zero"]
