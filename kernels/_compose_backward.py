"""Backward kernels of factor composition; launched by `compose_factors.backward`.

The walk over the pixels writes the gradients of the channels and, per program, one partial sum of each of 13 numbers:
outer product of point gradients and camera points (9), point gradients (3), the rest of the scale's gradient (1).
A program a row adds the partials and applies the quaternion's chain rule; a program a sample adds the scale gradients
of its views.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._points import EPS, exp, load3, load_unit_quaternion, rotation, store3, store6, store_sums3, sum_column

SUMS = tl.constexpr(13)


@triton.jit
def load_scale(log_scale):
    """The scale, and e^log_scale before clamping."""
    raw = exp(tl.load(log_scale).to(tl.float32))
    return tl.maximum(raw, EPS, propagate_nan=tl.PropagateNan.ALL), raw


@triton.jit
def load_pixel(geometry, lane, stride, channel_stride, inside, TILE: tl.constexpr):
    """Unit ray, inverse of the clamped norm, norm, and depth of each pixel."""
    cx, cy, cz = load3(geometry, lane, stride, channel_stride, inside, TILE)
    log_depth = geometry + channel_stride
    log_depth += channel_stride
    log_depth += channel_stride
    depth = exp(tl.load(log_depth + lane * stride, mask=inside, other=0.0).to(tl.float32))
    norm = tl.sqrt_rn(cx * cx + cy * cy + cz * cz)
    inverse = tl.div_rn(1.0, tl.maximum(norm, EPS))
    return cx * inverse, cy * inverse, cz * inverse, inverse, norm, depth, log_depth


@triton.jit
def _load_grad3(pointer, first, lane, inside, TILE: tl.constexpr):
    if pointer is None:
        zero = tl.zeros([lane.shape[0]], tl.float32)
        x, y, z = zero, zero, zero
    else:
        x, y, z = load3(pointer + first * 3, lane, 3, 1, inside, TILE)
    return x, y, z


@triton.jit
def _load_grad(pointer, first, lane, inside):
    if pointer is None:
        values = tl.zeros([lane.shape[0]], tl.float32)
    else:
        values = tl.load(pointer + first + lane, mask=inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def backward_kernel(
    geometry, flow, quats, trans, log_scale,
    grad_pts, grad_cam, grad_rays, grad_depth, grad_scene_flow, grad_conf, grad_logits,
    out_geometry, out_flow, partials,
    pixels, chunks, batch,
    geometry_row, geometry_pixel, geometry_channel, flow_row, flow_pixel, flow_channel,
    quats_row, trans_row, scale_row,
    out_pixel, out_channel, out_flow_pixel, out_flow_channel,
    BLOCK: tl.constexpr, ITERATIONS: tl.constexpr, TILE_GEOMETRY: tl.constexpr, TILE_FLOW: tl.constexpr,
    TILE_LOADS: tl.constexpr, TILE_STORES: tl.constexpr, TILE_FLOW_STORES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    chunk = program % chunks
    lane = tl.arange(0, BLOCK)
    scale, _ = load_scale(log_scale + (row % batch) * scale_row)
    qx, qy, qz, qw, _ = load_unit_quaternion(quats + row * quats_row)
    r00, r01, r02, r10, r11, r12, r20, r21, r22 = rotation(qx, qy, qz, qw)
    zero = tl.zeros([BLOCK], tl.float32)
    m00, m01, m02, m10, m11, m12, m20, m21, m22 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    sx, sy, sz, rest = zero, zero, zero, zero

    for step in range(ITERATIONS):
        start = (chunk * ITERATIONS + step).to(tl.int64) * BLOCK
        inside = lane < pixels - start
        first = row * pixels + start
        base = geometry + row * geometry_row + start * geometry_pixel
        rx, ry, rz, inverse, norm, depth, channel = load_pixel(
            base, lane, geometry_pixel, geometry_channel, inside, TILE_GEOMETRY
        )
        px, py, pz = _load_grad3(grad_pts, first, lane, inside, TILE_LOADS)
        gx, gy, gz = _load_grad3(grad_cam, first, lane, inside, TILE_LOADS)
        gd = _load_grad(grad_depth, first, lane, inside)
        lx = depth * rx
        ly = depth * ry
        lz = depth * rz

        if out_geometry is not None:
            ax = scale * (r00 * px + r10 * py + r20 * pz + gx)
            ay = scale * (r01 * px + r11 * py + r21 * pz + gy)
            az = scale * (r02 * px + r12 * py + r22 * pz + gz)
            ux, uy, uz = _load_grad3(grad_rays, first, lane, inside, TILE_LOADS)
            ux += depth * ax
            uy += depth * ay
            uz += depth * az
            # Below the clamp the norm is a constant: nothing to project out.
            along = tl.where(norm >= EPS, rx * ux + ry * uy + rz * uz, 0.0)
            out_depth = (ax * rx + ay * ry + az * rz + scale * gd) * depth
            out_conf = zero
            if grad_conf is not None:
                channel += geometry_channel
                log_conf = tl.load(channel + lane * geometry_pixel, mask=inside, other=0.0).to(tl.float32)
                out_conf = _load_grad(grad_conf, first, lane, inside) * exp(log_conf)
            store6(
                out_geometry + row * pixels * 6 + start * out_pixel, lane, out_pixel, out_channel,
                (ux - rx * along) * inverse, (uy - ry * along) * inverse, (uz - rz * along) * inverse,
                out_depth, out_conf, _load_grad(grad_logits, first, lane, inside),
                inside, TILE_STORES,
            )  # fmt: skip

        fx, fy, fz = _load_grad3(grad_scene_flow, first, lane, inside, TILE_LOADS)
        if out_flow is not None:
            store3(
                out_flow + row * pixels * 3 + start * out_flow_pixel, lane, out_flow_pixel, out_flow_channel,
                scale * fx, scale * fy, scale * fz, inside, TILE_FLOW_STORES,
            )  # fmt: skip

        if partials is not None:
            rest += gx * lx + gy * ly + gz * lz + gd * depth
            if grad_scene_flow is not None:
                vx, vy, vz = load3(
                    flow + row * flow_row + start * flow_pixel, lane, flow_pixel, flow_channel, inside, TILE_FLOW
                )
                rest += fx * vx + fy * vy + fz * vz
            m00 += px * lx
            m01 += px * ly
            m02 += px * lz
            m10 += py * lx
            m11 += py * ly
            m12 += py * lz
            m20 += pz * lx
            m21 += pz * ly
            m22 += pz * lz
            sx += px
            sy += py
            sz += pz

    if partials is not None:
        out = partials + row * SUMS * chunks + chunk
        store_sums3(out, chunks, m00, m01, m02)
        store_sums3(out + 3 * chunks, chunks, m10, m11, m12)
        store_sums3(out + 6 * chunks, chunks, m20, m21, m22)
        store_sums3(out + 9 * chunks, chunks, sx, sy, sz)
        tl.store(out + 12 * chunks, tl.sum(rest))


@triton.jit
def finish_row_kernel(
    quats, trans, log_scale, grad_cam_trans, grad_cam_quats, partials, out_quats, out_trans, row_scales,
    chunks, batch, quats_row, trans_row, scale_row, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add one row's partial sums; gradients of its quaternion and translation, and its part of the scale's.

    In float64, which costs nothing for a few hundred numbers: the sums cancel, above all in the quaternion's gradient.
    """
    row = tl.program_id(0).to(tl.int64)
    partials += row * SUMS * chunks
    m00 = sum_column(partials, chunks, BLOCK)
    m01 = sum_column(partials + chunks, chunks, BLOCK)
    m02 = sum_column(partials + 2 * chunks, chunks, BLOCK)
    m10 = sum_column(partials + 3 * chunks, chunks, BLOCK)
    m11 = sum_column(partials + 4 * chunks, chunks, BLOCK)
    m12 = sum_column(partials + 5 * chunks, chunks, BLOCK)
    m20 = sum_column(partials + 6 * chunks, chunks, BLOCK)
    m21 = sum_column(partials + 7 * chunks, chunks, BLOCK)
    m22 = sum_column(partials + 8 * chunks, chunks, BLOCK)
    gx = sum_column(partials + 9 * chunks, chunks, BLOCK)
    gy = sum_column(partials + 10 * chunks, chunks, BLOCK)
    gz = sum_column(partials + 11 * chunks, chunks, BLOCK)
    rest = sum_column(partials + 12 * chunks, chunks, BLOCK)
    if grad_cam_trans is not None:
        gx += tl.load(grad_cam_trans + row * 3)
        gy += tl.load(grad_cam_trans + row * 3 + 1)
        gz += tl.load(grad_cam_trans + row * 3 + 2)

    scale, _ = load_scale(log_scale + (row % batch) * scale_row)
    x, y, z, w, norm = load_unit_quaternion(quats + row * quats_row)
    r00, r01, r02, r10, r11, r12, r20, r21, r22 = rotation(x, y, z, w)
    trans += row * trans_row
    tx = tl.load(trans).to(tl.float32)
    ty = tl.load(trans + 1).to(tl.float32)
    tz = tl.load(trans + 2).to(tl.float32)
    turned = r00 * m00 + r01 * m01 + r02 * m02 + r10 * m10 + r11 * m11 + r12 * m12 + r20 * m20 + r21 * m21 + r22 * m22
    tl.store(row_scales + row, rest + turned + tx * gx + ty * gy + tz * gz)

    kind: tl.constexpr = out_trans.dtype.element_ty
    tl.store(out_trans + row * 3, (scale * gx).to(tl.float32).to(kind))
    tl.store(out_trans + row * 3 + 1, (scale * gy).to(tl.float32).to(kind))
    tl.store(out_trans + row * 3 + 2, (scale * gz).to(tl.float32).to(kind))

    # d loss / d R = scale * m; each component's derivative of R contracted with it.
    ux = 2 * scale * (y * (m01 + m10) + z * (m02 + m20) + w * (m21 - m12) - 2 * x * (m11 + m22))
    uy = 2 * scale * (x * (m01 + m10) + z * (m12 + m21) + w * (m02 - m20) - 2 * y * (m00 + m22))
    uz = 2 * scale * (x * (m02 + m20) + y * (m12 + m21) + w * (m10 - m01) - 2 * z * (m00 + m11))
    uw = 2 * scale * (x * (m21 - m12) + y * (m02 - m20) + z * (m10 - m01))
    if grad_cam_quats is not None:
        ux += tl.load(grad_cam_quats + row * 4)
        uy += tl.load(grad_cam_quats + row * 4 + 1)
        uz += tl.load(grad_cam_quats + row * 4 + 2)
        uw += tl.load(grad_cam_quats + row * 4 + 3)
    length = tl.maximum(norm, EPS)
    along = tl.where(norm >= EPS, x * ux + y * uy + z * uz + w * uw, 0.0)
    quat: tl.constexpr = out_quats.dtype.element_ty
    tl.store(out_quats + row * 4, tl.div_rn((ux - x * along).to(tl.float32), length).to(quat))
    tl.store(out_quats + row * 4 + 1, tl.div_rn((uy - y * along).to(tl.float32), length).to(quat))
    tl.store(out_quats + row * 4 + 2, tl.div_rn((uz - z * along).to(tl.float32), length).to(quat))
    tl.store(out_quats + row * 4 + 3, tl.div_rn((uw - w * along).to(tl.float32), length).to(quat))


@triton.jit(do_not_specialize=["rows"])
def finish_scale_kernel(log_scale, row_scales, grad_metric, out_scale, rows, batch, scale_row, BLOCK: tl.constexpr):
    """Add the views of one sample: gradient of its log scale."""
    sample = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, rows // batch, BLOCK):
        row = (start + lane).to(tl.int64) * batch + sample
        total += tl.load(row_scales + row, mask=row < rows, other=0.0)
    grad = tl.sum(total)
    if grad_metric is not None:
        grad += tl.load(grad_metric + sample)
    _, raw = load_scale(log_scale + sample * scale_row)
    grad = tl.where(raw < EPS, 0.0, grad * raw).to(tl.float32)
    tl.store(out_scale + sample, grad.to(out_scale.dtype.element_ty))
