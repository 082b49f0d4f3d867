"""Triton `dense_maps` against float64: in the interpreter, and on a GPU at the model's sizes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from any4d_fast import testing
from any4d_fast.ops.dense_maps import finish, gelu, narrow, new_flag, padded, patches, upsample
from any4d_fast.reference import dense_maps as reference
from tests.kernels_common import DEVICE, GPU, kernel_test

pytestmark = kernel_test

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# images, height, width, channels: one pixel; primes and channels that are no power of two; the model's width; blocks
# that end within a row.
SHAPES = [(1, 1, 1, 1), (2, 5, 7, 24), (1, 3, 5, 256), (3, 2, 9, 300)]


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Map, bias, residual, coarser map of half the size rounded up."""
    n, height, width, channels = shape
    half = (n, (height + 1) // 2, (width + 1) // 2, channels)
    return (
        random(*shape, seed=0, dtype=dtype),
        random(channels, seed=1, dtype=dtype),
        random(*shape, seed=2, dtype=dtype),
        random(*half, seed=3, dtype=dtype),
    )


def exact(size: tuple[int, int], double: tuple[int, int], *terms: Tensor | None) -> Tensor:
    """The sum in float64."""
    wide = [None if t is None else t.double() for t in terms]
    return reference.finish(*wide, double, size, new_flag(torch.device(DEVICE)))


def check_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    # Sums and resizes in float32, rounded once.
    assert found.dtype == dtype
    assert testing.relative_error(found, expected) <= testing.ROUNDING[dtype] + 4 * testing.ROUNDING[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_combination_is_the_sum(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    value, bias, residual, coarse = inputs(shape, dtype)
    size, double = shape[1:3], (2 * coarse.shape[1], 2 * coarse.shape[2])
    flag = new_flag(value.device)
    with testing.poisoned_empty():
        for given in (
            (None, None, None),
            (bias, None, None),
            (bias, residual, None),
            (None, None, coarse),
            (bias, residual, coarse),
        ):
            expected = exact(size, double, value, *given)
            total, positive = finish(
                value, given[0], flag, residual=given[1], coarse=given[2], relu=True, backend="triton"
            )
            check_close(total, expected, dtype)
            check_close(positive, expected.relu(), dtype)
            alone = finish(value, given[0], flag, residual=given[1], coarse=given[2], out=False, relu=True)[1]
            assert torch.equal(alone, positive)
        check_close(upsample(coarse, flag, backend="triton"), exact(double, double, None, None, None, coarse), dtype)
    assert flag.item() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "wanted"),
    # Sums over the pixels of several programs are the same whichever results are used.
    [*itertools.product([*SHAPES, (2, 5, 8, 24)], ["sum", "relu", "both"]), ((7, 13, 11, 24), "both")],
)
def test_gradients_are_the_sums(shape: tuple[int, int, int, int], dtype: torch.dtype, wanted: str) -> None:
    """Of every operand, whichever results are used; a coarser map that is cut gets nothing from what is cut off."""
    leaves = [t.requires_grad_() for t in inputs(shape, dtype)]
    used = [i for i, name in enumerate(("sum", "relu")) if wanted in (name, "both")]
    cotangents = [random(*shape, seed=9 + i, dtype=dtype) for i in range(2)]

    def found(backend: str, operands: list[Tensor], given: list[Tensor]) -> list[Tensor]:
        value, bias, residual, coarse = operands
        flag = new_flag(value.device)
        results = finish(value, bias, flag, residual=residual, coarse=coarse, relu=True, backend=backend)
        return list(torch.autograd.grad([results[i] for i in used], operands, [given[i] for i in used]))

    wide = [t.detach().double().requires_grad_() for t in leaves]
    # The same signs before the ReLU: a sum that rounds to zero lets nothing through.
    expected = found("eager", wide, [c.double() for c in cotangents])
    with testing.poisoned_empty():
        actual = found("triton", leaves, cotangents)
        again = found("triton", leaves, cotangents)
    for grad, other, oracle, leaf in zip(actual, again, expected, leaves, strict=True):
        assert grad.dtype == dtype and grad.shape == leaf.shape
        assert torch.equal(grad, other)
        # The total is rounded before it is resized, and sums over pixels add float32 before they are rounded.
        assert testing.relative_error(grad, oracle) <= 3 * testing.ROUNDING[dtype] + 1e-6


def test_gradients_of_parts() -> None:
    """What is not there, or wants none, is left out; and a result that is not asked for has no gradient."""
    value, bias, residual, coarse = inputs((2, 5, 7, 24), torch.float32)
    flag = new_flag(value.device)
    value.requires_grad_()
    only, nothing = finish(value, None, flag, backend="triton")
    assert nothing.numel() == 0 and not nothing.requires_grad
    (grad,) = torch.autograd.grad(only.sum(), value)
    assert torch.equal(grad, torch.ones_like(value))
    bias.requires_grad_()
    summed, positive = finish(value.detach(), bias, flag, residual=residual, relu=True, backend="triton")
    (grad,) = torch.autograd.grad(positive.sum(), bias)
    torch.testing.assert_close(grad, (summed > 0).sum((0, 1, 2)).to(grad.dtype))
    coarse.requires_grad_()
    (grad,) = torch.autograd.grad(upsample(coarse, flag, backend="triton").sum(), coarse)
    (other,) = torch.autograd.grad(upsample(coarse, flag, backend="eager").sum(), coarse)
    torch.testing.assert_close(grad, other)


def test_maps_need_not_be_contiguous() -> None:
    value, bias, residual, coarse = (t.transpose(1, 2) if t.ndim == 4 else t for t in inputs((2, 4, 6, 8), DTYPES[0]))
    flag = new_flag(value.device)
    found = finish(value, bias, flag, residual=residual, coarse=coarse, backend="triton")[0]
    copies = (t.contiguous() for t in (value, bias, residual, coarse))
    value, bias, residual, coarse = copies
    assert torch.equal(found, finish(value, bias, flag, residual=residual, coarse=coarse, backend="triton")[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_read_where_they_are(dtype: torch.dtype) -> None:
    tokens = random(2, 3 * 35 + 1, 24, seed=0, dtype=torch.float32)
    rows = tokens[:, :105].unflatten(1, (3, 35))[:, 1:].transpose(0, 1)
    flag = new_flag(tokens.device)
    with testing.poisoned_empty():
        found = narrow(rows, dtype, flag, backend="triton")
    assert torch.equal(found, rows.reshape(4, 35, 24).to(dtype))
    assert torch.equal(narrow(rows.transpose(2, 3).contiguous().transpose(2, 3), dtype, flag), found)
    assert flag.item() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gelu_is_that_of_the_sum(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    value, bias, residual, _ = inputs(shape, dtype)
    flag = new_flag(value.device)
    for other in (None, residual):
        expected = reference.gelu(value.double(), bias.double(), None if other is None else other.double(), flag)
        with testing.poisoned_empty():
            found = gelu(value, bias, flag, residual=other, backend="triton")
        assert found.dtype == dtype
        # 16-bit kernels take GELU as a polynomial that errs by 4.6e-5 at most.
        error = 1e-6 if dtype == torch.float32 else 5e-5
        torch.testing.assert_close(found.double(), expected, rtol=testing.ROUNDING[dtype] * 2, atol=error)
    assert flag.item() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("patch", "shape"), [(14, (2, 28, 42, 3)), (14, (1, 14, 14, 1)), (5, (3, 15, 10, 2)), (3, (1, 21, 33, 7))]
)
def test_patches_are_rows_with_zeros_behind(patch: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = random(*shape, seed=0, dtype=torch.float32)
    flag = new_flag(x.device)
    expected = reference.patches(x, patch, padded(patch * patch * shape[3]), dtype, flag)
    with testing.poisoned_empty():
        assert torch.equal(patches(x, patch, dtype, flag, backend="triton"), expected)
        taller = torch.cat([x, x], dim=1)[:, : shape[1]]  # views' and rows' strides as they come
        assert torch.equal(patches(taller, patch, dtype, flag, backend="triton"), expected)
        turned = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        assert torch.equal(patches(turned, patch, dtype, flag, backend="triton"), expected)
    assert flag.item() == 0


@pytest.mark.parametrize("large", [7e4, -7e4, float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("place", ["first", "last"])
def test_the_flag_is_set_by_what_does_not_fit(place: str, large: float) -> None:
    index = (0, 0, 0, 0) if place == "first" else (-1, -1, -1, -1)
    wide = random(2, 3, 5, 24, seed=0, dtype=torch.float32)
    flag = new_flag(wide.device)
    narrow(wide, torch.float16, flag, backend="triton")
    finish(wide.half(), None, flag, out=False, relu=True, backend="triton")
    assert flag.item() == 0
    wide[index] = large
    doubled = torch.zeros(2, 6, 10, 24, device=DEVICE, dtype=torch.float16)
    for call in (
        lambda f: narrow(wide, torch.float16, f, backend="triton"),
        lambda f: finish(wide.half(), None, f, out=False, relu=True, backend="triton"),
        lambda f: finish(torch.zeros_like(wide).half(), None, f, residual=wide.half(), backend="triton"),
        lambda f: finish(doubled, None, f, coarse=wide.half(), backend="triton"),
        lambda f: upsample(wide.half(), f, backend="triton"),
        lambda f: patches(wide, 1, torch.float16, f, backend="triton"),
        lambda f: gelu(wide.half(), wide.new_zeros(24).half(), f, backend="triton"),
        lambda f: gelu(
            torch.zeros_like(wide).half(), wide.new_zeros(24).half(), f, residual=wide.half(), backend="triton"
        ),
    ):
        flag = new_flag(wide.device)
        call(flag)
        assert flag.item() == 1
    flag = new_flag(wide.device)
    bound = wide.new_full((1, 1, 1, 16), 65504.0)
    narrow(bound, torch.float16, flag, backend="triton")
    finish(bound.half(), None, flag, backend="triton")
    assert flag.item() == 0  # the largest float16 fits


def test_nan_passes_through_relu() -> None:
    value = torch.full((1, 1, 1, 16), float("nan"), device=DEVICE, dtype=torch.float16)
    assert bool(finish(value, None, new_flag(value.device), out=False, relu=True, backend="triton")[1].isnan().all())


def test_empty_maps() -> None:
    flag = new_flag(torch.device(DEVICE))
    value = torch.zeros(0, 4, 4, 16, device=DEVICE, dtype=torch.float16)
    assert finish(value, None, flag, relu=True, backend="triton")[1].shape == value.shape
    assert upsample(value, flag, backend="triton").shape == (0, 8, 8, 16)
    assert narrow(value, torch.float16, flag, backend="triton").shape == (0, 4, 16)
    assert gelu(value, value.new_zeros(16), flag, residual=value, backend="triton").shape == value.shape
    assert patches(value, 2, torch.float16, flag, backend="triton").shape == (0, 2, 2, 64)
    assert flag.item() == 0


def test_operators_are_registered_correctly() -> None:
    value, bias, residual, coarse = inputs((1, 4, 4, 16), torch.float16)
    flag = new_flag(value.device)
    ops = torch.ops.any4d_fast
    torch.library.opcheck(
        ops.dense_maps_finish.default, (value, bias, residual, coarse, [4, 4], flag, True, True)
    )  # fmt: skip
    grads = (torch.randn_like(value), torch.randn_like(value))
    for given in ((*grads, value.relu(), True, True), (grads[0], None, None, False, True)):
        torch.library.opcheck(ops.dense_maps_finish_backward.default, given)
    torch.library.opcheck(ops.dense_maps_upsample.default, (coarse, [4, 4], [4, 4], flag))
    torch.library.opcheck(ops.dense_maps_gelu.default, (value, bias, residual, flag))
    torch.library.opcheck(ops.dense_maps_patches.default, (value.float(), 2, torch.float16, flag))
    torch.library.opcheck(ops.dense_maps_narrow.default, (value.float(), torch.float16, flag))


@pytest.mark.skipif(not GPU, reason="needs a CUDA device (make test-gpu)")
@pytest.mark.gpu
def test_a_map_of_more_than_2_31_elements() -> None:
    shape = (40, 192, 1160, 256)  # 2.28e9 elements, 4.6 GB
    value = torch.zeros(shape, device=DEVICE, dtype=torch.float16)
    value[-1, -1, -1] = 3.0
    flag = new_flag(value.device)
    positive = finish(value, None, flag, out=False, relu=True, backend="triton")[1]
    assert torch.equal(positive[-1, -1, -1], value[-1, -1, -1])
    assert flag.item() == 0
    coarse = value[:, ::2, ::2].contiguous()
    coarse[-1, -1, -1] = 5.0
    large = upsample(coarse, flag, backend="triton")
    assert large.shape == shape and bool((large[-1, -1, -1] == 5.0).all())
