"""Factor composition: one pass from raw head channels, pose and scale to every output, and back.

One program per (row, block of pixels); the row's pose and scale are scalars that each program derives itself.
The backward kernels are in `_compose_backward`; they use no atomics, so the order of every sum is fixed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from any4d_fast.layout import evenly_spaced, like_map, map_strides, packed

from ._compose_backward import SUMS, backward_kernel, finish_row_kernel, finish_scale_kernel, load_pixel, load_scale
from ._points import exp, load3, load_unit_quaternion, rotation, store3
from .aot import AotCase


class Config(NamedTuple):
    """Launch configuration; `tile_*` choose between tiled and strided access of interleaved channels."""

    block: int
    warps: int
    iterations: int
    tile_loads: bool
    tile_stores: bool


# Both kernels are bound by memory: few pixels a thread keep registers low (64 and about 100 on sm_90), so that 16 and
# more warps a multiprocessor hide the latency. 16 iterations spread the 13 reductions' shuffles over
# 4,096 pixels. Measured on an H200 (kernels/notes/compose_factors.md).
FORWARD = Config(block=256, warps=4, iterations=1, tile_loads=False, tile_stores=True)
BACKWARD = Config(block=256, warps=4, iterations=16, tile_loads=False, tile_stores=True)
_FINISH_BLOCK = 128


@triton.jit
def _forward_kernel(
    geometry, flow, quats, trans, log_scale,
    pts3d, pts3d_cam, rays, depth_along_ray, cam_trans, cam_quats, scene_flow, metric, conf, mask, logits,
    pixels, blocks, batch,
    geometry_row, geometry_pixel, geometry_channel, flow_row, flow_pixel, flow_channel,
    quats_row, trans_row, scale_row,
    BLOCK: tl.constexpr, TILE_GEOMETRY: tl.constexpr, TILE_FLOW: tl.constexpr, TILE_STORES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    start = (program % blocks).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < pixels - start

    scale, _ = load_scale(log_scale + (row % batch) * scale_row)
    qx, qy, qz, qw, _ = load_unit_quaternion(quats + row * quats_row)
    r00, r01, r02, r10, r11, r12, r20, r21, r22 = rotation(qx, qy, qz, qw)
    trans += row * trans_row
    tx = tl.load(trans).to(tl.float32)
    ty = tl.load(trans + 1).to(tl.float32)
    tz = tl.load(trans + 2).to(tl.float32)
    if start == 0:
        tl.store(cam_trans + row * 3, scale * tx)
        tl.store(cam_trans + row * 3 + 1, scale * ty)
        tl.store(cam_trans + row * 3 + 2, scale * tz)
        tl.store(cam_quats + row * 4, qx)
        tl.store(cam_quats + row * 4 + 1, qy)
        tl.store(cam_quats + row * 4 + 2, qz)
        tl.store(cam_quats + row * 4 + 3, qw)
        if row < batch:
            tl.store(metric + row, scale)

    geometry += row * geometry_row + start * geometry_pixel
    rx, ry, rz, _, _, depth, channel = load_pixel(
        geometry, lane, geometry_pixel, geometry_channel, inside, TILE_GEOMETRY
    )
    channel += geometry_channel
    log_conf = tl.load(channel + lane * geometry_pixel, mask=inside, other=0.0).to(tl.float32)
    channel += geometry_channel
    logit = tl.load(channel + lane * geometry_pixel, mask=inside, other=0.0).to(tl.float32)
    flow += row * flow_row + start * flow_pixel
    fx, fy, fz = load3(flow, lane, flow_pixel, flow_channel, inside, TILE_FLOW)

    lx = depth * rx
    ly = depth * ry
    lz = depth * rz
    px = scale * (r00 * lx + r01 * ly + r02 * lz + tx)
    py = scale * (r10 * lx + r11 * ly + r12 * lz + ty)
    pz = scale * (r20 * lx + r21 * ly + r22 * lz + tz)

    first = row * pixels + start
    store3(pts3d + first * 3, lane, 3, 1, px, py, pz, inside, TILE_STORES)
    store3(pts3d_cam + first * 3, lane, 3, 1, scale * lx, scale * ly, scale * lz, inside, TILE_STORES)
    store3(rays + first * 3, lane, 3, 1, rx, ry, rz, inside, TILE_STORES)
    store3(scene_flow + first * 3, lane, 3, 1, scale * fx, scale * fy, scale * fz, inside, TILE_STORES)
    tl.store(depth_along_ray + first + lane, scale * depth, mask=inside)
    tl.store(conf + first + lane, 1 + exp(log_conf), mask=inside)
    tl.store(logits + first + lane, logit, mask=inside)
    # Not logit > 0: the sigmoid of a tiny positive float32 rounds to one half.
    tl.store(mask + first + lane, (tl.div_rn(1.0, 1 + exp(-logit)) > 0.5).to(tl.uint8), mask=inside)


def forward(
    geometry: Tensor, flow: Tensor, quats: Tensor, trans: Tensor, log_scale: Tensor, config: Config | None = None
) -> tuple[Tensor, ...]:
    """Launch the forward pass; shapes as in `any4d_fast.ops.compose_factors`, outputs in the order of `Factors`."""
    config = config or FORWARD
    n, height, width, _ = geometry.shape
    batch, device = log_scale.shape[0], geometry.device

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    pts3d, pts3d_cam, rays, scene_flow = (empty(n, height, width, 3) for _ in range(4))
    depth, conf, logits = empty(n, height, width, 1), empty(n, height, width), empty(n, height, width)
    cam_trans, cam_quats = empty(n, 3), empty(n, 4)
    mask = empty(n, height, width, dtype=torch.bool)
    if n == 0:
        metric = log_scale.float().exp().clamp(min=1e-8)
    else:
        metric = empty(batch, 1)
        geometry, flow, quats, trans = evenly_spaced(geometry), evenly_spaced(flow), packed(quats), packed(trans)
        # A map without pixels still has poses and scales to write.
        blocks = max(1, triton.cdiv(height * width, config.block))
        _forward_kernel[(n * blocks,)](
            geometry, flow, quats, trans, log_scale,
            pts3d, pts3d_cam, rays, depth, cam_trans, cam_quats, scene_flow, metric,
            conf, mask.view(torch.uint8), logits,
            height * width, blocks, batch, *map_strides(geometry), *map_strides(flow),
            quats.stride(0), trans.stride(0), log_scale.stride(0),
            BLOCK=config.block, TILE_GEOMETRY=config.tile_loads and geometry.stride(3) == 1,
            TILE_FLOW=config.tile_loads and flow.stride(3) == 1, TILE_STORES=config.tile_stores,
            num_warps=config.warps,
        )  # fmt: skip
    return pts3d, pts3d_cam, rays, depth, cam_trans, cam_quats, scene_flow, metric, conf, mask, logits


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
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward pass.

    Args:
        geometry, flow, quats, trans, log_scale: the forward's inputs.
        cotangents: of every output but the mask, in the order of `Factors`; None counts as zero and is not read.
        need_geometry, need_flow, need_pose, need_scale: which gradients to compute.
        config: launch configuration; the module's own by default.

    Returns:
        Gradients of the five inputs, in their dtypes; an empty tensor for each that is not needed.
    """
    config = config or BACKWARD
    n, height, width, _ = geometry.shape
    batch, device = log_scale.shape[0], geometry.device

    def grad(needed: bool, like: Tensor) -> Tensor:
        return torch.empty(like.shape if needed else (0,), dtype=like.dtype, device=device)

    out_geometry = like_map(geometry) if need_geometry else grad(False, geometry)
    out_flow = like_map(flow) if need_flow else grad(False, flow)
    reduce = need_pose or need_scale
    out_quats, out_trans, out_scale = grad(reduce, quats), grad(reduce, trans), grad(need_scale, log_scale)
    row_scales = torch.empty(n if reduce else 0, dtype=torch.float64, device=device)
    given = [None if g is None else g.contiguous() for g in cotangents]
    pts, cam, rays, depth, cam_trans, cam_quats, scene_flow, metric, conf, logits = given
    if n > 0:
        geometry, flow, quats, trans = evenly_spaced(geometry), evenly_spaced(flow), packed(quats), packed(trans)
        chunks = max(1, triton.cdiv(height * width, config.block * config.iterations))
        partials = torch.empty((n, SUMS.value, chunks), dtype=torch.float32, device=device) if reduce else None
        small_strides = quats.stride(0), trans.stride(0), log_scale.stride(0)
        unused = (0, 0, 0)
        out_strides = (
            *(map_strides(out_geometry) if need_geometry else unused)[1:],
            *(map_strides(out_flow) if need_flow else unused)[1:],
        )
        backward_kernel[(n * chunks,)](
            geometry, flow, quats, trans, log_scale, pts, cam, rays, depth, scene_flow, conf, logits,
            out_geometry if need_geometry else None, out_flow if need_flow else None, partials,
            height * width, chunks, batch, *map_strides(geometry), *map_strides(flow), *small_strides, *out_strides,
            BLOCK=config.block, ITERATIONS=config.iterations,
            TILE_GEOMETRY=config.tile_loads and geometry.stride(3) == 1,
            TILE_FLOW=config.tile_loads and flow.stride(3) == 1, TILE_LOADS=config.tile_loads,
            TILE_STORES=config.tile_stores and out_strides[1] == 1,
            TILE_FLOW_STORES=config.tile_stores and out_strides[3] == 1, num_warps=config.warps,
        )  # fmt: skip
        if reduce:
            finish_row_kernel[(n,)](
                quats, trans, log_scale, cam_trans, cam_quats, partials, out_quats, out_trans, row_scales,
                chunks, batch, *small_strides, BLOCK=_FINISH_BLOCK, num_warps=1,
            )  # fmt: skip
    if need_scale and batch > 0:
        finish_scale_kernel[(batch,)](
            log_scale, row_scales, metric, out_scale, n, batch, log_scale.stride(0), BLOCK=_FINISH_BLOCK, num_warps=1
        )
    if not need_pose:
        out_quats, out_trans = grad(False, quats), grad(False, trans)
    return out_geometry, out_flow, out_quats, out_trans, out_scale


def _signature(kernel: Any, kind: str, absent: tuple[str, ...] = ()) -> dict[str, str]:
    """Types of a kernel's run-time arguments: maps and their gradients in `kind`, everything else float32."""
    in_kind = {"geometry", "flow", "out_geometry", "out_flow"}
    types = {}
    for name in kernel.arg_names:
        if name.isupper() or name in absent:
            continue
        integer = name in _INTEGERS or name.split("_")[-1] in ("row", "pixel", "channel")
        pointer = f"*{kind}" if name in in_kind else {"mask": "*u8", "row_scales": "*fp64"}.get(name, "*fp32")
        types[name] = "i32" if integer else pointer
    return types


_INTEGERS = {"pixels", "blocks", "chunks", "batch", "rows"}


def aot_cases() -> list[AotCase]:
    """Production configurations: heads in 16 or 32 bit, channels last; backward of all outputs, of points alone."""
    unit = {"geometry_channel": 1, "flow_channel": 1, "out_channel": 1, "out_flow_channel": 1}
    losses = {
        "all": (),
        "points": ("grad_rays", "grad_depth", "grad_conf", "grad_logits"),
        "inputs": ("partials",),
    }
    cases = []

    def add(name: str, kernel: Any, kind: str, constants: dict[str, Any], warps: int) -> None:
        fixed = {k: v for k, v in ({**unit, **constants}).items() if k in kernel.arg_names}
        types = {k: v for k, v in _signature(kernel, kind).items() if k not in fixed}
        aligned = tuple(k for k, v in types.items() if v.startswith("*"))
        cases.append(AotCase(name, kernel, types, fixed, aligned, {"num_warps": warps}))

    for kind in ("fp16", "bf16", "fp32"):
        tiles = dict.fromkeys(("TILE_GEOMETRY", "TILE_FLOW"), FORWARD.tile_loads)
        tiles["TILE_STORES"] = FORWARD.tile_stores
        add(f"compose_factors forward {kind}", _forward_kernel, kind, {"BLOCK": FORWARD.block, **tiles}, FORWARD.warps)
        for loss, missing in losses.items():
            tiles = dict.fromkeys(("TILE_GEOMETRY", "TILE_FLOW", "TILE_LOADS"), BACKWARD.tile_loads)
            tiles |= dict.fromkeys(("TILE_STORES", "TILE_FLOW_STORES"), BACKWARD.tile_stores)
            shape = {"BLOCK": BACKWARD.block, "ITERATIONS": BACKWARD.iterations}
            constants = {**shape, **tiles, **dict.fromkeys(missing)}
            add(f"compose_factors backward {loss} {kind}", backward_kernel, kind, constants, BACKWARD.warps)
    block = {"BLOCK": _FINISH_BLOCK}
    add("compose_factors finish row", finish_row_kernel, "fp32", {**block, "quats_row": 4, "trans_row": 3}, 1)
    add("compose_factors finish scale", finish_scale_kernel, "fp32", {**block, "scale_row": 1}, 1)
    return cases
