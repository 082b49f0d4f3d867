"""Unprojection: z-depth, intrinsics and camera poses -> world points, and with scene flow moved points."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..reference.unproject import unproject as reference_unproject
from ._library import define, launchers

__all__ = ["unproject"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _forward_impl(
    depth: Tensor, intrinsics: Tensor, poses: Tensor, flow: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor] = launchers("unproject", backend).forward(depth, intrinsics, poses, flow)
    return outputs


def _forward_fake(
    depth: Tensor, intrinsics: Tensor, poses: Tensor, flow: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    points = depth.new_empty((*depth.shape, 3), dtype=torch.float32)
    return points, torch.empty_like(points) if flow is not None else points.new_empty(0)


def _backward_impl(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *rest, backend = args
    grads: tuple[Tensor, Tensor, Tensor] = launchers("unproject", backend).backward(*rest)
    return grads


def _backward_fake(
    depth: Tensor,
    intrinsics: Tensor,
    poses: Tensor,
    grad_points: Tensor | None,
    grad_moved: Tensor | None,
    need_depth: bool,
    need_cameras: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        depth.new_empty(depth.shape if need_depth else (0,)),
        intrinsics.new_empty(intrinsics.shape if need_cameras else (0,)),
        poses.new_empty(poses.shape if need_cameras else (0,)),
    )


_forward = define(
    "unproject_forward",
    "(Tensor depth, Tensor intrinsics, Tensor poses, Tensor? flow, str backend) -> (Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
)
_backward = define(
    "unproject_backward",
    "(Tensor depth, Tensor intrinsics, Tensor poses, Tensor? grad_points, Tensor? grad_moved, bool need_depth, "
    "bool need_cameras, str backend) -> (Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


class _Unproject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, depth: Tensor, intrinsics: Tensor, poses: Tensor, flow: Tensor | None, backend: str) -> Any:
        # An output that no loss uses must not cost a map of zeros; Dynamo cannot trace the call.
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
        ctx.save_for_backward(depth, intrinsics, poses)
        ctx.flow_dtype, ctx.backend = None if flow is None else flow.dtype, backend
        points, moved = _forward(depth, intrinsics, poses, flow, backend)
        return points if flow is None else (points, moved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_points: Tensor | None, grad_moved: Tensor | None = None) -> tuple[Tensor | None, ...]:
        need_depth, need_intrinsics, need_poses, need_flow, _ = ctx.needs_input_grad
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if need_depth or need_intrinsics or need_poses:
            wanted = need_depth, need_intrinsics or need_poses
            grads = _backward(*ctx.saved_tensors, grad_points, grad_moved, *wanted, ctx.backend)
        grad_flow = grad_moved.to(ctx.flow_dtype) if need_flow and grad_moved is not None else None
        needed = zip(grads, (need_depth, need_intrinsics, need_poses), strict=True)
        return (*(g if want else None for g, want in needed), grad_flow, None)


def _triton_reasons(*tensors: Tensor | None) -> list[str]:
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        return ["float64 runs in eager mode only"]
    return backends.triton_reasons(*tensors)


def _cuda_reasons(*tensors: Tensor | None) -> list[str]:
    depth, flow = tensors[0], tensors[3]
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        return ["float64 runs in eager mode only"]
    if depth is not None and flow is not None and depth.dtype != flow.dtype:
        return [f"depth_z and flow must have one dtype, got {depth.dtype} and {flow.dtype}"]
    if depth is not None and depth.shape[-2] * depth.shape[-1] > 2**30:
        return ["a view has more than 2^30 pixels"]
    return backends.cuda_reasons(*tensors)


backends.register("unproject", cuda=_cuda_reasons, triton=_triton_reasons)


def _validate(depth_z: Tensor, intrinsics: Tensor, camera_poses: Tensor, flow: Tensor | None) -> None:
    checks: list[tuple[str, Any, str, int, tuple[int, ...], str]] = [
        ("depth_z", depth_z, "[..., H, W]", 2, (), "pass z-depth in metres without a channel dimension"),
        ("intrinsics", intrinsics, "[..., 3, 3]", 2, (3, 3), "pass one pinhole matrix in pixels a view"),
        ("camera_poses", camera_poses, "[..., 4, 4]", 2, (4, 4), "pass one camera-to-world matrix a view"),
    ]
    if flow is not None:
        checks.append(("flow", flow, "[..., H, W, 3]", 3, (3,), "pass one world-frame displacement in metres a pixel"))
    for name, tensor, text, rank, tail, advice in checks:
        is_tensor = isinstance(tensor, Tensor)
        fits = is_tensor and tensor.ndim >= rank and tuple(tensor.shape[tensor.ndim - len(tail) :]) == tail
        if not fits or tensor.dtype not in _FLOATS:
            got = f"{list(tensor.shape)} {tensor.dtype}" if is_tensor else f"a {type(tensor).__name__}"
            raise ValueError(f"{name}: expected {text} floating point, got {got}; {advice}")
        if tensor.device != depth_z.device:
            raise ValueError(
                f"{name}: expected device {depth_z.device} (depth_z's), got {tensor.device}; "
                "move all inputs to one device"
            )
    lead = depth_z.shape[:-2]
    for name, tensor in (("intrinsics", intrinsics), ("camera_poses", camera_poses)):
        own = tensor.shape[:-2]
        padded = (1,) * (len(lead) - len(own)) + tuple(own)
        if len(own) > len(lead) or any(a not in (1, b) for a, b in zip(padded, lead, strict=True)):
            raise ValueError(
                f"{name}: expected leading dimensions that broadcast to depth_z's {list(lead)}, "
                f"got {list(tensor.shape)}; pass one matrix a view, or one for all"
            )
    if flow is not None and tuple(flow.shape[:-1]) != tuple(depth_z.shape):
        raise ValueError(
            f"flow: expected {[*depth_z.shape, 3]} like depth_z, got {list(flow.shape)}; give flow for every pixel"
        )


def unproject(
    depth_z: Tensor,
    intrinsics: Tensor,
    camera_poses: Tensor,
    flow: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """World points of depth maps, and where scene flow moves them.

    The pixel (u, v), its centre at integer coordinates, unprojects to x = R (d (u - cx) / fx, d (v - cy) / fy, d) + t.
    OpenCV cameras (right, down, forward), camera-to-world poses. Of `intrinsics` only fx, fy, cx and cy are used: skew
    is taken to be zero. Of `camera_poses` the upper three rows are used as they are. Other entries get zero gradients.
    A depth of 0 gives the camera's centre; NaN stays NaN, and makes the gradients of its view's camera NaN (mask it
    before).

    Differentiable once in every argument; the kernels sum over pixels in a fixed order.

    Args:
        depth_z: [..., H, W] metres along the optical axis, 16 or 32 bit.
        intrinsics: [..., 3, 3] pixels; leading dimensions broadcast to those of depth_z.
        camera_poses: [..., 4, 4] camera-to-world, metres; leading dimensions broadcast likewise.
        flow: [..., H, W, 3] metres, world frame, or None. Scene flow lives on the pixels of the reference view.
        backend: "triton", "cuda", "eager" or None (automatic).

    Returns:
        Points [..., H, W, 3] metres, world; and points + flow, or None without flow. float32 (float64 if an input is).

    Raises:
        ValueError: rank, shape, dtype or device of an argument do not fit.
        BackendError: the backend asked for cannot run the call.
    """
    _validate(depth_z, intrinsics, camera_poses, flow)
    name = backends.select("unproject", backend, depth_z, intrinsics, camera_poses, flow)
    if name == backends.EAGER:
        return reference_unproject(depth_z, intrinsics, camera_poses, flow)
    lead, (height, width) = depth_z.shape[:-2], depth_z.shape[-2:]
    n = lead.numel()
    depth = depth_z.reshape(n, height, width)
    matrices = (m.expand(*lead, *m.shape[-2:]).reshape(n, *m.shape[-2:]) for m in (intrinsics, camera_poses))
    if flow is None:
        return _Unproject.apply(depth, *matrices, None, name).view(*lead, height, width, 3), None
    points, moved = _Unproject.apply(depth, *matrices, flow.reshape(n, height, width, 3), name)
    return points.view(*lead, height, width, 3), moved.view(*lead, height, width, 3)
