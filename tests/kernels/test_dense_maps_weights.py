"""Triton `dense_maps.lay_out` against PyTorch's copy, both ways: in the interpreter, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from any4d_fast import testing
from any4d_fast.ops.dense_maps import lay_out
from tests.kernels_common import DEVICE, kernel_test

pytestmark = kernel_test

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Cout, Cin, kh, kw: one of each; primes; a block of channels that ends early; the model's width; no output channel.
SHAPES = [
    (1, 1, 1, 1),
    (3, 7, 3, 3),
    (2, 131, 3, 3),
    (5, 256, 3, 3),
    (3, 20, 4, 4),
    (4, 33, 2, 1),
    (7, 6, 1, 1),
    (0, 8, 3, 3),
]


def weights(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_ways_are_pytorchs_copies(shape: tuple[int, ...], source: torch.dtype, to: torch.dtype) -> None:
    weight, grad = weights(shape, source).requires_grad_(), weights(shape, to, seed=1)
    expected = weight.to(to, memory_format=torch.channels_last)
    (expected_grad,) = torch.autograd.grad(expected, weight, grad.contiguous(memory_format=torch.channels_last))
    for given in (grad, grad.contiguous(memory_format=torch.channels_last)):
        with testing.poisoned_empty():
            found = lay_out(weight, to, backend="triton")
            (found_grad,) = torch.autograd.grad(found, weight, given)
        assert found.dtype == to and found.stride() == expected.stride()
        assert torch.equal(found, expected)
        assert found_grad.dtype == source and found_grad.is_contiguous()
        assert torch.equal(found_grad, expected_grad)


def test_a_weight_need_not_be_contiguous() -> None:
    weight = weights((6, 5, 3, 3)).transpose(0, 1)
    assert torch.equal(lay_out(weight, torch.float16, backend="triton"), weight.half())


def test_a_convolution_reads_it() -> None:
    conv = nn.Conv2d(12, 20, 3, bias=False, device=DEVICE)
    x = weights((1, 12, 5, 5)).contiguous(memory_format=torch.channels_last)
    found = nn.functional.conv2d(x, lay_out(conv.weight, torch.float32, backend="triton"))
    torch.testing.assert_close(found, conv(x))


def test_compiled_whole() -> None:
    def loss(weight: Tensor) -> Tensor:
        return lay_out(weight, torch.float16, backend="triton").float().square().sum()

    weight = weights((4, 24, 3, 3)).requires_grad_()
    (expected,) = torch.autograd.grad(loss(weight), weight)
    (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(weight), weight)
    assert torch.equal(found, expected)


def test_registered_operators() -> None:
    ops = torch.ops.any4d_fast
    weight = weights((3, 24, 3, 3))
    torch.library.opcheck(ops.dense_maps_lay_out.default, (weight, torch.float16))
    grad = weight.half().contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(ops.dense_maps_lay_out_backward.default, (grad, torch.float32))
