"""Triton `resize_bilinear` against the float64 oracle: in the interpreter, and on a GPU at the heads' sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from any4d_fast import testing
from any4d_fast.ops.resize_bilinear import resize_bilinear
from any4d_fast.reference.resize_bilinear import resize_bilinear as reference
from tests.kernels_common import DEVICE, GPU, gpu_only, kernel_test

pytestmark = kernel_test

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Shape = tuple[int, int, int, int]
Size = tuple[int, int]


def random(shape: Shape, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape))).to(DEVICE, dtype)


def check(x: Tensor, size: Size) -> None:
    """Forward and gradient within the budget that plain PyTorch sets."""
    cotangent = random((x.shape[0], *size, x.shape[3]), x.dtype)
    exact, plain = reference(x.double(), size), reference(x, size)
    exacts = testing.gradients(lambda t: reference(t, size), [x.double()], [cotangent.double()])
    plains = testing.gradients(lambda t: reference(t, size), [x], [cotangent])
    with testing.poisoned_empty():
        actual = resize_bilinear(x, size, backend="triton")
        grads = testing.gradients(lambda t: resize_bilinear(t, size, backend="triton"), [x], [cotangent])
    assert actual.dtype == x.dtype and actual.is_contiguous()
    testing.assert_within_budget(actual, exact, plain)
    assert grads[0] is not None and exacts[0] is not None and plains[0] is not None
    testing.assert_within_budget(grads[0], exacts[0], plains[0], name="gradient")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "size"), [((2, 4, 5, 16), (8, 10)), ((1, 8, 7, 32), (14, 13)), ((3, 1, 3, 7), (2, 6))]
)
def test_parity(shape: Shape, size: Size, dtype: torch.dtype) -> None:
    check(random(shape, dtype), size)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 6, 5, 4), (4, 3)),  # shrinks
        ((1, 9, 11, 3), (2, 2)),
        ((1, 5, 4, 16), (5, 4)),  # the same size
        ((2, 3, 3, 1), (13, 37)),  # grows by more than four
        ((1, 2, 2, 5), (4, 71)),
        ((8, 4, 5, 16), (1, 1)),
        ((1, 1, 1, 16), (4, 3)),
        ((1, 3, 2, 144), (6, 4)),  # more than one block of channels
        ((1, 2, 67, 3), (4, 134)),  # more than one block of pixels
    ],
)
def test_parity_of_odd_shapes(shape: Shape, size: Size) -> None:
    check(random(shape, torch.float32), size)


@pytest.mark.parametrize("height", [2, 3, 4, 5, 12, 19, 37])
def test_every_reader_is_gathered(height: int) -> None:
    """A sum over the gradient is a sum over what came in, whatever the two sizes: none is missed, none taken twice."""
    for out in (2 * height, 2 * height - 1, height + 1, 3 * height + 1, max(1, height // 2)):
        x = torch.zeros(1, height, 1, 1, device=DEVICE, requires_grad=True)
        result = resize_bilinear(x, (out, 1), backend="triton")
        cotangent = torch.rand(1, out, 1, 1, generator=torch.Generator().manual_seed(out)).to(DEVICE)
        (grad,) = torch.autograd.grad(result, x, cotangent)
        torch.testing.assert_close(grad.sum(), cotangent.sum())


@pytest.mark.parametrize("kind", ["channels_first", "rows", "channels", "views"])
def test_non_contiguous(kind: str) -> None:
    base = random((4, 8, 5, 32), torch.float32)
    x = {
        "channels_first": base[:2, :4].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "rows": base[:2, ::2, :, :16],
        "channels": base[:2, :4, :, ::2],
        "views": base[:1, :4, :, 16:].expand(2, 4, 5, 16),
    }[kind]
    cotangent = torch.randn(x.shape[3], 10, 8, 2).to(DEVICE).permute(3, 2, 1, 0)
    found = []
    for op in (lambda t: resize_bilinear(t, (8, 10), backend="triton"), lambda t: reference(t, (8, 10))):
        leaf = x.detach().requires_grad_()
        out = op(leaf)
        found.append([out, *torch.autograd.grad(out, leaf, cotangent)])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)


def test_empty_batch() -> None:
    x = torch.zeros(0, 3, 3, 16, device=DEVICE, requires_grad=True)
    out = resize_bilinear(x, (6, 5), backend="triton")
    assert out.shape == (0, 6, 5, 16)
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_show(value: float) -> None:
    x = random((1, 4, 4, 16), torch.float32)
    x[0, 1, 2, 3] = value
    out, expected = resize_bilinear(x, (8, 8), backend="triton"), reference(x, (8, 8))
    assert torch.equal(out.isfinite(), expected.isfinite()) and not out.isfinite().all()


def test_gradients_are_deterministic() -> None:
    x = random((3, 148, 96, 256) if GPU else (2, 4, 5, 16), torch.float32).requires_grad_()
    out = resize_bilinear(x, (2 * x.shape[1], 2 * x.shape[2]), backend="triton")
    cotangent = torch.randn_like(out)
    runs = [torch.autograd.grad(out, x, cotangent, retain_graph=True)[0] for _ in range(3)]
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_opcheck() -> None:
    ops = torch.ops.any4d_fast
    torch.library.opcheck(ops.resize_bilinear_forward.default, (random((1, 3, 4, 16), torch.float32), [6, 8]))
    torch.library.opcheck(ops.resize_bilinear_backward.default, (random((1, 6, 8, 16), torch.float32), [3, 4]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_forward_and_backward(dynamic: bool) -> None:
    def step(x: Tensor) -> Tensor:
        return resize_bilinear(x * 1.0, (2 * x.shape[1], 2 * x.shape[2]), backend="triton").square()

    compiled: Any = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 4):
        x = random((2, rows, 3, 16), torch.float32).requires_grad_()
        (actual,) = torch.autograd.grad(compiled(x).sum(), x)
        torch.testing.assert_close(actual, torch.autograd.grad(step(x).sum(), x)[0])


@pytest.mark.gpu
class TestOnGpu:
    """The heads' sizes, and offsets beyond 2^31 elements."""

    pytestmark = gpu_only

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(4, 12, 19, 256), (4, 24, 37, 256), (4, 148, 96, 256)])
    def test_model_sizes(self, shape: Shape, dtype: torch.dtype) -> None:
        check(random(shape, dtype), (2 * shape[1], 2 * shape[2]))

    def test_beyond_32_bits(self) -> None:
        x = random((1, 148, 96, 256), torch.float16).expand(160, -1, -1, -1)
        out = resize_bilinear(x, (296, 192), backend="triton")
        assert out.numel() > 2**31
        assert torch.equal(out[-1], out[0])
        grad = torch.ops.any4d_fast.resize_bilinear_backward(out, [148, 96])
        assert torch.equal(grad[-1], grad[0])
