"""Device code of the per-pixel training losses (see `map_losses.py`): two passes forward, one back, and their sums."""

from __future__ import annotations

import triton
import triton.language as tl

from ._penalties import (
    binary_cross_entropy,
    compare3,
    length3,
    log,
    penalty1,
    penalty_l1,
    pull_back3,
    reciprocal,
    reciprocal_pair,
    sign,
    squash1,
)
from ._points import EPS, load3, store3, sum_column

TERMS = tl.constexpr(5)
DISTANCE_SUMS = tl.constexpr(3)
LOSS_SUMS = tl.constexpr(9)


@triton.jit
def _place(chunks, batch, views, pixels, STEP: tl.constexpr):
    """View, sample, chunk, first pixel in predictions and in targets, row in targets, pixels left of a program."""
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    chunk = program % chunks
    view = row // batch
    sample = row % batch
    gt_row = sample * views + view
    start = chunk * STEP
    return view, sample, chunk, row * pixels + start, gt_row * pixels + start, gt_row, pixels - start


@triton.jit
def _byte(mask, pixel, inside):
    return tl.load(mask + pixel, mask=inside, other=0)


@triton.jit
def _scalar(maps, pixel, mask):
    return tl.load(maps + pixel, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _vector(maps, pixel, mask):
    return load3(maps, pixel, 3, 1, mask, False)


@triton.jit
def _pose(poses, row, world):
    """Rotation and translation in `row`, row by row; zeros without them."""
    poses += row * 16
    return (
        tl.load(poses, mask=world, other=0.0).to(tl.float32),
        tl.load(poses + 1, mask=world, other=0.0).to(tl.float32),
        tl.load(poses + 2, mask=world, other=0.0).to(tl.float32),
        tl.load(poses + 3, mask=world, other=0.0).to(tl.float32),
        tl.load(poses + 4, mask=world, other=0.0).to(tl.float32),
        tl.load(poses + 5, mask=world, other=0.0).to(tl.float32),
        tl.load(poses + 6, mask=world, other=0.0).to(tl.float32),
        tl.load(poses + 7, mask=world, other=0.0).to(tl.float32),
        tl.load(poses + 8, mask=world, other=0.0).to(tl.float32),
        tl.load(poses + 9, mask=world, other=0.0).to(tl.float32),
        tl.load(poses + 10, mask=world, other=0.0).to(tl.float32),
        tl.load(poses + 11, mask=world, other=0.0).to(tl.float32),
    )


@triton.jit
def _world_point(pose, rx, ry, rz, depth):
    """R (depth * ray) + t."""
    a, b, c, d, e, f, g, h, i, j, k, m = pose
    x, y, z = rx * depth, ry * depth, rz * depth
    return a * x + b * y + c * z + d, e * x + f * y + g * z + h, i * x + j * y + k * z + m


@triton.jit(do_not_specialize=["views", "batch", "chunks"])
def distances_kernel(
    points, depth, gt_rays, gt_depth, poses, depth_mask, has_rays, has_poses, partials,
    views, batch, pixels, chunks, BLOCK: tl.constexpr, ITERATIONS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of the prediction's and the target's distances over known depths, and how many those are."""
    view, sample, chunk, first, gt_first, gt_row, left = _place(chunks, batch, views, pixels, BLOCK * ITERATIONS)
    world = (tl.load(has_rays + sample) != 0) & (tl.load(has_poses + sample) != 0)
    pose = _pose(poses, gt_row, world)
    points += first * 3
    gt_rays += gt_first * 3
    gt_depth += gt_first
    depth_mask += gt_first
    if depth is not None:
        depth += first
    predicted = tl.zeros([BLOCK], tl.float32)
    true = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    lane = tl.arange(0, BLOCK)
    mask = _byte(depth_mask, lane, lane < left)
    for step in tl.range(ITERATIONS, num_stages=STAGES):
        pixel = step * BLOCK + lane
        known = mask != 0
        if depth is None:
            known = known & world
        here = known & world
        distance = _scalar(gt_depth, pixel, known)
        rx, ry, rz = _vector(gt_rays, pixel, here)
        px, py, pz = _vector(points, pixel, here)
        near = length3(px, py, pz)
        if depth is not None:
            near += tl.abs(_scalar(depth, pixel, known & (world == 0)))
        mask = _byte(depth_mask, pixel + BLOCK, pixel + BLOCK < left)
        gx, gy, gz = _world_point(pose, rx, ry, rz, distance)
        predicted += near
        true += tl.where(here, length3(gx, gy, gz), tl.abs(distance))
        count += known.to(tl.int32)
    columns = views * chunks
    partials += sample * DISTANCE_SUMS * columns + view * chunks + chunk
    tl.store(partials, tl.sum(predicted))
    tl.store(partials + columns, tl.sum(true))
    tl.store(partials + 2 * columns, tl.sum(count).to(tl.float32))


@triton.jit(do_not_specialize=["views", "chunks"])
def finish_distances_kernel(
    partials, has_rays, has_poses, pred_distance, distance, counts, views, chunks,
    HAS_DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One mean distance of one sample, the prediction's (0) or the target's; its numbers of depths and points."""
    sample = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1)
    columns = views * chunks
    partials += sample * DISTANCE_SUMS * columns
    count = sum_column(partials + 2 * columns, columns, BLOCK)
    mean = sum_column(partials + which * columns, columns, BLOCK) / tl.maximum(count, 1.0)
    tl.store(pred_distance + sample, mean.to(tl.float32), mask=which == 0)
    tl.store(distance + sample, mean.to(tl.float32), mask=which == 1)
    world = (tl.load(has_rays + sample) != 0) & (tl.load(has_poses + sample) != 0)
    number = count.to(tl.int64)
    counts += sample * TERMS
    tl.store(counts + 1, number if HAS_DEPTH else number * 0, mask=which == 0)
    tl.store(counts + 2, tl.where(world, number, 0), mask=which == 0)


@triton.jit(do_not_specialize=["views", "batch", "chunks"])
def losses_kernel(
    points, flow, depth, rays, logits, conf,
    gt_rays, gt_depth, poses, gt_flow, depth_mask, flow_mask, dynamic_mask, surface_mask,
    has_rays, has_poses, has_surface, pred_distance, distance, counts, partials,
    views, batch, pixels, chunks, dynamic_weight, conf_alpha, alpha, scale,
    ROBUST: tl.constexpr, BLOCK: tl.constexpr, ITERATIONS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of every loss, of its slope with respect to the prediction's mean distance, and the number of flows."""
    view, sample, chunk, first, gt_first, gt_row, left = _place(chunks, batch, views, pixels, BLOCK * ITERATIONS)
    with_rays = tl.load(has_rays + sample) != 0
    world = with_rays & (tl.load(has_poses + sample) != 0)
    with_surface = tl.load(has_surface + sample) != 0
    mean = tl.maximum(tl.load(pred_distance + sample), EPS)
    unit, unit_rest = reciprocal_pair(mean)
    gt_unit, gt_rest = reciprocal_pair(tl.maximum(tl.load(distance + sample), EPS))
    with_distance = tl.load(counts + sample * TERMS + 1) + tl.load(counts + sample * TERMS + 2) > 0
    pose = _pose(poses, gt_row, world)
    points += first * 3
    flow += first * 3
    gt_rays += gt_first * 3
    gt_depth += gt_first
    gt_flow += gt_first * 3
    depth_mask += gt_first
    flow_mask += gt_first
    dynamic_mask += gt_first
    surface_mask += gt_first
    zero = tl.zeros([BLOCK], tl.float32)
    rays_sum, depth_sum, points_sum, flow_sum, mask_sum = zero, zero, zero, zero, zero
    depth_slope, points_slope, flow_slope = zero, zero, zero
    flow_count = tl.zeros([BLOCK], tl.int32)
    lane = tl.arange(0, BLOCK)
    depth_byte = _byte(depth_mask, lane, lane < left)
    flow_byte = _byte(flow_mask, lane, lane < left)
    for step in tl.range(ITERATIONS, num_stages=STAGES):
        pixel = step * BLOCK + lane
        inside = pixel < left
        known = depth_byte != 0
        here = known & world
        moved = (flow_byte != 0) & with_distance
        # Every load before any arithmetic: one wait for memory a step.
        rx, ry, rz = _vector(gt_rays, pixel, inside & with_rays)
        gd = _scalar(gt_depth, pixel, known)
        px, py, pz = _vector(points, pixel, here)
        fx, fy, fz = _vector(flow, pixel, moved)
        hx, hy, hz = _vector(gt_flow, pixel, moved)
        dynamic = _byte(dynamic_mask, pixel, moved)
        if rays is not None:
            sx, sy, sz = _vector(rays + first * 3, pixel, inside & with_rays)
        if depth is not None:
            d = _scalar(depth + first, pixel, known)
        if conf is not None:
            certainty = tl.load(conf + first + pixel, mask=here, other=1.0).to(tl.float32)
        if logits is not None:
            asked = inside & with_surface
            logit = _scalar(logits + first, pixel, asked)
            seen = (_byte(surface_mask, pixel, asked) != 0).to(tl.float32)
        depth_byte = _byte(depth_mask, pixel + BLOCK, pixel + BLOCK < left)
        flow_byte = _byte(flow_mask, pixel + BLOCK, pixel + BLOCK < left)

        if rays is not None:
            value, a, b, c = penalty_l1(sx - rx, sy - ry, sz - rz, alpha, scale, ROBUST)
            rays_sum += value
        if depth is not None:
            residual = squash1(d, unit, unit_rest) - squash1(gd, gt_unit, gt_rest)
            value, g = penalty1(residual, alpha, scale, ROBUST)
            depth_sum += value
            depth_slope += g * d * reciprocal(mean + tl.abs(d))
        gx, gy, gz = _world_point(pose, rx, ry, rz, gd)
        value, a, b, c, length, inverse, factor = compare3(
            px, py, pz, gx, gy, gz, unit, unit_rest, gt_unit, gt_rest, alpha, scale, ROBUST
        )
        slope = (a * px + b * py + c * pz) * reciprocal(mean + length)
        if conf is not None:
            value = certainty * value - conf_alpha * log(certainty)
            slope *= certainty
        points_sum += tl.where(here, value, 0.0)
        points_slope += tl.where(here, slope, 0.0)
        value, a, b, c, length, inverse, factor = compare3(
            fx, fy, fz, hx, hy, hz, unit, unit_rest, gt_unit, gt_rest, alpha, scale, ROBUST
        )
        weight = tl.where(dynamic != 0, dynamic_weight, 1.0)
        flow_sum += weight * value
        flow_slope += weight * ((a * fx + b * fy + c * fz) * reciprocal(mean + length))
        flow_count += moved.to(tl.int32)
        if logits is not None:
            value, g = binary_cross_entropy(logit, seen)
            mask_sum += tl.where(asked, value, 0.0)
    columns = views * chunks
    partials += sample * LOSS_SUMS * columns + view * chunks + chunk
    tl.store(partials, tl.sum(rays_sum))
    tl.store(partials + columns, tl.sum(depth_sum))
    tl.store(partials + 2 * columns, tl.sum(points_sum))
    tl.store(partials + 3 * columns, tl.sum(flow_sum))
    tl.store(partials + 4 * columns, tl.sum(mask_sum))
    # f(v / u) has the slope -v / (u (u + |v|)) over u.
    tl.store(partials + 5 * columns, tl.div_rn(-tl.sum(depth_slope), mean))
    tl.store(partials + 6 * columns, tl.div_rn(-tl.sum(points_slope), mean))
    tl.store(partials + 7 * columns, tl.div_rn(-tl.sum(flow_slope), mean))
    tl.store(partials + 8 * columns, tl.sum(flow_count).to(tl.float32))


@triton.jit(do_not_specialize=["views", "pixels", "chunks"])
def finish_losses_kernel(
    partials, has_rays, has_surface, counts, terms, slopes, views, pixels, chunks,
    HAS_RAYS: tl.constexpr, HAS_LOGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean of one column of one sample (five losses, then slopes of three), and the counts that are not there yet."""
    sample = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1)
    term = tl.where(column < TERMS, column, column - TERMS + 1)
    columns = views * chunks
    partials += sample * LOSS_SUMS * columns
    counts += sample * TERMS
    every = views.to(tl.int64) * pixels
    total = sum_column(partials + column * columns, columns, BLOCK)
    flows = sum_column(partials + (LOSS_SUMS - 1) * columns, tl.where(term == 3, columns, 0), BLOCK)
    number = tl.where(term == 3, flows.to(tl.int64), tl.load(counts + term, mask=(term == 1) | (term == 2), other=0))
    number = tl.where(term == 0, tl.where(tl.load(has_rays + sample) != 0, every, 0) * HAS_RAYS, number)
    number = tl.where(term == 4, tl.where(tl.load(has_surface + sample) != 0, every, 0) * HAS_LOGITS, number)
    mean = (total / tl.maximum(number, 1).to(tl.float64)).to(tl.float32)
    tl.store(terms + sample * TERMS + column, mean, mask=column < TERMS)
    tl.store(slopes + sample * 3 + column - TERMS, mean, mask=column >= TERMS)
    tl.store(counts + term, number, mask=(column == 0) | (column == 3) | (column == 4))


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
    ROBUST: tl.constexpr, BLOCK: tl.constexpr, ITERATIONS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every map's gradient; zero where there is nothing to learn from."""
    view, sample, chunk, first, gt_first, gt_row, left = _place(chunks, batch, views, pixels, BLOCK * ITERATIONS)
    with_rays = tl.load(has_rays + sample) != 0
    world = with_rays & (tl.load(has_poses + sample) != 0)
    with_surface = tl.load(has_surface + sample) != 0
    counts += sample * TERMS
    grad_terms += sample * TERMS
    slopes += sample * 3
    mean = tl.load(pred_distance + sample)
    moves = mean >= EPS
    mean = tl.maximum(mean, EPS)
    unit, unit_rest = reciprocal_pair(mean)
    gt_unit, gt_rest = reciprocal_pair(tl.maximum(tl.load(distance + sample), EPS))
    # Either is 0 (the model has no depth, or the sample no points), or they are equal.
    measured = tl.maximum(tl.load(counts + 1), tl.load(counts + 2))
    with_distance = measured > 0
    # The mean distance moves with every known point: its gradient, shared among them.
    through_unit = tl.load(grad_terms + 1) * tl.load(slopes)
    through_unit += tl.load(grad_terms + 2) * tl.load(slopes + 1)
    through_unit += tl.load(grad_terms + 3) * tl.load(slopes + 2)
    of_mean = tl.where(moves, through_unit, 0.0) + tl.load(grad_pred_distance + sample)
    of_mean = tl.div_rn(of_mean, tl.maximum(measured, 1).to(tl.float32))
    rays_share = _share(grad_terms, counts, 0)
    depth_share = _share(grad_terms, counts, 1)
    points_share = _share(grad_terms, counts, 2)
    flow_share = _share(grad_terms, counts, 3)
    mask_share = _share(grad_terms, counts, 4)
    pose = _pose(poses, gt_row, world)
    gt_rays += gt_first * 3
    gt_depth += gt_first
    gt_flow += gt_first * 3
    depth_mask += gt_first
    flow_mask += gt_first
    dynamic_mask += gt_first
    surface_mask += gt_first
    lane = tl.arange(0, BLOCK)
    depth_byte = _byte(depth_mask, lane, lane < left)
    flow_byte = _byte(flow_mask, lane, lane < left)
    for step in tl.range(ITERATIONS, num_stages=STAGES):
        pixel = step * BLOCK + lane
        inside = pixel < left
        known = depth_byte != 0
        here = known & world
        moved = (flow_byte != 0) & with_distance
        # Every load before any arithmetic: one wait for memory a step.
        rx, ry, rz = _vector(gt_rays, pixel, inside & with_rays)
        gd = _scalar(gt_depth, pixel, known)
        if out_rays is not None:
            sx, sy, sz = _vector(rays + first * 3, pixel, inside & with_rays)
        if out_depth is not None:
            d = _scalar(depth + first, pixel, known)
        if out_points is not None or out_conf is not None:
            px, py, pz = _vector(points + first * 3, pixel, here)
            if conf is not None:
                certainty = tl.load(conf + first + pixel, mask=here, other=1.0).to(tl.float32)
        if out_flow is not None:
            fx, fy, fz = _vector(flow + first * 3, pixel, moved)
            hx, hy, hz = _vector(gt_flow, pixel, moved)
            dynamic = _byte(dynamic_mask, pixel, moved)
        if out_logits is not None:
            asked = inside & with_surface
            logit = _scalar(logits + first, pixel, asked)
            seen = (_byte(surface_mask, pixel, asked) != 0).to(tl.float32)
        depth_byte = _byte(depth_mask, pixel + BLOCK, pixel + BLOCK < left)
        flow_byte = _byte(flow_mask, pixel + BLOCK, pixel + BLOCK < left)

        if out_rays is not None:
            value, a, b, c = penalty_l1(sx - rx, sy - ry, sz - rz, alpha, scale, ROBUST)
            a, b, c = rays_share * a, rays_share * b, rays_share * c
            store3(out_rays + first * 3, pixel, 3, 1, a, b, c, inside, False)
        if out_depth is not None:
            residual = squash1(d, unit, unit_rest) - squash1(gd, gt_unit, gt_rest)
            value, g = penalty1(residual, alpha, scale, ROBUST)
            grad = depth_share * g * reciprocal(mean + tl.abs(d)) + tl.where(world, 0.0, of_mean) * sign(d)
            grad = tl.where(known, grad, 0.0).to(out_depth.dtype.element_ty)
            tl.store(out_depth + first + pixel, grad, mask=inside)
        if out_points is not None or out_conf is not None:
            gx, gy, gz = _world_point(pose, rx, ry, rz, gd)
            value, a, b, c, length, inverse, factor = compare3(
                px, py, pz, gx, gy, gz, unit, unit_rest, gt_unit, gt_rest, alpha, scale, ROBUST
            )
            g = points_share
            if conf is not None:
                g = points_share * certainty
                if out_conf is not None:
                    grad = points_share * (value - conf_alpha * reciprocal(certainty))
                    grad = tl.where(here, grad, 0.0).to(out_conf.dtype.element_ty)
                    tl.store(out_conf + first + pixel, grad, mask=inside)
            if out_points is not None:
                a, b, c = pull_back3(px, py, pz, g * a, g * b, g * c, length, inverse, factor, unit, mean)
                outward = of_mean * inverse
                a = tl.where(here, a + outward * px, 0.0)
                b = tl.where(here, b + outward * py, 0.0)
                c = tl.where(here, c + outward * pz, 0.0)
                store3(out_points + first * 3, pixel, 3, 1, a, b, c, inside, False)
        if out_flow is not None:
            value, a, b, c, length, inverse, factor = compare3(
                fx, fy, fz, hx, hy, hz, unit, unit_rest, gt_unit, gt_rest, alpha, scale, ROBUST
            )
            g = tl.where(dynamic != 0, dynamic_weight, 1.0) * flow_share
            a, b, c = pull_back3(fx, fy, fz, g * a, g * b, g * c, length, inverse, factor, unit, mean)
            store3(out_flow + first * 3, pixel, 3, 1, a, b, c, inside, False)
        if out_logits is not None:
            value, g = binary_cross_entropy(logit, seen)
            grad = tl.where(asked, mask_share * g, 0.0).to(out_logits.dtype.element_ty)
            tl.store(out_logits + first + pixel, grad, mask=inside)
