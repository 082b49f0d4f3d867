"""Triton `layer_norm` against the float64 oracle: in the interpreter, and on a GPU at the model's sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from any4d_fast import testing
from any4d_fast.ops.layer_norm import layer_norm
from any4d_fast.reference.layer_norm import layer_norm as reference
from tests.kernels_common import DEVICE, GPU, gpu_only, kernel_test

pytestmark = kernel_test

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [8, 48, 100, 768]


def inputs(rows: int, channels: int, dtype: torch.dtype, parameters: torch.dtype) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(rows * 1009 + channels)
    x = torch.randn(rows, channels, generator=generator) * 3 + 1
    weight = torch.randn(channels, generator=generator)
    bias = torch.randn(channels, generator=generator)
    return [x.to(DEVICE, dtype), weight.to(DEVICE, parameters), bias.to(DEVICE, parameters)]


def check(given: list[Tensor | None], out_dtype: torch.dtype | None = None) -> None:
    """Forward and every gradient within the budget that plain PyTorch sets."""
    x = given[0]
    assert x is not None
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, out_dtype or x.dtype)
    wide = [None if t is None else t.double() for t in given]
    with torch.no_grad():
        oracle, plain = reference(*wide), reference(*given, out_dtype=out_dtype)  # type: ignore[arg-type]
    oracles = testing.gradients(reference, wide, [cotangent.double()])
    plains = testing.gradients(lambda *a: reference(*a, out_dtype=out_dtype), given, [cotangent])
    with testing.poisoned_empty():
        actual = layer_norm(*given, out_dtype=out_dtype, backend="triton")  # type: ignore[arg-type]
        grads = testing.gradients(lambda *a: layer_norm(*a, out_dtype=out_dtype, backend="triton"), given, [cotangent])
    assert actual.dtype == plain.dtype
    testing.assert_within_budget(actual, oracle, plain)
    for name, grad, exact, base, source in zip(("x", "weight", "bias"), grads, oracles, plains, given, strict=True):
        if source is not None:
            assert grad is not None and exact is not None and base is not None and grad.dtype == source.dtype
            testing.assert_within_budget(grad, exact, base, name=f"gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("rows", [1, 7, 33])
def test_parity(rows: int, channels: int, dtype: torch.dtype) -> None:
    check(inputs(rows, channels, dtype, torch.float32))


@pytest.mark.parametrize("channels", [1000, 1024, 1537, 4096])
def test_parity_of_wide_rows(channels: int) -> None:
    check(inputs(5, channels, torch.bfloat16, torch.bfloat16))


def test_one_channel_is_its_own_mean() -> None:
    x, weight, bias = inputs(7, 1, torch.float32, torch.float32)
    assert x is not None and bias is not None
    assert torch.equal(layer_norm(x, weight, bias, backend="triton"), bias.expand(7, 1))


@pytest.mark.parametrize("missing", [(1,), (2,), (1, 2)])
def test_without_parameters(missing: tuple[int, ...]) -> None:
    given = inputs(5, 48, torch.float32, torch.float32)
    check([None if i in missing else t for i, t in enumerate(given)])


def test_sixteen_bits_out_of_a_float32_stream() -> None:
    check(inputs(9, 96, torch.float32, torch.float32), out_dtype=torch.bfloat16)


def test_large_mean_does_not_cancel() -> None:
    given = inputs(4, 64, torch.float32, torch.float32)
    assert given[0] is not None
    given[0] += 1000.0
    check(given)


@pytest.mark.parametrize("kind", ["transposed", "rows", "columns", "expanded"])
def test_non_contiguous(kind: str) -> None:
    base = torch.randn(12, 12, 24, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    views = {
        "transposed": base[0].T,
        "rows": base[:, ::3],
        "columns": base[..., ::2],
        "expanded": base[:1, :, :].expand(3, 12, 24),
    }
    x = views[kind]
    weight = torch.randn(2 * x.shape[-1], generator=torch.Generator().manual_seed(3)).to(DEVICE)[::2]
    torch.testing.assert_close(layer_norm(x, weight, backend="triton"), reference(x, weight), rtol=0, atol=4e-6)
    grads = []
    for op in (lambda t, w: layer_norm(t, w, backend="triton"), reference):
        leaf, gain = x.detach().requires_grad_(), weight.detach().requires_grad_()
        cotangent = base[..., : x.shape[-1]].reshape(-1)[: x.numel()].reshape(x.shape[::-1])
        out = op(leaf, gain)
        grads.append(torch.autograd.grad(out.permute(*range(out.ndim)[::-1]), (leaf, gain), cotangent))
    # Both sum at most 144 float32 terms of order one, in different orders.
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 48)])
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    weight = torch.randn(shape[-1], device=DEVICE, requires_grad=True)
    bias = torch.randn(shape[-1], device=DEVICE, requires_grad=True)
    with testing.poisoned_empty():
        out = layer_norm(x, weight, bias, backend="triton")
        grads = torch.autograd.grad(out.sum(), (x, weight, bias))
    assert out.shape == shape and grads[0].shape == shape
    assert grads[1].eq(0).all() and grads[2].eq(0).all()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_the_gradients_that_are_needed(wanted: tuple[int, ...]) -> None:
    given = inputs(6, 16, torch.float32, torch.float32)
    grads = []
    for op in (lambda *a: layer_norm(*a, backend="triton"), reference):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(given) if t is not None]
        op(*leaves).square().sum().backward()
        grads.append([leaves[i].grad for i in wanted])
        assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i not in wanted)
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)  # float32 sums in different orders


def test_gradients_are_deterministic() -> None:
    given = inputs(20000 if GPU else 60, 768 if GPU else 48, torch.bfloat16, torch.float32)
    cotangent = torch.randn_like(given[0])  # type: ignore[arg-type]
    runs = [testing.gradients(lambda *a: layer_norm(*a, backend="triton"), given, [cotangent]) for _ in range(3)]
    for run in runs[1:]:
        for first, again in zip(runs[0], run, strict=True):
            assert first is not None and again is not None and torch.equal(first, again)


def test_opcheck() -> None:
    x, weight, bias = (t.requires_grad_() for t in inputs(5, 24, torch.float32, torch.float32) if t is not None)
    ops = torch.ops.any4d_fast
    forward = (x.detach(), weight.detach(), bias.detach(), 1e-6, torch.bfloat16)
    torch.library.opcheck(ops.layer_norm_forward.default, forward)
    torch.library.opcheck(ops.layer_norm_forward.default, (x.detach(), None, None, 1e-6, torch.float32))
    _, mean, rstd = ops.layer_norm_forward(*forward)
    grad = torch.randn(5, 24, device=DEVICE)
    for flags in ((True, torch.float32, torch.float32), (False, None, torch.float32), (True, None, None)):
        torch.library.opcheck(ops.layer_norm_backward.default, (grad, x.detach(), weight.detach(), mean, rstd, *flags))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_forward_and_backward(dynamic: bool) -> None:
    def step(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer_norm(x * 1.0, weight, bias, backend="triton").square()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (5, 9):
        given = [t.requires_grad_() for t in inputs(rows, 24, torch.float32, torch.float32) if t is not None]
        actual = torch.autograd.grad(compiled(*given).sum(), given)
        for grad, expected in zip(actual, torch.autograd.grad(step(*given).sum(), given), strict=True):
            torch.testing.assert_close(grad, expected)


class TestOnGpu:
    """The model's sizes, and offsets beyond 2^31 elements."""

    pytestmark = gpu_only

    @pytest.mark.parametrize("channels", [768, 1024])
    @pytest.mark.parametrize("rows", [887, 1777, 36409])
    def test_model_sizes(self, rows: int, channels: int) -> None:
        check(inputs(rows, channels, torch.bfloat16, torch.float32))
        check(inputs(rows, channels, torch.float32, torch.float32), out_dtype=torch.bfloat16)

    def test_offsets_beyond_32_bits(self) -> None:
        rows, channels = 2**31 // 1024 + 100, 1024
        x = torch.zeros(rows, channels, device=DEVICE, dtype=torch.bfloat16)
        x[-64:] = torch.randn(64, channels, device=DEVICE)
        x.requires_grad_()
        out = layer_norm(x, backend="triton")
        torch.testing.assert_close(out[-64:], reference(x[-64:]), rtol=2**-7, atol=1e-6)
        (grad,) = torch.autograd.grad(out, x, out.detach() * 2 + 1)
        tail = x[-64:].detach().requires_grad_()
        (expected,) = torch.autograd.grad(reference(tail), tail, out[-64:].detach() * 2 + 1)
        assert testing.relative_error(grad[-64:], expected) < 0.05  # the gradient nearly cancels; bfloat16 of terms ~2
