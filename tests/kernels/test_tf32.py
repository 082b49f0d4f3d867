"""Rounding to TF32 in a kernel against arithmetic on mantissas."""

from __future__ import annotations

import pytest
import torch
from any4d_fast.kernels._tf32 import rounded

from tests import tf32
from tests.kernels_common import DEVICE, kernel_test

pytestmark = kernel_test


def test_to_nearest_with_ties_away_from_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(-(2**12), 2**12, (999,), generator=generator) / 2.0
    wide = torch.randn(4096, generator=generator) * 10.0 ** torch.randint(-30, 30, (4096,), generator=generator)
    ties = torch.tensor([1 + 2**-11, -1 - 2**-11, 1 + 2**-11 - 2**-23, 2 - 2**-23, 0.0, -0.0])
    x = torch.cat([steps, wide, ties]).to(DEVICE)
    actual = rounded(x, "tf32")
    assert torch.equal(actual, tf32.rounded(x))
    assert torch.equal(actual[-6:].cpu(), torch.tensor([1 + 2**-10, -1 - 2**-10, 1.0, 2.0, 0.0, -0.0]))
    assert torch.equal(rounded(actual, "tf32"), actual)


def test_infinity_and_every_nan_stay() -> None:
    bits = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0x7F800000], dtype=torch.int32)
    special = torch.cat([bits, bits - 2**31]).to(DEVICE).view(torch.float32)
    actual = rounded(special, "tf32")
    assert actual.isnan().tolist() == [True, True, True, False] * 2
    assert actual[3] == float("inf") and actual[7] == -float("inf")
    # What tensor cores read of a NaN is one too.
    assert (actual.view(torch.int32) & -0x2000).view(torch.float32).isnan().tolist() == [True, True, True, False] * 2


@pytest.mark.parametrize(("dtype", "how"), [(torch.float32, "ieee"), (torch.float16, "tf32"), (torch.bfloat16, "tf32")])
def test_other_operands_are_left_as_they_are(dtype: torch.dtype, how: str) -> None:
    x = torch.randn(7, device=DEVICE).to(dtype)
    assert rounded(x, how) is x


def test_empty() -> None:
    assert rounded(torch.empty(0, 3, device=DEVICE), "tf32").shape == (0, 3)
