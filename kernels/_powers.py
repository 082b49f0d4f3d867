"""Powers of two that take float32 values into float16, which has TF32's mantissa and a smaller range.

Multiplying by a power of two is exact. What is 2^29 times smaller than a tensor's largest value loses bits, where TF32
keeps eleven of every value: nothing that a sum beside the largest value would show.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_TOP = 15  # a bound is taken to 2^14 .. 2^15: float16 ends at 2^16, and rounding and sums of roundings need room


def power(bound: Tensor) -> Tensor:
    """Power of two, float64 [], that takes a bound to 2^14 .. 2^15; one where the bound is zero or not finite.

    Everything stays on the device: nothing waits for it.
    """
    bound = bound.double()
    exponent = (_TOP - torch.frexp(bound).exponent).clamp(-100, 100)
    return torch.where(bound.isfinite() & (bound > 0), torch.exp2(exponent.double()), 1.0)


def largest(x: Tensor) -> Tensor:
    """max |x|, float64 []; NaN where there is one."""
    return torch.linalg.vector_norm(x, float("inf")).double()


class Powers(NamedTuple):
    """Of `resize_conv`'s backward pass, float64 [] each: what its operands are multiplied by in float16."""

    x: Tensor
    weight3: Tensor
    weight1: Tensor
    grad: Tensor
    hidden: Tensor
    """of the hidden map"""
    hidden_grad: Tensor

    def factors(self) -> Tensor:
        """[4] float32: from sums to the hidden map, to its gradient and to x's gradient; and of x."""
        return torch.stack(
            [
                self.hidden / (self.x * self.weight3),
                self.hidden_grad / (self.grad * self.weight1),
                1 / (self.hidden_grad * self.weight3),
                self.x,
            ]
        ).float()


def powers(grad: Tensor, x: Tensor, weight3: Tensor, bias3: Tensor, weight1: Tensor) -> Powers:
    """From the largest values, and bounds of what is computed on the way; shapes as in `resize_conv_backward`."""
    x_bound, grad_bound = largest(x), largest(grad)  # interpolating makes nothing larger
    hidden = x_bound * weight3.double().abs().sum((1, 2, 3)).max() + largest(bias3)
    hidden_grad = grad_bound * weight1.double().abs().sum(0).max()
    bounds = (x_bound, largest(weight3), largest(weight1), grad_bound, hidden, hidden_grad)
    return Powers(*(power(bound) for bound in bounds))
