"""TF32 convolutions on any device: operands rounded, products and sums in float32, as cuDNN has them on tensor cores.

Triton's interpreter multiplies float32 exactly, so that plain PyTorch on the CPU is no baseline for kernels that round
their operands to TF32; this is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_convolution = F.conv2d


def rounded(x: Tensor) -> Tensor:
    """Finite float32 to the nearest TF32 value, ties away from zero, by arithmetic: 11 bits of the mantissa stay."""
    mantissa, exponent = torch.frexp(x.double())
    steps = mantissa * 2**11
    return torch.ldexp((steps.abs() + 0.5).floor() * steps.sign() * 2**-11, exponent).to(x.dtype)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        operands = rounded(x), rounded(weight)
        ctx.save_for_backward(*operands)
        ctx.padding = padding
        return _convolution(*operands, bias, padding=padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        d_x, d_weight, _ = torch.ops.aten.convolution_backward(
            rounded(grad), x, weight, None, [1, 1], [ctx.padding] * 2, [1, 1], False, [0, 0], 1, [True, True, False]
        )
        return d_x, d_weight, grad.sum((0, 2, 3)), None


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: int = 0) -> Tensor:
    if x.dtype != torch.float32:
        return _convolution(x, weight, bias, padding=padding)
    out: Tensor = _Convolution.apply(x, weight, bias, padding)
    return out


@contextlib.contextmanager
def convolutions() -> Iterator[None]:
    """Inside, `torch.nn.functional.conv2d` of float32 rounds its operands to TF32, forward and backward."""
    F.conv2d = _conv2d
    try:
        yield
    finally:
        F.conv2d = _convolution


@contextlib.contextmanager
def settings(matmul: bool, cudnn: bool) -> Iterator[None]:
    """PyTorch's TF32 switches inside: the kernels follow the matmul's, convolutions cuDNN's."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
