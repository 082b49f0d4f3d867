"""Kernels of `unproject` against the float64 oracle: in the interpreter, and on a GPU at the model's sizes."""

from __future__ import annotations

import pytest
import torch
from any4d_fast.kernels import unproject as triton_kernels
from torch import Tensor

from any4d_fast import testing
from any4d_fast.geometry import quats_trans_to_pose
from any4d_fast.ops._library import launchers
from any4d_fast.ops.unproject import _backward, _forward, unproject
from tests.kernels_common import DEVICE, GPU, KERNEL_BACKENDS, gpu_only, kernel_test

pytestmark = kernel_test

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INPUTS = ("depth_z", "intrinsics", "camera_poses", "flow")


def make_inputs(*lead: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Depth and flow in `dtype`, cameras in float32."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    intrinsics = torch.eye(3).expand(*lead, 3, 3).clone()
    intrinsics[..., 0, 0] = width * (1 + 0.1 * normal(*lead))
    intrinsics[..., 1, 1] = width * (1 + 0.1 * normal(*lead))
    intrinsics[..., 0, 2], intrinsics[..., 1, 2] = width / 2 - 0.3, height / 2 + 0.2
    depth = (0.5 + 5 * torch.rand(*lead, height, width, generator=generator)).to(dtype)
    poses = quats_trans_to_pose(normal(*lead, 4), normal(*lead, 3))
    return [t.to(DEVICE) for t in (depth, intrinsics, poses, (0.1 * normal(*lead, height, width, 3)).to(dtype))]


@pytest.fixture(params=KERNEL_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(backend: str, used: str) -> object:
    """The op on one backend, returning the outputs that `used` names: "points", "moved" or "both"."""

    def function(*inputs: Tensor) -> list[Tensor]:
        outputs = [o for o in unproject(*inputs, backend=backend) if o is not None]
        return {"points": outputs[:1], "moved": outputs[1:], "both": outputs}[used]

    return function


def check(inputs: list[Tensor], backend: str, used: str = "both") -> None:
    """Forward and every gradient within the budget that plain PyTorch sets."""
    wide = [t.double() for t in inputs]
    kernel, eager = run(backend, used), run("eager", used)
    with torch.no_grad():
        oracle, plain = eager(*wide), eager(*inputs)
    generator = torch.Generator().manual_seed(7)
    # Cotangents that lean the same way in every pixel, so that the sums over the pixels do not cancel to nothing.
    lean = torch.randn(3, generator=generator)
    cotangents = [(lean + 0.5 * torch.randn(o.shape, generator=generator)).to(DEVICE) for o in plain]
    oracles, plains = testing.gradients(eager, wide, cotangents), testing.gradients(eager, inputs, cotangents)
    with testing.poisoned_empty():
        actual, grads = kernel(*inputs), testing.gradients(kernel, inputs, cotangents)
    for output, exact, baseline in zip(actual, oracle, plain, strict=True):
        assert output.dtype == torch.float32 and output.is_contiguous()
        testing.assert_within_budget(output, exact, baseline)
    for name, tensor, grad, exact, baseline in zip(INPUTS, inputs, grads, oracles, plains, strict=False):
        if exact is None:
            assert grad is None
            continue
        assert grad is not None and baseline is not None and grad.dtype == tensor.dtype
        testing.assert_within_budget(grad, exact, baseline, name=f"grad of {name}")


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


@pytest.mark.parametrize(
    ("dtype", "used"),
    [(torch.float32, "both"), (torch.float16, "both"), (torch.bfloat16, "points"), (torch.float32, "moved")],
)
def test_parity(dtype: torch.dtype, used: str, access: str) -> None:
    check(make_inputs(2, 2, height=13, width=17, dtype=dtype), access, used)


@pytest.mark.parametrize("height", [63, 64, 65, 131])
def test_partial_sums_in_several_steps(height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many partial sums as the last kernel adds at once, one less, one more, and some of a third step."""
    config = triton_kernels.Config(block=32, warps=1, iterations=1, tile_loads=False, tile_stores=False)
    monkeypatch.setattr(triton_kernels, "BACKWARD", config)
    assert triton_kernels._FINISH_BLOCK == 64
    check(make_inputs(2, height=height, width=32), "triton")


@pytest.mark.parametrize("dtype", DTYPES)
def test_parity_without_flow(dtype: torch.dtype, backend: str) -> None:
    check(make_inputs(3, height=28, width=42, dtype=dtype)[:3], backend, "points")


@pytest.mark.parametrize(
    ("lead", "height", "width"), [((), 1, 1), ((1,), 1, 7), ((2,), 31, 1), ((3, 1), 11, 13), ((2,), 61, 67)]
)
def test_sizes(lead: tuple[int, ...], height: int, width: int, backend: str) -> None:
    check(make_inputs(*lead, height=height, width=width), backend)


def test_layouts(backend: str) -> None:
    depth, intrinsics, poses, flow = make_inputs(2, height=9, width=11)
    crop = torch.nn.functional.pad(depth, (1, 2, 3, 4))[:, 3:-4, 1:-2]
    wide = depth[..., None].expand(2, 9, 11, 4).contiguous()[..., 1]
    transposed = intrinsics.mT.contiguous().mT
    planar = flow.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    expected = unproject(depth, intrinsics, poses, flow, backend=backend)
    for d in (crop, wide):
        for actual, reference in zip(unproject(d, transposed, poses, planar, backend=backend), expected, strict=True):
            assert torch.equal(actual, reference)
        check([d, transposed, poses, planar], backend)


def test_one_camera_for_all_views(backend: str) -> None:
    depth, intrinsics, poses, flow = make_inputs(3, height=9, width=11)
    check([depth, intrinsics[0], poses[:1], flow], backend)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3)])
def test_inputs_without_gradients(wanted: tuple[int, ...], backend: str) -> None:
    inputs = make_inputs(2, height=7, width=9)
    leaves = [t.requires_grad_() if i in wanted else t for i, t in enumerate(inputs)]
    found, expected = (
        torch.autograd.grad(unproject(*leaves, backend=b)[1].square().sum(), [leaves[i] for i in wanted])
        for b in (backend, "eager")
    )
    for actual, reference in zip(found, expected, strict=True):
        assert testing.relative_error(actual, reference) < 1e-5  # two float32 sums of 63 terms each, in two orders


def test_unknown_depth_stays_in_its_pixel(backend: str) -> None:
    inputs = make_inputs(2, height=5, width=6)
    inputs[0][0, 1, 2] = float("nan")
    inputs[0][1, 3, 4] = 0
    points, _ = unproject(*inputs, backend=backend)
    assert points.isnan().sum() == 3
    torch.testing.assert_close(points[1, 3, 4], inputs[2][1, :3, 3])


def test_empty(backend: str) -> None:
    inputs = make_inputs(2, height=4, width=5)
    for empty in ([t[:0] for t in inputs], [inputs[0][:, :0], *inputs[1:3], inputs[3][:, :0]]):
        leaves = [t.clone().requires_grad_() for t in empty]
        with testing.poisoned_empty():
            points, moved = unproject(*leaves, backend=backend)
            assert points.shape == moved.shape == (*empty[0].shape, 3)
            grads = torch.autograd.grad(points.sum() + moved.sum(), leaves)
        assert not any(g.any() for g in grads)


def test_gradients_are_bitwise_repeatable(backend: str) -> None:
    inputs = make_inputs(2, height=40, width=50)
    cotangents = [torch.randn(2, 40, 50, 3).to(DEVICE)] * 2
    first, second = (testing.gradients(run(backend, "both"), list(inputs), cotangents) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_opcheck(backend: str) -> None:
    inputs = make_inputs(2, height=4, width=5)
    for given in (inputs, [*inputs[:3], None]):
        torch.library.opcheck(_forward, (*given, backend))
    grad = torch.ones(2, 4, 5, 3, device=DEVICE)
    torch.library.opcheck(_backward, (*inputs[:3], grad, grad, True, True, backend))
    torch.library.opcheck(_backward, (*inputs[:3], grad, None, False, True, backend))
    torch.library.opcheck(_backward, (*inputs[:3], None, grad, True, False, backend))


@pytest.mark.parametrize(("dynamic", "used"), [(False, "both"), (True, "moved")])
def test_compile(dynamic: bool, used: str, backend: str) -> None:
    torch.compiler.reset()
    function = run(backend, used)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for views, height in ((2, 4), (3, 5)):
        inputs = make_inputs(views, height=height, width=6)
        for actual, expected in zip(compiled(*inputs), function(*inputs), strict=True):
            assert torch.equal(actual, expected)
        cotangents = [torch.ones(views, height, 6, 3, device=DEVICE) for _ in function(*inputs)]
        grads = [testing.gradients(f, list(inputs), cotangents) for f in (compiled, function)]
        for actual, expected in zip(*grads, strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.skipif(not GPU, reason="real sizes: needs a CUDA device (make test-gpu)")
def test_real_size(dtype: torch.dtype, backend: str) -> None:
    check(make_inputs(8, height=336, width=518, dtype=dtype), backend)


class TestOffsets:
    """Element offsets beyond 2^31."""

    pytestmark = gpu_only

    def test_beyond_two_to_the_31(self, backend: str) -> None:
        views = 4_200  # 3 * 4,200 * 518 * 336 > 2^31
        if torch.cuda.mem_get_info()[0] < 60 * 2**30:
            pytest.skip("needs 60 GB of free GPU memory")
        last = make_inputs(1, height=336, width=518)
        inputs = [t.expand(views, *t.shape[1:]).contiguous() for t in last]
        points, moved = unproject(*inputs, backend=backend)
        expected = unproject(*last, backend=backend)
        assert torch.equal(points[-1:], expected[0]) and torch.equal(moved[-1:], expected[1])
        kernels = launchers("unproject", backend)
        grads = kernels.backward(*inputs[:3], points, None)
        for grad, one in zip(grads, kernels.backward(*last[:3], expected[0], None), strict=True):
            assert torch.equal(grad[-1:], one)
