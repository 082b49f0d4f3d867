"""What somebody has put into a layer's place, or listens to it, has its say in every precision."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from any4d_fast import Any4D
from any4d_fast.head_precision import use_head_dtype
from any4d_fast.testing import relative_error
from tests.replicas import replica_of
from tests.small_models import small_model

LAYERS = [
    "encoder.model.patch_embed.proj",
    "encoder.model.blocks.0.attn.qkv",
    "ray_dirs_encoder.conv_in",
    "ray_dirs_encoder.encoder.0.conv1",
    "ray_dirs_encoder.encoder.0.shortcut",
    "info_sharing.proj_embed",
    "info_sharing.self_attention_blocks.0.mlp.fc1",
    "dpt_feature_head.input_process.0.0.0",
    "dpt_feature_head.scratch.refinenet1.resConfUnit1.conv1",
    "dpt_feature_head.scratch.refinenet1.out_conv",
    "scene_flow_dpt_regressor_head.conv1",
    "dpt_regressor_head.conv2.0",
    "dpt_regressor_head.conv2.2",
    "pose_head.proj",
    "pose_head.res_conv.0.res_conv1",
    "pose_head.fc_rot",
]
MODES = ["float32", "autocast", "heads in 16 bits"]


class Adapter(nn.Module):
    """As adapter libraries have it: what it adds is a parameter of its own, `weight` and `bias` are the layer's."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        noise = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))
        self.delta = nn.Parameter(noise * layer.weight.detach().std())

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight + self.delta, self.bias
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, self.layer.stride, self.layer.padding)


@pytest.fixture(scope="module")
def views() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"img": (1, 3, 28, 42), "ray_directions_cam": (1, 28, 42, 3)}
    return [{key: torch.rand(size, generator=generator) for key, size in sizes.items()} for _ in range(2)]


@pytest.fixture(scope="module")
def model() -> Any4D:
    return small_model()


def run(model: nn.Module, views: list[dict[str, Any]], mode: str) -> list[dict[str, Tensor]]:
    """Without gradients, in one of `MODES`."""
    heads = torch.float16 if mode == MODES[2] else None
    mixed = torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode != MODES[0])
    with torch.no_grad(), mixed, use_head_dtype(heads):
        out: list[dict[str, Tensor]] = model(views)
    return out


def difference(ours: list[dict[str, Tensor]], others: list[dict[str, Tensor]]) -> float:
    """The largest of all outputs."""
    pairs = [(a[key], b[key]) for a, b in zip(ours, others, strict=True) for key in a if a[key].is_floating_point()]
    return max(relative_error(a, b) for a, b in pairs)


def adapted(model: Any4D, name: str) -> tuple[Any4D, Adapter]:
    """A copy with an adapter in the place of one layer."""
    changed = copy.deepcopy(model)
    adapter = Adapter(changed.get_submodule(name))  # type: ignore[arg-type]
    parent, _, attribute = name.rpartition(".")
    setattr(changed.get_submodule(parent), attribute, adapter)
    return changed, adapter


@pytest.mark.parametrize("name", LAYERS)
def test_an_adapter_is_never_passed_over(name: str, model: Any4D, views: list[dict[str, Any]]) -> None:
    ours, adapter = adapted(model, name)
    merged = copy.deepcopy(model)
    with torch.no_grad():
        merged.get_submodule(name).weight.add_(adapter.delta)  # type: ignore[operator]
    for mode in MODES:
        found, expected, before = (run(m, views, mode) for m in (ours, merged, model))
        noise = difference(run(model, views, MODES[1]), run(model, views, mode)) if mode == MODES[2] else 0.0
        moved = difference(expected, before)
        assert difference(found, expected) <= max(0.2 * moved, 2 * noise), mode  # without it: all of `moved`
        assert moved > 4 * noise, mode  # so that the line above says something
    sum(v.float().square().sum() for view in ours(views) for v in view.values()).backward()
    assert adapter.delta.grad is not None and float(adapter.delta.grad.norm()) > 0


@pytest.mark.parametrize("name", [name for name in LAYERS if "attn" not in name])
def test_a_hook_is_always_called(name: str, model: Any4D, views: list[dict[str, Any]]) -> None:
    calls: list[None] = []
    handle = model.get_submodule(name).register_forward_hook(lambda *_: calls.append(None))
    try:
        for mode in MODES:
            calls.clear()
            run(model, views, mode)
            assert calls, mode
    finally:
        handle.remove()


def test_a_parametrized_last_convolution(model: Any4D, views: list[dict[str, Any]]) -> None:
    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    halved, ours = copy.deepcopy(model), copy.deepcopy(model)
    nn.utils.parametrize.register_parametrization(ours.dpt_regressor_head.conv2[0], "weight", Half())
    with torch.no_grad():
        halved.dpt_regressor_head.conv2[0].weight.div_(2)  # type: ignore[operator]
    for mode in MODES[:2]:
        assert difference(run(ours, views, mode), run(halved, views, mode)) < 1e-6  # float32's rounding


@pytest.mark.parametrize("mode", MODES)
def test_replicas_of_data_parallel(mode: str, model: Any4D, views: list[dict[str, Any]]) -> None:
    """They share everything but their weights, which are other tensors at every call."""
    ours = copy.deepcopy(model)
    expected = run(ours, views, MODES[1] if mode == MODES[2] else mode)
    for _ in range(2):
        assert difference(run(replica_of(ours), views, mode), expected) < 1e-2  # bfloat16's; 16-bit heads are not used
    with torch.no_grad():
        ours.encoder.model.blocks[0].attn.qkv.weight.mul_(3)  # type: ignore[union-attr,operator]
    changed = run(copy.deepcopy(ours), views, MODES[1] if mode == MODES[2] else mode)
    assert difference(changed, expected) > 0.05
    assert difference(run(replica_of(ours), views, mode), changed) < 1e-2


def test_replicas_train(model: Any4D, views: list[dict[str, Any]]) -> None:
    ours = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16), use_head_dtype(torch.float16):
        sum(v.float().square().sum() for view in replica_of(ours)(views) for v in view.values()).backward()
    given = ("depth", "cam_rot", "cam_trans", "scene_flow_encoder")  # inputs that nobody gave
    missing = [name for name, p in ours.named_parameters() if p.grad is None and not name.startswith(given)]
    assert not missing
