"""Triton `linear_gelu` and `linear_residual` against the float64 oracle, in the interpreter and on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from any4d_fast import testing
from any4d_fast.ops.linear_gelu import linear_gelu, linear_residual
from any4d_fast.reference.linear_gelu import linear_gelu as reference_gelu
from any4d_fast.reference.linear_gelu import linear_residual as reference_residual
from tests.kernels_common import DEVICE, INTERPRETING, gpu_only, kernel_test

pytestmark = kernel_test

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 8, 48), (7, 100, 33), (33, 48, 100), (33, 96, 768)]  # rows, inputs, outputs


def inputs(rows: int, k: int, n: int, dtype: torch.dtype, residual: bool) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(rows * 1009 + k + n)
    x, weight = torch.randn(rows, k, generator=generator), torch.randn(n, k, generator=generator)
    bias, gamma = torch.randn(n, generator=generator), torch.randn(n, generator=generator)
    stream = torch.randn(rows, n, generator=generator)
    given: list[Tensor | None] = [x.to(DEVICE, dtype), (weight * k**-0.5).to(DEVICE, dtype), bias.to(DEVICE)]
    return [*given, stream.to(DEVICE), gamma.to(DEVICE)] if residual else given


def check(
    op: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    given: list[Tensor | None],
    row_scale: Tensor | None = None,
    rows_per_scale: int = 1,
) -> None:
    """Forward and every gradient within the budget that plain PyTorch sets."""
    options = {} if row_scale is None else {"row_scale": row_scale, "rows_per_scale": rows_per_scale}
    wide_options = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    wide = [None if t is None else t.double() for t in given]
    with testing.poisoned_empty(), torch.no_grad():
        actual = op(*given, backend="triton", **options)
    with torch.no_grad():
        oracle, plain = reference(*wide, **wide_options), reference(*given, **options)
    assert actual.dtype == plain.dtype
    first = given[0]
    assert first is not None
    testing.assert_within_budget(actual, oracle, plain)
    cotangent = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, actual.dtype)
    with testing.poisoned_empty():
        grads = testing.gradients(lambda *a: op(*a, backend="triton", **options), given, [cotangent])
    oracles = testing.gradients(lambda *a: reference(*a, **wide_options), wide, [cotangent.double()])
    plains = testing.gradients(lambda *a: reference(*a, **options), given, [cotangent])
    names = ("x", "weight", "bias", "residual", "gamma")
    for name, grad, exact, base in zip(names, grads, oracles, plains, strict=False):
        assert (grad is None) == (base is None), name
        if grad is not None and exact is not None and base is not None:
            assert grad.dtype == base.dtype
            # Gradients go through matmuls in x's dtype: one rounding step of that dtype.
            testing.assert_within_budget(grad, exact, base, name=f"gradient of {name}", rounding=first.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_gelu_parity(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(linear_gelu, reference_gelu, inputs(*size, dtype, residual=False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_residual_parity(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(linear_residual, reference_residual, inputs(*size, dtype, residual=True))


@pytest.mark.parametrize("missing", [(2,), (4,), (2, 4)])
def test_without_parameters(missing: tuple[int, ...]) -> None:
    given = [None if i in missing else t for i, t in enumerate(inputs(9, 24, 48, torch.bfloat16, residual=True))]
    check(linear_residual, reference_residual, given)
    if 4 not in missing:
        check(linear_gelu, reference_gelu, given[:3])


@pytest.mark.parametrize("rows_per_scale", [1, 4])
def test_stochastic_depth(rows_per_scale: int) -> None:
    scale = torch.tensor([1.25, 0.0, 0.5] * (4 // rows_per_scale), device=DEVICE)
    given = inputs(12, 24, 48, torch.bfloat16, residual=True)
    check(linear_residual, reference_residual, given, scale, rows_per_scale)
    with torch.no_grad():
        out = linear_residual(
            *given,
            row_scale=scale,
            rows_per_scale=rows_per_scale,
            backend="triton",  # type: ignore[arg-type]
        )
    dropped = (scale == 0).repeat_interleave(rows_per_scale)
    assert given[3] is not None and torch.equal(out[dropped], given[3][dropped])


def test_gelu_of_extreme_values() -> None:
    values = torch.tensor([-3e4, -300.0, -20.0, -4.3, -4.2, -1.0, 0.0, 1.0, 4.2, 4.3, 20.0, 300.0, 3e4])
    for dtype in DTYPES:
        x, weight = torch.zeros(1, 8, device=DEVICE, dtype=dtype), torch.zeros(13, 8, device=DEVICE, dtype=dtype)
        bias = values.to(DEVICE).requires_grad_()
        out = linear_gelu(x, weight, bias, backend="triton")
        (grad,) = torch.autograd.grad(out.sum(), bias)
        wide = values.double().to(DEVICE).requires_grad_()
        exact = torch.nn.functional.gelu(wide)
        (exact_grad,) = torch.autograd.grad(exact.sum(), wide)
        # The 16-bit polynomial errs by 4.6e-5 at most, and the result is rounded; derivatives see a rounded input.
        rounding = testing.ROUNDING[dtype]
        torch.testing.assert_close(out[0].double(), exact, rtol=rounding, atol=1e-6 if dtype == torch.float32 else 5e-5)
        torch.testing.assert_close(grad.double(), exact_grad, rtol=2 * rounding, atol=2 * rounding)


def test_polynomial_close_to_erf_everywhere() -> None:
    grid = torch.linspace(-7, 7, 2001, device=DEVICE)
    x, weight = torch.zeros(1, 8, device=DEVICE), torch.zeros(2001, 8, device=DEVICE)
    from any4d_fast.kernels.linear_gelu import linear_gelu_forward

    out, _ = linear_gelu_forward(x, weight, grid, False, exact=False)
    error = (out[0].double() - torch.nn.functional.gelu(grid.double())).abs().max().item()
    assert error < 4.7e-5  # the fit's own error bound, stated at the kernel


@pytest.mark.parametrize("aligned", [True, False])
def test_non_contiguous(aligned: bool) -> None:
    """Rows 16-byte aligned go through descriptors, others through pointers."""
    step = 64 if aligned else 61
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(9, step, generator=generator).to(DEVICE)[:, :24]
    weight = torch.randn(48, step, generator=generator).to(DEVICE)[:, :24]
    residual = torch.randn(48, 9, generator=generator).to(DEVICE).T
    bias, gamma = (torch.randn(96, generator=generator).to(DEVICE)[::2] for _ in range(2))
    for op, reference, arguments in (
        (linear_gelu, reference_gelu, (x, weight, bias)),
        (linear_residual, reference_residual, (x, weight, bias, residual, gamma)),
    ):
        grads = []
        for function in (lambda *a, op=op: op(*a, backend="triton"), reference):
            leaves = [t.detach().requires_grad_() for t in arguments]
            out = function(*leaves)
            grads.append([out, *torch.autograd.grad(out.T.square().sum(), leaves)])
        for actual, expected in zip(*grads, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)  # float32 sums of up to 200 terms


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    residual = torch.empty(*shape[:-1], 6, device=DEVICE, requires_grad=True)
    weight, bias, gamma = (torch.randn(*s, device=DEVICE, requires_grad=True) for s in ((6, 8), (6,), (6,)))
    for out, leaves in (
        (linear_gelu(x, weight, bias, backend="triton"), (x, weight, bias)),
        (linear_residual(x, weight, bias, residual, gamma, backend="triton"), (x, weight, bias, residual, gamma)),
    ):
        assert out.shape == (*shape[:-1], 6)
        assert all(g.eq(0).all() for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 4)])
def test_only_the_gradients_that_are_needed(wanted: tuple[int, ...]) -> None:
    given = inputs(6, 16, 24, torch.float32, residual=True)
    for op, reference, count in ((linear_gelu, reference_gelu, 3), (linear_residual, reference_residual, 5)):
        chosen = [i for i in wanted if i < count]
        if not chosen:
            continue
        grads = []
        for function in (lambda *a, op=op: op(*a, backend="triton"), reference):
            leaves = [t.clone().requires_grad_(i in chosen) for i, t in enumerate(given[:count]) if t is not None]
            function(*leaves).square().sum().backward()
            grads.append([leaf.grad for leaf in leaves])
        for actual, expected in zip(*grads, strict=True):
            assert (actual is None) == (expected is None)
            if actual is not None:
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)  # float32 sums, other order


def test_opcheck() -> None:
    x, weight, bias, residual, gamma = inputs(6, 16, 24, torch.float32, residual=True)
    scale = torch.ones(3, device=DEVICE)
    ops = torch.ops.any4d_fast
    torch.library.opcheck(ops.linear_gelu_forward.default, (x, weight, bias, True))
    torch.library.opcheck(ops.linear_gelu_forward.default, (x, weight, None, False))
    out, pre = ops.linear_gelu_forward(x, weight, bias, True)
    for flags in ((True, torch.float32, torch.float32), (False, torch.bfloat16, None), (True, None, torch.bfloat16)):
        torch.library.opcheck(ops.linear_gelu_backward.default, (out, x, weight, pre, *flags))
    torch.library.opcheck(ops.linear_residual_forward.default, (x, weight, bias, residual, gamma, scale, 2))
    torch.library.opcheck(ops.linear_residual_forward.default, (x, weight, None, residual, None, None, 1))
    kept = (residual, x, weight, bias, gamma, scale, 2)
    for wanted in ((True, True, torch.float32, torch.float32), (False, False, None, torch.float32)):
        torch.library.opcheck(ops.linear_residual_backward.default, (*kept, *wanted))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_forward_and_backward(dynamic: bool) -> None:
    def step(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, gamma: Tensor) -> Tensor:
        hidden = linear_gelu(x, weight, bias, backend="triton")
        return linear_residual(hidden, weight.T.contiguous(), None, residual, gamma, backend="triton").square()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (5, 9):
        given = inputs(rows, 16, 24, torch.float32, residual=True)
        given[3:] = inputs(rows, 24, 16, torch.float32, residual=True)[3:]
        leaves = [t.requires_grad_() for t in given if t is not None]
        actual = torch.autograd.grad(compiled(*leaves).sum(), leaves)
        for grad, expected in zip(actual, torch.autograd.grad(step(*leaves).sum(), leaves), strict=True):
            torch.testing.assert_close(grad, expected)


def test_inference_keeps_no_pre_activation() -> None:
    x, weight, bias = inputs(5, 16, 24, torch.float32, residual=False)
    out, pre = torch.ops.any4d_fast.linear_gelu_forward(x, weight, bias, False)
    assert pre.numel() == 0
    with torch.no_grad():
        assert torch.equal(linear_gelu(x, weight, bias, backend="triton"), out)  # type: ignore[arg-type]


@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
def test_every_tile_gives_the_same(tma: bool, parts: int) -> None:
    from any4d_fast.kernels._linear import LinearTile
    from any4d_fast.kernels.linear_gelu import linear_gelu_forward

    x, weight, bias = inputs(70, 48, 96, torch.bfloat16, residual=False)
    assert x is not None and weight is not None
    tile = LinearTile(m=64 if not INTERPRETING else 32, n=64, k=32, warps=4, stages=2, parts=parts, group=2, tma=tma)
    with testing.poisoned_empty():
        out, pre = linear_gelu_forward(x, weight, bias, True, tile=tile)
    oracle = x.double() @ weight.double().T + bias.double()  # type: ignore[union-attr]
    assert testing.relative_error(pre, oracle) < testing.ROUNDING[torch.bfloat16]
    assert testing.relative_error(out, torch.nn.functional.gelu(oracle)) < testing.ROUNDING[torch.bfloat16]


class TestOnGpu:
    """The model's sizes, both kernels of sm_90, and offsets beyond 2^31 elements."""

    pytestmark = gpu_only

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("rows", [887, 1777, 36409])
    def test_model_sizes(self, rows: int, dtype: torch.dtype) -> None:
        check(linear_gelu, reference_gelu, inputs(rows, 768, 3072, dtype, residual=False))
        check(linear_residual, reference_residual, inputs(rows, 3072, 768, dtype, residual=True))

    def test_cublas_backend(self) -> None:
        given = inputs(887, 768, 3072, torch.bfloat16, residual=True)
        for op, reference, count in ((linear_gelu, reference_gelu, 3), (linear_residual, reference_residual, 5)):
            oracle = reference(*(t.double() for t in given[:count] if t is not None))
            actual = op(*given[:count], backend="cublas")
            testing.assert_within_budget(actual, oracle, reference(*given[:count]))

    def test_offsets_beyond_32_bits(self) -> None:
        rows, k, n = 2**31 // 4096 + 300, 64, 4096
        x = torch.zeros(rows, k, device=DEVICE, dtype=torch.bfloat16)
        x[-200:] = torch.randn(200, k, device=DEVICE)
        weight = torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16)
        with torch.no_grad():
            out = linear_gelu(x, weight, backend="triton")
            expected = reference_gelu(x[-200:].double(), weight.double())
        assert testing.relative_error(out[-200:], expected) < testing.ROUNDING[torch.bfloat16]
        assert out[0].eq(0).all()
