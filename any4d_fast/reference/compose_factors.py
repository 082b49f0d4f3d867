"""Factor composition in plain PyTorch: oracle in float64, and the eager backend of `any4d_fast.ops.compose_factors`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-8
"""Smallest norm or scale that is divided by or returned; upstream clamps at the same value."""


class Factors(NamedTuple):
    """Every output of the composition. N = V*B rows, view-major: row v*B + b is view v of sample b."""

    pts3d: Tensor
    """[N, H, W, 3] metres, world (the reference view's camera)."""
    pts3d_cam: Tensor
    """[N, H, W, 3] metres, the view's own camera."""
    ray_directions: Tensor
    """[N, H, W, 3] unit vectors, the view's own camera."""
    depth_along_ray: Tensor
    """[N, H, W, 1] metres from the camera centre."""
    cam_trans: Tensor
    """[N, 3] metres, camera-to-world."""
    cam_quats: Tensor
    """[N, 4] unit quaternions (x, y, z, w), camera-to-world."""
    scene_flow: Tensor
    """[N, H, W, 3] metres, world; row (v, b) lives on the pixels of the reference view of sample b."""
    metric_scaling_factor: Tensor
    """[B, 1] metres a unit."""
    conf: Tensor
    """[N, H, W], at least 1."""
    non_ambiguous_mask: Tensor
    """[N, H, W] bool."""
    non_ambiguous_mask_logits: Tensor
    """[N, H, W]."""


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any input has it, else float32: 16-bit inputs are widened before any arithmetic."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def rotation_matrix(quats: Tensor) -> Tensor:
    """[..., 3, 3] rotations from unit quaternions [..., 4] (x, y, z, w); the identity for a zero quaternion."""
    x, y, z, w = quats.unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def rotate_map(rotation: Tensor, vectors: Tensor) -> Tensor:
    """Rotate the vectors of a map, [..., 3, 3] and [..., H, W, 3] -> [..., H, W, 3].

    Written without a matrix product, so that neither TF32 nor autocast rounds it.
    """
    columns = rotation[..., None, None, :, :].unbind(-1)  # 3 x [..., 1, 1, 3]
    x, y, z = vectors.split(1, dim=-1)
    return columns[0] * x + columns[1] * y + columns[2] * z


def compose_factors(geometry: Tensor, flow: Tensor, quats: Tensor, trans: Tensor, log_scale: Tensor) -> Factors:
    """Plain PyTorch twin of `any4d_fast.ops.compose_factors`; see there for shapes and frames."""
    dtype = compute_dtype(geometry, flow, quats, trans, log_scale)
    geometry, flow, quats, trans, log_scale = (t.to(dtype) for t in (geometry, flow, quats, trans, log_scale))
    direction, log_depth, log_conf, logits = geometry.split([3, 1, 1, 1], dim=-1)

    rays = direction / torch.linalg.vector_norm(direction, dim=-1, keepdim=True).clamp(min=EPS)
    local = log_depth.exp() * rays  # [N, H, W, 3] camera frame, before the metric scale
    unit_quats = quats / torch.linalg.vector_norm(quats, dim=-1, keepdim=True).clamp(min=EPS)
    scale = log_scale.exp().clamp(min=EPS)  # [B, 1]
    row_scale = scale.repeat(quats.shape[0] // scale.shape[0], 1) if scale.shape[0] else scale  # [N, 1]
    map_scale = row_scale[:, :, None, None]  # [N, 1, 1, 1]

    logits = logits[..., 0]
    return Factors(
        pts3d=map_scale * (rotate_map(rotation_matrix(unit_quats), local) + trans[:, None, None]),
        pts3d_cam=map_scale * local,
        ray_directions=rays,
        depth_along_ray=map_scale * log_depth.exp(),
        cam_trans=row_scale * trans,
        cam_quats=unit_quats,
        scene_flow=map_scale * flow,
        metric_scaling_factor=scale,
        conf=1 + log_conf[..., 0].exp(),
        non_ambiguous_mask=logits.sigmoid() > 0.5,
        non_ambiguous_mask_logits=logits,
    )
