"""What the kernels over rows share: tiles, programs, statistics of a row, deterministic sums over rows.

A tile is `rows` rows of C channels. Channels are walked in `CHUNKS` pieces of `CHUNK` (a power of two), each piece a
[rows, CHUNK] block that stays in registers (a tuple of blocks), so that C = 768 is 3 x 256 and no lane is idle.
"""

# Kernels grow tuples of blocks, which mypy takes for tuples of fixed length.
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from any4d_fast import backends


@dataclass(frozen=True)
class RowTile:
    """How a kernel over rows is laid out: rows and channels a block, warps, pipeline stages, programs an SM.

    `programs` of 0 starts one program a tile; otherwise programs walk over tiles.
    """

    rows: int
    chunk: int
    warps: int
    stages: int = 1
    programs: int = 0

    def chunks(self, channels: int) -> int:
        """Pieces into which the channels are cut."""
        return triton.cdiv(channels, self.chunk)

    def constants(self, channels: int) -> dict[str, int]:
        """The tile as the constants that every kernel over rows takes."""
        chunks = self.chunks(channels)
        return {"C": channels, "ROWS": self.rows, "CHUNK": self.chunk, "CHUNKS": chunks, "STAGES": self.stages}


def processors(device: torch.device) -> int:
    """Multiprocessors of the device; a small number in the interpreter, where programs run one by one."""
    if backends.interpreting():
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs(rows: int, tile: RowTile, device: torch.device) -> int:
    """Programs to start for so many rows."""
    tiles = triton.cdiv(rows, tile.rows)
    return min(tiles, tile.programs * processors(device)) if tile.programs else tiles


def strips(rows: int, columns: int, tile: RowTile, device: torch.device) -> tuple[int, int]:
    """Grid of an elementwise pass over [rows, columns]: programs along the columns, and strips of rows."""
    across = triton.cdiv(columns, tile.chunk)
    wanted = triton.cdiv(tile.programs * processors(device), across)
    return across, min(wanted, triton.cdiv(rows, tile.rows))


def as_rows(x: Tensor) -> Tensor:
    """[..., C] as [rows, C] with unit stride in C; a view whenever the strides allow one."""
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        x = x.contiguous()
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return x.reshape(rows, x.shape[-1])


@triton.jit
def load_channels(pointer, C: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """A [C] vector as a tuple of float32 [CHUNK] blocks, zero beyond C."""
    blocks = ()
    for chunk in tl.static_range(CHUNKS):
        column = chunk * CHUNK + tl.arange(0, CHUNK)
        blocks = blocks + (tl.load(pointer + column, mask=column < C, other=0.0).to(tl.float32),)
    return blocks


@triton.jit
def load_rows(pointer, stride, row, valid, C: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Rows of C channels as a tuple of float32 [ROWS, CHUNK] blocks, zero beyond C and in rows that are not valid."""
    blocks = ()
    for chunk in tl.static_range(CHUNKS):
        column = chunk * CHUNK + tl.arange(0, CHUNK)
        mask = valid[:, None] & (column < C)[None, :]
        block = tl.load(pointer + row[:, None] * stride + column[None, :], mask=mask, other=0.0)
        blocks = blocks + (block.to(tl.float32),)
    return blocks


@triton.jit
def row_statistics(blocks, eps, C: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Mean and reciprocal standard deviation of every row. The blocks are zero beyond C.

    The variance is the mean of squared differences from the mean (not E[x^2] - E[x]^2, which cancels).
    """
    total = blocks[0]
    for chunk in tl.static_range(1, CHUNKS):
        total += blocks[chunk]
    mean = tl.sum(total, axis=1) / C
    squares = tl.zeros_like(total)
    for chunk in tl.static_range(CHUNKS):
        centred = blocks[chunk] - mean[:, None]
        if C % CHUNK != 0:
            column = chunk * CHUNK + tl.arange(0, CHUNK)
            centred = tl.where((column < C)[None, :], centred, 0.0)
        squares += centred * centred
    return mean, tl.rsqrt(tl.sum(squares, axis=1) / C + eps)


@triton.jit
def power_of_two(most):
    """The smallest power of two that brings values of at most `most` to at most 448, and its reciprocal.

    1 for zero, 2^-44 at least, NaN beyond 2^44: `any4d_fast.reference.attention_fp8.power_of_two` bit for bit.
    """
    bits = ((most * (1.0 / 448.0)).to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
    bits = tl.where(most > 0.0, tl.maximum(bits, 83 << 23), 127 << 23)
    fits = bits <= (171 << 23)
    scale = tl.where(fits, bits.to(tl.float32, bitcast=True), float("nan"))
    return scale, tl.where(fits, ((254 << 23) - bits).to(tl.float32, bitcast=True), float("nan"))


@triton.jit
def store_e4m3(
    blocks, out, scales, row, valid, C: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr
):
    """Round rows, zero beyond C, to e4m3 with a scale each: out [rows, C] contiguous, scales [rows] float32."""
    most = tl.zeros([ROWS, CHUNK], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        most = tl.maximum(most, tl.abs(blocks[chunk]))
    scale, inverse = power_of_two(tl.max(most, axis=1))
    tl.store(scales + row, scale, mask=valid)
    for chunk in tl.static_range(CHUNKS):
        column = chunk * CHUNK + tl.arange(0, CHUNK)
        mask = valid[:, None] & (column < C)[None, :]
        value = (blocks[chunk] * inverse[:, None]).to(out.dtype.element_ty)
        tl.store(out + row[:, None] * C + column[None, :], value, mask=mask)


@triton.jit
def store_normed(
    blocks,
    centre,
    scale,
    gains,
    shifts,
    out,
    mean,
    rstd,
    row,
    valid,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    """LayerNorm of rows by their statistics, which are stored too; with QUANTIZE to e4m3, `rstd` taking the scales."""
    if not QUANTIZE:
        tl.store(mean + row, centre, mask=valid)
        tl.store(rstd + row, scale, mask=valid)
    results = ()
    for chunk in tl.static_range(CHUNKS):
        column = chunk * CHUNK + tl.arange(0, CHUNK)
        mask = valid[:, None] & (column < C)[None, :]
        normed = (blocks[chunk] - centre[:, None]) * scale[:, None]
        if HAS_WEIGHT:
            normed = normed * gains[chunk][None, :]
        if HAS_BIAS:
            normed = normed + shifts[chunk][None, :]
        if QUANTIZE:
            results = results + (tl.where((column < C)[None, :], normed, 0.0),)
        else:
            tl.store(out + row[:, None] * C + column[None, :], normed.to(out.dtype.element_ty), mask=mask)
    if QUANTIZE:
        store_e4m3(results, out, rstd, row, valid, C, ROWS, CHUNK, CHUNKS)


@triton.jit(do_not_specialize=["count"])
def column_sum_kernel(
    partials,  # [sections, programs, C] float32
    out_0,
    out_1,
    out_2,
    count,
    C,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum partial sums over programs, always in the same order."""
    section = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < C
    base = partials + section.to(tl.int64) * count * C
    total = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for start in range(0, count, BLOCK):
        row = start + tl.arange(0, BLOCK)
        mask = (row < count)[:, None] & inside[None, :]
        total += tl.load(base + row.to(tl.int64)[:, None] * C + column[None, :], mask=mask, other=0.0)
    result = tl.sum(total, axis=0)
    if section == 0:
        tl.store(out_0 + column, result.to(out_0.dtype.element_ty), mask=inside)
    elif section == 1:
        tl.store(out_1 + column, result.to(out_1.dtype.element_ty), mask=inside)
    else:
        tl.store(out_2 + column, result.to(out_2.dtype.element_ty), mask=inside)


# 64 partial rows of 16 channels a step: 64-byte segments keep sectors whole, and C = 768 still gives 48 programs a
# section, because this launch is bound by latency, not by bandwidth.
_SUM_BLOCK, _SUM_COLUMNS, _SUM_WARPS = 64, 16, 4


def column_sums(partials: Tensor, dtypes: list[torch.dtype]) -> list[Tensor]:
    """Sum [sections, programs, C] float32 over programs into one [C] tensor a section (three at most)."""
    sections, count, channels = partials.shape
    outs = [torch.empty(channels, device=partials.device, dtype=dtype) for dtype in dtypes]
    pointers = (outs * 3)[:3]
    grid = (triton.cdiv(channels, _SUM_COLUMNS), sections)
    column_sum_kernel[grid](
        partials, *pointers, count, channels, BLOCK=_SUM_BLOCK, COLUMNS=_SUM_COLUMNS, num_warps=_SUM_WARPS
    )
    return outs
