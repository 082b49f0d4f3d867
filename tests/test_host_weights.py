"""Weights in host memory beside 16-bit copies: which move, what stays equal, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from any4d_fast import Any4D
from any4d_fast.checkpoint import aliases, save_safetensors
from any4d_fast.head_precision import use_head_dtype
from any4d_fast.modules import host_weights
from any4d_fast.modules.derived import Derived, signature
from any4d_fast.modules.host_weights import home, packable, require_here, resident
from tests.golden_cases import golden_views
from tests.small_models import small_config, small_model

KEYS = ["ray_directions_cam", "depth_along_ray", "camera_pose_quats", "camera_pose_trans"]


@pytest.fixture
def model() -> Any4D:
    return small_model(small_config(modalities=None))


class Hosted:
    """Matrices of a model pretend to be in host memory: there is no second device without a GPU."""

    def __init__(self, model: Any4D, monkeypatch: pytest.MonkeyPatch) -> None:
        hosted = {id(p) for p in packable(model)}
        self.copied: list[int] = []
        self._masters = {id(p): p.data_ptr() for p in packable(model)}
        monkeypatch.setattr(host_weights, "_away", lambda t, device: id(t) in hosted)
        monkeypatch.setattr(host_weights, "_copied", self._copy)
        self._model = model

    def _copy(self, tensor: Tensor, device: torch.device) -> Tensor:
        self.copied.append(tensor.data_ptr())
        return tensor.clone()

    def all_back(self) -> bool:
        return self._masters == {id(p): p.data_ptr() for p in packable(self._model)}


def views(count: int = 2, keys: list[str] | None = None) -> list[dict[str, Any]]:
    return golden_views(count, 1, 28, 42, 0, [keys or []] * count)


def run(
    model: Any4D, given: list[dict[str, Any]], dtype: torch.dtype | None = torch.float16
) -> list[dict[str, Tensor]]:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), use_head_dtype(dtype):
        found: list[dict[str, Tensor]] = model(given)
    return found


def equal(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(a[key], b[key]) for a, b in pairs for key in b)


def test_nearly_everything_is_packable() -> None:
    with torch.device("meta"):
        model = Any4D.from_preset("any4d")
    moved = {id(p): p.numel() for p in packable(model)}
    everything = sum(p.numel() for p in model.parameters())
    assert 4 * everything == pytest.approx(2.45e9, rel=0.01)
    assert 4 * (everything - sum(moved.values())) < 0.03e9
    tokenizers = (model.ray_dirs_encoder, model.depth_encoder, model.scene_flow_encoder)
    dense = sum(moved.get(id(p), 0) for module in tokenizers for p in module.parameters())
    assert 2 * dense == pytest.approx(0.18e9, rel=0.03)
    assert 2 * (sum(moved.values()) - dense) == pytest.approx(1.03e9, rel=0.01)


def test_home_is_the_device_that_is_not_the_cpu() -> None:
    here, there = torch.zeros(1), torch.zeros(1, device="meta")
    assert home([here, there, here]) == there.device
    assert home([here, here]) == here.device


def test_resident_parameters_are_put_back_unseen(model: Any4D, monkeypatch: pytest.MonkeyPatch) -> None:
    run(model, views())
    hosted = Hosted(model, monkeypatch)
    parameters = list(model.dpt_feature_head.parameters())
    before = signature(parameters)
    with pytest.raises(KeyError), torch.inference_mode(), resident(parameters, torch.device("cpu")):
        assert signature(parameters) != before
        raise KeyError
    assert signature(parameters) == before and hosted.all_back()
    for module in model.modules():
        if isinstance(kept := getattr(module, "derived", None), Derived):
            assert not any(one.refresh() for one in kept._kept.values())


def test_a_head_that_leaves_its_range_borrows_its_weights(model: Any4D, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        model.dpt_feature_head.scratch.refinenet2.resConfUnit1.conv1.bias[3] = 1e5
    expected = run(model, views())
    hosted = Hosted(model, monkeypatch)
    for module in model.modules():
        if isinstance(kept := getattr(module, "derived", None), Derived):
            kept.clear()
    assert equal(run(model, views()), expected)
    first = len(hosted.copied)
    assert equal(run(model, views()), expected) and hosted.all_back()
    wanted = {p.data_ptr() for p in host_weights.head_parameters(model) if p.ndim > 1}
    # To derive from and to run again with, then only to run again with.
    assert set(hosted.copied[first:]) <= wanted and first > len(hosted.copied) - first > 0


def test_float32_tokenizers_and_heads_borrow_theirs(model: Any4D, monkeypatch: pytest.MonkeyPatch) -> None:
    given = views(2, KEYS)
    expected = run(model, given, torch.float32)
    hosted = Hosted(model, monkeypatch)
    monkeypatch.setattr("any4d_fast.modules.encoder.require_here", lambda *_: None)
    assert equal(run(model, given, torch.float32), expected) and hosted.all_back()
    assert {p.data_ptr() for p in model.ray_dirs_encoder.parameters() if p.ndim > 1} <= set(hosted.copied)


def test_packing_keeps_objects_values_and_outputs(model: Any4D) -> None:
    expected, objects = run(model, views()), list(model.parameters())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert model.pack_weights_() is model
    assert equal(run(model, views()), expected)
    assert model.unpack_weights_() is model
    assert all(a is b for a, b in zip(model.parameters(), objects, strict=True))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert equal(run(copy.deepcopy(model.pack_weights_("cpu")), views()), expected)


def test_what_needs_float32_weights_says_so() -> None:
    weight = torch.zeros(2, 2)
    require_here("encoder", weight, weight)
    with pytest.raises(RuntimeError, match=r"encoder: expected float32 weights on meta.*unpack_weights_\(\)"):
        require_here("encoder", weight, weight.to("meta"))


def test_from_pretrained_packs(model: Any4D, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_safetensors(model.state_dict(), aliases(model), model.config, path)
    found = Any4D.from_pretrained(path, weights="packed", device="cpu")
    assert not found.training
    assert equal(run(found, views()), run(model, views()))
    with pytest.raises(ValueError, match='weights: expected "float32" or "packed", got \'int4\''):
        Any4D.from_pretrained(path, weights="int4")
