"""Linear layers of a block in training: from their parameters where they are plain, else by calling them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from any4d_fast import ops
from any4d_fast.modules import block as block_module
from any4d_fast.modules.block import Block
from any4d_fast.ops import Segments

LAYERS = {False: ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"), True: ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3")}
EVERY = [(gated, name) for gated, names in LAYERS.items() for name in names]


class Adapter(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def made(gated: bool = False) -> Block:
    torch.manual_seed(0)
    return Block(48, 3, init_values=0.5, gated=gated)


def replace(block: Block, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(block.get_submodule(parent), child, layer)


def step(block: Block, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Both results of a block, and the gradients of everything that it is given or made of (or an error)."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(12, 48, generator=generator, requires_grad=True) for _ in range(2))
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        outs = block(x, y.to(dtype or y.dtype), Segments.frame(batch=1, views=2, tokens=6), 0.25, nn.LayerNorm(48))
    assert all(isinstance(out, Tensor) for out in outs)
    parts = [p for name, p in block.named_parameters() if not name.startswith("norm1")]  # the block before applies it
    return [*outs, *torch.autograd.grad(sum(out.float().square().sum() for out in outs), (x, y, *parts))]


@pytest.fixture
def by_modules(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, layers are called as modules, whatever they are."""
    return lambda: monkeypatch.setattr(block_module, "plain_linear", lambda layer: False)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_the_same_as_calling_the_layers(
    gated: bool, dtype: torch.dtype | None, by_modules: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[torch.dtype] = []
    monkeypatch.setattr(ops, "linear", lambda x, *given, run=ops.linear: (calls.append(x.dtype), run(x, *given))[1])
    found = step(made(gated), dtype)
    expected_calls = [dtype or torch.float32] * (4 if gated else 3)  # the fourth of the plain MLP is linear_gelu's
    assert calls == expected_calls
    by_modules()
    for actual, expected in zip(found, step(made(gated), dtype), strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    assert calls == expected_calls


def test_rows_of_another_dtype_than_autocasts_go_through_the_module() -> None:
    block, y = made(), torch.randn(12, 48)
    with torch.autocast("cpu", torch.bfloat16):
        out = block.attn(y, Segments.frame(batch=1, views=2, tokens=6), 0.25)
        assert out.dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert block.attn(y, Segments.frame(batch=1, views=2, tokens=6), 0.25).dtype == torch.float32


@pytest.mark.parametrize(("gated", "name"), EVERY)
def test_an_adapter_is_called(gated: bool, name: str) -> None:
    block, scaled = made(gated), made(gated)
    layer = block.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    adapter = Adapter(layer.in_features, layer.out_features)
    adapter.load_state_dict(layer.state_dict())
    replace(block, name, adapter)
    with torch.no_grad():
        for parameter in scaled.get_submodule(name).parameters():
            parameter.mul_(2)
    for actual, expected in zip(step(block)[:4], step(scaled)[:4], strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("gated", "name"), EVERY)
def test_a_forward_replaced_on_the_instance_is_called(gated: bool, name: str) -> None:
    """As device maps and wrappers of other packages do."""
    block, calls = made(gated), []
    layer = block.get_submodule(name)
    before = layer.forward
    layer.forward = lambda x: (calls.append(name), before(x))[1]  # type: ignore[method-assign,assignment]
    for actual, expected in zip(step(block), step(made(gated)), strict=True):
        torch.testing.assert_close(actual, expected)
    assert calls == [name]


@pytest.mark.parametrize(("gated", "name"), EVERY)
def test_hooks_run(gated: bool, name: str) -> None:
    ran: list[str] = []

    def note(kind: str) -> Any:
        return lambda *_: ran.append(kind)

    block = made(gated)
    layer = block.get_submodule(name)
    layer.register_forward_pre_hook(note("before"))
    layer.register_forward_hook(note("after"))
    layer.register_full_backward_pre_hook(note("before backward"))
    layer.register_full_backward_hook(note("after backward"))
    found = step(block)
    assert ran == ["before", "after", "before backward", "after backward"]
    for actual, expected in zip(found, step(made(gated)), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("gated", "name"), EVERY)
def test_a_parametrization_takes_part(gated: bool, name: str) -> None:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    block = made(gated)
    layer = block.get_submodule(name)
    before = step(block)[0]
    parametrize.register_parametrization(layer, "weight", Double())
    assert not torch.equal(before, step(block)[0])


@pytest.mark.parametrize("gated", [False, True])
def test_the_last_product_is_not_computed_again(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(torch.autograd.Function):
        """A linear layer as the op is where Triton runs: what it saves it saves after its product."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            products.append(tuple(weight.shape))
            return nn.functional.linear(x, weight, bias)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
            x, weight = ctx.saved_tensors
            return grad @ weight, grad.T @ x, grad.sum(0)

    products: list[tuple[int, ...]] = []
    expected = step(made(gated))
    monkeypatch.setattr(ops, "linear", Counted.apply)
    block = made(gated).train()
    block.recompute_mlp = True
    found = step(block)
    first = [(144, 48), (48, 48)]  # QKV and the projection, which are not computed again
    both = (2 * 128, 48)  # a gated MLP's first layer, which is
    assert products == (first + [both, both] if gated else first)
    for actual, like in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, like)


@pytest.mark.parametrize(("gated", "name"), EVERY)
def test_a_weight_of_another_class_is_left_to_its_layer(
    gated: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A DTensor or a quantised weight knows how it is multiplied; a kernel does not."""

    class Other(Tensor):
        pass

    called: list[type] = []

    def note(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, weight, bias: (called.append(type(weight)), run(x, weight, bias))[1]

    block = made(gated)
    layer = block.get_submodule(name)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Other))
    assert type(layer) is nn.Linear and type(layer.weight) is Other
    for op in ("linear", "linear_gelu"):
        monkeypatch.setattr(ops, op, note(getattr(ops, op)))
    found = step(block)
    assert called == [nn.Parameter] * 3
    for actual, expected in zip(found, step(made(gated)), strict=True):
        torch.testing.assert_close(actual.as_subclass(Tensor), expected)
