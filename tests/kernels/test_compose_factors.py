"""Kernels of `compose_factors` against the float64 oracle: in the interpreter, and on a GPU at the model's sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from any4d_fast.kernels import compose_factors as triton_kernels
from torch import Tensor

from any4d_fast import testing
from any4d_fast.ops._library import launchers
from any4d_fast.ops.compose_factors import Factors, _backward, _forward, compose_factors
from tests.kernels_common import DEVICE, GPU, KERNEL_BACKENDS, gpu_only, kernel_test

pytestmark = kernel_test

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INPUTS = ("geometry", "flow", "quats", "trans", "log_scale")
DIFFERENTIABLE = [name for name in Factors._fields if name != "non_ambiguous_mask"]


def make_inputs(
    views: int, batch: int, height: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """Raw head outputs of model-like size: maps in `dtype`, the small heads in float32."""
    generator = torch.Generator().manual_seed(seed)
    n = views * batch

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    geometry = normal(n, height, width, 6)
    geometry[..., 2] += 2  # cameras look forward
    maps = [geometry.to(dtype), normal(n, height, width, 3).to(dtype)]
    return [t.to(DEVICE) for t in (*maps, normal(n, 4), normal(n, 3), normal(batch, 1))]


@pytest.fixture(params=KERNEL_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def kernel(backend: str) -> Callable[..., Factors]:
    """The op on one backend."""
    return functools.partial(compose_factors, backend=backend)


def eager(*inputs: Tensor) -> Factors:
    return compose_factors(*inputs, backend="eager")


def make_cotangents(inputs: list[Tensor], used: list[str]) -> list[Tensor]:
    """Cotangents that lean the same way in every pixel, so that the sums over the pixels do not cancel to nothing."""
    generator = torch.Generator().manual_seed(7)
    outputs = eager(*inputs)
    values = []
    for name in DIFFERENTIABLE:
        output = getattr(outputs, name)
        lean = torch.randn(output.shape[-1] if output.shape[-1] <= 4 else 1, generator=generator)
        noisy = lean + 0.5 * torch.randn(output.shape, generator=generator)
        values.append(noisy.to(DEVICE) if name in used else torch.zeros_like(output))
    return values


def loss_gradients(
    function: Callable[..., Factors], inputs: list[Tensor], cotangents: list[Tensor], used: list[str]
) -> list[Tensor | None]:
    """Gradients through the outputs named in `used` alone; the others get no cotangent at all."""

    def chosen(*leaves: Tensor) -> list[Tensor]:
        outputs = function(*leaves)
        return [getattr(outputs, name) for name in used]

    picked = [c for name, c in zip(DIFFERENTIABLE, cotangents, strict=True) if name in used]
    return testing.gradients(chosen, list(inputs), picked)


def check(inputs: list[Tensor], backend: str, used: list[str] = DIFFERENTIABLE) -> None:
    """Forward and every gradient within the budget that plain PyTorch sets."""
    wide = [t.double() for t in inputs]
    with torch.no_grad():
        oracle, plain = eager(*wide), eager(*inputs)
    cotangents = make_cotangents(inputs, used)
    oracles = loss_gradients(eager, wide, cotangents, used)
    plains = loss_gradients(eager, inputs, cotangents, used)
    with testing.poisoned_empty():
        actual = kernel(backend)(*inputs)
        grads = loss_gradients(kernel(backend), inputs, cotangents, used)
    for name in DIFFERENTIABLE:
        output = getattr(actual, name)
        assert output.dtype == torch.float32 and output.is_contiguous()
        testing.assert_within_budget(output, getattr(oracle, name), getattr(plain, name), name=name)
    assert torch.equal(actual.non_ambiguous_mask, plain.non_ambiguous_mask)
    for name, tensor, grad, oracle_grad, plain_grad in zip(INPUTS, inputs, grads, oracles, plains, strict=True):
        if oracle_grad is None:
            assert grad is None or not grad.any(), name
            continue
        assert grad is not None and plain_grad is not None and grad.dtype == tensor.dtype
        # A handful of numbers that are sums over all pixels: plain PyTorch errs by 0.6e-7 to 7.5e-7 there, by the luck
        # of the inputs (kernels/notes/compose_factors.md).
        floor = 2e-7 if grad.numel() < 16 else 0.0
        testing.assert_within_budget(grad, oracle_grad, plain_grad, name=f"grad of {name}", floor=floor)


@pytest.fixture(params=["triton strided", "triton tiled", *KERNEL_BACKENDS[1:]])
def access(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend; Triton in both ways of touching interleaved channels, and with small blocks, so that small maps take
    several programs."""
    name, *way = str(request.param).split()
    if name == "triton":
        tiled = way == ["tiled"]
        forward = triton_kernels.Config(block=64, warps=4, iterations=1, tile_loads=tiled, tile_stores=tiled)
        monkeypatch.setattr(triton_kernels, "FORWARD", forward)
        monkeypatch.setattr(triton_kernels, "BACKWARD", forward._replace(iterations=2))
    return name


@pytest.mark.parametrize("dtype", DTYPES)
def test_parity(dtype: torch.dtype, access: str) -> None:
    check(make_inputs(3, 2, 13, 17, dtype), access)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parity_of_the_shipped_configuration(dtype: torch.dtype, backend: str) -> None:
    check(make_inputs(2, 1, 28, 42, dtype), backend)


@pytest.mark.parametrize(
    ("views", "batch", "height", "width"),
    [(1, 1, 1, 1), (1, 3, 1, 7), (2, 1, 31, 1), (5, 1, 11, 13), (1, 1, 16, 64), (2, 1, 37, 61)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sizes(views: int, batch: int, height: int, width: int, dtype: torch.dtype, backend: str) -> None:
    check(make_inputs(views, batch, height, width, dtype), backend)


def _channels_last_convolution(x: Tensor) -> Tensor:
    maps = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return maps.permute(0, 2, 3, 1)


def _planar(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


def _wider_rows(x: Tensor) -> Tensor:
    return torch.cat([x, x.flip(-1)], dim=-1)[..., : x.shape[-1]]


def _crop(x: Tensor) -> Tensor:
    n, height, width, channels = x.shape
    padded = x.new_zeros(n, height + 2, width + 3, channels)
    padded[:, 1:-1, 1:-2] = x
    return padded[:, 1:-1, 1:-2]


def _planar_crop(x: Tensor) -> Tensor:
    n, height, width, channels = x.shape
    padded = x.new_zeros(n, channels, height + 2, width + 3)
    padded[:, :, 1:-1, 1:-2] = x.permute(0, 3, 1, 2)
    return padded[:, :, 1:-1, 1:-2].permute(0, 2, 3, 1)


@pytest.mark.parametrize("layout", [_channels_last_convolution, _planar, _wider_rows, _crop, _planar_crop])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layouts(layout: Callable[[Tensor], Tensor], dtype: torch.dtype, access: str) -> None:
    geometry, flow, quats, trans, log_scale = make_inputs(2, 1, 9, 11, dtype)
    pose = torch.cat([trans, quats], dim=1)  # the pose head's 3 + 4 outputs, split without a copy
    strided = [layout(geometry), layout(flow), pose[:, 3:], pose[:, :3], log_scale]
    assert all(torch.equal(a, b) for a, b in zip(strided[:2], (geometry, flow), strict=True))
    function, kernels = kernel(access), launchers("compose_factors", access)
    for actual, expected in zip(function(*strided), function(geometry, flow, quats, trans, log_scale), strict=True):
        assert torch.equal(actual, expected)
    cotangents = [torch.ones_like(getattr(function(*strided), name)) for name in DIFFERENTIABLE]
    found = kernels.backward(*strided, tuple(cotangents))
    expected_grads = kernels.backward(geometry, flow, quats, trans, log_scale, tuple(cotangents))
    for actual, expected in zip(found, expected_grads, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    "used",
    [
        ["pts3d"],
        ["pts3d_cam", "conf"],
        ["ray_directions", "non_ambiguous_mask_logits"],
        ["depth_along_ray"],
        ["scene_flow"],
        ["cam_trans", "cam_quats"],
        ["metric_scaling_factor"],
    ],
)
def test_outputs_without_cotangents(used: list[str], backend: str) -> None:
    check(make_inputs(2, 2, 7, 9), backend, used)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (4,), (0, 3), (1, 4)])
def test_inputs_without_gradients(wanted: tuple[int, ...], backend: str) -> None:
    inputs = make_inputs(2, 2, 7, 9)
    leaves = [t.requires_grad_() if i in wanted else t for i, t in enumerate(inputs)]
    losses = [f(*leaves) for f in (kernel(backend), eager)]
    found, expected = (
        torch.autograd.grad(out.pts3d.square().sum() + out.scene_flow.square().sum(), [leaves[i] for i in wanted])
        if wanted != (2,)
        else torch.autograd.grad(out.pts3d.square().sum(), [leaves[2]])
        for out in losses
    )
    for actual, reference in zip(found, expected, strict=True):
        assert testing.relative_error(actual, reference) < 1e-5  # two float32 sums of 63 terms each, in two orders


def test_zero_rays_and_quaternions(backend: str) -> None:
    inputs = [torch.zeros_like(t) for t in make_inputs(2, 1, 5, 7)]
    inputs[0][:, 2:] = torch.randn(inputs[0][:, 2:].shape).to(DEVICE)
    check(inputs, backend)
    # float32 squares of 1e-9 are exact enough for both sides to see a ray below the clamp, and of 3e-8 one above it.
    for length in (1e-9, 3e-8):
        inputs[0][:, :2, :, :3] = length
        inputs[2][:] = length
        check(inputs, backend)


def test_extreme_logarithms(backend: str) -> None:
    inputs = make_inputs(1, 1, 8, 16)
    finite = [-200.0, -100.0, -87.0, -20.0, 0.0, 20.0, 80.0, 88.5, 90.0]
    values = torch.tensor([*finite, float("inf"), float("-inf"), float("nan")])
    inputs[0][0, 0, : len(values), 3] = values.to(DEVICE)
    inputs[0][0, 1, : len(values), 4] = values.to(DEVICE)
    inputs[0][0, 2, : len(values), 5] = values.to(DEVICE)
    inputs[4].zero_()
    actual, expected = kernel(backend)(*inputs), eager(*inputs)
    for name in ("depth_along_ray", "conf", "non_ambiguous_mask_logits"):
        # 1e-37: GPUs flush what is denormal
        torch.testing.assert_close(
            getattr(actual, name), getattr(expected, name), rtol=1e-6, atol=1e-37, equal_nan=True
        )
    assert torch.equal(actual.non_ambiguous_mask, expected.non_ambiguous_mask)


def test_mask_near_the_threshold(backend: str) -> None:
    inputs = make_inputs(1, 1, 4, 8)
    inputs[0][0, 0, :, 5] = torch.tensor([0.0, 1e-9, -1e-9, 1e-6, -1e-6, 1e-3, -1e-3, 5.0]).to(DEVICE)
    assert torch.equal(kernel(backend)(*inputs).non_ambiguous_mask, eager(*inputs).non_ambiguous_mask)


def test_small_scale_is_clamped_without_gradient(backend: str) -> None:
    inputs = make_inputs(2, 1, 5, 7)
    inputs[4].fill_(-50.0)
    check(inputs, backend)


def test_nan_as_a_scale_shows_in_its_gradient(backend: str) -> None:
    inputs = make_inputs(1, 2, 3, 4)
    inputs[4][1] = float("nan")
    log_scale = inputs[4].requires_grad_()
    (grad,) = torch.autograd.grad(kernel(backend)(*inputs).pts3d.sum(), log_scale)
    assert grad.isfinite().flatten().tolist() == [True, False]


def test_empty(backend: str) -> None:
    inputs = make_inputs(2, 2, 4, 5)
    nothing = [t[:0] for t in inputs[:4]]
    with testing.poisoned_empty():
        for empty in ([*nothing, inputs[4]], [*nothing, inputs[4][:0]], [*(t[:, :0] for t in inputs[:2]), *inputs[2:]]):
            actual, expected = kernel(backend)(*empty), eager(*empty)
            for output, reference in zip(actual, expected, strict=True):
                assert output.shape == reference.shape
                torch.testing.assert_close(output, reference)
            leaves = [t.clone().requires_grad_() for t in empty]
            out = kernel(backend)(*leaves)
            total = out.pts3d.sum() + out.cam_trans.sum() + out.metric_scaling_factor.sum()
            grads = torch.autograd.grad(total, leaves, allow_unused=True)
            assert all(g is None or g.isfinite().all() for g in grads)


def test_gradients_are_bitwise_repeatable(backend: str) -> None:
    inputs = make_inputs(2, 1, 30, 40, torch.float16)
    cotangents = make_cotangents(inputs, DIFFERENTIABLE)
    first, second = (loss_gradients(kernel(backend), inputs, cotangents, DIFFERENTIABLE) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None)


def test_maps_off_their_alignment(backend: str) -> None:
    """Every tensor one element past a 16-byte boundary, and cotangents too."""

    def shift(x: Tensor) -> Tensor:
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)

    kernels = launchers("compose_factors", backend)
    for dtype in (torch.float32, torch.float16):
        inputs = make_inputs(2, 1, 16, 24, dtype)
        cotangents = make_cotangents(inputs, DIFFERENTIABLE)
        shifted = [shift(t) for t in inputs]
        for actual, expected in zip(kernel(backend)(*shifted), kernel(backend)(*inputs), strict=True):
            assert torch.equal(actual, expected)
        found = kernels.backward(*shifted, tuple(shift(g) for g in cotangents))
        for actual, expected in zip(found, kernels.backward(*inputs, tuple(cotangents)), strict=True):
            # Other addresses are other code: the same sums, perhaps contracted elsewhere.
            assert testing.relative_error(actual, expected) <= 2**-22


@pytest.mark.parametrize("layout", [_channels_last_convolution, _planar])
def test_opcheck(layout: Callable[[Tensor], Tensor], backend: str) -> None:
    geometry, flow, *rest = make_inputs(2, 1, 4, 5)
    inputs = [layout(geometry), layout(flow), *rest]
    torch.library.opcheck(_forward, (*inputs, backend))
    cotangents = [torch.ones_like(o) for o in _forward(*inputs, backend) if o.is_floating_point()]
    torch.library.opcheck(_backward, (*inputs, *cotangents, True, True, True, True, backend))
    torch.library.opcheck(_backward, (*inputs, cotangents[0], *[None] * 9, True, False, False, True, backend))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool, backend: str) -> None:
    torch.compiler.reset()
    function = kernel(backend)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for views, height in ((2, 4), (3, 5)):
        inputs = make_inputs(views, 1, height, 6)
        used = ["pts3d", "cam_quats", "scene_flow", "conf"]
        cotangents = make_cotangents(inputs, used)
        for actual, expected in zip(compiled(*inputs), function(*inputs), strict=True):
            assert torch.equal(actual, expected)
        grads = [loss_gradients(f, inputs, cotangents, used) for f in (compiled, function)]
        for actual, expected in zip(*grads, strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.skipif(not GPU, reason="real sizes: needs a CUDA device (make test-gpu)")
def test_real_size(dtype: torch.dtype, backend: str) -> None:
    check(make_inputs(8, 1, 336, 518, dtype), backend)


class TestOffsets:
    """Element offsets beyond 2^31."""

    pytestmark = gpu_only

    def test_beyond_two_to_the_31(self, backend: str) -> None:
        views = 4_200  # 3 * 4,200 * 518 * 336 > 2^31
        if torch.cuda.mem_get_info()[0] < 100 * 2**30:
            pytest.skip("needs 100 GB of free GPU memory")
        last = make_inputs(1, 1, 336, 518, torch.float16)
        inputs = [t.expand(views, *t.shape[1:]).contiguous() for t in last[:4]]
        function, kernels = kernel(backend), launchers("compose_factors", backend)
        out = function(*inputs, last[4])
        expected = function(*last)
        for name in DIFFERENTIABLE:
            assert torch.equal(getattr(out, name)[-1], getattr(expected, name)[-1]), name
        cotangent = out.pts3d
        del out
        nothing = [None] * 9
        grads = kernels.backward(*inputs, last[4], (cotangent, *nothing))
        single = kernels.backward(*last, (expected.pts3d, *nothing))
        for grad, one in zip(grads[:4], single[:4], strict=True):
            assert torch.equal(grad[-1:], one)
