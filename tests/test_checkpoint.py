"""Weights in files: every format, every damage, all or nothing."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from any4d_fast import Any4D, checkpoint
from any4d_fast.checkpoint import CheckpointError, aliases, load_checkpoint, read_state_dict
from any4d_fast.config_upstream import to_upstream
from tests.small_models import small_config, small_model, small_scene


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def fresh() -> Any4D:
    """A small model with other weights than `small_model`'s."""
    torch.manual_seed(0)
    return Any4D.from_config(small_config())


@pytest.fixture(scope="module")
def trained() -> Any4D:
    return small_model()


@pytest.fixture(scope="module")
def pth(trained: Any4D, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As upstream's trainer saves it."""
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save({"model": trained.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def safetensors(trained: Any4D, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    checkpoint.save_safetensors(trained.state_dict(), aliases(trained), trained.config, path)
    return path


# Formats.

FORMATS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "upstream's .pth": lambda state, path: torch.save({"model": state}, path.with_suffix(".pth")),
    "bare dictionary": lambda state, path: torch.save(state, path.with_suffix(".pt")),
    "state_dict": lambda state, path: torch.save({"state_dict": state}, path.with_suffix(".ckpt")),
    "with a trainer's numbers": lambda state, path: torch.save(
        {"model": state, "epoch": 3, "args": {"lr": 1e-4}, "optimizer": {"state": {}}}, path.with_suffix(".pth")
    ),
    "the older pickle": lambda state, path: torch.save(
        {"model": state}, path.with_suffix(".pth"), _use_new_zipfile_serialization=False
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_weights_back(name: str, trained: Any4D, tmp_path: Path) -> None:
    FORMATS[name](trained.state_dict(), tmp_path / "weights")
    (path,) = tmp_path.iterdir()
    model = Any4D.from_pretrained(path, config=small_config())
    assert not model.training
    assert equal(model.state_dict(), trained.state_dict())
    assert equal(Any4D.from_pretrained(tmp_path, config=small_config()).state_dict(), trained.state_dict())


def test_safetensors_hold_each_parameter_once_and_the_configuration(safetensors: Path, trained: Any4D) -> None:
    stored = read_state_dict(safetensors)
    canonical = aliases(trained)
    assert set(stored) == set(canonical.values()) and len(stored) < len(canonical)
    model = Any4D.from_pretrained(str(safetensors))
    assert model.config == trained.config
    assert equal(model.state_dict(), trained.state_dict())


def test_safetensors_without_a_configuration_are_read_as_the_released_architecture(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert checkpoint.stored_config(tmp_path / "a.safetensors").name == "any4d"
    assert checkpoint.stored_config(tmp_path / "a.pth").name == "any4d"


def test_every_alias_alone_is_enough(trained: Any4D, tmp_path: Path) -> None:
    canonical = aliases(trained)
    last = {first: key for key, first in canonical.items()}  # the last of each parameter's names
    torch.save({key: trained.state_dict()[key] for key in last.values()}, tmp_path / "a.pth")
    model = fresh()
    assert not load_checkpoint(model, tmp_path / "a.pth")
    assert equal(model.state_dict(), trained.state_dict())


def test_half_precision_weights_are_widened(trained: Any4D, tmp_path: Path) -> None:
    halves = {k: v.bfloat16() for k, v in trained.state_dict().items()}
    torch.save({"model": halves}, tmp_path / "a.pth")
    model = Any4D.from_pretrained(tmp_path / "a.pth", config=small_config())
    assert equal(model.state_dict(), {k: v.float() for k, v in halves.items()})


# All or nothing.


def changed(trained: Any4D, change: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
    state = trained.state_dict()
    change(state)
    return dict(state)


BIAS = "scale_head.proj.bias"
MISFITS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda s: s.pop(BIAS), rf"1 missing: {BIAS}$"),
    "unexpected": (lambda s: s.update(other=torch.zeros(1)), "1 unexpected: other$"),
    "mis-shaped": (lambda s: s.update({BIAS: torch.zeros(9)}), rf"1 mis-shaped: {BIAS} \[9\] instead of \[8\]$"),
    "many": (lambda s: [s.pop(k) for k in list(s) if k.startswith("encoder.")],
             r"\d+ missing: encoder\.model\..*, .*, .* and \d+ more$"),
    "contradicting names": (lambda s: s.update({"dense_head.1.conv1.bias": torch.ones(4)}),
                            "dpt_regressor_head.conv1.bias and dense_head.1.conv1.bias name one parameter but differ"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(name: str, trained: Any4D, tmp_path: Path) -> None:
    change, message = MISFITS[name]
    path = tmp_path / "weights.pth"
    torch.save({"model": changed(trained, change)}, path)
    model = fresh()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))}: (does not fit the model: )?{message}"):
        load_checkpoint(model, path)
    assert equal(model.state_dict(), before)
    with pytest.raises(CheckpointError, match=message):
        Any4D.from_pretrained(path, config=small_config())


def test_without_strictness_what_fits_is_loaded_and_the_rest_reported(
    trained: Any4D, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = trained.state_dict()
    del state["scale_token"]
    torch.save({"model": {**state, "other": torch.zeros(1), BIAS: torch.zeros(9)}}, tmp_path / "a.pth")
    model = fresh()
    before = snapshot(model)
    mismatch = load_checkpoint(model, tmp_path / "a.pth", strict=False)
    assert (mismatch.missing, mismatch.unexpected) == (["scale_token"], ["other"])
    assert mismatch.shapes == [f"{BIAS} [9] instead of [8]"]
    kept = {"scale_token", BIAS}
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key in kept else trained.state_dict()[key]), key
    assert "1 missing: scale_token; 1 unexpected: other; 1 mis-shaped" in caplog.text


class _Malicious:
    """A pickle that runs code when it is read carelessly."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def damaged(kind: str, path: Path, pth: Path, safetensors: Path) -> None:
    source, share = {"pth": pth, "safetensors": safetensors}[path.suffix.removeprefix(".")], 0.5
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<html>404: not found</html>")
    elif kind == "nearly whole":
        path.write_bytes(source.read_bytes()[:-1])
    elif kind == "only a beginning":
        path.write_bytes(source.read_bytes()[:20])
    elif kind == "half":
        path.write_bytes(source.read_bytes()[: int(source.stat().st_size * share)])
    elif kind == "zeros":
        path.write_bytes(bytes(1000))


DAMAGES = ["empty", "text", "nearly whole", "only a beginning", "half", "zeros"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_named_and_nothing_is_loaded(
    kind: str, suffix: str, tmp_path: Path, pth: Path, safetensors: Path
) -> None:
    path = tmp_path / f"weights{suffix}"
    damaged(kind, path, pth, safetensors)
    model = fresh()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))}: "):
        load_checkpoint(model, path)
    assert equal(model.state_dict(), before)
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))}: "):
        Any4D.from_pretrained(path)


def test_any_damaged_byte_of_a_pickles_structure_is_an_error_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"model": {"a": torch.arange(3.0)}}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x5A]) + whole[position + 1 :])
        try:
            assert all(isinstance(v, Tensor) for v in read_state_dict(path).values())
        except CheckpointError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize("form", ["torch", "plain pickle", "inside"])
def test_a_pickle_that_wants_to_run_code_is_refused_and_does_not(form: str, tmp_path: Path, trained: Any4D) -> None:
    path, trace = tmp_path / "weights.pth", tmp_path / "it_ran"
    if form == "torch":
        torch.save(_Malicious(trace), path)
    elif form == "plain pickle":
        path.write_bytes(pickle.dumps(_Malicious(trace), protocol=2))
    else:
        torch.save({"model": trained.state_dict(), "args": _Malicious(trace)}, path)
    with pytest.raises(CheckpointError, match="files that would run code are not read"):
        Any4D.from_pretrained(path)
    assert not trace.exists()


CONTENTS: dict[str, tuple[Any, str]] = {
    "a list": ([torch.zeros(1)], "expected a dictionary of tensors, got list"),
    "a tensor": (torch.zeros(1), "expected a dictionary of tensors, got Tensor"),
    "numbers": ({"model": {"a": 1.0}}, "key 'a' holds float, expected a tensor"),
    "numbered keys": ({"model": {1: torch.zeros(1)}}, "key 1 holds Tensor, expected a tensor"),
    "nothing": ({"model": {}}, "the checkpoint is empty"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_what_is_no_state_dict_is_refused(name: str, tmp_path: Path) -> None:
    content, message = CONTENTS[name]
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"name": "x"}', json.dumps({k: "x" for k in to_upstream(small_config())})]
)
def test_a_stored_configuration_that_cannot_be_read_is_an_error(text: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={checkpoint.CONFIG_KEY: text})
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(path))}: its stored configuration cannot be read"):
        Any4D.from_pretrained(path)


# Where the file is.


def test_a_path_that_is_no_checkpoint_is_an_error(tmp_path: Path, pth: Path) -> None:
    other = tmp_path / "weights.bin"
    other.write_bytes(b"1234")
    for source, message in [
        (tmp_path / "none.pth", "none.pth: no such file"),
        ("./here/none.pth", "none.pth: no such file"),
        ("nothing", "nothing: no such file; give a .* or a Hugging Face id"),
        (tmp_path, "expected one file of .* in the folder, found none"),
        (other, "weights.bin: expected a file of .safetensors, .pth"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            Any4D.from_pretrained(source)
    for name in ("a.pth", "b.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"found \['a.pth', 'b.safetensors'\]"):
        Any4D.from_pretrained(tmp_path)


class _Hub:
    """A Hugging Face hub of our own."""

    files: list[str] = []
    asked: list[tuple[str, str]] = []

    def list_repo_files(self, repository: str) -> list[str]:
        if not self.files:
            raise ConnectionError("no route to host")
        return self.files


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, pth: Path, safetensors: Path) -> type[_Hub]:
    import huggingface_hub

    _Hub.files, _Hub.asked = [], []

    def download(repository: str, name: str) -> str:
        _Hub.asked.append((repository, name))
        return str(safetensors if name.endswith(".safetensors") else pth)

    monkeypatch.setattr(huggingface_hub, "HfApi", _Hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return _Hub


def test_a_repository_that_cannot_be_reached_is_an_error(hub: type[_Hub]) -> None:
    with pytest.raises(
        CheckpointError, match=r"someone/any4d: neither a local file nor .* reached \(no route to host\)"
    ):
        Any4D.from_pretrained("someone/any4d")
    hub.files = ["README.md"]
    with pytest.raises(CheckpointError, match="someone/any4d: the repository holds no file of"):
        Any4D.from_pretrained("someone/any4d")


def test_a_repositorys_safetensors_are_preferred(hub: type[_Hub], trained: Any4D) -> None:
    hub.files = ["README.md", "model.pth", "model.safetensors"]
    assert equal(Any4D.from_pretrained("someone/any4d").state_dict(), trained.state_dict())
    hub.files = ["README.md", "model.pth"]
    assert equal(Any4D.from_pretrained("someone/any4d", config=small_config()).state_dict(), trained.state_dict())
    assert hub.asked == [("someone/any4d", "model.safetensors"), ("someone/any4d", "model.pth")]


# Through the constructor, by parts, and converted.


def test_the_constructor_loads_as_upstreams_does(pth: Path, trained: Any4D) -> None:
    model = Any4D(**to_upstream(small_config()), pretrained_checkpoint_path=pth)
    assert equal(model.state_dict(), trained.state_dict())


@pytest.mark.parametrize("format_", ["pth", "safetensors"])
@pytest.mark.parametrize("prefix", ["info_sharing", "dpt_feature_head", "dense_head"])
def test_the_constructor_loads_parts(prefix: str, format_: str, pth: Path, safetensors: Path, trained: Any4D) -> None:
    torch.manual_seed(0)
    model = Any4D(
        **to_upstream(small_config()),
        pretrained_checkpoint_path={"pth": pth, "safetensors": safetensors}[format_],
        load_specific_pretrained_submodules=True,
        specific_pretrained_submodules=[prefix, "scale_token"],
    )
    before, canonical = fresh().state_dict(), aliases(trained)
    loaded = {canonical[k] for k in canonical if k.startswith((prefix, "scale_token"))}
    assert len(loaded) > 1
    for key, value in model.state_dict().items():
        assert torch.equal(value, (trained.state_dict() if canonical[key] in loaded else before)[key]), key


@pytest.mark.parametrize("prefixes", [None, [], ["nowhere."]])
def test_parts_that_are_not_there_are_an_error(prefixes: list[str] | None, pth: Path) -> None:
    with pytest.raises(CheckpointError, match="specific_pretrained_submodules"):
        Any4D(
            **to_upstream(small_config()),
            pretrained_checkpoint_path=pth,
            load_specific_pretrained_submodules=True,
            specific_pretrained_submodules=prefixes,
        )


def test_encoder_and_transformer_can_start_from_files_of_their_own(trained: Any4D, tmp_path: Path) -> None:
    arguments = to_upstream(small_config())
    for part, options in (
        (trained.encoder, arguments["encoder_config"]),
        (trained.info_sharing, arguments["info_sharing_config"]["module_args"]),
    ):
        path = tmp_path / f"{type(part).__name__}.pth"
        torch.save({"model": part.state_dict()}, path)
        options["pretrained_checkpoint_path"] = str(path)
    torch.manual_seed(0)
    model = Any4D(**arguments)
    before = fresh().state_dict()
    for key, value in model.state_dict().items():
        own = key.startswith(("encoder.", "info_sharing."))
        assert torch.equal(value, (trained.state_dict() if own else before)[key]), key
    checkpoint.save_safetensors(model.state_dict(), aliases(model), model.config, tmp_path / "whole.safetensors")
    for path in tmp_path.glob("*.pth"):
        path.unlink()
    assert equal(Any4D.from_pretrained(tmp_path / "whole.safetensors").state_dict(), model.state_dict())


def test_converting_checks_and_keeps_everything(pth: Path, trained: Any4D, tmp_path: Path) -> None:
    target = tmp_path / "new" / "small.safetensors"
    count = checkpoint.convert(pth, target, small_config())
    assert count == len(set(aliases(trained).values()))
    assert equal(Any4D.from_pretrained(target).state_dict(), trained.state_dict())


def test_a_conversion_that_fails_writes_nothing_and_loses_nothing(pth: Path, tmp_path: Path) -> None:
    target = tmp_path / "small.safetensors"
    target.write_bytes(b"precious")
    with pytest.raises(CheckpointError, match="does not fit the model 'small': .* mis-shaped"):
        checkpoint.convert(pth, target, small_config(small_scene(confidence=False)))
    with pytest.raises(CheckpointError, match="expected a path that ends in .safetensors"):
        checkpoint.convert(pth, tmp_path / "small.pth", small_config())
    assert target.read_bytes() == b"precious"
    assert [p.name for p in tmp_path.iterdir()] == ["small.safetensors"]


def test_a_full_disk_is_named_and_the_old_file_stays(pth: Path, tmp_path: Path) -> None:
    target = tmp_path / "small.safetensors"
    target.write_bytes(b"precious")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"small.safetensors: cannot be written .*File too large"):
            checkpoint.convert(pth, target, small_config())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_bytes() == b"precious"
    assert [p.name for p in tmp_path.iterdir()] == ["small.safetensors"]


def test_the_convert_command(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from any4d_fast.cli import app

    torch.manual_seed(0)
    model = Any4D.from_preset("tiny")
    source, target = tmp_path / "tiny.pth", tmp_path / "tiny.safetensors"
    torch.save({"model": model.state_dict()}, source)
    result = CliRunner().invoke(app, ["convert", str(source), str(target), "--preset", "tiny"])
    assert result.exit_code == 0, result.output
    assert f"wrote {target}" in result.output
    assert equal(Any4D.from_pretrained(target).state_dict(), model.state_dict())
    again = tmp_path / "again.safetensors"
    result = CliRunner().invoke(app, ["convert", str(target), str(again)])  # the file knows its architecture
    assert result.exit_code == 0, result.output
    assert equal(Any4D.from_pretrained(again).state_dict(), model.state_dict())
    with pytest.raises(CheckpointError, match="the model 'small', and its header says that it is of 'tiny': "):
        checkpoint.load_checkpoint(Any4D.from_config(small_config()), target)
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "none.pth"), str(target), "--preset", "tiny"])
    assert result.exit_code == 2
