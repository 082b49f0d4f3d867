"""Triton kernels on e4m3 rows against their emulation, in the interpreter and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from any4d_fast import ops, testing
from any4d_fast.backends import capability
from any4d_fast.ops.linear_fp8 import Rows8
from any4d_fast.testing import relative_error
from tests.kernels_common import DEVICE, GPU, kernel_test

pytestmark = [
    *kernel_test,
    pytest.mark.skipif(GPU and capability(0) < (9, 0), reason="e4m3 products need a GPU of compute capability 9.0"),
]

E4M3 = torch.float8_e4m3fn
SIZES = [(1, 16, 48), (33, 112, 80), (70, 96, 144)]  # rows, inputs, outputs
SUMS = 2e-3 if GPU else 1e-6
"""Tensor cores keep about 14 bits of a sum: 2^-14 of the largest partial sum, at every step of 32 products."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def rows8(*shape: int, seed: int = 0) -> Rows8:
    return ops.quantize_rows(normal(*shape, seed=seed), backend="eager")


def assert_same_rows(found: Rows8, expected: Rows8) -> None:
    """Equal but for values that float32 sums put on the other side of a rounding boundary."""
    assert found.values.dtype == E4M3 and found.values.shape == expected.values.shape
    assert found.scale is not None and expected.scale is not None and found.scale.shape == expected.scale.shape
    assert (found.scale != expected.scale).float().mean() <= 0.02
    assert relative_error(found.wide(), expected.wide()) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 16), (37, 48), (5, 3, 768), (3, 2500), (0, 32)])
def test_quantize_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (normal(*shape) * 3).to(dtype)
    with testing.poisoned_empty():
        found = ops.quantize_rows(x, backend="triton")
    expected = ops.quantize_rows(x, backend="eager")
    assert found.scale is not None and expected.scale is not None
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.values.view(torch.uint8), expected.values.view(torch.uint8)), "bit for bit"


def test_quantize_rows_of_any_size_and_stride() -> None:
    x = normal(60, 64).repeat_interleave(2, 1)[:, ::2] * torch.logspace(-14, 14, 60, device=DEVICE)[:, None]
    x[3], x[4, 5] = 0, float("inf")
    found, expected = ops.quantize_rows(x, backend="triton"), ops.quantize_rows(x, backend="eager")
    assert found.scale is not None
    assert torch.equal(found.scale.isnan(), torch.arange(60, device=DEVICE) == 4)
    for i in (0, 3, 30, 59):
        assert torch.equal(found.wide()[i], expected.wide()[i])
    assert found.wide()[4].isnan().all()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("channels", [48, 768, 1024, 2500])
def test_norms(channels: int, affine: bool) -> None:
    gain, shift = (normal(channels, seed=2), normal(channels, seed=3)) if affine else (None, None)
    x, branch = normal(21, channels), normal(21, channels, seed=1).bfloat16()
    with testing.poisoned_empty():
        found = ops.layer_norm_fp8(x, gain, shift, backend="triton")
    assert_same_rows(found, ops.layer_norm_fp8(x, gain, shift, backend="eager"))
    scale: dict[str, Any] = {"row_scale": torch.tensor([1.0, 0.0, 2.0], device=DEVICE), "rows_per_scale": 7}
    expected, rows = ops.residual_norm_fp8(x.clone(), branch, gain, gain, shift, **scale, backend="eager")
    with testing.poisoned_empty():
        new, found = ops.residual_norm_fp8(x, branch, gain, gain, shift, **scale, backend="triton")
    assert new is x and relative_error(new, expected) < 1e-6
    assert_same_rows(found, rows)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linear(size: tuple[int, int, int], dtype: torch.dtype, scaled: bool) -> None:
    rows, k, n = size
    x, weight, bias = rows8(rows, k), rows8(n, k, seed=1), normal(n, seed=2)
    x = x if scaled else Rows8(x.values, None)
    with testing.poisoned_empty():
        found = ops.linear_fp8(x, weight, bias, out_dtype=dtype, backend="triton")
    exact = F.linear(x.wide().double(), weight.wide().double(), bias.double())
    assert found.dtype == dtype
    assert relative_error(found, exact) < SUMS + testing.ROUNDING[dtype]


@pytest.mark.parametrize("size", SIZES)
def test_linear_with_gelu(size: tuple[int, int, int]) -> None:
    rows, k, n = size
    x, weight = rows8(rows, k), rows8(n, k, seed=1)
    inverse = torch.exp2(torch.arange(n, device=DEVICE) % 5 - 2.0)
    for bias in (None, normal(n, seed=2)):
        with testing.poisoned_empty():
            found = ops.linear_fp8(x, weight, bias, inverse=inverse, backend="triton")
        exact = F.gelu(F.linear(x.wide(), weight.wide(), bias)) * inverse
        assert found.dtype == E4M3
        kept = exact.clamp(max=448)
        assert relative_error(found.float(), kept) < 0.0275 + 5 / found.numel()


def test_what_is_too_large_saturates() -> None:
    x, weight = rows8(20, 32), rows8(32, 32, seed=1)
    found = ops.linear_fp8(x, weight, inverse=torch.full((32,), 1e4, device=DEVICE), backend="triton").float()
    assert found.max() == 448 and found.isfinite().all()


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("size", [*SIZES, (500, 1040, 32)])
def test_correct_bias(size: tuple[int, int, int], scaled: bool) -> None:
    rows, k, n = size
    x, lost = rows8(rows, k), rows8(n, k, seed=1)
    x = x if scaled else Rows8(x.values, None)
    for bias in (None, normal(n, seed=2)):
        with testing.poisoned_empty():
            found = ops.correct_bias(x, lost, bias, backend="triton")
        assert relative_error(found, ops.correct_bias(x, lost, bias, backend="eager")) < 1e-5


def test_no_rows() -> None:
    x, weight, bias = rows8(0, 32), rows8(16, 32), normal(16)
    assert ops.linear_fp8(x, weight, bias, backend="triton").shape == (0, 16)
    assert torch.equal(ops.correct_bias(x, weight, bias, backend="triton"), bias)
    assert ops.layer_norm_fp8(normal(0, 32), backend="triton").values.shape == (0, 32)


def test_registered_operators() -> None:
    x, weight, bias = rows8(20, 32), rows8(16, 32, seed=1), normal(16)
    stream, vector = normal(20, 32), normal(32)
    own = torch.ops.any4d_fast
    checked = [
        (own.quantize_rows.default, (stream, "triton")),
        (own.correct_bias.default, (*x, *weight, bias, "triton")),
        (own.linear_fp8.default, (*x, *weight, bias, None, torch.bfloat16, "triton")),
        (own.linear_fp8.default, (x.values, None, *weight, bias, normal(16).abs(), torch.bfloat16, "triton")),
        (own.layer_norm_fp8.default, (stream, vector, vector, 1e-6, "triton")),
        (own.residual_norm_fp8.default, (stream, stream.clone(), None, vector, vector, 1e-6, None, 1, "triton")),
    ]
    for op, arguments in checked:
        # Not test_schema: it compares results by arithmetic that PyTorch does not have in e4m3.
        torch.library.opcheck(op, arguments, test_utils=("test_faketensor",))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="the vendor's product needs a CUDA device")
@pytest.mark.parametrize("scaled", [True, False])
def test_cublas(scaled: bool) -> None:
    x, weight, bias = rows8(1000, 768), rows8(2304, 768, seed=1), normal(2304, seed=2)
    x = x if scaled else Rows8(x.values, None)
    found = ops.linear_fp8(x, weight, bias, backend="cublas")
    exact = F.linear(x.wide().double(), weight.wide().double(), bias.double())
    assert relative_error(found, exact) < SUMS + 2 * testing.ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("promote", [False, True])
@pytest.mark.parametrize("size", [(36_409, 768, 2304), (36_409, 3072, 768), (36_449, 4096, 1024), (887, 768, 3072)])
@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="real sizes")
def test_real_sizes(size: tuple[int, int, int], promote: bool) -> None:
    from any4d_fast.kernels import linear_fp8 as kernels

    rows, k, n = size
    x, weight, bias = rows8(rows, k), rows8(n, k, seed=1), normal(n, seed=2)
    assert x.scale is not None and weight.scale is not None
    arguments = (x.values, x.scale, weight.values, weight.scale, bias)
    exact = F.linear(x.wide().double(), weight.wide().double(), bias.double())
    found = kernels.linear_fp8(*arguments, None, torch.float32, promote=promote)
    assert relative_error(found, exact) < SUMS
    inverse = torch.full((n,), k**-0.5, device=DEVICE)
    hidden = kernels.linear_fp8(*arguments, inverse, torch.bfloat16, promote=promote)
    assert relative_error(hidden.float(), F.gelu(exact) * inverse) < 0.028
