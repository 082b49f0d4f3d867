"""Attention forward over packed QKV rows: Triton kernels, their tiles, and the launcher.

One program computes one tile of queries of one (segment, head). Scores live in the log2 domain: scale * log2(e) is
folded into one multiply-add, and the log-sum-exp is turned back to the natural logarithm when it is written.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from any4d_fast.layout import copy_engine_reads, zero_uncovered

from ._attention_tiles import (
    ForwardTile,
    HopperTile,
    aot_case,
    aot_sizes,
    block_type,
    forward_tile,
    hopper_tile,
    major_capability,
    padded,
)
from .aot import AotCase

LOG2E = math.log2(math.e)
SEGMENT_ARGS = ["start", "length", "count", "stride", "group_stride", "segments", "rows"]
"""Not specialised on: they change with the number of views, and a change must not compile anew."""


@triton.jit
def segment_row(segment, start, count, stride, group_stride):
    """First row of a segment, in 64 bits."""
    group = segment // count
    return start + group.to(tl.int64) * group_stride + (segment % count).to(tl.int64) * stride


@triton.jit
def load_rows(base, index, row_stride, limit, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr):
    """Rows `index` of a [*, HEAD_DIM] matrix, zero-padded to WIDTH columns and, with MASK, beyond `limit` rows."""
    column = tl.arange(0, WIDTH)
    pointers = base + index[:, None] * row_stride + column[None, :]
    if MASK and HEAD_DIM != WIDTH:
        return tl.load(pointers, mask=(index[:, None] < limit) & (column[None, :] < HEAD_DIM), other=0.0)
    elif MASK:
        return tl.load(pointers, mask=index[:, None] < limit, other=0.0)
    elif HEAD_DIM != WIDTH:
        return tl.load(pointers, mask=column[None, :] < HEAD_DIM, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_rows(base, value, index, row_stride, limit, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Inverse of `load_rows`, rounding to the destination's dtype."""
    column = tl.arange(0, WIDTH)
    pointers = base + index[:, None].to(tl.int64) * row_stride + column[None, :]
    mask = (index[:, None] < limit) & (column[None, :] < HEAD_DIM)
    tl.store(pointers, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def exp2_polynomial(x):
    """2**x for x <= 0 on the multiply-add units: relative error 7.5e-5, below half a bfloat16 rounding step.

    Adding 1.5 * 2^23 rounds to an integer and leaves it in the low mantissa bits, ready to shift into the exponent.
    """
    x = tl.maximum(x, -126.0)
    shifted = x + 12582912.0
    fraction = x - (shifted - 12582912.0)
    value = (0.05517132 * fraction + 0.24261054) * fraction + 0.69326099
    value = value * fraction + 0.99992811
    bits = value.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def exp2_mixed(x, POLYNOMIAL: tl.constexpr):
    """2**x of a [M, N] tile; with POLYNOMIAL a quarter of the columns avoids the special function units."""
    if POLYNOMIAL:
        M: tl.constexpr = x.shape[0]
        N: tl.constexpr = x.shape[1]
        low, high = x.reshape(M, 2, N // 2).permute(0, 2, 1).split()
        third, last = high.reshape(M, 2, N // 4).permute(0, 2, 1).split()
        high = tl.join(tl.math.exp2(third), exp2_polynomial(last)).permute(0, 2, 1).reshape(M, N // 2)
        return tl.join(tl.math.exp2(low), high).permute(0, 2, 1).reshape(M, N)
    else:
        return tl.math.exp2(x)


@triton.jit
def softmax_step(
    scores, m, total, acc, v, factor, LAZY: tl.constexpr, POLYNOMIAL: tl.constexpr, PRECISION: tl.constexpr
):
    """One block of keys of the online softmax: running maximum m and total, output acc; scores times factor >= 0."""
    highest = tl.max(scores, 1) * factor
    if LAZY > 0:
        m_new = tl.where(highest > m + LAZY, highest, m)
    else:
        m_new = tl.maximum(m, highest)
    alpha = tl.math.exp2(m - m_new)
    p = exp2_mixed(scores * factor - m_new[:, None], POLYNOMIAL)
    total = total * alpha + tl.sum(p, 1)
    if LAZY > 0:
        if tl.min(alpha, 0) < 1.0:
            acc = acc * alpha[:, None]
    else:
        acc = acc * alpha[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return m_new, total, acc


@triton.jit(do_not_specialize=SEGMENT_ARGS)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, row_stride, head_stride, out_stride,
    start, length, count, stride, group_stride, rows, heads, scale_log2,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr,
    LAZY: tl.constexpr, POLYNOMIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out, lse of one tile of BM queries; with TMA k_ptr and v_ptr are what `descriptor` makes."""
    tiles = tl.cdiv(length, BM)
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles) % heads
    segment = tl.program_id(0) // (tiles * heads)
    row = segment_row(segment, start, count, stride, group_stride)
    group, member = segment // count, segment % count

    index = tile * BM + tl.arange(0, BM)
    offset = row * row_stride + head.to(tl.int64) * head_stride
    # A query tile's 32-bit row index times the row stride can pass 2^31 within one segment.
    q_base = q_ptr + offset + (tile * BM).to(tl.int64) * row_stride
    q = load_rows(q_base, tl.arange(0, BM), row_stride, length - tile * BM, HEAD_DIM, WIDTH, True)
    m = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, WIDTH], tl.float32)

    key = tl.arange(0, BN)
    full = (length // BN) * BN
    if TMA:
        for begin in tl.range(0, full, BN):
            k = k_ptr.load([group, member, head, begin, 0]).reshape(BN, WIDTH)
            v = v_ptr.load([group, member, head, begin, 0]).reshape(BN, WIDTH)
            scores = tl.dot(q, k.T, input_precision=PRECISION)
            m, total, acc = softmax_step(scores, m, total, acc, v, scale_log2, LAZY, POLYNOMIAL, PRECISION)
    else:
        k_base = k_ptr + offset
        v_base = v_ptr + offset
        for _ in tl.range(0, full, BN):
            k = load_rows(k_base, key, row_stride, BN, HEAD_DIM, WIDTH, False)
            v = load_rows(v_base, key, row_stride, BN, HEAD_DIM, WIDTH, False)
            scores = tl.dot(q, k.T, input_precision=PRECISION)
            m, total, acc = softmax_step(scores, m, total, acc, v, scale_log2, LAZY, POLYNOMIAL, PRECISION)
            k_base += BN * row_stride
            v_base += BN * row_stride
    if full < length:
        if TMA:
            k = k_ptr.load([group, member, head, full, 0]).reshape(BN, WIDTH)
            v = v_ptr.load([group, member, head, full, 0]).reshape(BN, WIDTH)
        else:
            k = load_rows(k_base, key, row_stride, length - full, HEAD_DIM, WIDTH, True)
            v = load_rows(v_base, key, row_stride, length - full, HEAD_DIM, WIDTH, True)
        scores = tl.dot(q, k.T, input_precision=PRECISION) * scale_log2
        scores = tl.where((key < length - full)[None, :], scores, -float("inf"))
        m, total, acc = softmax_step(scores, m, total, acc, v, 1.0, 0, False, PRECISION)

    out_base = out_ptr + row * out_stride + head.to(tl.int64) * HEAD_DIM
    store_rows(out_base, acc / total[:, None], index, out_stride, length, HEAD_DIM, WIDTH)
    lse = (m + tl.math.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + head.to(tl.int64) * rows + row + index, lse, mask=index < length)


def precision(dtype: torch.dtype) -> str:
    """input_precision of the products: float32 obeys PyTorch's TF32 switch, 16-bit operands are exact anyway."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def in_place(x: Tensor) -> Tensor:
    """`x` itself if the kernels can address it: unit last stride, and 128 rows within 32-bit offsets."""
    return x if x.stride(-1) == 1 and x.stride(0) * 128 < 2**31 else x.contiguous()


def descriptor(x: Tensor, segments: list[int], block: int, width: int) -> TensorDescriptor:
    """[groups, count, heads, length, width] view of the segments of `x` [rows, heads, head_dim] for the copy engine.

    The engine fills what lies beyond a segment's length or a head's channels with zeros.
    """
    start, length, count, stride, groups, group_stride = segments
    row, head, _ = x.stride()
    # A single segment's stride means nothing, but the engine wants every stride to be positive.
    strides = [max(group_stride, length) * row, max(stride, length) * row, head, row, 1]
    shape = [groups, count, x.shape[1], length, x.shape[2]]
    return TensorDescriptor(x[start:], shape, strides, [1, 1, 1, block, width])


def tma_reasons(x: Tensor) -> str | None:
    """Why the copy engine cannot read `x`, or None: it wants addresses and strides that are multiples of 16 bytes."""
    return None if copy_engine_reads(x) else "addresses are not multiples of 16 bytes"


def forward(
    qkv: Tensor, segments: list[int], scale: float, tile: ForwardTile | HopperTile | None = None
) -> tuple[Tensor, Tensor]:
    """Run the forward.

    Args:
        qkv: [rows, 3, heads, head_dim], unit last stride, any other strides.
        segments: [start, length, count, stride, groups, group_stride] as in `Segments.as_list`.
        scale: factor on q k^T, 0 or more.
        tile: configuration to run instead of the table's (for tuning).

    Returns:
        out [rows, heads, head_dim] contiguous; lse [heads, rows] float32, natural logarithm.
    """
    rows, _, heads, head_dim = qkv.shape
    out = torch.empty((rows, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((heads, rows), dtype=torch.float32, device=qkv.device)
    zero_uncovered(out, segments)
    zero_uncovered(lse.t(), segments)
    start, length, count, stride, groups, group_stride = segments
    if groups * count * length == 0:
        return out, lse
    qkv = in_place(qkv)
    tile = tile or _choose(qkv, length)
    if isinstance(tile, HopperTile):
        from . import attention_hopper

        attention_hopper.launch(qkv, out, lse, segments, scale, tile)
    else:
        _launch(qkv, out, lse, segments, scale, tile)
    return out, lse


def _choose(qkv: Tensor, length: int) -> ForwardTile | HopperTile:
    """Configuration by the tables; the copy engine only where it can read the rows."""
    head_dim, aligned = qkv.shape[3], tma_reasons(qkv[:, 0]) is None
    if qkv.is_cuda and aligned and torch.cuda.get_device_capability(qkv.device)[0] == 9:
        special = hopper_tile(length, head_dim, qkv.dtype)
        if special is not None:
            return special
    tile = forward_tile(length, head_dim, qkv.dtype, major_capability(qkv.device))
    return tile if aligned else replace(tile, tma=False)


def _launch(qkv: Tensor, out: Tensor, lse: Tensor, segments: list[int], scale: float, tile: ForwardTile) -> None:
    start, length, count, stride, groups, group_stride = segments
    rows, _, heads, head_dim = qkv.shape
    q, k, v = qkv.unbind(1)
    if tile.tma:
        k, v = (descriptor(x, segments, tile.keys, padded(head_dim)) for x in (k, v))
    grid = (triton.cdiv(length, tile.queries) * heads * groups * count,)
    forward_kernel[grid](
        q,
        k,
        v,
        out,
        lse,
        qkv.stride(0),
        qkv.stride(2),
        out.stride(0),
        start,
        length,
        count,
        stride,
        group_stride,
        rows,
        heads,
        scale * LOG2E,
        HEAD_DIM=head_dim,
        WIDTH=padded(head_dim),
        PRECISION=precision(qkv.dtype),
        **tile.constants(),
        **tile.options(),
    )


def forward_case(tile: ForwardTile, dtype: torch.dtype, head_dim: int, target: int) -> AotCase:
    """Ahead-of-time case of one configuration."""
    blocks = {n: block_type(dtype, tile.keys, head_dim) for n in ("k_ptr", "v_ptr")} if tile.tma else {}
    name = f"attention-forward-{tile.queries}x{tile.keys}{'-tma' if tile.tma else ''}"
    return aot_case(name, forward_kernel, dtype, head_dim, tile.constants(), tile.options(), blocks, target)


def aot_cases() -> list[AotCase]:
    """Every production configuration of the forward."""
    found: dict[str, AotCase] = {}
    for length, dtype, head_dim in aot_sizes():
        for target in (80, 90, 100):
            tile = forward_tile(length, head_dim, dtype, target // 10)
            case = forward_case(tile, dtype, head_dim, target)
            found[case.name] = case
    return list(found.values())
