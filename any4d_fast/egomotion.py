"""Camera motion: world poses, IMU egomotion, and Doppler turned into flow along the rays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from any4d_fast import geometry
from any4d_fast.views import InputError, describe, fail, to_real

RIGID_TOLERANCE = 1e-3
"""Largest deviation of R^T R from the identity that counts as rounding in a pose file."""

MAX_SECONDS = 3600.0
"""Longest time between two views over which a radial velocity can be taken as constant; more is a wrong unit."""


def read_pose(value: Any, where: str, batch: int) -> Tensor:
    """A camera pose in any of its forms, as [B, 4, 4] float64 cam2world.

    Args:
        value: [4, 4], [B, 4, 4], or a pair (quaternions [4] or [B, 4] in x, y, z, w order and of any length,
            translations [3] or [B, 3]). OpenCV camera to world, any world frame.
        where: name in error messages.
        batch: number of images of the view.

    Raises:
        InputError: if a shape is wrong, a value is not finite, or the transform is not rigid.
    """
    if _is_pair(value):
        rotation = _read_rotation(value[0], f"{where} (rotation)", batch, matrices=False)
        return _rigid(rotation, _read_translation(value[1], f"{where} (translation)", batch))
    expected = f"cam2world [4, 4], [{batch}, 4, 4] or (quaternions [4], translations [3])"
    pose = to_real(value, where, expected)
    if tuple(pose.shape) not in {(4, 4), (batch, 4, 4)}:
        short = tuple(pose.shape[-2:]) == (3, 4)
        fix = "append the row (0, 0, 0, 1)" if short else "give one pose for each image of the batch"
        fail(where, expected, describe(pose), fix)
    pose = pose.expand(batch, 4, 4)
    if not bool(pose.isfinite().all()):
        fail(where, expected, "NaN or infinite values", "leave camera_poses out of the views that have none")
    last = pose.new_tensor([0.0, 0.0, 0.0, 1.0])
    if not torch.allclose(pose[:, 3], last.expand(batch, 4), atol=1e-6):
        fail(where, "a last row of (0, 0, 0, 1)", f"{pose[0, 3].tolist()}", "transpose a row-vector matrix")
    _check_rotation(pose[:, :3, :3], where)
    return pose


def _is_pair(value: Any) -> bool:
    """Whether a value is (rotation, translation) rather than an array of matrices."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return False
    shapes = [getattr(part, "shape", None) for part in value]
    return not any(shape is not None and tuple(shape[-2:]) == (4, 4) for shape in shapes)


def _read_rotation(value: Any, where: str, batch: int, *, matrices: bool) -> Tensor:
    """Quaternions, or rotation matrices where allowed, as [B, 3, 3] float64."""
    forms = f"quaternion (x, y, z, w) [4] or [{batch}, 4]" + (f", or rotation [3, 3] or [{batch}, 3, 3]" * matrices)
    rotation = to_real(value, where, forms)
    if matrices and tuple(rotation.shape) in {(3, 3), (batch, 3, 3)}:
        rotation = rotation.expand(batch, 3, 3)
        if not bool(rotation.isfinite().all()):
            fail(where, forms, "NaN or infinite values", "repair the measurement or leave it out of all views")
        _check_rotation(rotation, where)
        return rotation
    if tuple(rotation.shape) not in {(4,), (batch, 4)}:
        fail(where, forms, describe(rotation), "give one rotation for each image of the batch")
    if not bool(rotation.isfinite().all()):
        fail(where, forms, "NaN or infinite values", "repair the measurement or leave it out")
    quats = rotation.expand(batch, 4)
    if not bool((quats.norm(dim=-1) > 1e-8).all()):
        fail(where, forms, "a zero quaternion", "no rotation is (0, 0, 0, 1)")
    return geometry.quats_trans_to_pose(quats, quats.new_zeros(batch, 3))[:, :3, :3]


def _read_translation(value: Any, where: str, batch: int) -> Tensor:
    """Translations as [B, 3] float64."""
    expected = f"[3] or [{batch}, 3] metres"
    trans = to_real(value, where, expected)
    if tuple(trans.shape) not in {(3,), (batch, 3)}:
        fail(where, expected, describe(trans), "give one translation for each image of the batch")
    if not bool(trans.isfinite().all()):
        fail(where, expected, "NaN or infinite values", "repair the measurement or leave it out")
    return trans.expand(batch, 3)


def _check_rotation(rotation: Tensor, where: str) -> None:
    """Raise unless [B, 3, 3] are proper rotations."""
    if bool((torch.linalg.det(rotation).abs() < 1e-6).any()):
        fail(where, "a rotation", "a singular 3x3 part", "leave the pose out of the views that have none")
    error = (rotation.transpose(-1, -2) @ rotation - torch.eye(3, dtype=rotation.dtype, device=rotation.device)).abs()
    if float(error.max()) > RIGID_TOLERANCE:
        lengths = [round(length, 4) for length in rotation[int(error.amax((1, 2)).argmax())].norm(dim=0).tolist()]
        fail(where, "a rigid transform (R^T R = I)", f"columns of length {lengths}, off by {float(error.max()):.2g}",
             "take scale and shear out of the 3x3 part")  # fmt: skip
    if bool((torch.linalg.det(rotation) < 0).any()):
        fail(where, "a rotation (determinant +1)", "a reflection (determinant -1)",
             "convert the axes to OpenCV: x right, y down, z forward")  # fmt: skip


def _rigid(rotation: Tensor, trans: Tensor) -> Tensor:
    """[B, 3, 3] and [B, 3] as [B, 4, 4]."""
    pose = torch.eye(4, dtype=rotation.dtype, device=rotation.device).repeat(rotation.shape[0], 1, 1)
    pose[:, :3, :3], pose[:, :3, 3] = rotation, trans
    return pose


def compose_egomotion(steps: Sequence[Any | None], batch: int, device: torch.device) -> list[Tensor]:
    """World poses from an IMU's motion between consecutive frames.

    Args:
        steps: for each frame in the caller's order, (rotation, translation) that take a point from camera i to camera
            i-1: the pose of camera i in the frame of camera i-1. Rotation [3, 3], [B, 3, 3] or quaternion (x, y, z, w)
            [4], [B, 4]; translation [3] or [B, 3] metres. The first frame's may be missing and is not used: the frame
            before it is not there.
        batch: number of images of a view.
        device: where the result goes.

    Returns:
        For each frame, [B, 4, 4] float64 cam2world; the world is the first frame's camera.

    Raises:
        InputError: if a step after the first is missing or is not a rigid motion.
    """
    identity = torch.eye(4, dtype=torch.float64, device=device).repeat(batch, 1, 1)
    poses: list[Tensor] = []
    for index, step in enumerate(steps):
        where = f'views[{index}]["imu"]'
        if step is None and index > 0:
            raise InputError(
                f"{where}: expected the motion since views[{index - 1}], got none; egomotion is a chain: "
                "give imu for every view after the first, or for none"
            )
        motion = identity if step is None else _read_step(step, where, batch).to(device)
        poses.append(poses[-1] @ motion if poses else identity)
    return poses


def _read_step(step: Any, where: str, batch: int) -> Tensor:
    """One (rotation, translation) as [B, 4, 4] float64."""
    if not isinstance(step, (tuple, list)) or len(step) != 2:
        fail(where, "a pair (rotation, translation) relative to the previous frame", describe(step),
             "pass (R, t) with R [3, 3] or a quaternion (x, y, z, w) and t [3] in metres")  # fmt: skip
    rotation = _read_rotation(step[0], f"{where} (rotation)", batch, matrices=True)
    return _rigid(rotation, _read_translation(step[1], f"{where} (translation)", batch).to(rotation.device))


def relative_to(reference: Tensor, poses: Sequence[Tensor | None]) -> list[Tensor | None]:
    """World poses in the frame of the reference camera, [B, 4, 4] float64 each.

    In float64, because a world frame such as UTM has coordinates in which float32 resolves no better than decimetres.
    """
    inverse = geometry.invert_pose(reference)
    identity = torch.eye(4, dtype=reference.dtype, device=reference.device).expand_as(reference)
    return [None if pose is None else identity if pose is reference else inverse @ pose for pose in poses]


def doppler_flow(doppler: Tensor, rays: Tensor, seconds: Tensor) -> Tensor:
    """Radial scene flow from radial velocity.

    A radar measures how fast the distance to a surface grows. At constant velocity the surface's distance changes by
    velocity times time between the reference view and this one, so the part of its flow that the radar can see is
    that length along the pixel's ray. It is egocentric: the sensor's own motion is in it, as it is in the measurement.

    Args:
        doppler: [B, H, W, 1] m/s, positive moving away, NaN where there is none.
        rays: [B, H, W, 3] unit, camera frame of this view.
        seconds: [B] this view's time minus the reference view's.

    Returns:
        [B, H, W, 3] metres, camera frame of this view; 0 where there is no measurement.
    """
    return torch.where(doppler.isnan(), 0, doppler) * seconds.to(doppler.dtype)[:, None, None, None] * rays


def flow_normaliser(
    depths: Sequence[Tensor | None], reference_rays: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Points of the reference view whose mean distance is what the model divides radial flow by.

    The reference view's own depth (a radar's sparse ranges count) where given; else the mean distance over the depths
    of all other views; else one metre, so that the flow enters in metres as it is.

    Args:
        depths: for each view, the reference first, [B, H, W, 1] metres along the ray, 0 where unknown.
        reference_rays: [B, H, W, 3] unit rays of the reference view; there if its depth is.
        like: [B, 3, H, W], gives size, device and dtype.

    Returns:
        points [B, H, W, 3] metres in the reference camera, and which of them count, [B, H, W] bool.
    """
    own = depths[0]
    if own is not None and reference_rays is not None:
        return own * reference_rays, own[..., 0] > 0
    others = [depth for depth in depths[1:] if depth is not None]
    batch, _, height, width = like.shape
    mean = like.new_ones(batch)
    if others:
        total = torch.stack([depth.double().sum((1, 2, 3)) for depth in others]).sum(0)
        mean = (total / torch.stack([(depth > 0).sum((1, 2, 3)) for depth in others]).sum(0)).to(like.dtype)
    points = like.new_zeros(batch, height, width, 3)
    points[..., 2] = mean[:, None, None]
    return points, torch.ones(batch, height, width, dtype=torch.bool, device=like.device)
