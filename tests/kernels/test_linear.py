"""`linear` with Triton's bias gradient against the float64 oracle, in the interpreter and on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from any4d_fast import testing
from any4d_fast.ops.linear import linear
from any4d_fast.ops.linear_gelu import linear_gelu
from any4d_fast.reference.linear import linear as reference
from any4d_fast.reference.linear_gelu import linear_gelu as reference_gelu
from tests.kernels_common import DEVICE, gpu_only, kernel_test

pytestmark = kernel_test

NARROW = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 8, 48), (7, 100, 33), (31, 13, 257), (133, 48, 768)]  # rows, inputs, outputs
OPS = [(linear, reference), (linear_gelu, reference_gelu)]


def inputs(rows: int, k: int, n: int, dtype: torch.dtype, parameters: torch.dtype) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(rows * 1009 + k + n)
    x, weight = torch.randn(rows, k, generator=generator), torch.randn(n, k, generator=generator) * k**-0.5
    bias = torch.randn(n, generator=generator)
    return [x.to(DEVICE, dtype), weight.to(DEVICE, parameters), bias.to(DEVICE, parameters)]


def check(op: Callable[..., Tensor], reference: Callable[..., Tensor], given: list[Tensor | None]) -> None:
    """Forward and every gradient within the budget that plain PyTorch sets, in the dtypes of what they belong to."""
    wide = [None if t is None else t.double() for t in given]
    with testing.poisoned_empty(), torch.no_grad():
        actual = op(*given, backend="triton")
    plain = reference(*given)
    assert given[0] is not None and actual.dtype == given[0].dtype
    testing.assert_within_budget(actual, reference(*wide), plain)
    cotangent = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, actual.dtype)
    with testing.poisoned_empty():
        grads = testing.gradients(lambda *a: op(*a, backend="triton"), given, [cotangent])
    oracles = testing.gradients(reference, wide, [cotangent.double()])
    plains = testing.gradients(reference, given, [cotangent])
    for name, leaf, grad, exact, base in zip(("x", "weight", "bias"), given, grads, oracles, plains, strict=True):
        assert (grad is None) == (leaf is None), name
        if leaf is not None and grad is not None and exact is not None and base is not None:
            assert grad.dtype == leaf.dtype and grad.shape == leaf.shape
            # Products are in x's dtype: one rounding step of that dtype.
            testing.assert_within_budget(grad, exact, base, name=f"gradient of {name}", rounding=actual.dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("size", SIZES)
def test_parity(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(linear, reference, inputs(*size, dtype, torch.float32))


@pytest.mark.parametrize(("dtype", "parameters"), list(itertools.permutations(NARROW, 2)))
@pytest.mark.parametrize(("op", "reference"), OPS)
def test_mixed_dtypes(op: Any, reference: Any, dtype: torch.dtype, parameters: torch.dtype) -> None:
    given = inputs(9, 24, 48, dtype, parameters)
    check(op, reference, given)
    check(op, reference, [*given[:2], None])


def test_the_bias_gradient_is_a_float32_sum_and_deterministic() -> None:
    x, weight, bias = (t.requires_grad_() for t in inputs(997, 8, 67, torch.bfloat16, torch.float32) if t is not None)
    cotangent = torch.randn(997, 67, generator=torch.Generator().manual_seed(3)).to(DEVICE, torch.bfloat16) + 1
    found = [torch.autograd.grad(linear(x, weight, bias, backend="triton"), bias, cotangent)[0] for _ in range(2)]
    assert torch.equal(*found)
    # 997 terms around one: a sum in 16 bits, or rounded to them, would be off by 2^-9 and more.
    assert testing.relative_error(found[0], cotangent.double().sum(0)) < 1e-6


def test_a_float32_weight_gets_an_unrounded_gradient_from_the_product_itself() -> None:
    """What runs on a GPU, seen on fake tensors: one product that is told its result's dtype, and no copy."""
    from any4d_fast.kernels.linear import weight_gradient

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "aten" and not func.is_view:
                calls.append(str(func))
            return func(*args, **(kwargs or {}))

    for dtype, wanted, expected in (
        (torch.bfloat16, torch.float32, ["aten.mm.dtype"]),
        (torch.float16, torch.float32, ["aten.mm.dtype"]),
        (torch.bfloat16, torch.bfloat16, ["aten.mm.default"]),
        (torch.float32, torch.float32, ["aten.mm.default"]),
        (torch.bfloat16, torch.float16, ["aten.mm.default", "aten._to_copy.default"]),
    ):
        calls: list[str] = []
        with FakeTensorMode():
            grad, x = (torch.empty(6, c, device="cuda", dtype=dtype) for c in (5, 8))
            with Calls():
                found = weight_gradient(grad, x, wanted)
        assert found.shape == (5, 8) and found.dtype == wanted and calls == expected


@pytest.mark.parametrize(("op", "reference"), OPS)
def test_non_contiguous(op: Any, reference: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 24, 7, generator=generator).to(DEVICE).transpose(1, 2)
    weight = torch.randn(24, 48, generator=generator).to(DEVICE).T
    bias = torch.randn(96, generator=generator).to(DEVICE)[::2]
    grads = []
    for function in (lambda *a: op(*a, backend="triton"), reference):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        out = function(*leaves)
        assert out.shape == (3, 7, 48)
        expanded = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
        grads.append([out, *torch.autograd.grad(out.mT.square().sum(), leaves), *expanded])
    assert grads[0][0].is_contiguous()
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)  # float32 sums of up to 200 terms


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (8,)])
def test_empty_and_single_rows(shape: tuple[int, ...]) -> None:
    leaves = [torch.ones(*s, device=DEVICE, requires_grad=True) for s in (shape, (6, 8), (6,))]
    out = linear(*leaves, backend="triton")
    assert out.shape == (*shape[:-1], 6)
    value = float(shape == (8,))
    expected = (6 * value, value, value)
    for grad, number in zip(torch.autograd.grad(out.sum(), leaves), expected, strict=True):
        assert grad.eq(number).all()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_only_the_gradients_that_are_needed(wanted: tuple[int, ...]) -> None:
    given = [t for t in inputs(6, 16, 24, torch.bfloat16, torch.float32) if t is not None]
    leaves = [t.requires_grad_(i in wanted) for i, t in enumerate(given)]
    out = linear(*leaves, backend="triton")
    saved = [t is not None for t in out.grad_fn.saved_tensors]  # type: ignore[union-attr]
    assert saved == [1 in wanted, 0 in wanted]  # the product's other factor
    out.sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [i in wanted for i in range(3)]


def test_no_copy_of_a_weight_that_fits() -> None:
    x, weight, _ = (t.requires_grad_() for t in inputs(6, 16, 24, torch.bfloat16, torch.bfloat16) if t is not None)
    out = linear(x, weight, backend="triton")  # kept: what its graph has saved goes with it
    kept = out.grad_fn.saved_tensors  # type: ignore[union-attr]
    assert [t.data_ptr() for t in kept] == [x.data_ptr(), weight.data_ptr()]


def test_autocast_changes_nothing() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [t.requires_grad_() for t in inputs(6, 16, 24, dtype, torch.float32) if t is not None]
        found = []
        for enabled in (False, True):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
                out = linear(*leaves, backend="triton")
                found.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_opcheck() -> None:
    x, weight, bias = inputs(6, 16, 24, torch.bfloat16, torch.bfloat16)
    ops = torch.ops.any4d_fast
    torch.library.opcheck(ops.linear_forward.default, (x, weight, bias))
    torch.library.opcheck(ops.linear_forward.default, (x, weight, None))
    grad = ops.linear_forward(x, weight, bias)
    for arguments in ((x, weight, torch.float32), (x, None, None), (None, weight, torch.bfloat16)):
        torch.library.opcheck(ops.linear_backward.default, (grad, *arguments[:2], torch.float32, arguments[2]))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_forward_and_backward(dynamic: bool, autocast: bool) -> None:
    def step(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            hidden = linear(x, weight, bias, backend="triton")
            return linear(linear_gelu(hidden, weight.T, None, backend="triton"), weight, backend="triton").square()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (5, 9):
        leaves = [t.requires_grad_() for t in inputs(rows, 16, 24, torch.bfloat16, torch.float32) if t is not None]
        actual = torch.autograd.grad(compiled(*leaves).sum(), leaves)
        for grad, expected in zip(actual, torch.autograd.grad(step(*leaves).sum(), leaves), strict=True):
            torch.testing.assert_close(grad, expected)


class TestOnGpu:
    """The model's sizes, the product's own float32 result, and offsets beyond 2^31 elements."""

    pytestmark = gpu_only

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("size", [(887, 768, 2304), (21313, 3072, 768), (21336, 1024, 3072)])
    def test_model_sizes(self, size: tuple[int, int, int], dtype: torch.dtype) -> None:
        check(linear, reference, inputs(*size, dtype, torch.float32))

    @pytest.mark.parametrize(("op", "backend"), [(linear, "triton"), (linear_gelu, "triton"), (linear_gelu, "cublas")])
    def test_the_weight_gradient_is_not_rounded(self, op: Any, backend: str) -> None:
        x, weight, _ = inputs(887, 768, 3072, torch.bfloat16, torch.float32)
        assert x is not None and weight is not None
        x, weight = x.abs() + 1, (weight.abs() + 1).requires_grad_()  # so that GELU is the identity
        cotangent = torch.randn(887, 3072, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16)
        (grad,) = torch.autograd.grad(op(x, weight, backend=backend), weight, cotangent)
        # Float32 sums of 887 products; rounding to bfloat16 alone would err by 1.6e-3.
        assert testing.relative_error(grad, cotangent.double().T @ x.double()) < 1e-5

    def test_no_rows(self) -> None:
        x = torch.empty(0, 16, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        weight, bias = (torch.ones(*s, device=DEVICE, requires_grad=True) for s in ((24, 16), (24,)))
        grads = torch.autograd.grad(linear(x, weight, bias, backend="triton").sum(), (x, weight, bias))
        assert all(g.eq(0).all() for g in grads)

    def test_offsets_beyond_32_bits(self) -> None:
        from any4d_fast.kernels.linear import bias_gradient

        grad = torch.zeros(2**31 // 4096 + 300, 4096, device=DEVICE, dtype=torch.bfloat16)
        grad[-200:] = torch.randn(200, 4096, device=DEVICE)
        exact = grad[-200:].double().sum(0)
        # Float32 sums, most of them of zeros.
        assert testing.relative_error(bias_gradient(grad, torch.float32), exact) < 1e-6
