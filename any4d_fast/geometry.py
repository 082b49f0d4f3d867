"""Camera geometry shared by inputs, outputs and synthetic data.

Conventions everywhere: OpenCV cameras (x right, y down, z forward), camera-to-world poses, metres,
quaternions in (x, y, z, w) order, pixel centres at integer coordinates.
"""

from __future__ import annotations

import roma
import torch
from torch import Tensor


def pixel_grid(
    height: int, width: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Pixel coordinates (u, v) of every pixel centre, [H, W, 2] in pixels."""
    v, u = torch.meshgrid(
        torch.arange(height, device=device, dtype=dtype or torch.float32),
        torch.arange(width, device=device, dtype=dtype or torch.float32),
        indexing="ij",
    )
    return torch.stack([u, v], dim=-1)


def rays_from_intrinsics(intrinsics: Tensor, height: int, width: int, *, unit: bool = True) -> Tensor:
    """Ray directions of a pinhole camera, in the camera frame.

    Args:
        intrinsics: [..., 3, 3] pixels.
        height, width: image size in pixels.
        unit: rays on the unit sphere; otherwise on the image plane z = 1.

    Returns:
        [..., H, W, 3].
    """
    uv = pixel_grid(height, width, device=intrinsics.device, dtype=intrinsics.dtype)  # [H, W, 2]
    focal = torch.stack([intrinsics[..., 0, 0], intrinsics[..., 1, 1]], dim=-1)[..., None, None, :]
    centre = intrinsics[..., :2, 2][..., None, None, :]
    xy = (uv - centre) / focal
    rays = torch.cat([xy, torch.ones_like(xy[..., :1])], dim=-1)
    return rays / rays.norm(dim=-1, keepdim=True) if unit else rays


def depth_z_to_along_ray(depth_z: Tensor, rays: Tensor) -> Tensor:
    """Distance from the camera centre, from depth along the optical axis.

    Args:
        depth_z: [..., H, W, 1] metres.
        rays: [..., H, W, 3] camera frame, any length.

    Returns:
        [..., H, W, 1] metres; 0 where a ray does not point forward (its z-depth has no meaning).
    """
    z = rays[..., 2:3]
    forward = z > 0
    length = rays.norm(dim=-1, keepdim=True) / torch.where(forward, z, torch.ones_like(z))
    return torch.where(forward, depth_z * length, torch.zeros_like(depth_z))


def resize_intrinsics(intrinsics: Tensor, old_hw: tuple[int, int], new_hw: tuple[int, int]) -> Tensor:
    """Intrinsics after resizing an image, [..., 3, 3] pixels of the new size.

    Pixel centres are integers, so the principal point moves by u -> (u + 0.5) * s - 0.5.
    """
    scale_y, scale_x = new_hw[0] / old_hw[0], new_hw[1] / old_hw[1]
    out = intrinsics.clone()
    out[..., 0, :2] *= scale_x
    out[..., 1, :2] *= scale_y
    out[..., 0, 2] = (intrinsics[..., 0, 2] + 0.5) * scale_x - 0.5
    out[..., 1, 2] = (intrinsics[..., 1, 2] + 0.5) * scale_y - 0.5
    return out


def pose_to_quats_trans(pose: Tensor) -> tuple[Tensor, Tensor]:
    """Split [..., 4, 4] rigid poses into unit quaternions [..., 4] (x, y, z, w >= 0) and translations [..., 3]."""
    quats = roma.rotmat_to_unitquat(pose[..., :3, :3])
    return torch.where(quats[..., 3:] < 0, -quats, quats), pose[..., :3, 3]


def quats_trans_to_pose(quats: Tensor, trans: Tensor) -> Tensor:
    """[..., 4, 4] rigid poses from quaternions [..., 4] (x, y, z, w, any length) and translations [..., 3]."""
    rotation = roma.unitquat_to_rotmat(quats / quats.norm(dim=-1, keepdim=True).clamp(min=1e-8))
    top = torch.cat([rotation, trans[..., None]], dim=-1)
    bottom = torch.zeros_like(top[..., :1, :])
    bottom[..., 3].fill_(1)  # where it is: on a GPU, numbers from the host would wait for everything before
    return torch.cat([top, bottom], dim=-2)


def invert_pose(pose: Tensor) -> Tensor:
    """Inverse of rigid transforms, [..., 4, 4]."""
    rotation = pose[..., :3, :3].transpose(-1, -2)
    out = torch.zeros_like(pose)
    out[..., :3, :3] = rotation
    out[..., :3, 3] = -(rotation @ pose[..., :3, 3:])[..., 0]
    out[..., 3, 3] = 1
    return out


def transform_points(pose: Tensor, points: Tensor) -> Tensor:
    """Apply rigid transforms [B, 4, 4] to point maps [B, ..., 3]."""
    lead = (slice(None),) + (None,) * (points.ndim - 2)
    return (pose[:, :3, :3][lead] @ points[..., None])[..., 0] + pose[:, :3, 3][lead]
