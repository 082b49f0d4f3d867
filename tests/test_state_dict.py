"""The state dict: exactly upstream's keys, shapes and aliases, and strict loading at full size."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from any4d_fast import Any4D
from any4d_fast.checkpoint import aliases, load_checkpoint
from tests.golden_cases import CASES, FOLDER, load_case

Listing = dict[str, dict[str, Any]]


def listing(name: str) -> Listing:
    """State-dict keys of the original: shape, and the parameter that each is a name of (null: a buffer)."""
    found: Listing = json.loads((FOLDER / f"{name}.state_dict.json").read_text())
    return found


@pytest.mark.parametrize("name", [*CASES, "released_checkpoint"])
def test_the_state_dict_is_upstreams(name: str) -> None:
    expected = listing(name)
    with torch.device("meta"):
        model = Any4D.from_preset("any4d") if name == "released_checkpoint" else Any4D(**load_case(name)["config"])
    state = model.state_dict(keep_vars=True)
    assert set(state) == set(expected)
    assert {k: list(v.shape) for k, v in state.items()} == {k: v["shape"] for k, v in expected.items()}
    for key, described in expected.items():
        if described["canonical"] is None:
            assert not isinstance(state[key], nn.Parameter), key
        else:
            assert state[key] is state[described["canonical"]], key
    assert aliases(model) == {key: v["canonical"] or key for key, v in expected.items()}
    assert {name for name, _ in model.named_parameters()} == {v["canonical"] for v in expected.values()} - {None}


def test_a_full_size_checkpoint_loads_strictly_and_saves_with_the_same_keys(tmp_path: Path) -> None:
    expected = listing("released_checkpoint")
    assert len(expected) == 1034
    values = {k: float(zlib.crc32(k.encode()) % 256) for k in expected}
    # One number a tensor, repeated by strides: the file is small, what is loaded has its full shape.
    tensors = {k: torch.tensor(values[v["canonical"] or k]).expand(v["shape"]) for k, v in expected.items()}
    path = tmp_path / "any4d.pth"
    torch.save({"model": tensors}, path)
    with torch.device("meta"):
        model = Any4D.from_preset("any4d")
    # Only loading fills these 1.2 GB; numbers up to 256 survive bfloat16, and float32 would take twice the memory.
    model = model.bfloat16().to_empty(device="cpu")
    assert not load_checkpoint(model, path)
    state = model.state_dict()
    assert set(state) == set(expected)
    for key, described in expected.items():
        number = values[described["canonical"] or key]
        flat = state[key].flatten()
        assert flat[0] == number and flat[-1] == number, key
