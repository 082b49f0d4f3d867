"""Attention forward for Hopper (sm_90) in Gluon: one warpgroup copies, two or three others compute.

The copying warpgroup keeps a ring of key and value blocks full through the copy engine; every computing warpgroup owns
ROWS queries, holds their probabilities in registers, and with OVERLAP issues the next block's scores before it waits
for the current block's output, so that one block's softmax runs beside another's products. Programs are persistent:
the copies of a program's next tile overlap the end of its current one. Gluon does not run in the interpreter.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton import cdiv
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ._attention_tiles import HOPPER_TILES, TRITON_DTYPES, HopperTile, padded
from .aot import AotCase
from .attention import LOG2E, SEGMENT_ARGS
from .attention import descriptor as segment_descriptor


@gluon.constexpr_function
def _mma_layout(columns):
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def _tile_layout(rows, width, dtype):
    return gl.NVMMASharedLayout.get_default_for([1, 1, 1, rows, width], dtype)


@gluon.jit
def _tile_of(index, length, heads, count, TILE: gl.constexpr):
    """First row, head, and place of the segment of a program's tile; tiles of one (segment, head) are neighbours."""
    tiles = gl.cdiv(length, TILE)
    head = (index // tiles) % heads
    segment = index // (tiles * heads)
    return (index % tiles) * TILE, head, segment // count, segment % count


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    length, heads, count, total,
    ROWS: gl.constexpr, KEYS: gl.constexpr, WIDTH: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
):  # fmt: skip
    """Copy queries, keys and values of every tile of this program; the last, partial block of keys comes first."""
    q_bytes: gl.constexpr = GROUPS * q_desc.block_type.nbytes
    blocks = gl.cdiv(length, KEYS)
    step = 0
    turn = 0
    for index in range(gl.program_id(0), total, gl.num_programs(0)):
        first, head, group, member = _tile_of(index, length, heads, count, ROWS * GROUPS)
        q_stage = turn % Q_STAGES
        mbarrier.wait(q_empty.index(q_stage), ((turn // Q_STAGES) & 1) ^ 1)
        mbarrier.expect(q_full.index(q_stage), q_bytes)
        for c in gl.static_range(GROUPS):
            slot = q_smem.index(q_stage * GROUPS + c)
            tma.async_copy_global_to_shared(
                q_desc, [group, member, head, first + c * ROWS, 0], q_full.index(q_stage), slot
            )
        turn += 1
        for j in range(0, blocks):
            row = ((j + blocks - 1) % blocks) * KEYS
            stage = step % STAGES
            phase = ((step // STAGES) & 1) ^ 1
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                k_desc, [group, member, head, row, 0], k_full.index(stage), k_smem.index(stage)
            )
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                v_desc, [group, member, head, row, 0], v_full.index(stage), v_smem.index(stage)
            )
            step += 1


@gluon.jit
def _exp2_polynomial(x):
    """As `attention.exp2_polynomial`."""
    x = gl.maximum(x, -126.0)
    shifted = x + 12582912.0
    fraction = x - (shifted - 12582912.0)
    value = (0.05517132 * fraction + 0.24261054) * fraction + 0.69326099
    value = value * fraction + 0.99992811
    bits = value.to(gl.int32, bitcast=True) + (shifted.to(gl.int32, bitcast=True) << 23)
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def _exp2(x, POLYNOMIAL: gl.constexpr):
    """2**x; with POLYNOMIAL a quarter of the columns avoids the special function units."""
    if POLYNOMIAL:
        M: gl.constexpr = x.shape[0]
        N: gl.constexpr = x.shape[1]
        low, high = x.reshape(M, 2, N // 2).permute(0, 2, 1).split()
        third, last = high.reshape(M, 2, N // 4).permute(0, 2, 1).split()
        high = gl.join(gl.exp2(third), _exp2_polynomial(last)).permute(0, 2, 1).reshape(M, N // 2)
        # Layouts that are equal but written differently.
        high = gl.convert_layout(high, low.type.layout, assert_trivial=True)
        found = gl.join(gl.exp2(low), high).permute(0, 2, 1).reshape(M, N)
        return gl.convert_layout(found, x.type.layout, assert_trivial=True)
    else:
        return gl.exp2(x)


@gluon.jit
def _softmax(scores, m, mass, factor, POLYNOMIAL: gl.constexpr):
    """Probabilities of one block, the correction of what came before, and the new running maximum and sum."""
    m_new = gl.maximum(m, gl.max(scores, 1) * factor)
    alpha = gl.exp2(m - m_new)
    p = _exp2(scores * factor - m_new[:, None], POLYNOMIAL)
    return p, alpha, m_new, mass * alpha + gl.sum(p, 1)


@gluon.jit
def _scores(q, k_smem, k_full, k_empty, stage, phase, ROWS: gl.constexpr, KEYS: gl.constexpr, WIDTH: gl.constexpr):
    """q k^T of one block, waited for; its keys' buffer is free again."""
    layout: gl.constexpr = _mma_layout(KEYS)
    mbarrier.wait(k_full.index(stage), phase)
    k = k_smem.index(stage).reshape([KEYS, WIDTH]).permute([1, 0])
    scores = gl.zeros([ROWS, KEYS], gl.float32, layout)
    scores = warpgroup_mma(q, k, scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_empty.index(stage))
    return scores


@gluon.jit
def _consume(
    out_desc, lse_ptr, q_smem, k_smem, v_smem, out_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    start, length, count, stride, group_stride, rows, heads, total, scale_log2,
    ROWS: gl.constexpr, KEYS: gl.constexpr, WIDTH: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr, OVERLAP: gl.constexpr, POLYNOMIAL: gl.constexpr, MEMBER: gl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of the MEMBER-th run of ROWS queries of every tile of this program."""
    dtype: gl.constexpr = out_desc.dtype
    scores_layout: gl.constexpr = _mma_layout(KEYS)
    acc_layout: gl.constexpr = _mma_layout(WIDTH)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    acc_rows: gl.constexpr = gl.SliceLayout(1, acc_layout)
    blocks = gl.cdiv(length, KEYS)
    step = 0
    turn = 0
    for index in range(gl.program_id(0), total, gl.num_programs(0)):
        first, head, group, member = _tile_of(index, length, heads, count, ROWS * GROUPS)
        q_stage = turn % Q_STAGES
        q_phase = (turn // Q_STAGES) & 1
        mbarrier.wait(q_full.index(q_stage), q_phase)
        q = q_smem.index(q_stage * GROUPS + MEMBER).reshape([ROWS, WIDTH])
        m = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
        mass = gl.full([ROWS], 0.0, gl.float32, row_layout)
        acc = gl.zeros([ROWS, WIDTH], gl.float32, acc_layout)

        # The last block of keys, which may be partial, is the first in the ring.
        scores = _scores(q, k_smem, k_full, k_empty, step % STAGES, (step // STAGES) & 1, ROWS, KEYS, WIDTH)
        key = (blocks - 1) * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, scores_layout))
        scores = gl.where((key < length)[None, :], scores * scale_log2, float("-inf"))
        p, alpha, m, mass = _softmax(scores, m, mass, 1.0, POLYNOMIAL)
        p = gl.convert_layout(p.to(dtype), p_layout)
        for _ in range(1, blocks):
            stage = step % STAGES
            phase = (step // STAGES) & 1
            if OVERLAP:
                next_stage = (step + 1) % STAGES
                mbarrier.wait(k_full.index(next_stage), ((step + 1) // STAGES) & 1)
                k = k_smem.index(next_stage).reshape([KEYS, WIDTH]).permute([1, 0])
                scores = gl.zeros([ROWS, KEYS], gl.float32, scores_layout)
                scores = warpgroup_mma(q, k, scores, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(stage), phase)
                acc = warpgroup_mma(p, v_smem.index(stage).reshape([KEYS, WIDTH]), acc, is_async=True)
                scores = warpgroup_mma_wait(1, deps=[scores])
                mbarrier.arrive(k_empty.index(next_stage))
                p_new, alpha, m, mass = _softmax(scores, m, mass, scale_log2, POLYNOMIAL)
                # This barrier completed long ago. Its branch ends a basic block: within one, ptxas moves the wait for
                # the product above the softmax that should run beside it.
                mbarrier.wait(q_full.index(q_stage), q_phase)
                # p is a dependency so that its registers are not reused while the product reads them.
                acc, p = warpgroup_mma_wait(0, deps=[acc, p])
                mbarrier.arrive(v_empty.index(stage))
                acc = acc * gl.convert_layout(alpha, acc_rows)[:, None]
                p = gl.convert_layout(p_new.to(dtype), p_layout)
            else:
                mbarrier.wait(v_full.index(stage), phase)
                acc = warpgroup_mma(p, v_smem.index(stage).reshape([KEYS, WIDTH]), acc, is_async=True)
                acc, p = warpgroup_mma_wait(0, deps=[acc, p])
                mbarrier.arrive(v_empty.index(stage))
                scores = _scores(
                    q, k_smem, k_full, k_empty, (step + 1) % STAGES, ((step + 1) // STAGES) & 1, ROWS, KEYS, WIDTH
                )
                p_new, alpha, m, mass = _softmax(scores, m, mass, scale_log2, POLYNOMIAL)
                acc = acc * gl.convert_layout(alpha, acc_rows)[:, None]
                p = gl.convert_layout(p_new.to(dtype), p_layout)
            step += 1
        mbarrier.arrive(q_empty.index(q_stage))
        stage = step % STAGES
        mbarrier.wait(v_full.index(stage), (step // STAGES) & 1)
        acc = warpgroup_mma(p, v_smem.index(stage).reshape([KEYS, WIDTH]), acc, is_async=True)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        mbarrier.arrive(v_empty.index(stage))
        step += 1
        turn += 1

        out = acc * gl.convert_layout(1.0 / mass, acc_rows)[:, None]
        tma.store_wait(0)
        own = out_smem.index(MEMBER)
        own.reshape([ROWS, WIDTH]).store(out.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [group, member, head, first + MEMBER * ROWS, 0], own)
        row = start + group.to(gl.int64) * group_stride + member.to(gl.int64) * stride
        place = first + MEMBER * ROWS + gl.arange(0, ROWS, row_layout)
        lse = (m + gl.log2(mass)) * 0.6931471805599453
        gl.store(lse_ptr + head.to(gl.int64) * rows + row + place, lse, mask=place < length)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=[*SEGMENT_ARGS, "total"])
def hopper_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr,
    start, length, count, stride, group_stride, rows, heads, total, scale_log2,
    ROWS: gl.constexpr, KEYS: gl.constexpr, WIDTH: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr, Q_STAGES: gl.constexpr, OVERLAP: gl.constexpr, POLYNOMIAL: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Out and lse; descriptors are [groups, count, heads, length, WIDTH]."""
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [Q_STAGES * GROUPS, 1, 1, 1, ROWS, WIDTH], q_desc.layout)
    out_smem = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, 1, ROWS, WIDTH], out_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 1, KEYS, WIDTH], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 1, KEYS, WIDTH], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=GROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=GROUPS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=GROUPS)
    fence_async_shared()
    # Written out: a tuple held in a variable would turn its compile-time members into run-time values.
    if GROUPS == 2:
        gl.warp_specialize([
            (_produce, (
                q_desc, k_desc, v_desc, q_smem, k_smem, v_smem,
                q_full, q_empty, k_full, k_empty, v_full, v_empty,
                length, heads, count, total, ROWS, KEYS, WIDTH, GROUPS, STAGES, Q_STAGES,
            )),
            (_consume, (
                out_desc, lse_ptr, q_smem, k_smem, v_smem, out_smem,
                q_full, q_empty, k_full, k_empty, v_full, v_empty,
                start, length, count, stride, group_stride, rows, heads, total, scale_log2,
                ROWS, KEYS, WIDTH, GROUPS, STAGES, Q_STAGES, OVERLAP, POLYNOMIAL, 0,
            )),
            (_consume, (
                out_desc, lse_ptr, q_smem, k_smem, v_smem, out_smem,
                q_full, q_empty, k_full, k_empty, v_full, v_empty,
                start, length, count, stride, group_stride, rows, heads, total, scale_log2,
                ROWS, KEYS, WIDTH, GROUPS, STAGES, Q_STAGES, OVERLAP, POLYNOMIAL, 1,
            )),
        ], [4, 4], [REGISTERS, REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_produce, (
                q_desc, k_desc, v_desc, q_smem, k_smem, v_smem,
                q_full, q_empty, k_full, k_empty, v_full, v_empty,
                length, heads, count, total, ROWS, KEYS, WIDTH, GROUPS, STAGES, Q_STAGES,
            )),
            (_consume, (
                out_desc, lse_ptr, q_smem, k_smem, v_smem, out_smem,
                q_full, q_empty, k_full, k_empty, v_full, v_empty,
                start, length, count, stride, group_stride, rows, heads, total, scale_log2,
                ROWS, KEYS, WIDTH, GROUPS, STAGES, Q_STAGES, OVERLAP, POLYNOMIAL, 0,
            )),
            (_consume, (
                out_desc, lse_ptr, q_smem, k_smem, v_smem, out_smem,
                q_full, q_empty, k_full, k_empty, v_full, v_empty,
                start, length, count, stride, group_stride, rows, heads, total, scale_log2,
                ROWS, KEYS, WIDTH, GROUPS, STAGES, Q_STAGES, OVERLAP, POLYNOMIAL, 1,
            )),
            (_consume, (
                out_desc, lse_ptr, q_smem, k_smem, v_smem, out_smem,
                q_full, q_empty, k_full, k_empty, v_full, v_empty,
                start, length, count, stride, group_stride, rows, heads, total, scale_log2,
                ROWS, KEYS, WIDTH, GROUPS, STAGES, Q_STAGES, OVERLAP, POLYNOMIAL, 2,
            )),
        ], [4, 4, 4], [REGISTERS, REGISTERS, REGISTERS])  # fmt: skip


def _descriptor(x: Tensor, segments: list[int], block: int) -> TensorDescriptor:
    """As `attention.descriptor`, with the layout in shared memory that Gluon wants to know."""
    plain = segment_descriptor(x, segments, block, padded(x.shape[2]))
    layout = _tile_layout(block, padded(x.shape[2]), getattr(gl, str(x.dtype).removeprefix("torch.")))
    return TensorDescriptor(plain.base, plain.shape, plain.strides, plain.block_shape, layout)


def launch(qkv: Tensor, out: Tensor, lse: Tensor, segments: list[int], scale: float, tile: HopperTile) -> None:
    """Fill the covered rows of `out` and `lse`; arguments as `attention.forward` has them.

    Sixteen-bit dtypes, heads of at most 64 channels, addresses that the copy engine can use.
    """
    rows, _, heads, head_dim = qkv.shape
    start, length, count, stride, groups, group_stride = segments
    q, k, v = qkv.unbind(1)
    total = cdiv(length, tile.rows * tile.groups) * heads * groups * count
    multiprocessors = torch.cuda.get_device_properties(qkv.device).multi_processor_count
    hopper_kernel[(min(total, multiprocessors),)](
        _descriptor(q, segments, tile.rows),
        _descriptor(k, segments, tile.keys),
        _descriptor(v, segments, tile.keys),
        _descriptor(out, segments, tile.rows),
        lse,
        start,
        length,
        count,
        stride,
        group_stride,
        rows,
        heads,
        total,
        scale * LOG2E,
        **tile.constants(head_dim),
        num_warps=4,
    )


def hopper_case(tile: HopperTile, dtype: torch.dtype, head_dim: int) -> AotCase:
    """Ahead-of-time case of one configuration, for sm_90 only."""
    element, width = TRITON_DTYPES[dtype], padded(head_dim)

    def block(rows: int) -> str:
        layout = _tile_layout(rows, width, getattr(gl, str(dtype).removeprefix("torch.")))
        return f"tensordesc<{element}[1, 1, 1, {rows}, {width}],{layout!r}>"

    constants = tile.constants(head_dim)
    types = {n: "i32" for n in hopper_kernel.arg_names if n not in constants}
    types |= {"q_desc": block(tile.rows), "out_desc": block(tile.rows)}
    types |= {"k_desc": block(tile.keys), "v_desc": block(tile.keys), "lse_ptr": "*fp32", "scale_log2": "fp32"}
    name = f"attention-hopper-{tile.groups}x{tile.rows}x{tile.keys}-{element}-{head_dim}"
    # With three warpgroups 160 registers a thread: some twenty values that only the ends of a tile need are spilled.
    max_spills = 0 if tile.groups == 2 else 160
    return AotCase(name, hopper_kernel, types, constants, ("lse_ptr",), {"num_warps": 4}, (90,), max_spills)


def aot_cases() -> list[AotCase]:
    """Every production configuration."""
    dtypes = (torch.bfloat16, torch.float16)
    return [hopper_case(tile, dtype, 64) for tile in HOPPER_TILES.values() for dtype in dtypes]
