"""Devices by name, checked before anything is read or moved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from any4d_fast import Any4D
from any4d_fast.devices import find_device, pick_device

WRONG = [
    ("abacus", "device: expected 'cuda', 'cuda:N' or 'cpu', got 'abacus'"),
    ("cuda:99", "device: cuda:99 is not available; PyTorch sees"),
    (1.5, r"device: expected 'cuda', 'cuda:N' or 'cpu', got 1\.5"),
]


@pytest.mark.parametrize(("device", "message"), WRONG)
def test_what_is_no_device_here(device: str, message: str, tmp_path: Path) -> None:
    model = Any4D.from_preset("tiny")
    for call in (
        lambda: find_device(device),
        lambda: pick_device(device),
        lambda: Any4D.from_pretrained(tmp_path / "not read.pth", device=device),
        lambda: model.pack_weights_(device),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_choice_is_a_gpu_or_the_cpu() -> None:
    assert pick_device("cpu") == find_device("cpu") == torch.device("cpu")
    assert pick_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert find_device("meta").type == "meta"
    with pytest.raises(ValueError, match="got 'meta'; no other kind is supported"):
        pick_device("meta")
