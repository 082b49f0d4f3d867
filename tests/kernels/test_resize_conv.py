"""Triton `resize_conv` against the float64 oracle: in the interpreter, and on a GPU at the model's sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from any4d_fast import backends, testing
from any4d_fast.ops.resize_conv import pack_layers, resize_conv, resize_conv_checked
from any4d_fast.reference.resize_conv import resize_conv as reference
from tests import tf32
from tests.kernels_common import DEVICE, GPU, gpu_only, kernel_test

pytestmark = kernel_test

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("x", "weight3", "bias3", "weight1", "bias1")
Size = tuple[int, int]


@pytest.fixture(autouse=True)
def exact_products() -> Any:
    """PyTorch's convolutions use TF32 unless told not to; the kernels follow the matmul's setting."""
    with tf32.settings(matmul=False, cudnn=False):
        yield


def inputs(
    shape: tuple[int, int, int, int],
    hidden: int,
    outputs: int,
    dtype: torch.dtype,
    parameters: torch.dtype | None = None,
) -> list[Tensor]:
    """x, weight3, bias3, weight1, bias1, with activations of order one."""
    generator = torch.Generator().manual_seed(math.prod(shape) + hidden)
    channels = shape[3]
    sizes = (shape, (hidden, channels, 3, 3), (hidden,), (outputs, hidden, 1, 1), (outputs,))
    given = [torch.randn(size, generator=generator) for size in sizes]
    given[1] /= math.sqrt(9 * channels)
    given[3] /= math.sqrt(hidden)
    return [given[0].to(DEVICE, dtype), *(t.to(DEVICE, parameters or dtype) for t in given[1:])]


def bound(op: Callable[..., Tensor], size: Size, **options: Any) -> Callable[..., Tensor]:
    return lambda x, *layers: op(x, size, *layers, **options)


def check(given: list[Tensor], size: Size) -> None:
    """Forward and every gradient within the budget that plain PyTorch sets."""
    x = given[0]
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(x.shape[0], *size, given[4].shape[0], generator=generator).to(DEVICE, x.dtype)
    wide = [t.double() for t in given]
    with torch.no_grad():
        oracle, plain = reference(wide[0], size, *wide[1:]), reference(x, size, *given[1:])
    oracles = testing.gradients(bound(reference, size), list(wide), [cotangent.double()])
    plains = testing.gradients(bound(reference, size), list(given), [cotangent])
    with testing.poisoned_empty():
        actual = resize_conv(x, size, *given[1:], backend="triton")
        grads = testing.gradients(bound(resize_conv, size, backend="triton"), list(given), [cotangent])
    assert actual.dtype == x.dtype and actual.is_contiguous()
    testing.assert_within_budget(actual, oracle, plain)
    for name, grad, exact, base, source in zip(NAMES, grads, oracles, plains, given, strict=True):
        assert grad is not None and exact is not None and base is not None and grad.dtype == source.dtype
        testing.assert_within_budget(grad, exact, base, name=f"gradient of {name}", rounding=x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "hidden", "outputs", "size"),
    [
        ((2, 4, 5, 16), 32, 6, (7, 9)),
        ((1, 8, 8, 32), 16, 3, (14, 13)),
        ((3, 1, 3, 16), 16, 3, (5, 6)),
        ((2, 5, 1, 16), 16, 16, (5, 7)),
    ],
)
def test_parity(shape: Any, hidden: int, outputs: int, size: Size, dtype: torch.dtype) -> None:
    check(inputs(shape, hidden, outputs, dtype), size)


@pytest.mark.parametrize(
    ("shape", "hidden", "outputs", "size"),
    [
        ((2, 6, 5, 48), 80, 2, (4, 3)),  # shrinks; channels that are no powers of two
        ((1, 5, 4, 16), 16, 3, (5, 4)),  # the same size
        ((1, 3, 3, 16), 16, 1, (13, 16)),  # grows by more than four
        ((32, 4, 5, 16), 16, 3, (1, 1)),
        ((1, 1, 1, 16), 16, 3, (4, 3)),
        ((1, 3, 2, 144), 16, 3, (4, 5)),
    ],
)
def test_parity_of_odd_shapes(shape: Any, hidden: int, outputs: int, size: Size) -> None:
    check(inputs(shape, hidden, outputs, torch.float32), size)


@pytest.mark.parametrize(
    ("shape", "hidden", "outputs", "size"),
    [((2, 4, 5, 16), 32, 6, (7, 9)), ((1, 6, 5, 48), 80, 3, (9, 8))],
)
def test_tf32_rounds_to_nearest(shape: Any, hidden: int, outputs: int, size: Size) -> None:
    """The baseline rounds a convolution's operands and multiplies exactly: see `tests/tf32.py`.

    Within the budget is not enough where the interpreter multiplies exactly: results must be the baseline's, except for
    values that sums in another order take to the other side of a tie.
    """
    given = inputs(shape, hidden, outputs, torch.float32)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(shape[0], *size, outputs, generator=generator).to(DEVICE)
    wide = [t.double() for t in given]
    oracles = [reference(wide[0], size, *wide[1:])]
    oracles += testing.gradients(bound(reference, size), list(wide), [cotangent.double()])  # type: ignore[arg-type]
    with tf32.convolutions():
        plains = [reference(given[0], size, *given[1:])]
        plains += testing.gradients(bound(reference, size), list(given), [cotangent])  # type: ignore[arg-type]
    op = bound(resize_conv, size, backend="triton")
    with tf32.settings(matmul=True, cudnn=False), testing.poisoned_empty():
        found = [op(*given), *testing.gradients(op, list(given), [cotangent])]
    for name, actual, exact, base in zip(("output", *NAMES), found, oracles, plains, strict=True):
        assert actual is not None
        if name == "bias1":
            testing.assert_within_budget(actual, exact, base, name=name)
            continue
        error = testing.relative_error(base, exact)
        assert 2e-5 < error < 1e-3, name
        # The bias's gradient sums rounded values, where PyTorch sums them as they are.
        share = 1.0 if name == "bias3" else 0.25
        assert testing.relative_error(actual, base) < share * error, name


def tf32_gradients(given: list[Tensor], size: Size, cotangent: Tensor) -> list[Tensor | None]:
    with tf32.settings(matmul=True, cudnn=False), testing.poisoned_empty():
        return testing.gradients(bound(resize_conv, size, backend="triton"), list(given), [cotangent])


@pytest.mark.parametrize(("x_power", "weight_power", "grad_power"), [(20, -20, -40), (-40, 30, 20), (0, 0, -80)])
def test_tf32_gradients_of_any_magnitude(x_power: int, weight_power: int, grad_power: int) -> None:
    """The backward pass works in float16; powers of two change nothing but the exponent."""
    size = (7, 9)
    x, weight3, bias3, weight1, bias1 = inputs((2, 4, 5, 16), 32, 6, torch.float32)
    cotangent = torch.randn(2, *size, 6, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected = tf32_gradients([x, weight3, bias3, weight1, bias1], size, cotangent)
    hidden = 2.0 ** (x_power + weight_power)
    scaled = [x * 2.0**x_power, weight3 * 2.0**weight_power, bias3 * hidden, weight1, bias1]
    found = tf32_gradients(scaled, size, cotangent * 2.0**grad_power)
    units = (2.0**weight_power, 2.0**x_power, 1.0, hidden, 1.0)
    for name, actual, base, unit in zip(NAMES, found, expected, units, strict=True):
        assert actual is not None and base is not None
        assert torch.equal(actual, base * unit * 2.0**grad_power), name


def test_tf32_gradients_beside_large_ones() -> None:
    """Gradients a million times smaller than the largest are as good as any."""
    size = (7, 9)
    given = inputs((2, 4, 5, 16), 32, 6, torch.float32)
    cotangent = torch.randn(2, *size, 6, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    cotangent[1] *= 2.0**-20
    alone = tf32_gradients([given[0][1:], *given[1:]], size, cotangent[1:])[0]
    beside = tf32_gradients(given, size, cotangent)[0]
    assert alone is not None and beside is not None
    assert testing.relative_error(beside[1:], alone) < 2.0**-18


def test_tf32_gradients_of_zero_and_nan() -> None:
    size = (7, 9)
    given = inputs((1, 4, 5, 16), 32, 6, torch.float32)
    cotangent = torch.zeros(1, *size, 6, device=DEVICE)
    assert all(g is not None and g.eq(0).all() for g in tf32_gradients(given, size, cotangent))
    cotangent[0, 3, 4, 1] = float("nan")
    assert all(g is not None and g.isnan().any() for g in tf32_gradients(given, size, cotangent))


def test_backward_keeps_the_setting_of_its_forward_pass() -> None:
    given = inputs((1, 4, 5, 16), 16, 3, torch.float32)
    cotangent = torch.randn(1, 7, 9, 3, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected = tf32_gradients(given, (7, 9), cotangent)
    leaves = [t.detach().requires_grad_() for t in given]
    with tf32.settings(matmul=True, cudnn=False):
        out = resize_conv(leaves[0], (7, 9), *leaves[1:], backend="triton")
    for actual, base in zip(torch.autograd.grad(out, leaves, cotangent), expected, strict=True):
        assert base is not None and torch.equal(actual, base)


def test_float32_parameters_of_a_float16_map() -> None:
    check(inputs((2, 4, 5, 16), 32, 6, torch.float16, torch.float32), (7, 9))


@pytest.mark.parametrize("kind", ["channels_first", "rows", "channels", "views"])
def test_non_contiguous(kind: str) -> None:
    x, *layers = inputs((2, 4, 5, 16), 16, 3, torch.float32)
    base = torch.randn(4, 8, 5, 32, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    views = {
        "channels_first": x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "rows": base[:2, ::2, :, :16],
        "channels": base[:2, :4, :, ::2],
        "views": base[:1, :4, :, 16:].expand(2, 4, 5, 16),
    }
    given = [views[kind], *(t.flip(0).as_strided_(t.shape, t.stride()) for t in layers)]
    given[2] = torch.stack([given[2], given[2]], 1)[:, 0]
    cotangent = torch.randn(3, 9, 8, 2).to(DEVICE).permute(3, 1, 2, 0)
    found = []
    for op in (bound(resize_conv, (9, 8), backend="triton"), bound(reference, (9, 8))):
        leaves = [t.detach().requires_grad_() for t in given]
        out = op(*leaves)
        found.append([out, *torch.autograd.grad(out, leaves, cotangent)])
    # Sums of 144 products of order one, in float32, in different orders; the weights' gradients over 144 pixels.
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("allow_tf32", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_show(value: float, allow_tf32: bool) -> None:
    x, *layers = inputs((1, 4, 4, 16), 16, 3, torch.float32)
    x[0, 0, 0, 0] = value
    with tf32.settings(matmul=allow_tf32, cudnn=False):
        out = resize_conv(x, (8, 8), *layers, backend="triton")
    expected = reference(x, (8, 8), *layers)
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert out.isfinite().any() and not out.isfinite().all()


def test_automatic_choice_follows_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN takes float32 without TF32 on a GPU; the interpreter's tensors are on the CPU, where it cannot run."""
    chosen = []
    select = backends.select
    monkeypatch.setattr(backends, "select", lambda *a, **k: chosen.append(select(*a, **k)) or chosen[-1])
    for dtype, allow_tf32 in ((torch.float32, False), (torch.float32, True), (torch.float16, False)):
        x, *layers = inputs((1, 3, 4, 16), 16, 3, dtype)
        with tf32.settings(matmul=allow_tf32, cudnn=False):
            resize_conv(x, (5, 6), *layers)
            with backends.use_backend("triton"):
                resize_conv(x, (5, 6), *layers)
    assert chosen == ["cudnn" if GPU else "triton", *["triton"] * 5]


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (4,), (0, 4), (1, 3)])
def test_only_the_gradients_that_are_needed(needed: tuple[int, ...]) -> None:
    given = inputs((1, 3, 4, 16), 16, 3, torch.float32)
    grads = []
    for op in (bound(resize_conv, (5, 6), backend="triton"), bound(reference, (5, 6))):
        leaves = [t.detach().requires_grad_(i in needed) for i, t in enumerate(given)]
        op(*leaves).square().sum().backward()
        grads.append([leaves[i].grad for i in needed])
        assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i not in needed)
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)  # float32 sums in different orders


def test_empty_batch() -> None:
    leaves = [t.requires_grad_() for t in inputs((0, 3, 3, 16), 16, 2, torch.float32)]
    with testing.poisoned_empty():
        out = resize_conv(leaves[0], (6, 5), *leaves[1:], backend="triton")
        grads = torch.autograd.grad(out.sum(), leaves)
    assert out.shape == (0, 6, 5, 2)
    for leaf, grad in zip(leaves, grads, strict=True):
        assert grad.shape == leaf.shape and grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_result_of_16_bits(dtype: torch.dtype) -> None:
    """Its gradient is rounded to the map's dtype, then all is as for a result of that dtype."""
    x, *layers = inputs((2, 4, 5, 16), 32, 6, dtype)
    size = (7, 9)
    with testing.poisoned_empty():
        out = resize_conv(x, size, *layers, out_dtype=torch.float32, backend="triton")
    assert out.dtype == torch.float32
    oracle = reference(x.double(), size, *(t.double() for t in layers))
    testing.assert_within_budget(out, oracle, reference(x, size, *layers, torch.float32))
    assert testing.relative_error(out, oracle) < testing.relative_error(out.to(dtype), oracle)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    op = bound(resize_conv, size, backend="triton")
    wide = testing.gradients(
        bound(resize_conv, size, out_dtype=torch.float32, backend="triton"), [x, *layers], [cotangent]
    )
    narrow = testing.gradients(op, [x, *layers], [cotangent.to(dtype)])
    for name, found, expected in zip(NAMES, wide, narrow, strict=True):
        assert found is not None and expected is not None
        limit = 0 if name != "bias1" else torch.finfo(dtype).eps  # whose sum takes the gradient unrounded
        assert testing.relative_error(found, expected) <= limit


@pytest.mark.parametrize("tma", [False, True])
def test_stretches_and_groups(tma: bool) -> None:
    """Tiles smaller than a row, many stretches, one view a group: each with a share of the next one's neighbours."""
    if tma and GPU and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("tensor descriptors need compute capability 9.0")
    from any4d_fast.kernels.resize_conv import Tiles, resize_conv_forward
    from any4d_fast.kernels.resize_conv_backward import Config, resize_conv_backward

    x, weight3, bias3, weight1, bias1 = inputs((2, 3, 4, 32), 16, 3, torch.float16)
    size, flat = (4, 19), weight1.flatten(1)
    tile = Tiles(16, 16, 4, 2, tma=tma, pixel_rows=True, waves=1)
    cotangent = torch.randn(2, *size, 3, generator=torch.Generator().manual_seed(1)).to(x)
    expected = resize_conv(x, size, weight3, bias3, weight1, bias1, backend="triton")
    gradients = resize_conv_backward(cotangent, x, weight3, bias3, flat, (True,) * 4)
    for t in (tile, tile._replace(pixel_rows=False, flatten=True, waves=2)):
        with testing.poisoned_empty():
            out = resize_conv_forward(x, size, weight3, bias3, flat, bias1, config=t)
            config = Config(tile, t, tile._replace(pixels=16))
            found = resize_conv_backward(cotangent, x, weight3, bias3, flat, (True,) * 4, config, scratch=1)
        # Two roundings of float16 between sums in different orders.
        assert testing.relative_error(out, expected) < 2**-10
        for actual, base in zip(found, gradients, strict=True):
            assert testing.relative_error(actual, base) < 2**-10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "hidden"), [(32, 16), (48, 24)])
def test_checked_results_are_float32(channels: int, hidden: int, dtype: torch.dtype) -> None:
    """From weights packed once: the same sums, not rounded to the map's dtype, and a flag."""
    x, *layers = inputs((2, 3, 5, channels), hidden, 6, dtype)
    packed = pack_layers(*layers, dtype)
    assert packed.packed or hidden % 16
    flag = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    with testing.poisoned_empty():
        found = resize_conv_checked(x, (7, 9), packed, flag)
    assert found.dtype == torch.float32 and found.shape == (2, 7, 9, 6)
    oracle = reference(x.double(), (7, 9), *(t.double() for t in layers))
    plain = reference(x, (7, 9), *layers)
    testing.assert_within_budget(found, oracle, plain)
    assert flag.item() == 0


@pytest.mark.parametrize("large", [float("inf"), float("nan"), 6e4])
def test_checked_results_raise_the_flag(large: float) -> None:
    """A NaN or an infinity in the map, and a hidden value that float16 does not hold."""
    x, *layers = inputs((1, 3, 5, 32), 32, 3, torch.float16, torch.float32)
    x[0, 1, 2, 7] = large
    layers[0][:, 7] = 4.0
    flag = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    resize_conv_checked(x, (7, 9), pack_layers(*layers, torch.float16), flag)
    assert flag.item() == 1


def test_gradients_are_deterministic() -> None:
    shape = (3, 296, 192, 128) if GPU else (2, 4, 5, 16)
    given = inputs(shape, 128 if GPU else 16, 3, torch.float16)
    size = (518, 336) if GPU else (7, 9)
    cotangent = torch.randn(shape[0], *size, 3).to(given[0])
    op = bound(resize_conv, size, backend="triton")
    runs = [testing.gradients(op, list(given), [cotangent]) for _ in range(3 if GPU else 2)]
    for run in runs[1:]:
        for first, again in zip(runs[0], run, strict=True):
            assert first is not None and again is not None and torch.equal(first, again)


def test_opcheck() -> None:
    x, weight3, bias3, weight1, bias1 = inputs((1, 3, 4, 16), 16, 3, torch.float32)
    flat = weight1.flatten(1)
    ops = torch.ops.any4d_fast
    for out_dtype in (torch.float32, torch.float16):
        narrow = x.to(out_dtype)
        torch.library.opcheck(
            ops.resize_conv_forward.default, (narrow, [5, 6], weight3, bias3, flat, bias1, torch.float32)
        )
    packed = pack_layers(weight3, bias3, weight1, bias1, x.dtype).packed
    flag = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(ops.resize_conv_checked.default, (x, [5, 6], packed, flag))
    grad = torch.randn(1, 5, 6, 3, device=DEVICE)
    for flags in ((True, True, True, True, True), (False, True, False, False, False), (True, False, True, False, True)):
        torch.library.opcheck(ops.resize_conv_backward.default, (grad, x, weight3, bias3, flat, *flags))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_forward_and_backward(dynamic: bool) -> None:
    def step(x: Tensor, *layers: Tensor) -> Tensor:
        size = (2 * x.shape[1] - 1, 2 * x.shape[2])
        return resize_conv(x * 1.0, size, *layers, backend="triton").square()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 4):
        given = [t.requires_grad_() for t in inputs((2, rows, 3, 16), 16, 3, torch.float32)]
        actual = torch.autograd.grad(compiled(*given).sum(), given)
        for grad, expected in zip(actual, torch.autograd.grad(step(*given).sum(), given), strict=True):
            torch.testing.assert_close(grad, expected)


@pytest.mark.gpu
class TestOnGpu:
    """The model's sizes, and offsets beyond 2^31 elements."""

    pytestmark = gpu_only

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("outputs", [3, 6])
    def test_model_sizes(self, outputs: int, dtype: torch.dtype) -> None:
        check(inputs((3, 296, 192, 128), 128, outputs, dtype), (518, 336))

    @pytest.mark.parametrize("outputs", [3, 6])
    def test_tf32(self, outputs: int) -> None:
        with tf32.settings(matmul=True, cudnn=True):
            check(inputs((2, 152, 96, 128), 128, outputs, torch.float32), (266, 168))

    @pytest.mark.parametrize("hidden", [16, 32, 64, 256])
    def test_other_widths(self, hidden: int) -> None:
        check(inputs((2, 45, 37, hidden), hidden, 4, torch.bfloat16), (79, 101))

    def test_output_beyond_32_bits(self) -> None:
        views, size = 1400, (518, 336)
        given = inputs((1, 8, 8, 16), 16, 16, torch.float16)
        x = given[0].expand(views, -1, -1, -1)
        out = resize_conv(x, size, *given[1:], backend="triton")
        assert out.numel() > 2**31
        torch.testing.assert_close(out[-1], resize_conv(x[:1], size, *given[1:], backend="triton")[0], rtol=0, atol=0)

    def test_input_beyond_32_bits(self) -> None:
        views = 2**31 // (37 * 37 * 128) + 2
        layers = inputs((1, 1, 1, 128), 16, 3, torch.float16)[1:]
        x = torch.zeros(views, 37, 37, 128, device=DEVICE, dtype=torch.float16)
        x[-1] = torch.randn(37, 37, 128, device=DEVICE)
        x.requires_grad_()
        out = resize_conv(x, (9, 9), *layers, backend="triton")
        (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
        last = x[-1:].detach().requires_grad_()
        expected = resize_conv(last, (9, 9), *layers, backend="triton")
        torch.testing.assert_close(out[-1:], expected, rtol=0, atol=0)
        torch.testing.assert_close(grad[-1:], torch.autograd.grad(expected, last, torch.ones_like(expected))[0])

    def test_peak_memory_does_not_grow_with_views(self) -> None:
        given = inputs((1, 296, 192, 128), 128, 3, torch.float16)
        block = 512  # bytes to which PyTorch rounds every allocation, the output's too
        peaks = []
        for views in (4, 16):
            x = given[0].expand(views, -1, -1, -1)
            out = resize_conv(x, (518, 336), *given[1:], backend="triton")
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            resize_conv(x, (518, 336), *given[1:], backend="triton")
            peaks.append(torch.cuda.max_memory_allocated() - before - -(-out.nbytes // block) * block)
            del out
        assert peaks[1] == peaks[0] < 64 * 2**20
