"""8-bit linear layers on the CPU: the emulated roundings against float64, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from any4d_fast import ops
from any4d_fast.backends import BackendError
from any4d_fast.ops.linear_fp8 import Rows8
from any4d_fast.reference.layer_norm import layer_norm
from any4d_fast.testing import relative_error

E4M3 = torch.float8_e4m3fn


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rows_are_rounded_to_three_bits_with_powers_of_two() -> None:
    x = normal(200, 768) * torch.logspace(-9, 9, 200)[:, None]
    values, scale = rounded = ops.quantize_rows(x)
    assert values.dtype == E4M3 and scale is not None and scale.dtype == torch.float32
    assert torch.equal(torch.frexp(scale)[0], torch.full_like(scale, 0.5))
    largest = values.float().abs().amax(-1)
    assert (largest > 220).all() and (largest <= 448).all()
    assert relative_error(rounded.wide(), x) < 0.0275  # e4m3 errs by 0.0265 rms


def test_rows_without_a_scale() -> None:
    zero, infinite = ops.quantize_rows(torch.zeros(2, 8)), ops.quantize_rows(torch.tensor([[1.0, float("inf")]]))
    assert torch.equal(zero.wide(), torch.zeros(2, 8))
    assert infinite.wide().isnan().all(), "nothing saturates silently"
    assert ops.quantize_rows(torch.empty(0, 16)).values.shape == (0, 16)


def test_linear_is_the_product_of_what_was_rounded() -> None:
    x, weight, bias = ops.quantize_rows(normal(33, 96)), ops.quantize_rows(normal(48, 96, seed=1)), normal(48, seed=2)
    exact = F.linear(x.wide().double(), weight.wide().double(), bias.double())
    assert relative_error(ops.linear_fp8(x, weight, bias, out_dtype=torch.float32), exact) < 1e-6
    assert relative_error(ops.linear_fp8(x, weight, bias), exact) < 4e-3  # bfloat16
    inverse = torch.full((48,), 2.0)
    hidden = ops.linear_fp8(x, weight, bias, inverse=inverse)
    assert hidden.dtype == E4M3
    assert relative_error(hidden.float() / 2, F.gelu(exact)) < 0.03  # 1,584 numbers
    saturated = ops.linear_fp8(x, weight, bias, inverse=1e6 * inverse).float()
    assert saturated.max() == 448 and saturated.isfinite().all()


def test_the_corrected_bias_takes_the_common_error_away() -> None:
    """Rows with a large common part: the weight's rounding errs alike in all of them."""
    x, wide = normal(500, 256) + 4 * normal(256, seed=3), normal(64, 256, seed=1)
    rows, weight = ops.quantize_rows(x), ops.quantize_rows(wide)
    lost = ops.quantize_rows(wide - weight.wide())
    bias = normal(64, seed=2)
    exact = F.linear(rows.wide(), wide, bias)
    plain = ops.linear_fp8(rows, weight, bias, out_dtype=torch.float32) - exact
    corrected = ops.linear_fp8(rows, weight, ops.correct_bias(rows, lost, bias), out_dtype=torch.float32) - exact
    assert corrected.mean(0).norm() < 0.1 * plain.mean(0).norm()
    assert corrected.norm() < 0.4 * plain.norm()
    assert torch.equal(ops.correct_bias(ops.quantize_rows(x[:0]), lost, bias), bias)


@pytest.mark.parametrize("rows_per_scale", [0, 5])
def test_norms_round_what_they_normalise(rows_per_scale: int) -> None:
    residual, branch, gain, shift = normal(15, 48), normal(15, 48, seed=1), normal(48, seed=2), normal(48, seed=3)
    scale: dict[str, Any] = {}
    if rows_per_scale:
        scale = {"row_scale": torch.tensor([1.0, 0.0, 2.0]), "rows_per_scale": rows_per_scale}
    new, rounded = ops.residual_norm_fp8(stream := residual.clone(), branch, gain, gain, shift, **scale)
    exact, normed = ops.residual_norm(residual, branch, gain, gain, shift, **scale)
    assert new is stream and torch.equal(new, exact)
    assert torch.equal(rounded.wide(), ops.quantize_rows(normed).wide())
    assert torch.equal(
        ops.layer_norm_fp8(residual, gain, shift).wide(), ops.quantize_rows(layer_norm(residual, gain, shift)).wide()
    )


def test_messages() -> None:
    x, weight = ops.quantize_rows(normal(4, 32)), ops.quantize_rows(normal(16, 32))
    with pytest.raises(ValueError, match=r"linear_fp8: x.values: expected contiguous \[rows, channels\] float8_e4m3fn"):
        ops.linear_fp8(Rows8(normal(4, 32), None), weight)
    with pytest.raises(ValueError, match=r"weight.scale: expected contiguous \[16\] float32, got None"):
        ops.linear_fp8(x, Rows8(weight.values, None))
    with pytest.raises(ValueError, match=r"weight.values: expected \[N, 32\]"):
        ops.linear_fp8(x, ops.quantize_rows(normal(16, 48)))
    with pytest.raises(ValueError, match="residual: expected a contiguous tensor, which is overwritten"):
        ops.residual_norm_fp8(normal(4, 32).T, normal(32, 4))
    with pytest.raises(RuntimeError, match="quantize_rows: expected a call without gradients"):
        ops.quantize_rows(normal(4, 32).requires_grad_())
    with pytest.raises(BackendError, match="GELU and the rounding to e4m3"):
        ops.linear_fp8(x, weight, inverse=torch.ones(16), backend="cublas")
    with pytest.raises(BackendError, match="17 outputs are not a multiple of 16"):
        ops.linear_fp8(x, ops.quantize_rows(normal(17, 32)), backend="triton")
