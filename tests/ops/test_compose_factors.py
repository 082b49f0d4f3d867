"""compose_factors in eager mode: the definition, its derivatives where norms vanish, and its errors."""

from __future__ import annotations

from typing import Any

import pytest
import roma
import torch
from torch import Tensor

from any4d_fast.backends import BackendError
from any4d_fast.ops.compose_factors import Factors, compose_factors
from any4d_fast.testing import gradients

VIEWS, BATCH, HEIGHT, WIDTH = 3, 2, 4, 5


def make_inputs(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n = VIEWS * BATCH
    shapes = [(n, HEIGHT, WIDTH, 6), (n, HEIGHT, WIDTH, 3), (n, 4), (n, 3), (BATCH, 1)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def eager(*inputs: Tensor) -> Factors:
    return compose_factors(*inputs, backend="eager")


def test_definition_pixel_by_pixel() -> None:
    geometry, flow, quats, trans, log_scale = make_inputs(torch.float64)
    out = eager(geometry, flow, quats, trans, log_scale)
    for view in range(VIEWS):
        for sample in range(BATCH):
            row = view * BATCH + sample
            scale = log_scale[sample, 0].exp()
            rotation = roma.unitquat_to_rotmat(quats[row] / quats[row].norm())
            pixel = geometry[row, 2, 3]
            ray = pixel[:3] / pixel[:3].norm()
            local = pixel[3].exp() * ray
            expected = {
                "pts3d": scale * (rotation @ local + trans[row]),
                "pts3d_cam": scale * local,
                "ray_directions": ray,
                "depth_along_ray": scale * pixel[3:4].exp(),
                "scene_flow": scale * flow[row, 2, 3],
                "conf": 1 + pixel[4].exp(),
                "non_ambiguous_mask_logits": pixel[5],
            }
            for name, value in expected.items():
                torch.testing.assert_close(getattr(out, name)[row, 2, 3], value)
            torch.testing.assert_close(out.cam_trans[row], scale * trans[row])
            torch.testing.assert_close(out.cam_quats[row], quats[row] / quats[row].norm())
    torch.testing.assert_close(out.metric_scaling_factor, log_scale.exp())
    assert torch.equal(out.non_ambiguous_mask, geometry[..., 5] > 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_inputs_are_widened_before_arithmetic(dtype: torch.dtype) -> None:
    inputs = make_inputs(dtype)
    actual = eager(*inputs)
    for output, wide in zip(actual, eager(*(t.float() for t in inputs)), strict=True):
        assert output.dtype in (torch.float32, torch.bool)
        assert torch.equal(output, wide)


def test_autocast_changes_nothing() -> None:
    inputs = make_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        inside = eager(*inputs)
    for actual, expected in zip(inside, eager(*inputs), strict=True):
        assert torch.equal(actual, expected)


def test_gradcheck() -> None:
    inputs = [t.requires_grad_() for t in make_inputs(torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: [o for o in eager(*x) if o.is_floating_point()], inputs)


def test_zero_rays_and_quaternions_are_finite() -> None:
    inputs = [torch.zeros_like(t) for t in make_inputs()]
    out = eager(*inputs)
    assert all(o.isfinite().all() for o in out)
    assert not out.ray_directions.any() and not out.cam_quats.any()
    cotangents = [torch.ones_like(o) for o in out if o.is_floating_point()]
    grads = gradients(eager, list(inputs), cotangents)
    assert all(g is not None and g.isfinite().all() for g in grads)
    # Below the clamp, x / max(|x|, 1e-8) is linear: its derivative is 1e8 times the incoming gradient (here 3 and 1).
    torch.testing.assert_close(grads[0][..., :3], torch.full_like(grads[0][..., :3], 3e8))
    torch.testing.assert_close(grads[2], torch.full_like(grads[2], 1e8))


def test_zero_quaternion_rotates_by_the_identity() -> None:
    geometry, flow, quats, trans, log_scale = make_inputs()
    out = eager(geometry, flow, torch.zeros_like(quats), torch.zeros_like(trans), log_scale)
    torch.testing.assert_close(out.pts3d, out.pts3d_cam)


def test_scale_is_clamped_without_gradient() -> None:
    inputs = make_inputs()
    inputs[4] = torch.full_like(inputs[4], -50.0).requires_grad_()
    out = eager(*inputs)
    torch.testing.assert_close(out.metric_scaling_factor, torch.full((BATCH, 1), 1e-8))
    (grad,) = torch.autograd.grad(out.pts3d.sum(), inputs[4])
    assert not grad.any()


def test_strides_do_not_matter() -> None:
    inputs = make_inputs()
    planar = [t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for t in inputs[:2]]
    for actual, expected in zip(eager(*planar, *inputs[2:]), eager(*inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)  # vectorised exp rounds by position


def test_empty() -> None:
    inputs = make_inputs()
    out = eager(*(t[:0] for t in inputs[:4]), inputs[4])
    assert out.pts3d.shape == (0, HEIGHT, WIDTH, 3)
    assert out.metric_scaling_factor.shape == (BATCH, 1)
    assert eager(*(t[:0] for t in inputs)).metric_scaling_factor.shape == (0, 1)
    assert eager(inputs[0][:, :0], inputs[1][:, :0], *inputs[2:]).cam_trans.shape == (VIEWS * BATCH, 3)


def test_compiles_without_graph_breaks() -> None:
    inputs = make_inputs()
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    cotangents = [torch.ones_like(o) for o in eager(*inputs) if o.is_floating_point()]
    for actual, expected in zip(compiled(*inputs), eager(*inputs), strict=True):
        torch.testing.assert_close(actual, expected)
    for actual, expected in zip(
        gradients(compiled, list(inputs), cotangents), gradients(eager, list(inputs), cotangents), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)  # float32 sums in another order


def replaced(index: int, value: Any) -> list[Any]:
    inputs: list[Any] = make_inputs()
    inputs[index] = value
    return inputs


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (replaced(0, torch.zeros(6, 4, 5)), r"geometry: expected \[N, H, W, 6\] floating point, got \[6, 4, 5\]"),
        (replaced(0, torch.zeros(6, 6, 4, 5)), r"geometry: .* got \[6, 6, 4, 5\] torch.float32; .*permute"),
        (replaced(0, torch.zeros(6, 4, 5, 6, dtype=torch.int64)), r"geometry: .* torch.int64"),
        (replaced(0, None), "geometry: .* got a NoneType"),
        (replaced(1, torch.zeros(6, 4, 6, 3)), r"flow: expected \[6, 4, 5, 3\] like geometry"),
        (replaced(1, torch.zeros(6, 4, 5, 2)), r"flow: expected \[N, H, W, 3\]"),
        (replaced(2, torch.zeros(6, 3)), r"quats: expected \[N, 4\]"),
        (replaced(2, torch.zeros(5, 4)), "quats: expected 6 rows"),
        (replaced(3, torch.zeros(7, 3)), "trans: expected 6 rows"),
        (replaced(4, torch.zeros(4, 1)), r"log_scale: expected \[B, 1\] with B dividing the 6 rows"),
        (replaced(4, torch.zeros(0, 1)), "log_scale: .* dividing"),
        (replaced(4, torch.zeros(2)), r"log_scale: expected \[B, 1\]"),
        (replaced(3, torch.zeros(6, 3, device="meta")), "trans: expected device cpu .* got meta"),
    ],
)
def test_errors_say_what_to_do(inputs: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose_factors(*inputs)


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(BackendError, match="expected one of .*triton.*cuda.*eager"):
        compose_factors(*make_inputs(), backend="flash")
    for backend in ("triton", "cuda"):
        with pytest.raises(BackendError, match="float64"):
            compose_factors(*make_inputs(torch.float64), backend=backend)


def test_cuda_wants_one_dtype_of_maps() -> None:
    geometry, flow, *rest = make_inputs()
    with pytest.raises(BackendError, match="one dtype"):
        compose_factors(geometry, flow.half(), *rest, backend="cuda")
