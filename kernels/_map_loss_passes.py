"""Device code of the per-pixel training losses (see `map_losses.py`): two passes forward, one back, and their sums."""

from __future__ import annotations

import triton
import triton.language as tl

from ._penalties import (
    binary_cross_entropy,
    compare3,
    length3,
    log1p,
    penalty1,
    penalty_l1,
    pull_back3,
    sign,
    squash_factor,
)
from ._points import EPS, component, load3, store3, sum_columns

TERMS = tl.constexpr(5)
DISTANCE_SUMS = tl.constexpr(3)
LOSS_SUMS = tl.constexpr(9)


@triton.jit
def _known(mask, row, pixels, start, lane, inside):
    """A bool map's block."""
    return tl.load(mask + row * pixels + start + lane, mask=inside, other=0) != 0


@triton.jit
def _scalar_map(maps, row, pixels, start, lane, mask):
    return tl.load(maps + row * pixels + start + lane, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _vector_map(maps, row, pixels, start, lane, mask):
    return load3(maps + (row * pixels + start) * 3, lane, 3, 1, mask, False)


@triton.jit
def _world_point(poses, row, world, rx, ry, rz, depth):
    """R (depth * ray) + t of the pose in `row`, or zero without one."""
    poses += row * 16
    x, y, z = rx * depth, ry * depth, rz * depth
    a = tl.load(poses, mask=world, other=0.0).to(tl.float32)
    b = tl.load(poses + 1, mask=world, other=0.0).to(tl.float32)
    c = tl.load(poses + 2, mask=world, other=0.0).to(tl.float32)
    d = tl.load(poses + 3, mask=world, other=0.0).to(tl.float32)
    px = a * x + b * y + c * z + d
    a = tl.load(poses + 4, mask=world, other=0.0).to(tl.float32)
    b = tl.load(poses + 5, mask=world, other=0.0).to(tl.float32)
    c = tl.load(poses + 6, mask=world, other=0.0).to(tl.float32)
    d = tl.load(poses + 7, mask=world, other=0.0).to(tl.float32)
    py = a * x + b * y + c * z + d
    a = tl.load(poses + 8, mask=world, other=0.0).to(tl.float32)
    b = tl.load(poses + 9, mask=world, other=0.0).to(tl.float32)
    c = tl.load(poses + 10, mask=world, other=0.0).to(tl.float32)
    d = tl.load(poses + 11, mask=world, other=0.0).to(tl.float32)
    return px, py, a * x + b * y + c * z + d


@triton.jit(do_not_specialize=["views", "batch", "chunks"])
def distances_kernel(
    points, depth, gt_rays, gt_depth, poses, depth_mask, has_rays, has_poses, partials,
    views, batch, pixels, chunks, BLOCK: tl.constexpr, ITERATIONS: tl.constexpr,
):  # fmt: skip
    """Sums of the prediction's and the target's distances over known depths, and how many those are."""
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    chunk = program % chunks
    view = row // batch
    sample = row % batch
    gt_row = sample * views + view
    lane = tl.arange(0, BLOCK)
    world = (tl.load(has_rays + sample) != 0) & (tl.load(has_poses + sample) != 0)
    predicted = tl.zeros([BLOCK], tl.float32)
    true = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for step in range(ITERATIONS):
        start = (chunk * ITERATIONS + step).to(tl.int64) * BLOCK
        inside = lane < pixels - start
        known = _known(depth_mask, gt_row, pixels, start, lane, inside)
        if depth is None:
            known = known & world
        here = known & world
        distance = _scalar_map(gt_depth, gt_row, pixels, start, lane, known)
        rx, ry, rz = _vector_map(gt_rays, gt_row, pixels, start, lane, here)
        gx, gy, gz = _world_point(poses, gt_row, world, rx, ry, rz, distance)
        px, py, pz = _vector_map(points, row, pixels, start, lane, here)
        near = length3(px, py, pz)
        if depth is not None:
            near += tl.abs(_scalar_map(depth, row, pixels, start, lane, known & (world == 0)))
        predicted += near
        true += tl.where(known, tl.where(world, length3(gx, gy, gz), tl.abs(distance)), 0.0)
        count += known.to(tl.float32)
    columns = views * chunks
    partials += sample * DISTANCE_SUMS * columns + view * chunks + chunk
    tl.store(partials, tl.sum(predicted))
    tl.store(partials + columns, tl.sum(true))
    tl.store(partials + 2 * columns, tl.sum(count))


@triton.jit(do_not_specialize=["views", "chunks"])
def finish_distances_kernel(
    partials, has_rays, has_poses, pred_distance, distance, counts, views, chunks,
    HAS_DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean distances of one sample, and its numbers of depths and points."""
    sample = tl.program_id(0).to(tl.int64)
    columns = views * chunks
    partials += sample * DISTANCE_SUMS * columns
    world = (tl.load(has_rays + sample) != 0) & (tl.load(has_poses + sample) != 0)
    sums = sum_columns(partials, columns, DISTANCE_SUMS, 4, BLOCK)
    index = tl.arange(0, 4)
    count = component(sums, index, 2)
    means = sums / tl.maximum(count, 1.0)
    tl.store(pred_distance + sample, component(means, index, 0).to(tl.float32))
    tl.store(distance + sample, component(means, index, 1).to(tl.float32))
    number = count.to(tl.int64)
    counts += sample * TERMS
    tl.store(counts + 1, number if HAS_DEPTH else number * 0)
    tl.store(counts + 2, tl.where(world, number, 0))


@triton.jit(do_not_specialize=["views", "batch", "chunks"])
def losses_kernel(
    points, flow, depth, rays, logits, conf,
    gt_rays, gt_depth, poses, gt_flow, depth_mask, flow_mask, dynamic_mask, surface_mask,
    has_rays, has_poses, has_surface, pred_distance, distance, counts, partials,
    views, batch, pixels, chunks, dynamic_weight, conf_alpha, alpha, scale,
    ROBUST: tl.constexpr, BLOCK: tl.constexpr, ITERATIONS: tl.constexpr,
):  # fmt: skip
    """Sums of every loss, of its slope with respect to the prediction's mean distance, and the number of flows."""
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    chunk = program % chunks
    view = row // batch
    sample = row % batch
    gt_row = sample * views + view
    lane = tl.arange(0, BLOCK)
    with_rays = tl.load(has_rays + sample) != 0
    world = with_rays & (tl.load(has_poses + sample) != 0)
    with_surface = tl.load(has_surface + sample) != 0
    unit = tl.maximum(tl.load(pred_distance + sample), EPS)
    gt_unit = tl.maximum(tl.load(distance + sample), EPS)
    with_distance = tl.load(counts + sample * TERMS + 1) + tl.load(counts + sample * TERMS + 2) > 0
    zero = tl.zeros([BLOCK], tl.float32)
    rays_sum, depth_sum, points_sum, flow_sum, mask_sum = zero, zero, zero, zero, zero
    depth_slope, points_slope, flow_slope, flow_count = zero, zero, zero, zero
    for step in range(ITERATIONS):
        start = (chunk * ITERATIONS + step).to(tl.int64) * BLOCK
        inside = lane < pixels - start
        known = _known(depth_mask, gt_row, pixels, start, lane, inside)
        here = known & world
        gx, gy, gz = _vector_map(gt_rays, gt_row, pixels, start, lane, inside & with_rays)
        gd = _scalar_map(gt_depth, gt_row, pixels, start, lane, known)
        if rays is not None:
            x, y, z = _vector_map(rays, row, pixels, start, lane, inside & with_rays)
            value, a, b, c = penalty_l1(x - gx, y - gy, z - gz, alpha, scale, ROBUST)
            rays_sum += value
        if depth is not None:
            d = _scalar_map(depth, row, pixels, start, lane, known)
            factor = squash_factor(tl.abs(d), unit)
            residual = factor * d - squash_factor(tl.abs(gd), gt_unit) * gd
            value, g = penalty1(residual, alpha, scale, ROBUST)
            depth_sum += value
            depth_slope -= tl.div_rn(g * d, unit + tl.abs(d)) / unit
        gx, gy, gz = _world_point(poses, gt_row, world, gx, gy, gz, gd)
        x, y, z = _vector_map(points, row, pixels, start, lane, here)
        value, a, b, c, length, factor = compare3(x, y, z, gx, gy, gz, unit, gt_unit, alpha, scale, ROBUST)
        if conf is not None:
            certainty = tl.load(conf + row * pixels + start + lane, mask=here, other=1.0).to(tl.float32)
            value = certainty * value - conf_alpha * log1p(certainty - 1.0)
            a, b, c = certainty * a, certainty * b, certainty * c
        points_sum += tl.where(here, value, 0.0)
        a, b, c, slope = pull_back3(x, y, z, a, b, c, length, factor, unit)
        points_slope += tl.where(here, slope, 0.0)
        moved = _known(flow_mask, gt_row, pixels, start, lane, inside) & with_distance
        weight = tl.where(_known(dynamic_mask, gt_row, pixels, start, lane, moved), dynamic_weight, 1.0)
        x, y, z = _vector_map(flow, row, pixels, start, lane, moved)
        gx, gy, gz = _vector_map(gt_flow, gt_row, pixels, start, lane, moved)
        value, a, b, c, length, factor = compare3(x, y, z, gx, gy, gz, unit, gt_unit, alpha, scale, ROBUST)
        flow_sum += weight * value
        a, b, c, slope = pull_back3(x, y, z, a, b, c, length, factor, unit)
        flow_slope += weight * slope
        flow_count += moved.to(tl.float32)
        if logits is not None:
            asked = inside & with_surface
            logit = _scalar_map(logits, row, pixels, start, lane, asked)
            seen = _known(surface_mask, gt_row, pixels, start, lane, asked).to(tl.float32)
            value, g = binary_cross_entropy(logit, seen)
            mask_sum += tl.where(asked, value, 0.0)
    columns = views * chunks
    partials += sample * LOSS_SUMS * columns + view * chunks + chunk
    tl.store(partials, tl.sum(rays_sum))
    tl.store(partials + columns, tl.sum(depth_sum))
    tl.store(partials + 2 * columns, tl.sum(points_sum))
    tl.store(partials + 3 * columns, tl.sum(flow_sum))
    tl.store(partials + 4 * columns, tl.sum(mask_sum))
    tl.store(partials + 5 * columns, tl.sum(depth_slope))
    tl.store(partials + 6 * columns, tl.sum(points_slope))
    tl.store(partials + 7 * columns, tl.sum(flow_slope))
    tl.store(partials + 8 * columns, tl.sum(flow_count))


@triton.jit(do_not_specialize=["views", "pixels", "chunks"])
def finish_losses_kernel(
    partials, has_rays, has_surface, counts, terms, slopes, views, pixels, chunks,
    HAS_RAYS: tl.constexpr, HAS_LOGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Means of one sample's losses and slopes, and the counts that are not there yet."""
    sample = tl.program_id(0).to(tl.int64)
    columns = views * chunks
    partials += sample * LOSS_SUMS * columns
    counts += sample * TERMS
    terms += sample * TERMS
    slopes += sample * 3
    every = views.to(tl.int64) * pixels
    rays_count = tl.where(tl.load(has_rays + sample) != 0, every, 0) * HAS_RAYS
    mask_count = tl.where(tl.load(has_surface + sample) != 0, every, 0) * HAS_LOGITS
    sums = sum_columns(partials, columns, LOSS_SUMS, 16, BLOCK)
    index = tl.arange(0, 16)
    flow_count = component(sums, index, LOSS_SUMS - 1).to(tl.int64)
    tl.store(counts, rays_count)
    tl.store(counts + 3, flow_count)
    tl.store(counts + 4, mask_count)
    # Sums of the five terms, then slopes of the depth's, points' and flow's.
    of_depth, of_points, of_flow = (index == 1) | (index == 5), (index == 2) | (index == 6), (index == 3) | (index == 7)
    number = tl.where(index == 0, rays_count, mask_count)
    number = tl.where(of_depth, tl.load(counts + 1), number)
    number = tl.where(of_points, tl.load(counts + 2), number)
    number = tl.where(of_flow, flow_count, number)
    means = (sums / tl.maximum(number, 1).to(tl.float64)).to(tl.float32)
    tl.store(terms + index, means, mask=index < TERMS)
    tl.store(slopes + index - TERMS, means, mask=(index >= TERMS) & (index < TERMS + 3))


@triton.jit
def _share(grad_terms, counts, term: tl.constexpr):
    """The cotangent of one pixel's loss."""
    return tl.div_rn(tl.load(grad_terms + term), tl.maximum(tl.load(counts + term), 1).to(tl.float32))


@triton.jit(do_not_specialize=["views", "batch", "chunks"])
def backward_kernel(
    points, flow, depth, rays, logits, conf,
    gt_rays, gt_depth, poses, gt_flow, depth_mask, flow_mask, dynamic_mask, surface_mask,
    has_rays, has_poses, has_surface, pred_distance, distance, counts, slopes, grad_terms, grad_pred_distance,
    out_points, out_flow, out_depth, out_rays, out_logits, out_conf,
    views, batch, pixels, chunks, dynamic_weight, conf_alpha, alpha, scale,
    ROBUST: tl.constexpr, BLOCK: tl.constexpr, ITERATIONS: tl.constexpr,
):  # fmt: skip
    """Every map's gradient; zero where there is nothing to learn from."""
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    chunk = program % chunks
    view = row // batch
    sample = row % batch
    gt_row = sample * views + view
    lane = tl.arange(0, BLOCK)
    with_rays = tl.load(has_rays + sample) != 0
    world = with_rays & (tl.load(has_poses + sample) != 0)
    with_surface = tl.load(has_surface + sample) != 0
    counts += sample * TERMS
    grad_terms += sample * TERMS
    slopes += sample * 3
    mean = tl.load(pred_distance + sample)
    unit = tl.maximum(mean, EPS)
    gt_unit = tl.maximum(tl.load(distance + sample), EPS)
    # Either is 0 (the model has no depth, or the sample no points), or they are equal.
    measured = tl.maximum(tl.load(counts + 1), tl.load(counts + 2))
    with_distance = measured > 0
    # The mean distance moves with every known point: its gradient, shared among them.
    through_unit = tl.load(grad_terms + 1) * tl.load(slopes)
    through_unit += tl.load(grad_terms + 2) * tl.load(slopes + 1)
    through_unit += tl.load(grad_terms + 3) * tl.load(slopes + 2)
    of_mean = tl.where(mean >= EPS, through_unit, 0.0) + tl.load(grad_pred_distance + sample)
    of_mean = tl.div_rn(of_mean, tl.maximum(measured, 1).to(tl.float32))
    rays_share = _share(grad_terms, counts, 0)
    depth_share = _share(grad_terms, counts, 1)
    points_share = _share(grad_terms, counts, 2)
    flow_share = _share(grad_terms, counts, 3)
    mask_share = _share(grad_terms, counts, 4)
    zero = tl.zeros([BLOCK], tl.float32)
    for step in range(ITERATIONS):
        start = (chunk * ITERATIONS + step).to(tl.int64) * BLOCK
        inside = lane < pixels - start
        known = _known(depth_mask, gt_row, pixels, start, lane, inside)
        here = known & world
        first = row * pixels + start
        gx, gy, gz = _vector_map(gt_rays, gt_row, pixels, start, lane, inside & with_rays)
        gd = _scalar_map(gt_depth, gt_row, pixels, start, lane, known)
        if out_rays is not None:
            x, y, z = _vector_map(rays, row, pixels, start, lane, inside & with_rays)
            value, a, b, c = penalty_l1(x - gx, y - gy, z - gz, alpha, scale, ROBUST)
            store3(out_rays + first * 3, lane, 3, 1, rays_share * a, rays_share * b, rays_share * c, inside, False)
        if out_depth is not None:
            d = _scalar_map(depth, row, pixels, start, lane, known)
            residual = squash_factor(tl.abs(d), unit) * d - squash_factor(tl.abs(gd), gt_unit) * gd
            value, g = penalty1(residual, alpha, scale, ROBUST)
            grad = tl.div_rn(depth_share * g, unit + tl.abs(d)) + tl.where(world, 0.0, of_mean) * sign(d)
            grad = tl.where(known, grad, 0.0).to(out_depth.dtype.element_ty)
            tl.store(out_depth + first + lane, grad, mask=inside)
        if out_points is not None or out_conf is not None:
            gx, gy, gz = _world_point(poses, gt_row, world, gx, gy, gz, gd)
            x, y, z = _vector_map(points, row, pixels, start, lane, here)
            value, a, b, c, length, factor = compare3(x, y, z, gx, gy, gz, unit, gt_unit, alpha, scale, ROBUST)
            g = points_share + zero
            if conf is not None:
                certainty = tl.load(conf + first + lane, mask=here, other=1.0).to(tl.float32)
                g *= certainty
                if out_conf is not None:
                    grad = points_share * (value - tl.div_rn(conf_alpha + zero, certainty))
                    grad = tl.where(here, grad, 0.0).to(out_conf.dtype.element_ty)
                    tl.store(out_conf + first + lane, grad, mask=inside)
            if out_points is not None:
                a, b, c, slope = pull_back3(x, y, z, g * a, g * b, g * c, length, factor, unit)
                outward = tl.where(length > 0, tl.div_rn(of_mean + zero, tl.where(length > 0, length, 1.0)), 0.0)
                a = tl.where(here, a + outward * x, 0.0)
                b = tl.where(here, b + outward * y, 0.0)
                c = tl.where(here, c + outward * z, 0.0)
                store3(out_points + first * 3, lane, 3, 1, a, b, c, inside, False)
        if out_flow is not None:
            moved = _known(flow_mask, gt_row, pixels, start, lane, inside) & with_distance
            weight = tl.where(_known(dynamic_mask, gt_row, pixels, start, lane, moved), dynamic_weight, 1.0)
            x, y, z = _vector_map(flow, row, pixels, start, lane, moved)
            gx, gy, gz = _vector_map(gt_flow, gt_row, pixels, start, lane, moved)
            value, a, b, c, length, factor = compare3(x, y, z, gx, gy, gz, unit, gt_unit, alpha, scale, ROBUST)
            g = weight * flow_share
            a, b, c, slope = pull_back3(x, y, z, g * a, g * b, g * c, length, factor, unit)
            store3(out_flow + first * 3, lane, 3, 1, a, b, c, inside, False)
        if out_logits is not None:
            asked = inside & with_surface
            logit = _scalar_map(logits, row, pixels, start, lane, asked)
            seen = _known(surface_mask, gt_row, pixels, start, lane, asked).to(tl.float32)
            value, g = binary_cross_entropy(logit, seen)
            grad = tl.where(asked, mask_share * g, 0.0).to(out_logits.dtype.element_ty)
            tl.store(out_logits + first + lane, grad, mask=inside)
