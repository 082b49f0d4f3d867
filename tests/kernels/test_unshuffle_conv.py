"""Triton `unshuffle_conv` against the float64 oracle: in the interpreter, and on a GPU at the model's sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from any4d_fast import backends, testing
from any4d_fast.ops.unshuffle_conv import unshuffle_conv
from any4d_fast.reference.unshuffle_conv import unshuffle_conv as reference
from tests import tf32
from tests.kernels_common import DEVICE, GPU, gpu_only, kernel_test

pytestmark = kernel_test


def inputs(
    size: tuple[int, int, int, int], cout: int, dtype: torch.dtype, patch: int = 14, x: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(size[1] + cout)
    depth = size[3] * patch * patch
    weight = torch.randn(cout, depth, 3, 3, generator=generator) / (9 * depth) ** 0.5
    bias = torch.randn(cout, generator=generator)
    return [torch.randn(size, generator=generator).to(DEVICE, x), weight.to(DEVICE, dtype), bias.to(DEVICE, dtype)]


def check(given: list[Tensor], patch: int = 14, out_dtype: torch.dtype | None = None) -> None:
    """Forward and every gradient within the budget that plain PyTorch sets."""
    wide = [t.double() for t in given]
    with torch.no_grad():
        oracle, plain = reference(*wide, patch), reference(*given, patch, out_dtype=out_dtype)
    cotangent = torch.randn(oracle.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, plain.dtype)
    oracles = testing.gradients(lambda *a: reference(*a, patch), wide, [cotangent.double()])
    plains = testing.gradients(lambda *a: reference(*a, patch, out_dtype=out_dtype), given, [cotangent])

    def run(*a: Tensor) -> Tensor:
        return unshuffle_conv(*a, patch, out_dtype=out_dtype, backend="triton")

    with testing.poisoned_empty():
        actual, grads = run(*given), testing.gradients(run, given, [cotangent])
    assert actual.dtype == plain.dtype and actual.is_contiguous()
    testing.assert_within_budget(actual, oracle, plain)
    for name, grad, fine, base, source in zip(("x", "weight", "bias"), grads, oracles, plains, given, strict=True):
        assert grad is not None and fine is not None and base is not None and grad.dtype == source.dtype
        testing.assert_within_budget(grad, fine, base, name=f"gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cin", [1, 3])
def test_parity(cin: int, dtype: torch.dtype) -> None:
    check(inputs((2, 28, 42, cin), 20, dtype))


@pytest.mark.parametrize("cin", [1, 3])
def test_tf32_rounds_to_nearest(cin: int) -> None:
    """As a convolution whose operands are rounded to TF32 and multiplied exactly: see `tests/tf32.py`."""
    x, weight, bias = inputs((2, 28, 42, cin), 20, torch.float32)
    oracle = reference(x.double(), weight.double(), bias.double(), 14)
    with tf32.settings(matmul=False, cudnn=False), tf32.convolutions():
        plain = reference(x, weight, bias, 14)
    with tf32.settings(matmul=True, cudnn=False), testing.poisoned_empty():
        actual = unshuffle_conv(x, weight, bias, 14, backend="triton")
    error = testing.relative_error(plain, oracle)
    assert 2e-5 < error < 1e-3
    # Equal but for the order (and on a GPU the width) of sums. Truncated operands differ by more than `error`; and the
    # interpreter multiplies exactly, so that a bound on the error alone would say nothing.
    assert testing.relative_error(actual, plain) < 0.25 * error


def test_automatic_choice_follows_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN on a GPU; the interpreter's tensors are on the CPU, where it cannot run."""
    chosen = []
    select = backends.select
    monkeypatch.setattr(backends, "select", lambda *a, **k: chosen.append(select(*a, **k)) or chosen[-1])
    given = inputs((1, 28, 28, 1), 16, torch.float16)
    unshuffle_conv(*given, 14)
    with backends.use_backend("triton"):
        unshuffle_conv(*given, 14)
    assert chosen == ["cudnn" if GPU else "triton", "triton"]


@pytest.mark.parametrize("size", [(1, 14, 14, 3), (1, 14, 42, 1), (3, 42, 14, 1)])
def test_maps_of_one_patch_in_a_direction(size: tuple[int, int, int, int]) -> None:
    check(inputs(size, 16, torch.float32))


@pytest.mark.parametrize(("patch", "cin"), [(1, 1), (2, 3), (3, 1), (5, 3), (16, 2)])
def test_other_patch_sizes(patch: int, cin: int) -> None:
    check(inputs((1, 3 * patch, 2 * patch, cin), 16, torch.float32, patch), patch)


def test_half_maps_and_out_dtype() -> None:
    check(inputs((1, 28, 28, 3), 16, torch.float32, x=torch.bfloat16))
    check(inputs((1, 28, 28, 3), 16, torch.float16), out_dtype=torch.float32)


def test_no_bias_and_strided_maps() -> None:
    x, weight, bias = inputs((2, 28, 42, 3), 16, torch.float32)
    expected = unshuffle_conv(x, weight, None, 14, backend="triton")
    testing.assert_within_budget(
        expected, reference(x.double(), weight.double(), None, 14), reference(x, weight, None, 14)
    )
    wide = torch.zeros(2, 31, 45, 3, device=DEVICE)
    for view in (wide[:, 1:29, 1:43], x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)):
        view.copy_(x)
        assert torch.equal(unshuffle_conv(view, weight, None, 14, backend="triton"), expected)


def test_empty_batch() -> None:
    x, weight, bias = inputs((0, 28, 28, 3), 16, torch.float32)
    out = unshuffle_conv(x, weight.requires_grad_(), bias, 14, backend="triton")
    assert out.shape == (0, 2, 2, 16)
    out.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_nan_stays_in_its_neighbourhood() -> None:
    x, weight, bias = inputs((1, 14, 70, 3), 16, torch.float32)
    x[0, 3, 30] = float("nan")
    nan = unshuffle_conv(x, weight, bias, 14, backend="triton").isnan().any(-1)
    assert nan.tolist() == [[[False, True, True, True, False]]]


def test_opcheck() -> None:
    x, weight, bias = inputs((2, 14, 28, 1), 16, torch.float32)
    torch.library.opcheck(torch.ops.any4d_fast.unshuffle_conv_forward.default, (x, weight, bias, 14, torch.bfloat16))
    grad = torch.randn(2, 1, 2, 16, device=DEVICE)
    arguments = (grad, x, weight, 14, True, True, False)
    torch.library.opcheck(torch.ops.any4d_fast.unshuffle_conv_backward.default, arguments)


def test_compiles_fullgraph_with_dynamic_shapes() -> None:
    def step(*given: Tensor) -> Tensor:
        return unshuffle_conv(*given, 14, backend="triton")

    compiled = torch.compile(step, fullgraph=True, backend="inductor" if GPU else "aot_eager", dynamic=True)
    for size in ((2, 28, 42, 3), (3, 14, 28, 3)):
        given = inputs(size, 16, torch.float32)
        cotangent = torch.ones(size[0], size[1] // 14, size[2] // 14, 16, device=DEVICE)
        for actual, expected in zip(
            testing.gradients(compiled, given, [cotangent]), testing.gradients(step, given, [cotangent]), strict=True
        ):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("cin", [1, 3])
class TestRealSizes:
    pytestmark = gpu_only

    def test_parity(self, cin: int, dtype: torch.dtype) -> None:
        check(inputs((2, 518, 336, cin), 588, dtype))

    def test_parity_in_tf32(self, cin: int, dtype: torch.dtype) -> None:
        with tf32.settings(matmul=True, cudnn=True):
            check(inputs((2, 518, 336, cin), 588, dtype))


class TestOffsets:
    pytestmark = gpu_only

    def test_beyond_31_bits(self) -> None:
        """4,200 maps of 518 x 336 x 3: 2.2e9 elements; the last map is compared."""
        one, weight, bias = inputs((1, 518, 336, 3), 64, torch.float16, x=torch.float16)
        many = torch.zeros(4200, 518, 336, 3, dtype=torch.float16, device=DEVICE)
        many[-1] = one[0]
        actual = unshuffle_conv(many, weight, bias, 14, backend="triton")
        assert torch.equal(actual[-1], unshuffle_conv(one, weight, bias, 14, backend="triton")[0])
