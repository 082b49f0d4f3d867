"""The second oracle is what it says it is, and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from tests.oracles import assert_same_gradients, dinov2, needs_oracles, upstream


@needs_oracles
def test_importing_upstreams_modules_leaves_no_stand_in_and_no_switch_behind() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    assert upstream("prediction_heads.dpt").__name__ == "uniception.models.prediction_heads.dpt"
    assert type(dinov2("dinov2_vits14_reg", depth=1)).__module__ == "depth_anything_v2.dinov2"
    for name in ("timm", "torchvision"):
        if importlib.util.find_spec(name) is None:
            assert name not in sys.modules
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_gradients_that_differ_are_noticed() -> None:
    pair = [torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)]
    pair[1].load_state_dict(pair[0].state_dict())
    x = torch.ones(1, 3)
    assert_same_gradients(*pair, [pair[0](x)], [pair[1](x)])
    for module in pair:
        module.zero_grad()
    with pytest.raises(AssertionError, match="gradient of weight"):
        assert_same_gradients(*pair, [pair[0](x)], [pair[1](1.001 * x)])
