"""Packed weights on a GPU: the same bits, two gigabytes less, and nothing that goes unseen."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from any4d_fast import Any4D
from any4d_fast.head_precision import use_head_dtype
from any4d_fast.profile import make_views
from any4d_fast.work import MODALITIES
from tests.golden_cases import golden_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (make test-gpu)"),
]
CUDA = torch.device("cuda")


@pytest.fixture
def model() -> Iterator[Any4D]:
    torch.manual_seed(0)
    with CUDA:
        made = Any4D.from_preset("any4d").eval()
    golden_weights(made, torch.Generator("cuda").manual_seed(0))
    yield made
    del made
    gc.collect()
    torch.cuda.empty_cache()


def views(given: bool = False) -> list[dict[str, Any]]:
    return make_views(1, 2, 336, 518, MODALITIES if given else (), CUDA)


def run(model: Any4D, views: list[dict[str, Any]], graphs: bool | None = False) -> list[dict[str, Tensor]]:
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        found: list[dict[str, Tensor]] = model(views, cuda_graphs=graphs)
    return found


def equal(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> bool:
    """The same numbers; what leaves every range is NaN in both."""
    pairs = [(a[key], b[key]) for a, b in zip(found, expected, strict=True) for key in b]
    return all(bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in pairs)


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("given", [False, True])
def test_same_bits_less_memory(model: Any4D, given: bool) -> None:
    expected = run(model, views(given))
    before = allocated()
    model.pack_weights_()
    assert equal(run(model, views(given)), expected)
    for _ in range(3):
        assert equal(run(model, views(given), graphs=True), expected)
    model._graphs.clear()
    saved = before - allocated()
    print(f"saved {saved / 1e9:.2f} GB")
    assert saved > 2.3e9
    model.unpack_weights_()
    assert all(p.is_cuda for p in model.parameters())
    assert equal(run(model, views(given)), expected)


def test_changes_are_seen(model: Any4D) -> None:
    twin = copy.deepcopy(model)
    model.pack_weights_()
    run(model, views(), graphs=True)
    weight = model.encoder.model.blocks[3].mlp.fc1.weight
    assert weight.device.type == "cpu" and model.scale_token.is_cuda
    with torch.no_grad():
        weight.mul_(-1)
        twin.encoder.model.blocks[3].mlp.fc1.weight.mul_(-1)
    expected = run(twin, views())
    for graphs in (True, False):
        assert equal(run(model, views(), graphs), expected)
    assert equal(run(copy.deepcopy(model), views()), expected)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.9)
    model.load_state_dict(twin.state_dict())
    assert weight.device.type == "cpu"
    for graphs in (True, False):
        assert equal(run(model, views(), graphs), run(twin, views()))
    model.to("cuda")
    assert weight.is_cuda
    assert equal(run(model, views()), run(twin, views()))


def test_what_leaves_the_range_runs_again_and_float32_heads_run(model: Any4D) -> None:
    for place in (model.dpt_feature_head.scratch.refinenet2.resConfUnit1.conv1.bias,
                  model.depth_encoder.encoder[0].conv1.bias):  # fmt: skip
        with torch.no_grad():
            before = place.clone()
            place[3] = 1e5
        expected = run(model, views(True))
        model.pack_weights_()
        held = allocated()
        assert equal(run(model, views(True)), expected)
        assert allocated() - held < 1.5e9  # 16-bit copies; what was borrowed is gone
        model.unpack_weights_()
        with torch.no_grad():
            place.copy_(before)
    with use_head_dtype(torch.float32):
        expected = run(model, views())
        assert equal(run(model.pack_weights_(), views()), expected)


def test_what_needs_float32_weights_is_refused(model: Any4D) -> None:
    model.pack_weights_()
    with pytest.raises(RuntimeError, match="unpack_weights_"), torch.no_grad():
        model(views())  # float32
    with pytest.raises(RuntimeError, match="unpack_weights_"), torch.autocast("cuda", dtype=torch.bfloat16):
        model(views())  # gradients
    with pytest.raises(RuntimeError, match="unpack_weights_"), torch.autocast("cuda", dtype=torch.bfloat16):
        model.train()(views())
    model.eval().unpack_weights_()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        model(views())[0]["conf"].sum().backward()


def test_from_the_host_only_vectors_and_copies_reach_the_gpu() -> None:
    before = allocated()
    model = Any4D.from_preset("any4d").eval().pack_weights_("cuda")
    assert allocated() - before < 0.04e9
    run(model, views())
    assert allocated() - before < 1.2e9
