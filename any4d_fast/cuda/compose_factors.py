"""Launchers of factor composition in CUDA C++ (csrc/compose_factors*.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _ext
from ..layout import evenly_spaced, like_map, map_strides, packed
from ..reference.compose_factors import EPS
from . import dtype_code, pointer, stream

_MAP_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _inputs(geometry: Tensor, flow: Tensor, quats: Tensor, trans: Tensor, log_scale: Tensor) -> dict[str, object]:
    """The arguments that both passes share; every tensor as the kernels can read it."""
    if geometry.dtype != flow.dtype:
        raise TypeError(f"flow: expected {geometry.dtype} like geometry, got {flow.dtype}; convert one of them")
    n, height, width, _ = geometry.shape
    return {
        "map_dtype": dtype_code("geometry", geometry, *_MAP_DTYPES),
        "geometry": (pointer(geometry), *map_strides(geometry)),
        "flow": (pointer(flow), *map_strides(flow)),
        **{
            name: (pointer(rows), rows.stride(0), dtype_code(name, rows, *_MAP_DTYPES))
            for name, rows in (("quats", quats), ("trans", trans), ("log_scale", log_scale))
        },
        "rows": n,
        "batch": log_scale.shape[0],
        "pixels": height * width,
        "device": geometry.device.index,
        "stream": stream(geometry.device),
    }


def forward(geometry: Tensor, flow: Tensor, quats: Tensor, trans: Tensor, log_scale: Tensor) -> tuple[Tensor, ...]:
    """Launch the forward pass; shapes as in `any4d_fast.ops.compose_factors`, outputs in the order of `Factors`.

    Raises:
        TypeError: geometry and flow differ in dtype, or a dtype is not float32, bfloat16 or float16.
    """
    n, height, width, _ = geometry.shape
    device = geometry.device

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    pts3d, pts3d_cam, rays, scene_flow = (empty(n, height, width, 3) for _ in range(4))
    depth, conf, logits = empty(n, height, width, 1), empty(n, height, width), empty(n, height, width)
    cam_trans, cam_quats = empty(n, 3), empty(n, 4)
    mask = empty(n, height, width, dtype=torch.bool)
    if n == 0:
        metric = log_scale.float().exp().clamp(min=EPS)
        return pts3d, pts3d_cam, rays, depth, cam_trans, cam_quats, scene_flow, metric, conf, mask, logits
    metric = empty(log_scale.shape[0], 1)
    outputs = (pts3d, pts3d_cam, rays, depth, cam_trans, cam_quats, scene_flow, metric, conf, mask, logits)
    # Copies made here, if any, must outlive the launch: they are bound to names.
    geometry, flow, quats, trans = evenly_spaced(geometry), evenly_spaced(flow), packed(quats), packed(trans)
    _ext.module().compose_forward(
        **_inputs(geometry, flow, quats, trans, log_scale), outputs=[pointer(output) for output in outputs]
    )
    return outputs


def backward(
    geometry: Tensor,
    flow: Tensor,
    quats: Tensor,
    trans: Tensor,
    log_scale: Tensor,
    cotangents: tuple[Tensor | None, ...],
    need_geometry: bool = True,
    need_flow: bool = True,
    need_pose: bool = True,
    need_scale: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward pass.

    Args:
        geometry, flow, quats, trans, log_scale: the forward's inputs.
        cotangents: of every output but the mask, in the order of `Factors`; None counts as zero and is not read.
        need_geometry, need_flow, need_pose, need_scale: which gradients to compute.

    Returns:
        Gradients of the five inputs, in their dtypes; an empty tensor for each that is not needed.

    Raises:
        TypeError: as `forward`.
    """
    n, height, width, _ = geometry.shape
    batch, device = log_scale.shape[0], geometry.device

    def grad(needed: bool, like: Tensor) -> Tensor:
        return torch.empty(like.shape if needed else (0,), dtype=like.dtype, device=device)

    out_geometry = like_map(geometry) if need_geometry else grad(False, geometry)
    out_flow = like_map(flow) if need_flow else grad(False, flow)
    out_quats, out_trans, out_scale = grad(need_pose, quats), grad(need_pose, trans), grad(need_scale, log_scale)
    given = [None if g is None else g.contiguous() for g in cotangents]
    outputs = (out_geometry, out_flow, out_quats, out_trans, out_scale)
    if n == 0:
        if need_scale:
            raw, metric = log_scale.float().exp(), given[7]
            out_scale.copy_(torch.where(raw >= EPS, raw * (0 if metric is None else metric), 0))
        return outputs
    if not (need_geometry or need_flow or need_pose or need_scale):
        return outputs

    module = _ext.module()
    geometry, flow, quats, trans = evenly_spaced(geometry), evenly_spaced(flow), packed(quats), packed(trans)
    workspace: tuple[Tensor | None, ...] = (None, None, None)
    if need_pose or need_scale:
        chunks = module.compose_backward_chunks(height * width)
        workspace = (
            torch.empty((n, chunks, 16), dtype=torch.float32, device=device),
            torch.empty(n, dtype=torch.float64, device=device) if need_scale else None,
            torch.empty(batch, dtype=torch.int32, device=device) if need_scale else None,
        )
    needed = (need_geometry, need_flow, need_pose, need_pose, need_scale)
    module.compose_backward(
        **_inputs(geometry, flow, quats, trans, log_scale),
        cotangents=[pointer(g) for g in given],
        outputs=[pointer(out) if wanted else 0 for out, wanted in zip(outputs, needed, strict=True)],
        workspace=[pointer(buffer) for buffer in workspace],
    )
    return outputs
