"""What is put into a model after it was accelerated, or goes wrong while it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from any4d_fast import accelerate
from any4d_fast.integrations.recogniser import Recogniser
from any4d_fast.testing import relative_error
from tests.accelerate_cases import lively, pair
from tests.model_twins import TimmTransformer
from tests.oracles import FORWARD_BUDGET, needs_oracles

DIM = 64


class Doubled(nn.Module):
    """A layer of somebody's, or a parametrization."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.gamma = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if self.inner is None else 2 * self.inner(x)


def doubled_forward(model: nn.Module, path: str) -> None:
    """As Hugging Face's device maps replace forwards: on the instance."""
    module = model.get_submodule(path)
    before = module.forward
    module.forward = lambda x: 2 * before(x)  # type: ignore[method-assign,assignment]


def doubled(model: nn.Module, path: str) -> None:
    model.set_submodule(path, Doubled(model.get_submodule(path)))


def doubled_weight(model: nn.Module, path: str) -> None:
    nn.utils.parametrize.register_parametrization(model.get_submodule(path), "weight", Doubled())


def subclassed(model: nn.Module, path: str) -> None:
    old = model.get_submodule(path)
    before = type(old)
    old.__class__ = type("Scaled", (before,), {"forward": lambda self, x: 2 * before.forward(self, x)})


def rectified(model: nn.Module, path: str) -> None:
    model.set_submodule(path, nn.ReLU())


_LAYERS = ("norm1", "ls1", "drop_path1", "norm2", "mlp.fc1", "mlp.act", "attn.qkv", "attn.attn_drop")
_CHANGES: list[tuple[str, Callable[[nn.Module, str], None], str]] = [
    *(("timm", change, f"blocks.0.{layer}") for change in (doubled, doubled_forward) for layer in _LAYERS),
    *(("timm", doubled_weight, f"blocks.0.{layer}") for layer in ("norm1", "mlp.fc1")),
    ("timm", rectified, "blocks.0.mlp.act"),
    *(("dinov2", change, "patch_embed.proj") for change in (doubled, doubled_forward, doubled_weight, subclassed)),
    *(("dinov2", change, "patch_embed.norm") for change in (doubled, doubled_forward)),
    *(("uniception dense head", change, f"1.conv2.{i}") for change in (doubled, doubled_forward) for i in range(3)),
    *(("uniception dense head", change, "1.conv2.0") for change in (doubled_weight, subclassed)),
    *(("uniception dense head", change, "0.scratch.refinenet1.out_conv") for change in (subclassed, rectified)),
]


@pytest.mark.parametrize(
    ("name", "change", "path"),
    [pytest.param(*case, marks=[needs_oracles] if case[0] != "timm" else []) for case in _CHANGES],
)
def test_what_is_changed_afterwards_counts(name: str, change: Callable[[nn.Module, str], None], path: str) -> None:
    found = pair(name)
    with torch.no_grad():
        before = found.family.call(found.theirs, found.x, found.size)
        for model in (found.ours, found.theirs):
            change(model, path)
        ours, theirs = (found.family.call(model, found.x, found.size) for model in (found.ours, found.theirs))
    for mine, other in zip(ours, theirs, strict=True):
        assert relative_error(mine, other) <= FORWARD_BUDGET
    never = ("attn_drop", "drop_path1")  # nothing is dropped, and what takes its place is not called either
    if not path.endswith(never):
        assert any(relative_error(old, new) > 1e-4 for old, new in zip(before, theirs, strict=True))


@pytest.mark.parametrize("name", ["timm", pytest.param("dinov2", marks=needs_oracles)])
def test_shapes_without_data(name: str) -> None:
    found = pair(name)
    shapes = [
        [out.shape for out in found.family.call(model.to("meta"), found.x.detach().to("meta"), found.size)]
        for model in (found.ours, found.theirs)
    ]
    assert shapes[0] == shapes[1]


def test_an_error_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(TimmTransformer(2, DIM, 2))
    accelerate(model.get_submodule("blocks.0"))
    classes = [type(module) for module in model.modules()]

    def failing(module: nn.Module) -> list[str]:
        raise RuntimeError("no reason")

    monkeypatch.setattr(Recogniser, "why_not", lambda self, module: failing(module) if "mlp" in self.classes else [])
    with pytest.raises(RuntimeError, match="no reason"):
        accelerate(model)
    assert [type(module) for module in model.modules()] == classes
    monkeypatch.undo()
    model.get_submodule("blocks.1.attn").scale = None  # type: ignore[assignment]
    assert [line.reason for line in accelerate(model).kept] == ["scale is a NoneType, not head_dim ** -0.5"]
