"""Triton `residual_norm` against the float64 oracle: in the interpreter, and on a GPU at the model's sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from any4d_fast import testing
from any4d_fast.ops.residual_norm import residual_norm
from any4d_fast.reference.residual_norm import residual_norm as reference
from tests.kernels_common import DEVICE, GPU, gpu_only, kernel_test

pytestmark = kernel_test

NAMES = ("residual", "branch", "gamma", "weight", "bias")


def inputs(rows: int, channels: int, branch: torch.dtype, residual: torch.dtype = torch.float32) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(rows * 1009 + channels)
    shapes = [(rows, channels)] * 2 + [(channels,)] * 3
    dtypes = [residual, branch, torch.float32, torch.float32, torch.float32]
    return [torch.randn(*s, generator=generator).to(DEVICE, d) for s, d in zip(shapes, dtypes, strict=True)]


def cotangents(given: list[Tensor | None], out_dtype: torch.dtype, normalize: bool) -> list[Tensor]:
    assert given[0] is not None
    generator = torch.Generator().manual_seed(1)
    dtypes = [given[0].dtype, out_dtype][: 2 if normalize else 1]
    return [torch.randn(given[0].shape, generator=generator).to(DEVICE, d) for d in dtypes]


def outputs(op: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Tensor]:
    return [t for t in op(*args, **kwargs) if t is not None]


def check(given: list[Tensor | None], *, row_scale: Tensor | None = None, **options: Any) -> None:
    """Both outputs and every gradient within the budget that plain PyTorch sets."""
    branch = given[1]
    assert branch is not None
    normalize = options.get("normalize", True)
    grads = cotangents(given, options.get("out_dtype") or branch.dtype, normalize)
    wide = [None if t is None else t.double() for t in given]
    wide_scale = None if row_scale is None else row_scale.double()

    def exact(*args: Any) -> list[Tensor]:
        per = options.get("rows_per_scale", 1)
        return outputs(reference, *args, row_scale=wide_scale, rows_per_scale=per, normalize=normalize)

    def plain(*args: Any) -> list[Tensor]:
        return outputs(reference, *args, row_scale=row_scale, **options)

    def fused(*args: Any) -> list[Tensor]:
        return outputs(residual_norm, *args, row_scale=row_scale, backend="triton", **options)

    with testing.poisoned_empty(), torch.no_grad():
        actual = fused(*given)
    for name, result, oracle, base in zip(("new", "normed"), actual, exact(*wide), plain(*given), strict=False):
        assert result.dtype == base.dtype
        testing.assert_within_budget(result, oracle, base, name=name)
    with testing.poisoned_empty():
        found = testing.gradients(fused, given, grads)
    oracles = testing.gradients(exact, wide, [g.double() for g in grads])
    bases = testing.gradients(plain, given, grads)
    for name, grad, oracle, base in zip(NAMES, found, oracles, bases, strict=True):
        assert (grad is None) == (base is None), name
        if grad is not None and base is not None and oracle is not None:
            assert grad.dtype == base.dtype
            testing.assert_within_budget(grad, oracle, base, name=f"gradient of {name}")


@pytest.mark.parametrize("branch", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [8, 48, 100, 768])
@pytest.mark.parametrize("rows", [1, 7, 33])
def test_parity(rows: int, channels: int, branch: torch.dtype) -> None:
    check(inputs(rows, channels, branch))


@pytest.mark.parametrize("channels", [1024, 1537, 4096])
def test_parity_of_wide_rows(channels: int) -> None:
    check(inputs(5, channels, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_stream(dtype: torch.dtype) -> None:
    check(inputs(9, 48, dtype, residual=dtype))


@pytest.mark.parametrize("missing", [(2,), (3,), (4,), (2, 3, 4)])
def test_without_parameters(missing: tuple[int, ...]) -> None:
    given = inputs(5, 48, torch.bfloat16)
    check([None if i in missing else t for i, t in enumerate(given)])


@pytest.mark.parametrize("gamma", [True, False])
def test_without_norm(gamma: bool) -> None:
    given = inputs(7, 48, torch.bfloat16)
    check([*given[:2], given[2] if gamma else None, None, None], normalize=False)


@pytest.mark.parametrize("rows_per_scale", [1, 4, 12])
@pytest.mark.parametrize("normalize", [True, False])
def test_stochastic_depth(rows_per_scale: int, normalize: bool) -> None:
    scale = torch.tensor([1.25, 0.0, 1.0, 0.5] * 3)[: 12 // rows_per_scale].to(DEVICE)
    given = inputs(12, 48, torch.bfloat16)
    if not normalize:
        given[3:] = [None, None]
    check(given, row_scale=scale, rows_per_scale=rows_per_scale, normalize=normalize)


def test_dropped_rows_are_never_read() -> None:
    given = inputs(6, 48, torch.bfloat16)
    scale = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 1.0], device=DEVICE)
    assert given[1] is not None
    given[1][scale == 0] = torch.nan
    leaves = [t.requires_grad_() for t in given if t is not None]
    new, normed = residual_norm(*leaves, row_scale=scale, backend="triton")
    assert normed is not None and new.isfinite().all() and normed.isfinite().all()
    assert torch.equal(new[1], leaves[0][1])
    grads = torch.autograd.grad(new.sum() + normed.float().square().sum(), leaves)
    assert all(g.isfinite().all() for g in grads)
    assert grads[1][scale == 0].eq(0).all()


@pytest.mark.parametrize("output", [0, 1])
def test_one_cotangent_alone(output: int) -> None:
    given = inputs(7, 48, torch.float32)
    grads = []
    for op in (lambda *a: residual_norm(*a, backend="triton"), reference):
        leaves = [t.clone().requires_grad_() for t in given if t is not None]
        chosen = op(*leaves)[output]
        grads.append(torch.autograd.grad(chosen.square().sum(), leaves, allow_unused=True))
    for name, actual, expected in zip(NAMES, *grads, strict=True):
        assert (actual is None) == (expected is None), name
        if actual is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)  # float32 sums in different orders


def test_out_dtype() -> None:
    check(inputs(5, 48, torch.bfloat16), out_dtype=torch.float32)


@pytest.mark.parametrize("normalize", [True, False])
def test_in_place_on_a_view_of_rows(normalize: bool) -> None:
    residual, *rest = inputs(6, 48, torch.bfloat16)
    assert residual is not None
    expected, expected_normed = residual_norm(residual, *rest, normalize=normalize, backend="triton")  # type: ignore[arg-type]
    buffer = torch.full((7, 64), 7.0, device=DEVICE)
    view = buffer[:6, :48]
    view.copy_(residual)
    with torch.no_grad():
        new, normed = residual_norm(view, *rest, normalize=normalize, inplace=True, backend="triton")  # type: ignore[arg-type]
    assert new is view and torch.equal(view, expected)
    assert buffer[6].eq(7).all() and buffer[:, 48:].eq(7).all()
    assert normed is None if expected_normed is None else normed is not None and torch.equal(normed, expected_normed)


def test_non_contiguous() -> None:
    generator = torch.Generator().manual_seed(2)
    residual = torch.randn(24, 10, generator=generator).to(DEVICE).T
    branch = torch.randn(20, 48, generator=generator).to(DEVICE)[::2, ::2]
    vectors = [torch.randn(48, generator=generator).to(DEVICE)[::2] for _ in range(3)]
    grads = []
    for op in (lambda *a: residual_norm(*a, backend="triton"), reference):
        leaves = [t.detach().requires_grad_() for t in (residual, branch, *vectors)]
        new, normed = op(*leaves)
        assert normed is not None
        loss = (new.T.square().sum() + normed.T.square().sum(), new, normed)
        grads.append([*torch.autograd.grad(loss[0], leaves), new, normed])
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)  # float32 sums in different orders


def test_empty() -> None:
    leaves = [torch.randn(*s, device=DEVICE, requires_grad=True) for s in ((0, 8), (0, 8), (8,), (8,), (8,))]
    with testing.poisoned_empty():
        new, normed = residual_norm(*leaves, backend="triton")
        assert normed is not None
        grads = torch.autograd.grad(new.sum() + normed.sum(), leaves)
    assert new.shape == normed.shape == (0, 8)
    assert all(g.eq(0).all() for g in grads)


def test_gradients_are_deterministic() -> None:
    given = inputs(20000 if GPU else 60, 768 if GPU else 48, torch.bfloat16)
    grads = cotangents(given, torch.bfloat16, True)
    runs = [testing.gradients(lambda *a: list(residual_norm(*a, backend="triton")), given, grads) for _ in range(3)]
    for run in runs[1:]:
        for first, again in zip(runs[0], run, strict=True):
            assert first is not None and again is not None and torch.equal(first, again)


def test_opcheck() -> None:
    residual, branch, gamma, weight, bias = inputs(6, 24, torch.bfloat16)
    scale = torch.ones(3, device=DEVICE)
    ops = torch.ops.any4d_fast
    common = (branch, gamma, weight, bias, 1e-6, scale, 2, True, torch.bfloat16)
    torch.library.opcheck(ops.residual_norm_forward.default, (residual, *common))
    torch.library.opcheck(ops.residual_norm_inplace.default, (residual, *common))
    bare = (branch, None, None, None, 1e-6, None, 1, False, torch.bfloat16)
    torch.library.opcheck(ops.residual_norm_forward.default, (residual, *bare))
    new, normed, mean, rstd = ops.residual_norm_forward(residual, *common)
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float32, None]
    kept = (new, branch, gamma, weight, scale, 2, mean, rstd)
    torch.library.opcheck(ops.residual_norm_backward.default, (new, normed, *kept, *dtypes))
    torch.library.opcheck(ops.residual_norm_backward.default, (None, normed, *kept, *dtypes))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_forward_and_backward(dynamic: bool) -> None:
    def step(*args: Tensor) -> Tensor:
        new, normed = residual_norm(*args, backend="triton")
        assert normed is not None
        return new.square() + normed.square()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (5, 9):
        leaves = [t.requires_grad_() for t in inputs(rows, 24, torch.float32) if t is not None]
        actual = torch.autograd.grad(compiled(*leaves).sum(), leaves)
        for grad, expected in zip(actual, torch.autograd.grad(step(*leaves).sum(), leaves), strict=True):
            torch.testing.assert_close(grad, expected)


def test_in_place_compiles() -> None:
    def step(residual: Tensor, *rest: Tensor) -> Tensor | None:
        return residual_norm(residual, *rest, inplace=True, backend="triton")[1]

    given = [t for t in inputs(5, 24, torch.float32) if t is not None]
    again = [t.clone() for t in given]
    with torch.no_grad():
        actual = torch.compile(step, fullgraph=True, backend="aot_eager")(*again)
        expected = step(*given)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(again[0], given[0])


class TestOnGpu:
    """The model's sizes, and offsets beyond 2^31 elements."""

    pytestmark = gpu_only

    @pytest.mark.parametrize("channels", [768, 1024])
    @pytest.mark.parametrize("rows", [887, 1777, 36409])
    def test_model_sizes(self, rows: int, channels: int) -> None:
        check(inputs(rows, channels, torch.bfloat16))

    def test_offsets_beyond_32_bits(self) -> None:
        rows, channels = 2**31 // 1024 + 100, 1024
        residual = torch.zeros(rows, channels, device=DEVICE, dtype=torch.bfloat16)
        branch = torch.zeros_like(residual)
        residual[-64:] = torch.randn(64, channels, device=DEVICE)
        branch[-64:] = torch.randn(64, channels, device=DEVICE)
        with torch.no_grad():
            new, normed = residual_norm(residual, branch, backend="triton")
            tails = reference(residual[-64:], branch[-64:])
        assert normed is not None and tails[1] is not None
        torch.testing.assert_close(new[-64:], tails[0], rtol=0, atol=0)
        torch.testing.assert_close(normed[-64:], tails[1], rtol=2**-7, atol=1e-6)  # two bfloat16 roundings
