"""Attention backward over packed QKV rows: Triton kernels.

`query_kernel` makes dQ and `key_kernel` dK and dV; with ADD_DQ the latter makes dQ too, between `prepare_kernel` and
`finish_kernel`. `attention_backward.py` launches them.

`stats` [2, segments * heads * padded length] float32 is what they need of every row: its log-sum-exp in log2 units, and
delta = sum(dO * O) - dlse, which dS subtracts from dP. Lengths are padded to whole blocks of PAD rows, with an
infinite log-sum-exp that makes the probabilities of absent queries zero; the float32 buffer of dQ has the same rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention import SEGMENT_ARGS, load_rows, segment_row, store_rows


@triton.jit
def row_statistics(grad, out, lse_ptr, grad_lse_ptr, stats_ptr, plane, first, index, limit, HAS_GRAD_LSE: tl.constexpr):
    """Compute the statistics of a block of rows, write them from row `first` of each plane on, and return both."""
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + index, mask=index < limit, other=0.0)
    lse2 = tl.load(lse_ptr + index, mask=index < limit, other=float("inf")) * 1.4426950408889634
    tl.store(stats_ptr + first + index, lse2)
    tl.store(stats_ptr + plane + first + index, delta)
    return lse2, delta


@triton.jit
def padded_rows(length, PAD: tl.constexpr):
    """Rows of a segment in the padded buffers, in 64 bits."""
    return tl.cdiv(length, PAD).to(tl.int64) * PAD


@triton.jit
def query_step(dq, q, grad, k, v, lse2, delta, scale_log2, valid, MASK: tl.constexpr, PRECISION: tl.constexpr):
    """dQ (before its scale) from one block of keys; `valid` of them exist."""
    scores = tl.dot(q, k.T, input_precision=PRECISION)
    p = tl.math.exp2(scores * scale_log2 - lse2[:, None])
    if MASK:
        # Absent keys are zero rows, but exp2(-lse) may be infinite and 0 * inf is not zero.
        p = tl.where((tl.arange(0, k.shape[0]) < valid)[None, :], p, 0.0)
    dp = tl.dot(grad, v.T, input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=SEGMENT_ARGS)
def query_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, grad_ptr, lse_ptr, grad_lse_ptr, stats_ptr, dq_ptr,
    row_stride, head_stride, out_stride, grad_stride, grad_head_stride, dq_stride,
    start, length, count, stride, group_stride, segments, rows, heads, scale, scale_log2,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
    PAD: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ and statistics of one tile of BM queries of one (segment, head); with TMA k_ptr and v_ptr are descriptors."""
    tiles = tl.cdiv(length, BM)
    first = (tl.program_id(0) % tiles) * BM
    head = (tl.program_id(0) // tiles) % heads
    segment = tl.program_id(0) // (tiles * heads)
    group, member = segment // count, segment % count
    row = segment_row(segment, start, count, stride, group_stride)
    tile_row = row + first
    head64 = head.to(tl.int64)

    index = tl.arange(0, BM)
    limit = length - first
    q = load_rows(q_ptr + tile_row * row_stride + head64 * head_stride, index, row_stride, limit, HEAD_DIM, WIDTH, True)
    grad_base = grad_ptr + tile_row * grad_stride + head64 * grad_head_stride
    grad = load_rows(grad_base, index, grad_stride, limit, HEAD_DIM, WIDTH, True)
    out_base = out_ptr + tile_row * out_stride + head64 * HEAD_DIM
    out = load_rows(out_base, index, out_stride, limit, HEAD_DIM, WIDTH, True)
    padded = padded_rows(length, PAD)
    base = head64 * rows + tile_row
    lse2, delta = row_statistics(
        grad, out, lse_ptr + base, grad_lse_ptr + base, stats_ptr,
        segments * heads * padded, (segment * heads + head) * padded + first, index, limit, HAS_GRAD_LSE,
    )  # fmt: skip

    dq = tl.zeros([BM, WIDTH], tl.float32)
    key = tl.arange(0, BN)
    full = (length // BN) * BN
    if TMA:
        for begin in tl.range(0, full, BN):
            k = k_ptr.load([group, member, head, begin, 0]).reshape(BN, WIDTH)
            v = v_ptr.load([group, member, head, begin, 0]).reshape(BN, WIDTH)
            dq = query_step(dq, q, grad, k, v, lse2, delta, scale_log2, BN, False, PRECISION)
    else:
        k_base = k_ptr + row * row_stride + head64 * head_stride
        v_base = v_ptr + row * row_stride + head64 * head_stride
        for _ in tl.range(0, full, BN):
            k = load_rows(k_base, key, row_stride, BN, HEAD_DIM, WIDTH, False)
            v = load_rows(v_base, key, row_stride, BN, HEAD_DIM, WIDTH, False)
            dq = query_step(dq, q, grad, k, v, lse2, delta, scale_log2, BN, False, PRECISION)
            k_base += BN * row_stride
            v_base += BN * row_stride
    if full < length:
        if TMA:
            k = k_ptr.load([group, member, head, full, 0]).reshape(BN, WIDTH)
            v = v_ptr.load([group, member, head, full, 0]).reshape(BN, WIDTH)
        else:
            k = load_rows(k_base, key, row_stride, length - full, HEAD_DIM, WIDTH, True)
            v = load_rows(v_base, key, row_stride, length - full, HEAD_DIM, WIDTH, True)
        dq = query_step(dq, q, grad, k, v, lse2, delta, scale_log2, length - full, True, PRECISION)
    store_rows(dq_ptr + tile_row * dq_stride + head64 * HEAD_DIM, dq * scale, index, dq_stride, limit, HEAD_DIM, WIDTH)


@triton.jit
def add_share(dq_ptr, dq_row, share, HEAD_DIM: tl.constexpr, REDUCE: tl.constexpr):
    """Add a block's dQ to the float32 buffer [*, HEAD_DIM]; with REDUCE dq_ptr is its descriptor."""
    if REDUCE:
        dq_ptr.atomic_add([dq_row.to(tl.int32), 0], share)
    else:
        index = tl.arange(0, share.shape[0])
        column = tl.arange(0, share.shape[1])
        pointers = dq_ptr + dq_row * HEAD_DIM + index[:, None] * HEAD_DIM + column[None, :]
        if HEAD_DIM == share.shape[1]:
            tl.atomic_add(pointers, share, sem="relaxed")
        else:
            tl.atomic_add(pointers, share, mask=column[None, :] < HEAD_DIM, sem="relaxed")


@triton.jit
def key_step(
    dk, dv, k, v, q, grad, lse2, delta, scale_log2, valid, dq_ptr, dq_row,
    HEAD_DIM: tl.constexpr, MASK: tl.constexpr, ADD_DQ: tl.constexpr, REDUCE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK (before its scale) and dV from one block of queries, whose dQ grows by these keys' share with ADD_DQ."""
    scores = tl.dot(k, q.T, input_precision=PRECISION)  # transposed: [keys, queries]
    p = tl.math.exp2(scores * scale_log2 - lse2[None, :])
    if MASK:
        # As in query_step: only the product with k sees absent keys, so the two-pass way needs no mask.
        p = tl.where((tl.arange(0, k.shape[0]) < valid)[:, None], p, 0.0)
    dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
    dp = tl.dot(v, grad.T, input_precision=PRECISION)
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    if ADD_DQ:
        add_share(dq_ptr, dq_row, tl.dot(ds.T, k, input_precision=PRECISION), HEAD_DIM, REDUCE)
    return dk, dv


@triton.jit
def key_loop(
    dk, dv, k, v, q_base, grad_base, stats_ptr, plane, dq_ptr, first_row, row_stride, grad_stride, scale_log2,
    group, member, head, valid, first, last, length,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, TMA: tl.constexpr, TAIL: tl.constexpr,
    MASK: tl.constexpr, ADD_DQ: tl.constexpr, REDUCE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`key_step` over the queries [first, last) of a segment of `length` rows; TAIL: they may end within a block."""
    index = tl.arange(0, BM)
    if not TMA:
        q_base += first.to(tl.int64) * row_stride
        grad_base += first.to(tl.int64) * grad_stride
    for begin in tl.range(first, last, BM):
        if TMA:
            q = q_base.load([group, member, head, begin, 0]).reshape(BM, WIDTH)
            grad = grad_base.load([group, member, head, begin, 0]).reshape(BM, WIDTH)
        else:
            q = load_rows(q_base, index, row_stride, length - begin, HEAD_DIM, WIDTH, TAIL)
            grad = load_rows(grad_base, index, grad_stride, length - begin, HEAD_DIM, WIDTH, TAIL)
            q_base += BM * row_stride
            grad_base += BM * grad_stride
        stats_row = first_row + begin
        if TMA:
            lse2 = stats_ptr.load([stats_row.to(tl.int32)])
            delta = stats_ptr.load([(plane + stats_row).to(tl.int32)])
        else:
            lse2 = tl.load(stats_ptr + stats_row + index)
            delta = tl.load(stats_ptr + plane + stats_row + index)
        dk, dv = key_step(
            dk, dv, k, v, q, grad, lse2, delta, scale_log2, valid, dq_ptr, stats_row,
            HEAD_DIM, MASK, ADD_DQ, REDUCE, PRECISION,
        )  # fmt: skip
    return dk, dv


@triton.jit(do_not_specialize=SEGMENT_ARGS)
def key_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, stats_ptr, dk_ptr, dv_ptr, dq_ptr,
    row_stride, head_stride, grad_stride, grad_head_stride, dk_stride,
    start, length, count, stride, group_stride, segments, rows, heads, scale, scale_log2,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
    PAD: tl.constexpr, ADD_DQ: tl.constexpr, REDUCE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of BN keys of one (segment, head); with TMA q_ptr, grad_ptr, stats_ptr are descriptors."""
    tiles = tl.cdiv(length, BN)
    first = (tl.program_id(0) % tiles) * BN
    head = (tl.program_id(0) // tiles) % heads
    segment = tl.program_id(0) // (tiles * heads)
    group, member = segment // count, segment % count
    row = segment_row(segment, start, count, stride, group_stride)
    head64 = head.to(tl.int64)
    index = tl.arange(0, BN)
    limit = length - first
    offset = row * row_stride + head64 * head_stride
    tile_offset = offset + first.to(tl.int64) * row_stride
    k = load_rows(k_ptr + tile_offset, index, row_stride, limit, HEAD_DIM, WIDTH, True)
    v = load_rows(v_ptr + tile_offset, index, row_stride, limit, HEAD_DIM, WIDTH, True)
    dk = tl.zeros([BN, WIDTH], tl.float32)
    dv = tl.zeros([BN, WIDTH], tl.float32)

    q_base = q_ptr if TMA else q_ptr + offset
    grad_base = grad_ptr if TMA else grad_ptr + row * grad_stride + head64 * grad_head_stride
    padded = padded_rows(length, PAD)
    plane = segments * heads * padded
    first_row = (segment * heads + head) * padded
    begin = segment * 0
    if ADD_DQ:
        # Only the product with k minds absent keys; the last tile of keys takes the masked loop for all queries.
        split = tl.where(limit >= BN, length if TMA else (length // BM) * BM, 0)
        dk, dv = key_loop(
            dk, dv, k, v, q_base, grad_base, stats_ptr, plane, dq_ptr, first_row, row_stride, grad_stride, scale_log2,
            group, member, head, limit, begin, split, length,
            HEAD_DIM, WIDTH, BM, TMA, False, False, ADD_DQ, REDUCE, PRECISION,
        )  # fmt: skip
        begin = split
    # Without ADD_DQ this is the only loop: with a second one, ptxas waits for every single product of both.
    dk, dv = key_loop(
        dk, dv, k, v, q_base, grad_base, stats_ptr, plane, dq_ptr, first_row, row_stride, grad_stride, scale_log2,
        group, member, head, limit, begin, length, length,
        HEAD_DIM, WIDTH, BM, TMA, True, ADD_DQ, ADD_DQ, REDUCE, PRECISION,
    )  # fmt: skip
    out_offset = (row + first) * dk_stride + head64 * HEAD_DIM
    store_rows(dk_ptr + out_offset, dk * scale, index, dk_stride, limit, HEAD_DIM, WIDTH)
    store_rows(dv_ptr + out_offset, dv, index, dk_stride, limit, HEAD_DIM, WIDTH)


@triton.jit(do_not_specialize=SEGMENT_ARGS)
def prepare_kernel(
    out_ptr, grad_ptr, lse_ptr, grad_lse_ptr, stats_ptr, dq_ptr,
    out_stride, grad_stride, grad_head_stride,
    start, length, count, stride, group_stride, segments, rows, heads,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """Before the single pass: statistics of BM rows, and zeros in their block of the dQ buffer."""
    tiles = tl.cdiv(length, BM)
    first = (tl.program_id(0) % tiles) * BM
    head = (tl.program_id(0) // tiles) % heads
    segment = tl.program_id(0) // (tiles * heads)
    row = segment_row(segment, start, count, stride, group_stride) + first
    head64 = head.to(tl.int64)
    index = tl.arange(0, BM)
    limit = length - first
    grad_base = grad_ptr + row * grad_stride + head64 * grad_head_stride
    grad = load_rows(grad_base, index, grad_stride, limit, HEAD_DIM, WIDTH, True)
    out = load_rows(out_ptr + row * out_stride + head64 * HEAD_DIM, index, out_stride, limit, HEAD_DIM, WIDTH, True)
    padded = padded_rows(length, BM)
    base = head64 * rows + row
    row_statistics(
        grad, out, lse_ptr + base, grad_lse_ptr + base, stats_ptr,
        segments * heads * padded, (segment * heads + head) * padded + first, index, limit, HAS_GRAD_LSE,
    )  # fmt: skip
    dq_base = dq_ptr + tl.program_id(0).to(tl.int64) * (BM * HEAD_DIM)
    store_rows(dq_base, tl.zeros([BM, WIDTH], tl.float32), index, HEAD_DIM, BM, HEAD_DIM, WIDTH)


@triton.jit(do_not_specialize=SEGMENT_ARGS)
def finish_kernel(
    buffer_ptr, dq_ptr, dq_stride, start, length, count, stride, group_stride, heads, scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """After the single pass: the dQ buffer, scaled and rounded, to its rows of the packed gradient."""
    tiles = tl.cdiv(length, BM)
    first = (tl.program_id(0) % tiles) * BM
    head = (tl.program_id(0) // tiles) % heads
    segment = tl.program_id(0) // (tiles * heads)
    row = segment_row(segment, start, count, stride, group_stride) + first
    index = tl.arange(0, BM)
    base = buffer_ptr + tl.program_id(0).to(tl.int64) * (BM * HEAD_DIM)
    dq = load_rows(base, index, HEAD_DIM, BM, HEAD_DIM, WIDTH, False) * scale
    dq_base = dq_ptr + row * dq_stride + head.to(tl.int64) * HEAD_DIM
    store_rows(dq_base, dq, index, dq_stride, length - first, HEAD_DIM, WIDTH)
