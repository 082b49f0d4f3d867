"""`unshuffle_conv` on the eager path: values, gradients, arguments, torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from any4d_fast.backends import BackendError
from any4d_fast.ops.unshuffle_conv import unshuffle_conv


def parameters(cin: int, cout: int, patch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(cout, cin * patch * patch, 3, 3, generator=generator)
    return weight.to(dtype), torch.randn(cout, generator=generator).to(dtype)


@pytest.mark.parametrize("cin", [1, 3])
def test_equals_pixel_unshuffle_and_conv2d(cin: int) -> None:
    weight, bias = parameters(cin, 5, 2)
    x = torch.randn(2, 6, 4, cin, dtype=torch.float64)
    layer = torch.nn.Conv2d(cin * 4, 5, 3, padding=1).double()
    layer.load_state_dict({"weight": weight, "bias": bias})
    expected = layer(torch.nn.PixelUnshuffle(2)(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    actual = unshuffle_conv(x, weight, bias, 2)
    assert actual.shape == (2, 3, 2, 5) and actual.is_contiguous()
    torch.testing.assert_close(actual, expected)


def test_gradcheck() -> None:
    weight, bias = parameters(2, 3, 2)
    leaves = [t.requires_grad_() for t in (torch.randn(1, 4, 6, 2, dtype=torch.float64), weight, bias)]
    assert torch.autograd.gradcheck(lambda *a: unshuffle_conv(*a, 2), leaves)


def test_out_dtype_and_empty() -> None:
    weight, bias = parameters(3, 5, 2, torch.bfloat16)
    assert unshuffle_conv(torch.randn(1, 4, 4, 3), weight, bias, 2).dtype == torch.bfloat16
    out = unshuffle_conv(torch.randn(0, 4, 4, 3), weight, None, 2, out_dtype=torch.float32)
    assert out.shape == (0, 2, 2, 5) and out.dtype == torch.float32


def test_compiles_fullgraph() -> None:
    weight, bias = parameters(3, 5, 2, torch.float32)
    x = torch.randn(2, 4, 6, 3, requires_grad=True)
    compiled = torch.compile(unshuffle_conv, fullgraph=True, backend="aot_eager", dynamic=True)
    out = compiled(x, weight, bias, 2)
    torch.testing.assert_close(out, unshuffle_conv(x, weight, bias, 2))
    out.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    ("shape", "weight", "bias", "message"),
    [
        ((4, 4, 3), (5, 12, 3, 3), 5, r"x: expected \[N, H, W, Cin\]"),
        ((1, 5, 4, 3), (5, 12, 3, 3), 5, "divisible by the patch size 2"),
        ((1, 4, 4, 3), (5, 4, 3, 3), 5, r"weight: expected \[Cout, 12, 3, 3\] float for 3 input channels"),
        ((1, 4, 4, 3), (5, 12, 3, 3), 4, r"bias: expected \[5\]"),
    ],
)
def test_errors_name_the_argument(shape: tuple[int, ...], weight: tuple[int, ...], bias: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unshuffle_conv(torch.zeros(shape), torch.zeros(weight), torch.zeros(bias), 2)


def test_cudnn_says_why_it_cannot_run() -> None:
    weight, bias = parameters(1, 5, 2)
    with pytest.raises(BackendError, match="tensors are on cpu; cuDNN runs on CUDA devices"):
        unshuffle_conv(torch.zeros(1, 4, 4, 1).double(), weight, bias, 2, backend="cudnn")
