"""Rounding of float32 matmul operands to TF32.

Tensor cores read the upper 19 bits of a float32 operand and drop the rest, which errs by up to one step of TF32, always
towards zero. cuDNN and cuBLAS round to nearest first: half a step at most, and no bias. Triton's `tl.dot` leaves
operands as they are, so kernels round them: where they write them, or in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase

_BLOCK = 1024


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """A block as `tl.dot` should get it: float32 rounded to TF32 where PRECISION is "tf32", anything else unchanged.

    To nearest, ties away from zero. Infinities stay, and NaN is set anew: rounding bits would turn one NaN into an
    infinity and another into zero.
    """
    if PRECISION == "tf32":
        if x.dtype == tl.float32:
            bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
            x = tl.where(x == x, bits.to(tl.float32, bitcast=True), float("nan"))
    return x


@triton.jit
def round_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    tl.store(out_ptr + index, operand(tl.load(x_ptr + index, mask=mask), "tf32"), mask=mask)


def rounded(x: Tensor, how: str) -> Tensor:
    """`operand` for a whole contiguous tensor: a copy for float32 in "tf32", the tensor itself otherwise."""
    if x.dtype != torch.float32 or how != "tf32" or x.numel() == 0:
        return x
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        round_kernel[(triton.cdiv(x.numel(), _BLOCK),)](x, out, x.numel(), BLOCK=_BLOCK)
    return out


def aot_cases() -> list[AotCase]:
    """The one configuration."""
    return [
        AotCase(
            name="round_tf32",
            kernel=round_kernel,
            types={"x_ptr": "*fp32", "out_ptr": "*fp32", "count": "i32"},
            constants={"BLOCK": _BLOCK},
            aligned=("x_ptr", "out_ptr", "count"),
        )
    ]
