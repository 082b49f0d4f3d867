"""`resize_bilinear` on the eager path: values, gradients, arguments, torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from any4d_fast.backends import BackendError
from any4d_fast.ops.resize_bilinear import resize_bilinear


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def matrix(given: int, out: int) -> Tensor:
    """[out, given] weights of one axis, from the definition."""
    place = torch.arange(out, dtype=torch.float64) * ((given - 1) / max(out - 1, 1))
    return (1 - (place[:, None] - torch.arange(given)).abs()).clamp(min=0)


@pytest.mark.parametrize("size", [(10, 8), (5, 4), (7, 9), (1, 1), (1, 6), (16, 3)])
def test_equals_the_definition(size: tuple[int, int]) -> None:
    x = random(2, 5, 4, 3)
    expected = torch.einsum("Yy,Xx,nyxc->nYXc", matrix(5, size[0]), matrix(4, size[1]), x)
    torch.testing.assert_close(resize_bilinear(x, size), expected)


def test_a_single_pixel_is_repeated() -> None:
    x = random(2, 1, 1, 3)
    assert torch.equal(resize_bilinear(x, (4, 3)), x.expand(2, 4, 3, 3))


def test_gradcheck() -> None:
    x = random(2, 3, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: resize_bilinear(x, (6, 4)), [x])


def test_empty_batch() -> None:
    x = torch.zeros(0, 3, 3, 4, requires_grad=True)
    out = resize_bilinear(x, (6, 5))
    assert out.shape == (0, 6, 5, 4)
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


def test_compiles_fullgraph() -> None:
    x = random(2, 3, 4, 4).requires_grad_()
    compiled = torch.compile(resize_bilinear, fullgraph=True, backend="aot_eager", dynamic=True)
    out = compiled(x, (6, 8), backend="eager")
    torch.testing.assert_close(out, resize_bilinear(x, (6, 8)))
    out.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    ("x", "size", "message"),
    [
        (torch.zeros(4, 4, 3), (2, 2), r"x: expected \[N, h, w, C\] float, got \[4, 4, 3\]"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.int64), (2, 2), r"x: expected .* torch.int64"),
        (torch.zeros(1, 0, 4, 3), (2, 2), r"x: expected \[N, h, w, C\]"),
        (torch.zeros(1, 4, 4, 3), (0, 4), r"size: expected \(H, W\), both at least 1, got \(0, 4\)"),
    ],
)
def test_errors_name_the_argument(x: Tensor, size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resize_bilinear(x, size)


def test_backends_say_why_they_cannot_run() -> None:
    with pytest.raises(BackendError, match=r"x is torch.float64"):
        resize_bilinear(random(1, 2, 2, 3), (4, 4), backend="triton")
