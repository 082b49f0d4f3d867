"""Unprojection: one pass from z-depth, intrinsics and poses to world points and moved points, and back.

One program per (row, block of pixels). Every gradient of a row's camera follows from 16 sums over its pixels: the
point gradients (3), their outer product with the camera points (9), and four products in the camera frame for the
intrinsics (these follow from the nine, but by a difference that costs a digit). The walk back writes partial sums, and
a program a row adds them in a fixed order and applies the chain rule.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from any4d_fast.layout import evenly_spaced, map_strides, packed_matrices

from ._points import load3, store3, store_sums3, sum_columns
from .aot import AotCase

_SUMS = tl.constexpr(16)


class Config(NamedTuple):
    """Launch configuration; `tile_*` choose between tiled and strided access of interleaved channels."""

    block: int
    warps: int
    iterations: int
    tile_loads: bool
    tile_stores: bool


# Few pixels a thread: full occupancy (at most 64 registers forward on sm_90). Backward, 16
# iterations spread the 16 reductions' shuffles over 4,096 pixels. Measured on an H200 (kernels/notes/unproject.md).
FORWARD = Config(block=128, warps=4, iterations=1, tile_loads=False, tile_stores=False)
BACKWARD = Config(block=256, warps=4, iterations=16, tile_loads=False, tile_stores=False)
_FINISH_BLOCK, _FINISH_WARPS = 64, 4  # 41 views of 518x336 have 43 partial sums each: one step


@triton.jit
def _load_camera(intrinsics, poses, row, intrinsics_row, poses_row):
    """fx, fy, cx, cy and the rotation of one row."""
    intrinsics += row * intrinsics_row
    poses += row * poses_row
    return (
        tl.load(intrinsics).to(tl.float32),
        tl.load(intrinsics + 4).to(tl.float32),
        tl.load(intrinsics + 2).to(tl.float32),
        tl.load(intrinsics + 5).to(tl.float32),
        tl.load(poses).to(tl.float32),
        tl.load(poses + 1).to(tl.float32),
        tl.load(poses + 2).to(tl.float32),
        tl.load(poses + 4).to(tl.float32),
        tl.load(poses + 5).to(tl.float32),
        tl.load(poses + 6).to(tl.float32),
        tl.load(poses + 8).to(tl.float32),
        tl.load(poses + 9).to(tl.float32),
        tl.load(poses + 10).to(tl.float32),
    )


@triton.jit
def _rays(start, lane, width, fx, fy, cx, cy):
    """x/z and y/z of the pixels start + lane."""
    first_v = start // width
    column = (start - first_v * width).to(tl.int32) + lane
    down = column // width
    u = (column - down * width).to(tl.float32)
    v = (first_v.to(tl.int32) + down).to(tl.float32)
    # Not times 1/fx: its rounding would push every pixel the same way, and add up in the sums.
    return tl.div_rn(u - cx, fx), tl.div_rn(v - cy, fy)


@triton.jit
def _forward_kernel(
    depth, intrinsics, poses, flow, points, moved,
    pixels, width, blocks, depth_row, depth_pixel, intrinsics_row, poses_row, flow_row, flow_pixel, flow_channel,
    BLOCK: tl.constexpr, TILE_FLOW: tl.constexpr, TILE_STORES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    start = (program % blocks).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < pixels - start
    fx, fy, cx, cy, r00, r01, r02, r10, r11, r12, r20, r21, r22 = _load_camera(
        intrinsics, poses, row, intrinsics_row, poses_row
    )
    poses += row * poses_row
    a, b = _rays(start, lane, width, fx, fy, cx, cy)
    z = tl.load(depth + row * depth_row + start * depth_pixel + lane * depth_pixel, mask=inside, other=0.0)
    z = z.to(tl.float32)
    lx = a * z
    ly = b * z
    px = r00 * lx + r01 * ly + r02 * z + tl.load(poses + 3).to(tl.float32)
    py = r10 * lx + r11 * ly + r12 * z + tl.load(poses + 7).to(tl.float32)
    pz = r20 * lx + r21 * ly + r22 * z + tl.load(poses + 11).to(tl.float32)
    first = row * pixels + start
    store3(points + first * 3, lane, 3, 1, px, py, pz, inside, TILE_STORES)
    if flow is not None:
        flow += row * flow_row + start * flow_pixel
        dx, dy, dz = load3(flow, lane, flow_pixel, flow_channel, inside, TILE_FLOW)
        store3(moved + first * 3, lane, 3, 1, px + dx, py + dy, pz + dz, inside, TILE_STORES)


@triton.jit
def _backward_kernel(
    depth, intrinsics, poses, grad_points, grad_moved, out_depth, partials,
    pixels, width, chunks, depth_row, depth_pixel, intrinsics_row, poses_row,
    BLOCK: tl.constexpr, ITERATIONS: tl.constexpr, TILE_LOADS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    chunk = program % chunks
    lane = tl.arange(0, BLOCK)
    fx, fy, cx, cy, r00, r01, r02, r10, r11, r12, r20, r21, r22 = _load_camera(
        intrinsics, poses, row, intrinsics_row, poses_row
    )
    zero = tl.zeros([BLOCK], tl.float32)
    m00, m01, m02, m10, m11, m12, m20, m21, m22 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    sx, sy, sz, kfx, kcx, kfy, kcy = zero, zero, zero, zero, zero, zero, zero
    for step in range(ITERATIONS):
        start = (chunk * ITERATIONS + step).to(tl.int64) * BLOCK
        inside = lane < pixels - start
        first = row * pixels + start
        gx, gy, gz = zero, zero, zero
        if grad_points is not None:
            gx, gy, gz = load3(grad_points + first * 3, lane, 3, 1, inside, TILE_LOADS)
        if grad_moved is not None:
            hx, hy, hz = load3(grad_moved + first * 3, lane, 3, 1, inside, TILE_LOADS)
            gx += hx
            gy += hy
            gz += hz
        a, b = _rays(start, lane, width, fx, fy, cx, cy)
        qx = r00 * gx + r10 * gy + r20 * gz
        qy = r01 * gx + r11 * gy + r21 * gz
        if out_depth is not None:
            grad = a * qx + b * qy + (r02 * gx + r12 * gy + r22 * gz)
            tl.store(out_depth + first + lane, grad.to(out_depth.dtype.element_ty), mask=inside)
        if partials is not None:
            z = tl.load(depth + row * depth_row + start * depth_pixel + lane * depth_pixel, mask=inside, other=0.0)
            z = z.to(tl.float32)
            lx = a * z
            ly = b * z
            m00 += gx * lx
            m01 += gx * ly
            m02 += gx * z
            m10 += gy * lx
            m11 += gy * ly
            m12 += gy * z
            m20 += gz * lx
            m21 += gz * ly
            m22 += gz * z
            sx += gx
            sy += gy
            sz += gz
            kfx += qx * lx
            kcx += qx * z
            kfy += qy * ly
            kcy += qy * z
    if partials is not None:
        out = partials + row * _SUMS * chunks + chunk
        store_sums3(out, chunks, m00, m01, m02)
        store_sums3(out + 3 * chunks, chunks, m10, m11, m12)
        store_sums3(out + 6 * chunks, chunks, m20, m21, m22)
        store_sums3(out + 9 * chunks, chunks, sx, sy, sz)
        store_sums3(out + 12 * chunks, chunks, kfx, kcx, kfy)
        tl.store(out + 15 * chunks, tl.sum(kcy))


@triton.jit
def _finish_kernel(intrinsics, partials, out_intrinsics, out_poses, chunks, intrinsics_row, BLOCK: tl.constexpr):
    """Add one row's partial sums; gradients of its intrinsics and pose, an entry a sum.

    All columns in one loop: one after the other, sixteen sums of a handful of values wait for memory sixteen times.
    """
    row = tl.program_id(0).to(tl.int64)
    sums = sum_columns(partials + row * _SUMS * chunks, chunks, _SUMS, _SUMS, BLOCK).to(tl.float32)
    place = tl.arange(0, _SUMS)
    # The outer product is the pose's left part, the sums of the point gradients (9, 10, 11) its right column; its last
    # row is zero, and takes the places of the intrinsics' sums.
    entry = tl.where(place < 9, place // 3 * 4 + place % 3, tl.where(place < 12, (place - 9) * 4 + 3, place))
    tl.store(out_poses + row * 16 + entry, tl.where(place < 12, sums, 0.0).to(out_poses.dtype.element_ty))
    # d x / d fx = -x / fx and d x / d cx = -z / fx for the camera point (x, y, z): entries 0 and 2, fy's 4 and 5. The
    # other five are zero, and are written in the places of the first five sums.
    ours = place >= 12
    focal = tl.load(intrinsics + row * intrinsics_row + tl.where(place < 14, 0, 4), mask=ours, other=1.0).to(tl.float32)
    grad = tl.where(ours, tl.div_rn(-sums, focal), 0.0)
    zeros = tl.where(place < 2, 2 * place + 1, place + 4)
    entry = tl.where(ours, tl.where(place < 14, (place - 12) * 2, place - 10), zeros)
    grad = grad.to(out_intrinsics.dtype.element_ty)
    tl.store(out_intrinsics + row * 9 + entry, grad, mask=ours | (place < 5))


def forward(
    depth: Tensor, intrinsics: Tensor, poses: Tensor, flow: Tensor | None, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Launch the forward pass.

    Args:
        depth: [N, H, W] metres.
        intrinsics: [N, 3, 3] pixels.
        poses: [N, 4, 4] camera-to-world, metres.
        flow: [N, H, W, 3] metres, or None.
        config: launch configuration; the module's own by default.

    Returns:
        Points and moved points, [N, H, W, 3] float32; an empty tensor for the second without flow.
    """
    config = config or FORWARD
    n, height, width = depth.shape
    points = torch.empty((n, height, width, 3), dtype=torch.float32, device=depth.device)
    moved = torch.empty(points.shape if flow is not None else (0,), dtype=torch.float32, device=depth.device)
    if points.numel() == 0:
        return points, moved
    depth, intrinsics, poses = evenly_spaced(depth[..., None]), packed_matrices(intrinsics), packed_matrices(poses)
    flow = None if flow is None else evenly_spaced(flow)
    blocks = triton.cdiv(height * width, config.block)
    flow_strides = (0, 0, 1) if flow is None else map_strides(flow)
    _forward_kernel[(n * blocks,)](
        depth, intrinsics, poses, flow, points, moved, height * width, width, blocks, *map_strides(depth)[:2],
        intrinsics.stride(0), poses.stride(0), *flow_strides,
        BLOCK=config.block, TILE_FLOW=config.tile_loads and flow_strides[2] == 1, TILE_STORES=config.tile_stores,
        num_warps=config.warps,
    )  # fmt: skip
    return points, moved


def backward(
    depth: Tensor,
    intrinsics: Tensor,
    poses: Tensor,
    grad_points: Tensor | None,
    grad_moved: Tensor | None,
    need_depth: bool = True,
    need_cameras: bool = True,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward pass (the flow's gradient is `grad_moved` itself).

    Args:
        depth, intrinsics, poses: the forward's inputs.
        grad_points, grad_moved: [N, H, W, 3] cotangents; None counts as zero and is not read.
        need_depth, need_cameras: which gradients to compute.
        config: launch configuration; the module's own by default.

    Returns:
        Gradients of depth, intrinsics and poses in their dtypes; an empty tensor for each that is not needed.
    """
    config = config or BACKWARD
    n, height, width = depth.shape

    def grad(needed: bool, like: Tensor) -> Tensor:
        return torch.empty(like.shape if needed else (0,), dtype=like.dtype, device=like.device)

    out_depth = grad(need_depth, depth)
    out_intrinsics, out_poses = grad(need_cameras, intrinsics), grad(need_cameras, poses)
    if n == 0 or not (need_depth or need_cameras):
        return out_depth, out_intrinsics, out_poses
    grad_points, grad_moved = (None if g is None else g.contiguous() for g in (grad_points, grad_moved))
    depth, intrinsics, poses = evenly_spaced(depth[..., None]), packed_matrices(intrinsics), packed_matrices(poses)
    chunks = max(1, triton.cdiv(height * width, config.block * config.iterations))
    partials = torch.empty((n, _SUMS.value, chunks), dtype=torch.float32, device=depth.device) if need_cameras else None
    _backward_kernel[(n * chunks,)](
        depth, intrinsics, poses, grad_points, grad_moved, out_depth if need_depth else None, partials,
        height * width, max(width, 1), chunks, *map_strides(depth)[:2], intrinsics.stride(0), poses.stride(0),
        BLOCK=config.block, ITERATIONS=config.iterations, TILE_LOADS=config.tile_loads, num_warps=config.warps,
    )  # fmt: skip
    if need_cameras:
        _finish_kernel[(n,)](
            intrinsics, partials, out_intrinsics, out_poses, chunks, intrinsics.stride(0),
            BLOCK=_FINISH_BLOCK, num_warps=_FINISH_WARPS,
        )  # fmt: skip
    return out_depth, out_intrinsics, out_poses


_INTEGERS = {"pixels", "width", "blocks", "chunks"}


def aot_cases() -> list[AotCase]:
    """Every production configuration: depth in 16 or 32 bit, with and without flow and camera gradients."""
    cases = []

    def add(name: str, kernel: Any, kind: str, constants: dict[str, Any], warps: int) -> None:
        types = {}
        for arg in kernel.arg_names:
            if not arg.isupper() and arg not in constants:
                integer = arg in _INTEGERS or arg.split("_")[-1] in ("row", "pixel", "channel")
                types[arg] = "i32" if integer else f"*{kind}" if arg in ("depth", "flow", "out_depth") else "*fp32"
        aligned = tuple(arg for arg, kind_of in types.items() if kind_of.startswith("*"))
        cases.append(AotCase(f"unproject {name} {kind}", kernel, types, constants, aligned, {"num_warps": warps}))

    for kind in ("fp16", "bf16", "fp32"):
        forward_tiles = {"TILE_FLOW": FORWARD.tile_loads, "TILE_STORES": FORWARD.tile_stores}
        common = {"BLOCK": FORWARD.block, **forward_tiles, "depth_pixel": 1, "flow_channel": 1}
        add("forward", _forward_kernel, kind, {**common, "flow": None}, FORWARD.warps)
        add("forward with flow", _forward_kernel, kind, common, FORWARD.warps)
        common = {"BLOCK": BACKWARD.block, "ITERATIONS": BACKWARD.iterations, "TILE_LOADS": BACKWARD.tile_loads}
        common["depth_pixel"] = 1
        add("backward", _backward_kernel, kind, {**common, "grad_moved": None}, BACKWARD.warps)
        add("backward with flow", _backward_kernel, kind, common, BACKWARD.warps)
        add("backward of depth", _backward_kernel, kind, {**common, "partials": None}, BACKWARD.warps)
    add("finish", _finish_kernel, "fp32", {"BLOCK": _FINISH_BLOCK}, _FINISH_WARPS)
    return cases
