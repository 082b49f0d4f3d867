"""Recomputed activations: the same gradients, and less kept for the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from any4d_fast import Any4D
from tests.small_models import small_config, small_model

PARTS = [("mlp",), ("heads",), ("mlp", "heads"), ("blocks",), ("mlp", "blocks", "heads")]


def model() -> Any4D:
    return small_model(small_config(drop_path=0.3, proj_drop=0.1)).train()


def inputs() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [{"img": torch.randn(1, 3, 28, 42, generator=generator)} for _ in range(3)]


def step(network: Any4D) -> tuple[list[Tensor | None], int]:
    """Gradients of every parameter, and bytes kept for the backward pass beside them."""
    kept = {p.untyped_storage().data_ptr(): 0 for p in network.parameters()}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor)  # so that no address is used twice
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = network(inputs())
    sum((v * v).mean() for o in outputs for v in o.values() if v.is_floating_point()).backward()
    return [p.grad for p in network.parameters()], sum(kept.values())


@pytest.mark.parametrize("parts", PARTS)
def test_gradients_are_identical_and_less_is_kept(parts: tuple[str, ...]) -> None:
    plain, all_kept = step(model())
    network = model()
    network.recompute_activations(*parts)
    found, kept = step(network)
    for gradient, expected in zip(found, plain, strict=True):
        assert (gradient is None) == (expected is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, expected, rtol=0, atol=0)
    assert kept < all_kept
    network.zero_grad()
    network.recompute_activations()
    assert step(network)[1] == all_kept


def test_inference_recomputes_nothing() -> None:
    network = model().eval()
    with torch.no_grad():
        expected = network(inputs())
        network.recompute_activations("mlp", "blocks", "heads")
        found = network(inputs())
    for view, other in zip(found, expected, strict=True):
        assert all(torch.equal(view[key], other[key]) for key in other)


def test_unknown_parts_are_named() -> None:
    with pytest.raises(ValueError, match=r"parts: expected 'mlp', 'blocks' or 'heads', got \['attention'\]"):
        model().recompute_activations("mlp", "attention")
