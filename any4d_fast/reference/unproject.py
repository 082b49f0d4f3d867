"""Unprojection in plain PyTorch: oracle in float64, and the eager backend of `any4d_fast.ops.unproject`."""

from __future__ import annotations

import torch
from torch import Tensor

from .compose_factors import compute_dtype, rotate_map


def unproject(
    depth_z: Tensor, intrinsics: Tensor, camera_poses: Tensor, flow: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Plain PyTorch twin of `any4d_fast.ops.unproject`; see there for shapes, units and frames."""
    dtype = compute_dtype(depth_z, intrinsics, camera_poses, flow)
    depth, intrinsics, poses = (t.to(dtype) for t in (depth_z, intrinsics, camera_poses))
    height, width = depth.shape[-2:]
    u = torch.arange(width, device=depth.device, dtype=dtype)
    v = torch.arange(height, device=depth.device, dtype=dtype)[:, None]
    focal_x, focal_y, centre_x, centre_y = (
        intrinsics[..., row, column, None, None] for row, column in ((0, 0), (1, 1), (0, 2), (1, 2))
    )
    local = torch.stack([(u - centre_x) / focal_x * depth, (v - centre_y) / focal_y * depth, depth], dim=-1)
    points = rotate_map(poses[..., :3, :3], local) + poses[..., None, None, :3, 3]  # [..., H, W, 3] metres, world
    return points, None if flow is None else points + flow.to(dtype)
