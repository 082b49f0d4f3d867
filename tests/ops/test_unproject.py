"""unproject in eager mode: against the pinhole model written out, its derivatives and its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from any4d_fast.geometry import quats_trans_to_pose, rays_from_intrinsics, transform_points
from any4d_fast.ops.unproject import unproject
from any4d_fast.testing import gradients, relative_error


def make_inputs(*lead: int, height: int = 4, width: int = 5, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    intrinsics = torch.eye(3, dtype=torch.float64).expand(*lead, 3, 3).clone()
    intrinsics[..., 0, 0] = width * (1 + 0.1 * normal(*lead))
    intrinsics[..., 1, 1] = width * (1 + 0.1 * normal(*lead))
    intrinsics[..., 0, 2], intrinsics[..., 1, 2] = width / 2 - 0.3, height / 2 + 0.2
    depth = 0.5 + 5 * torch.rand(*lead, height, width, generator=generator, dtype=torch.float64)
    poses = quats_trans_to_pose(normal(*lead, 4), normal(*lead, 3))
    return [t.to(dtype) for t in (depth, intrinsics, poses, 0.1 * normal(*lead, height, width, 3))]


def test_points_are_poses_applied_to_rays() -> None:
    depth, intrinsics, poses, flow = make_inputs(3, dtype=torch.float64)
    points, moved = unproject(depth, intrinsics, poses, flow)
    local = rays_from_intrinsics(intrinsics, 4, 5, unit=False) * depth[..., None]
    torch.testing.assert_close(points, transform_points(poses, local))
    torch.testing.assert_close(moved, points + flow)
    assert unproject(depth, intrinsics, poses)[1] is None


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_leading_dimensions_and_broadcasting(lead: tuple[int, ...]) -> None:
    depth, intrinsics, poses, flow = make_inputs(*lead)
    points, moved = unproject(depth, intrinsics, poses, flow)
    assert points.shape == moved.shape == (*lead, 4, 5, 3)
    one_camera = intrinsics.flatten(0, -3)[0] if lead else intrinsics
    shared, _ = unproject(depth, one_camera, poses)
    repeated, _ = unproject(depth, one_camera.expand(*lead, 3, 3), poses)
    assert torch.equal(shared, repeated)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_close_to_the_oracle(dtype: torch.dtype) -> None:
    inputs = make_inputs(2, dtype=dtype)
    expected = unproject(*(t.double() for t in inputs))
    for actual, oracle in zip(unproject(*inputs, backend="eager"), expected, strict=True):
        assert actual.dtype == torch.float32
        assert relative_error(actual, oracle) < 4e-7  # about 6 float32 roundings


def test_gradcheck() -> None:
    inputs = [t.requires_grad_() for t in make_inputs(2, height=2, width=3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(unproject, inputs)


def test_compiles_without_graph_breaks() -> None:
    def eager(*inputs: Tensor) -> Any:
        return unproject(*inputs, backend="eager")

    inputs = make_inputs(2)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    cotangents = [torch.ones(2, 4, 5, 3)] * 2
    found, expected = (gradients(f, list(inputs), cotangents) for f in (compiled, eager))
    for actual, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-4)  # float32 sums in another order


def test_empty() -> None:
    points, moved = unproject(*make_inputs(0))
    assert points.shape == moved.shape == (0, 4, 5, 3)
    depth, intrinsics, poses, flow = make_inputs(2)
    assert unproject(depth[:, :0], intrinsics, poses, flow[:, :0])[0].shape == (2, 0, 5, 3)


DEPTH, INTRINSICS, POSES, FLOW = make_inputs(2)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.zeros(5), INTRINSICS, POSES), r"depth_z: expected \[\.\.\., H, W\] floating point, got \[5\]"),
        ((DEPTH.long(), INTRINSICS, POSES), "depth_z: .* torch.int64"),
        ((DEPTH[..., None], INTRINSICS, POSES), "intrinsics: .* broadcast to depth_z's|intrinsics: expected"),
        ((DEPTH, INTRINSICS[..., :2, :], POSES), r"intrinsics: expected \[\.\.\., 3, 3\]"),
        ((DEPTH, INTRINSICS[[0, 1, 0]], POSES), r"intrinsics: expected leading dimensions .* \[2\], got \[3, 3, 3\]"),
        ((DEPTH, INTRINSICS[None], POSES), "intrinsics: expected leading dimensions"),
        ((DEPTH, INTRINSICS, POSES[:, :3]), r"camera_poses: expected \[\.\.\., 4, 4\]"),
        ((DEPTH, INTRINSICS, None), "camera_poses: .* got a NoneType"),
        ((DEPTH, INTRINSICS, POSES, FLOW[:, :2]), r"flow: expected \[2, 4, 5, 3\] like depth_z, got \[2, 2, 5, 3\]"),
        ((DEPTH, INTRINSICS, POSES, FLOW[..., :2]), r"flow: expected \[\.\.\., H, W, 3\]"),
        ((DEPTH, INTRINSICS, POSES.to("meta")), "camera_poses: expected device cpu"),
    ],
)
def test_errors_say_what_to_do(inputs: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unproject(*inputs)
