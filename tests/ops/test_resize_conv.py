"""`resize_conv` on the eager path: values, gradients, arguments, torch.compile."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from any4d_fast.backends import BackendError
from any4d_fast.ops.resize_conv import resize_conv
from any4d_fast.testing import assert_within_budget, relative_error


def inputs(
    shape: tuple[int, int, int, int], hidden: int, outputs: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """x, weight3, bias3, weight1, bias1."""
    generator = torch.Generator().manual_seed(0)
    channels = shape[3]
    sizes = (shape, (hidden, channels, 3, 3), (hidden,), (outputs, hidden, 1, 1), (outputs,))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in sizes)


def formula(x: Tensor, size: tuple[int, int], *layers: Tensor) -> Tensor:
    """Source coordinates, the four neighbours, then modules of torch.nn."""
    weight3, bias3, weight1, bias1 = layers
    rows, columns = (
        torch.arange(out, dtype=torch.float64) * ((given - 1) / max(out - 1, 1))
        for given, out in zip(x.shape[1:3], size, strict=True)
    )

    def mix(values: Tensor, place: Tensor, dim: int) -> Tensor:
        lower = place.floor().long().clamp(max=values.shape[dim] - 1)
        upper = (lower + 1).clamp(max=values.shape[dim] - 1)
        weight = (place - lower).view([-1 if d == dim else 1 for d in range(4)]).to(values.dtype)
        return values.index_select(dim, lower) * (1 - weight) + values.index_select(dim, upper) * weight

    resized = mix(mix(x, rows, 1), columns, 2).permute(0, 3, 1, 2)
    head = nn.Sequential(
        nn.Conv2d(weight3.shape[1], weight3.shape[0], 3, padding=1), nn.ReLU(), nn.Conv2d(*weight1.shape[1::-1], 1)
    ).to(x.dtype)
    head.load_state_dict({"0.weight": weight3, "0.bias": bias3, "2.weight": weight1, "2.bias": bias1})
    out: Tensor = head(resized).permute(0, 2, 3, 1)
    return out


@pytest.mark.parametrize("size", [(7, 9), (5, 4), (4, 4), (1, 1), (1, 6), (16, 3)])
def test_equals_the_formula(size: tuple[int, int]) -> None:
    x, *layers = inputs((2, 5, 4, 3), 6, 2)
    torch.testing.assert_close(resize_conv(x, size, *layers), formula(x, size, *layers))


def test_single_row_is_repeated() -> None:
    x, *layers = inputs((1, 1, 1, 3), 4, 2)
    torch.testing.assert_close(resize_conv(x, (4, 5), *layers), formula(x, (4, 5), *layers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_budget(dtype: torch.dtype) -> None:
    x, *layers = inputs((2, 5, 4, 16), 16, 3, dtype)
    layers[0] /= math.sqrt(layers[0][0].numel())
    oracle = resize_conv(x.double(), (8, 7), *(t.double() for t in layers))
    actual = resize_conv(x, (8, 7), *layers, backend="eager")
    assert actual.dtype == dtype
    assert_within_budget(actual, oracle, formula(x, (8, 7), *layers))


def test_parameters_of_another_dtype_and_a_flat_weight() -> None:
    x, weight3, bias3, weight1, bias1 = inputs((1, 3, 3, 4), 5, 2, torch.float32)
    half = x.to(torch.bfloat16)
    out = resize_conv(half, (4, 4), weight3, bias3, weight1.flatten(1), bias1)
    assert out.dtype == torch.bfloat16
    rounded = (t.bfloat16() for t in (weight3, bias3, weight1, bias1))
    torch.testing.assert_close(out, resize_conv(half, (4, 4), *rounded))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_result_is_not_rounded_to_the_maps_dtype(dtype: torch.dtype) -> None:
    x, *layers = inputs((2, 5, 4, 16), 16, 3, dtype)
    layers[0] /= math.sqrt(layers[0][0].numel())
    oracle = resize_conv(x.double(), (8, 7), *(t.double() for t in layers))
    leaves = [t.clone().requires_grad_() for t in (x, *layers)]
    out = resize_conv(leaves[0], (8, 7), *leaves[1:], out_dtype=torch.float32)
    assert out.dtype == torch.float32
    assert relative_error(out, oracle) < relative_error(resize_conv(x, (8, 7), *layers), oracle)
    found = torch.autograd.grad(out, leaves, torch.ones_like(out))
    plain = torch.autograd.grad(resize_conv(leaves[0], (8, 7), *leaves[1:]), leaves, torch.ones_like(out, dtype=dtype))
    for grad, other, leaf in zip(found, plain, leaves, strict=True):
        assert grad.dtype == leaf.dtype
        assert relative_error(grad, other) < 2 * torch.finfo(dtype).eps


def test_gradcheck() -> None:
    leaves = [t.requires_grad_() for t in inputs((1, 3, 2, 2), 3, 2)]
    assert torch.autograd.gradcheck(lambda x, *layers: resize_conv(x, (4, 3), *layers), leaves)


def test_empty_batch_has_zero_gradients() -> None:
    leaves = [t.requires_grad_() for t in inputs((0, 3, 3, 4), 5, 2, torch.float32)]
    out = resize_conv(leaves[0], (6, 5), *leaves[1:])
    assert out.shape == (0, 6, 5, 2)
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert grad.shape == leaf.shape and grad.eq(0).all()


def test_compiles_fullgraph() -> None:
    leaves = [t.requires_grad_() for t in inputs((2, 3, 4, 4), 5, 2, torch.float32)]
    compiled = torch.compile(resize_conv, fullgraph=True, backend="aot_eager", dynamic=True)
    out = compiled(leaves[0], (6, 5), *leaves[1:], backend="eager")
    torch.testing.assert_close(out, resize_conv(leaves[0], (6, 5), *leaves[1:]))
    out.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("x", torch.zeros(4, 4, 3), r"x: expected \[N, h, w, C\] float, got \[4, 4, 3\]"),
        ("x", torch.zeros(1, 4, 4, 3, dtype=torch.int64), r"x: expected .* torch.int64"),
        ("x", torch.zeros(1, 0, 4, 3), r"x: expected \[N, h, w, C\]"),
        ("size", (0, 4), r"size: expected \(H, W\), both at least 1, got \(0, 4\)"),
        ("weight3", torch.zeros(5, 3, 1, 1), r"weight3: expected \[M, 3, 3, 3\] for 3 input channels"),
        ("bias3", torch.zeros(4), r"bias3: expected \[5\], got \[4\]"),
        ("weight1", torch.zeros(2, 4), r"weight1: expected \[Cout, 5\] or \[Cout, 5, 1, 1\], got \[2, 4\]"),
        ("bias1", torch.zeros(3), r"bias1: expected \[2\], got \[3\]"),
        ("bias1", torch.zeros(2, dtype=torch.int32), "bias1: expected floating point, got torch.int32"),
        ("out_dtype", torch.float16, "out_dtype: expected torch.float64 like x, or torch.float32, got torch.float16"),
    ],
)
def test_errors_name_the_argument(argument: str, value: object, message: str) -> None:
    names = ("x", "weight3", "bias3", "weight1", "bias1")
    given: dict[str, object] = dict(zip(names, inputs((1, 4, 4, 3), 5, 2), strict=True))
    with pytest.raises(ValueError, match=message):
        resize_conv(**({"size": (4, 4)} | given | {argument: value}))  # type: ignore[arg-type]


def test_backends_say_why_they_cannot_run() -> None:
    x, *layers = inputs((1, 4, 4, 24), 300, 20)
    with pytest.raises(BackendError, match=r"tensors are on cpu; cuDNN runs on CUDA devices"):
        resize_conv(x, (4, 4), *layers, backend="cudnn")
    with pytest.raises(BackendError, match=r"float64.*C = 24 .*M = 300 .*20 output channels"):
        resize_conv(x, (4, 4), *layers, backend="triton")
