"""What the tests of attention's kernels share: layouts, inputs, and the comparison with the float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from any4d_fast import backends
from any4d_fast.ops.attention import Segments, attention
from any4d_fast.reference.attention import attention as reference_attention
from any4d_fast.testing import ROUNDING, assert_within_budget, gradients, poisoned_empty
from tests.kernels_common import DEVICE, GPU, KERNEL_BACKENDS

SCALE = 0.2
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# On a GPU the kernels' exponentials come from the special function unit, whose ex2.approx errs by 2 ulp (PTX ISA) where
# PyTorch's float32 exp errs by 1: half as much again on top of the project's factor of 2. 16 bits hide it.
FLOAT32_FACTOR = 3.0 if GPU else 2.0

ODD = Segments(length=5, count=3, stride=7, groups=2, group_stride=30, start=3)
SEGMENTS = {
    "1": (Segments.global_(3, 1), 3),
    "7": (Segments.batched(3, 7), 21),
    "64": (Segments.frame(2, 1, 64), 130),
    "65": (Segments(length=65, count=2, stride=70, start=1), 150),
    "100": (Segments.frame(1, 2, 100), 201),
    "129": (Segments.global_(1, 129), 129),
    "odd": (ODD, 70),
}

EXACTEST = {"triton": torch.float32, "cuda": torch.bfloat16}
"""The dtype with the most precise arithmetic that a backend takes."""

BACKEND_DTYPES = [(b, d) for b in KERNEL_BACKENDS for d in DTYPES if b == "triton" or d != torch.float32]
"""Every backend with every dtype that it takes, for `parametrize`."""


def factor(dtype: torch.dtype) -> float:
    return FLOAT32_FACTOR if dtype == torch.float32 else 2.0


def sample(rows: int, heads: int, head_dim: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + rows)
    return torch.randn(rows, 3, heads, head_dim, generator=generator).to(DEVICE, dtype)


def skip_unless_offered(backend: str) -> None:
    """Skip, with the backend's reasons, on a machine where it can run no call at all."""
    try:
        qkv = torch.zeros(64, 3, 1, 64, device=DEVICE, dtype=torch.bfloat16)
        attention(qkv, segments=Segments(64), backend=backend)
    except backends.BackendError as error:
        pytest.skip(str(error))


def both(x: Tensor, segments: Segments, scale: float = SCALE) -> Any:
    return reference_attention(x, segments, scale, return_lse=True)


def only_output(x: Tensor, segments: Segments, scale: float = SCALE) -> Tensor:
    found = reference_attention(x, segments, scale)
    assert isinstance(found, Tensor)
    return found


def check(
    qkv: Tensor,
    segments: Segments,
    backend: str,
    deterministic: bool = False,
    with_lse: bool = True,
    scale: float = SCALE,
    few: bool = False,
) -> None:
    """Forward and every gradient of a backend within the budget; rows of no segment exactly zero.

    With `few` keys, and not many queries to even it out, the gradients of queries and keys are small differences of
    larger numbers, the output among them, that were rounded to 16 bits: they are seen beside the values' gradient, and
    plain PyTorch, which keeps float32 there, is credited with two rounding steps (one in the output).
    """
    rows, _, heads, head_dim = qkv.shape
    generator = torch.Generator().manual_seed(rows)
    grad_out = torch.randn(rows, heads, head_dim, generator=generator).to(qkv.device, qkv.dtype)
    grad_lse = torch.randn(heads, rows, generator=generator).to(qkv.device) * with_lse

    def ours(x: Tensor) -> Any:
        return attention(
            x, segments=segments, scale=scale, backend=backend, deterministic=deterministic, return_lse=True
        )

    def reference(x: Tensor) -> Any:
        return both(x, segments, scale)

    with poisoned_empty():
        out, lse = ours(qkv)
        (grad,) = gradients(ours, [qkv], [grad_out, grad_lse])
    oracle, oracle_lse = reference(qkv.double())
    (oracle_grad,) = gradients(reference, [qkv.double()], [grad_out, grad_lse])
    (baseline_grad,) = gradients(reference, [qkv], [grad_out, grad_lse])
    assert grad is not None and oracle_grad is not None and baseline_grad is not None
    assert out.dtype == qkv.dtype and lse.dtype == torch.float32
    floor = ROUNDING[qkv.dtype] if few else 0.0
    baseline = only_output(qkv, segments, scale)
    assert_within_budget(out, oracle, baseline, factor=factor(qkv.dtype), floor=floor, name="out")
    if few:
        # 64 products of normal values, added in float32 and scaled by at most 0.3: 64 roundings of 2^-24 of about 8.
        torch.testing.assert_close(lse.double(), oracle_lse, rtol=1e-6, atol=1e-5)
    else:
        assert_within_budget(lse, oracle_lse, reference(qkv.float())[1], factor=FLOAT32_FACTOR, name="lse")
    uncovered = oracle_lse.eq(0).all(0)
    assert not out[uncovered].any() and not lse[:, uncovered].any() and not grad[uncovered].any()
    if qkv.dtype == torch.float32 and GPU:
        # With one or two keys dq and dk are differences of nearly equal numbers: noise, unless seen beside dv.
        # The error of a probability enters twice: as a factor of its own gradient, and in dv.
        assert_within_budget(
            grad, oracle_grad, baseline_grad, factor=FLOAT32_FACTOR + 1, floor=2 * floor, name="gradient"
        )
        return
    if few:
        assert_within_budget(grad, oracle_grad, baseline_grad, floor=2 * floor, name="gradient")
        return
    for i, name in enumerate(("dq", "dk", "dv")):
        assert_within_budget(grad[:, i], oracle_grad[:, i], baseline_grad[:, i], name=name)
