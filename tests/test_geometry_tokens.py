"""Geometry beside, behind or before the encoder: the same tokens, in the order that each kind of call wants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from any4d_fast import Any4D, geometry_tokens
from any4d_fast.head_precision import use_head_dtype
from any4d_fast.modules.modalities import ModalityReader
from any4d_fast.modules.tokenizers import DenseTokenizer
from tests.golden_cases import golden_views
from tests.small_models import small_config, small_model

KEYS = ["ray_directions_cam", "depth_along_ray", "camera_pose_quats", "camera_pose_trans", "is_metric_scale"]
FEW = {"images_prob": 1, "ray_dirs_prob": 1, "depth_prob": 1, "cam_prob": 1, "overall_prob": 1, "dropout_prob": 0}


@pytest.fixture
def model() -> Any4D:
    return small_model(small_config(modalities=FEW))


def run(model: Any4D, keys: list[str]) -> list[dict[str, Tensor]]:
    with torch.no_grad(), use_head_dtype(torch.float16):
        found: list[dict[str, Tensor]] = model(golden_views(2, 1, 28, 42, 0, [keys] * 2))
    return found


def watched(model: Any4D, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    log: list[str] = []
    model.encoder.register_forward_pre_hook(lambda *_: log.append("encoder"))
    for module in model.modules():
        if isinstance(module, DenseTokenizer):
            module.register_forward_pre_hook(lambda *_: log.append("tokenizer"))
    read = ModalityReader.read
    monkeypatch.setattr(ModalityReader, "read", lambda self: (log.append("read"), read(self))[1])
    return log


def test_the_encoder_is_launched_before_inputs_are_read(model: Any4D, monkeypatch: pytest.MonkeyPatch) -> None:
    log = watched(model, monkeypatch)
    run(model, KEYS)
    assert log == ["encoder", "read", "tokenizer", "tokenizer"]


def test_what_is_drawn_is_drawn_before_the_encoder(model: Any4D, monkeypatch: pytest.MonkeyPatch) -> None:
    log = watched(model, monkeypatch)
    model.train()(golden_views(2, 1, 28, 42, 0, [KEYS] * 2))
    assert log[:2] == ["read", "encoder"]


@pytest.mark.parametrize("keys", [KEYS, []])
def test_beside_the_encoder_tokens_are_the_same(keys: list[str], model: Any4D, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, parts = run(model, keys), []

    def side_by_side(functions: Any, device: torch.device) -> list[list[Tensor]]:
        parts.append([function() for function in functions])
        return parts[-1]

    monkeypatch.setattr(geometry_tokens, "pays_side_by_side", lambda patches, like: patches == 2 * 2 * 3)
    monkeypatch.setattr(geometry_tokens, "side_by_side", side_by_side)
    found = run(model, keys)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(found, expected, strict=True) for key in b)
    assert len(parts) == bool(keys)
    if keys:  # everything that the other stream made is handed over: two maps, four vectors, and who uses them
        assert len(parts[0][1]) == 2 * (2 + 4)
