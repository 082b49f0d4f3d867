"""Launchers of unprojection in CUDA C++ (csrc/unproject.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _ext
from ..layout import evenly_spaced, map_strides, packed_matrices
from . import dtype_code, pointer, stream

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _inputs(depth: Tensor, intrinsics: Tensor, poses: Tensor) -> dict[str, object]:
    """The arguments that both passes share; `depth` is [N, H, W, 1], evenly spaced."""
    n, height, width, _ = depth.shape
    return {
        "map_dtype": dtype_code("depth", depth, *_DTYPES),
        "depth": (pointer(depth), *map_strides(depth)),
        "intrinsics": (pointer(intrinsics), intrinsics.stride(0), dtype_code("intrinsics", intrinsics, *_DTYPES)),
        "poses": (pointer(poses), poses.stride(0), dtype_code("poses", poses, *_DTYPES)),
        "rows": n,
        "pixels": height * width,
        "width": max(width, 1),
        "device": depth.device.index,
        "stream": stream(depth.device),
    }


def forward(depth: Tensor, intrinsics: Tensor, poses: Tensor, flow: Tensor | None) -> tuple[Tensor, Tensor]:
    """Launch the forward pass.

    Args:
        depth: [N, H, W] metres.
        intrinsics: [N, 3, 3] pixels.
        poses: [N, 4, 4] camera-to-world, metres.
        flow: [N, H, W, 3] metres in depth's dtype, or None.

    Returns:
        Points and moved points, [N, H, W, 3] float32; an empty tensor for the second without flow.

    Raises:
        TypeError: depth and flow differ in dtype, or a dtype is not float32, bfloat16 or float16.
    """
    if flow is not None and flow.dtype != depth.dtype:
        raise TypeError(f"flow: expected {depth.dtype} like depth, got {flow.dtype}; convert one of them")
    points = torch.empty((*depth.shape, 3), dtype=torch.float32, device=depth.device)
    moved = torch.empty(points.shape if flow is not None else (0,), dtype=torch.float32, device=depth.device)
    if points.numel() == 0:
        return points, moved
    maps, intrinsics, poses = evenly_spaced(depth[..., None]), packed_matrices(intrinsics), packed_matrices(poses)
    flow = None if flow is None else evenly_spaced(flow)
    _ext.module().unproject_forward(
        **_inputs(maps, intrinsics, poses),
        flow=(0, 0, 0, 1) if flow is None else (pointer(flow), *map_strides(flow)),
        points=pointer(points),
        moved=pointer(moved),
    )
    return points, moved


def backward(
    depth: Tensor,
    intrinsics: Tensor,
    poses: Tensor,
    grad_points: Tensor | None,
    grad_moved: Tensor | None,
    need_depth: bool = True,
    need_cameras: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward pass (the flow's gradient is `grad_moved` itself).

    Args:
        depth, intrinsics, poses: the forward's inputs.
        grad_points, grad_moved: [N, H, W, 3] float32 cotangents; None counts as zero and is not read.
        need_depth, need_cameras: which gradients to compute.

    Returns:
        Gradients of depth, intrinsics and poses in their dtypes; an empty tensor for each that is not needed.

    Raises:
        TypeError: a dtype is not float32, bfloat16 or float16.
    """
    n, height, width = depth.shape

    def grad(needed: bool, like: Tensor) -> Tensor:
        return torch.empty(like.shape if needed else (0,), dtype=like.dtype, device=like.device)

    out_depth = grad(need_depth, depth)
    out_intrinsics, out_poses = grad(need_cameras, intrinsics), grad(need_cameras, poses)
    if n == 0 or not (need_depth or need_cameras):
        return out_depth, out_intrinsics, out_poses
    module = _ext.module()
    grad_points, grad_moved = (None if g is None else g.contiguous() for g in (grad_points, grad_moved))
    maps, intrinsics, poses = evenly_spaced(depth[..., None]), packed_matrices(intrinsics), packed_matrices(poses)
    partials = None
    if need_cameras:
        chunks = module.unproject_backward_chunks(height * width)
        partials = torch.empty((n, chunks, 16), dtype=torch.float32, device=depth.device)
    module.unproject_backward(
        **_inputs(maps, intrinsics, poses),
        grad_points=pointer(grad_points),
        grad_moved=pointer(grad_moved),
        out_depth=pointer(out_depth) if need_depth else 0,
        out_intrinsics=pointer(out_intrinsics) if need_cameras else 0,
        out_poses=pointer(out_poses) if need_cameras else 0,
        partials=pointer(partials),
    )
    return out_depth, out_intrinsics, out_poses
