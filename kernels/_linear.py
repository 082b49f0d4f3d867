"""The matmul behind `linear_gelu` and `linear_residual`: persistent, with the epilogue finished before it writes.

Programs walk over output tiles in groups of rows, so that a group's rows of x and all of the weight stay in L2. Two
variants: tensor descriptors (TMA, sm_90 and later) and pointers (sm_80, odd strides, float32).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from any4d_fast import backends
from any4d_fast.switches import matmul_allows_tf32

from ._rows import processors
from .aot import AotCase


@dataclass(frozen=True)
class LinearTile:
    """Layout of the matmul: output tile m x n, depth k a step, parts of n that the epilogue takes one after another.

    `programs` a multiprocessor stay resident; `group` tiles of rows are walked together; `tma` takes descriptors;
    `specialize` gives loads a warp of their own (sm_90 and later; four warps and descriptors only).
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    parts: int = 1
    programs: int = 1
    group: int = 8
    tma: bool = False
    specialize: bool = False

    def constants(self) -> dict[str, Any]:
        """The tile as the constants that both kernels take."""
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k, "PARTS": self.parts, "GROUP": self.group}


# sm_90 and later, 16 bits: two programs a multiprocessor (114,712 bytes of shared memory each, half of it), so that one
# multiplies while the other is in its epilogue, which is a third as long as the matmul at K = 768.
_HOPPER = LinearTile(m=128, n=128, k=64, warps=4, stages=3, parts=2, programs=2, tma=True)
MANY_ROWS = 2**31 - 1
# `linear_gelu`, (at most so many rows, layout), first match: what `python -m benchmarks.sweep_small_rows` prints.
_BY_ROWS: tuple[tuple[int, LinearTile], ...] = ((MANY_ROWS, _HOPPER),)
# With a residual on sm_100, 8 warps: a part of its float32 tile is in registers beside the sum, and 4 warps spill.
_BLACKWELL_RESIDUAL = LinearTile(m=128, n=128, k=64, warps=8, stages=4, parts=2, tma=True)
# Pointers, 16 bits: 8 warps keep the accumulator at 64 registers a thread; three stages of 32 KB fit sm_80's 163 KB.
_POINTERS = LinearTile(m=128, n=128, k=64, warps=8, stages=3, parts=2)
# float32: twice the bytes an element, so smaller tiles; exact products run on the FMA units.
_FLOAT32 = LinearTile(m=64, n=64, k=32, warps=4, stages=3, programs=2)
_INTERPRETER = LinearTile(m=16, n=32, k=32, warps=4, stages=1, parts=2, group=2, tma=True)


@triton.jit
def gelu(x, EXACT: tl.constexpr):
    """x Phi(x). Without EXACT: Phi = 1/2 + x P(x^2), P of degree 8 fitted on |x| <= 4.25, saturated beyond.

    The fit errs by at most 4.6e-5 in the result (at x = -4.25, where GELU itself is that small; 1.6e-5 elsewhere), far
    below 16-bit rounding of values near one, and costs 13 FMA-pipe instructions where erf needs twice as many.
    """
    if EXACT:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    t = tl.minimum(x * x, 18.0625)
    p = t * 4.547082155248461e-11 - 4.51531123601967e-09
    p = p * t + 1.9861614930505311e-07
    p = p * t - 5.147518095327541e-06
    p = p * t + 8.848918514559045e-05
    p = p * t - 0.001079078298062086
    p = p * t + 0.009718779474496841
    p = p * t - 0.06619028002023697
    p = p * t + 0.3988192081451416
    return x * tl.minimum(tl.maximum(x * p + 0.5, 0.0), 1.0)


@triton.jit
def tile_origin(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: groups of GROUP rows, walked column by column."""
    first = tile // (GROUP * tiles_n) * GROUP
    inside = tile % (GROUP * tiles_n)
    size = tl.minimum(tiles_m - first, GROUP)
    return first + inside % size, inside // size


@triton.jit
def halves(value, M: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr):
    """[M, N] as a tuple of PARTS (1 or 2) blocks of columns."""
    if PARTS == 1:
        return (value,)
    else:
        return tl.split(tl.permute(tl.reshape(value, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def add_residual(
    value,
    residual,  # [M, N]
    gamma,  # [N] or unused
    row_scale,  # [M / rows_per_scale] or unused
    out,  # [M, N], contiguous
    row,
    column,
    M,
    N,
    residual_stride,
    rows_per_scale,
    HAS_GAMMA: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """out = residual + row_scale gamma value; a row whose scale is 0 takes the residual as it is."""
    mask = (row < M)[:, None] & (column < N)[None, :]
    if HAS_GAMMA:
        value = value * tl.load(gamma + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    if HAS_SCALE:
        scale = tl.load(row_scale + row // rows_per_scale, mask=row < M, other=0.0).to(tl.float32)[:, None]
        value = tl.where(scale == 0.0, 0.0, value * scale)
    value += tl.load(residual + row[:, None] * residual_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * N + column[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "rows_per_scale"])
def linear_tma_kernel(
    x,  # [M, K]
    weight,  # [N, K]
    bias,  # [N] or unused
    out,  # [M, N], contiguous
    pre,  # [M, N], contiguous, or unused
    residual,  # [M, N] or unused
    gamma,  # [N] or unused
    row_scale,  # [M / rows_per_scale] or unused
    M,
    N,
    K,
    x_stride,
    weight_stride,
    residual_stride,
    rows_per_scale,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GELU: tl.constexpr,
    EXACT: tl.constexpr,
    STORE_PRE: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """Tensor descriptors load both operands and store the result; edges are the hardware's business."""
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    x_tiles = tl.make_tensor_descriptor(x, [M, K], [x_stride, 1], [BLOCK_M, BLOCK_K])
    weight_tiles = tl.make_tensor_descriptor(weight, [N, K], [weight_stride, 1], [BLOCK_N, BLOCK_K])
    if not HAS_RESIDUAL:
        out_tiles = tl.make_tensor_descriptor(out, [M, N], [N, 1], [BLOCK_M, WIDTH])
    if STORE_PRE:
        pre_tiles = tl.make_tensor_descriptor(pre, [M, N], [N, 1], [BLOCK_M, WIDTH])
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # Flattened, the loads of the next tile are under way during this one's epilogue; specialised warps do so anyway.
    for tile in tl.range(
        tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=not SPECIALIZE, warp_specialize=SPECIALIZE
    ):
        tile_m, tile_n = tile_origin(tile, tiles_m, tiles_n, GROUP)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(tl.cdiv(K, BLOCK_K)):
            a = x_tiles.load([tile_m * BLOCK_M, step * BLOCK_K])
            b = weight_tiles.load([tile_n * BLOCK_N, step * BLOCK_K])
            total = tl.dot(a, b.T, total, input_precision=PRECISION)
        parts = halves(total, BLOCK_M, BLOCK_N, PARTS)
        for part in tl.static_range(PARTS):
            start = tile_n * BLOCK_N + part * WIDTH
            column = start + tl.arange(0, WIDTH)
            value = parts[part]
            if HAS_BIAS:
                value += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
            if STORE_PRE:
                pre_tiles.store([tile_m * BLOCK_M, start], value.to(pre.dtype.element_ty))
            if GELU:
                value = gelu(value, EXACT)
            if not HAS_RESIDUAL:
                out_tiles.store([tile_m * BLOCK_M, start], value.to(out.dtype.element_ty))
            else:
                row = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
                add_residual(
                    value, residual, gamma, row_scale, out, row, column, M, N, residual_stride, rows_per_scale,
                    HAS_GAMMA, HAS_SCALE,
                )  # fmt: skip


@triton.jit(do_not_specialize=["M", "rows_per_scale"])
def linear_kernel(
    x,  # [M, K]
    weight,  # [N, K]
    bias,  # [N] or unused
    out,  # [M, N], contiguous
    pre,  # [M, N], contiguous, or unused
    residual,  # [M, N] or unused
    gamma,  # [N] or unused
    row_scale,  # [M / rows_per_scale] or unused
    M,
    N,
    K,
    x_stride,
    weight_stride,
    residual_stride,
    rows_per_scale,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GELU: tl.constexpr,
    EXACT: tl.constexpr,
    STORE_PRE: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Pointers and masks: any strides, any sizes, any architecture."""
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_origin(tile, tiles_m, tiles_n, GROUP)
        row = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        output = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        depth = tl.arange(0, BLOCK_K)
        # Rows beyond the edge read the last row instead: no mask in the inner loop, and the store drops them.
        a_base = x + tl.minimum(row, M - 1)[:, None] * x_stride
        b_base = weight + tl.minimum(output, N - 1).to(tl.int64)[None, :] * weight_stride
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(tl.cdiv(K, BLOCK_K)):
            k = step * BLOCK_K + depth
            a = tl.load(a_base + k[None, :], mask=(k < K)[None, :], other=0.0)
            b = tl.load(b_base + k[:, None], mask=(k < K)[:, None], other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
        parts = halves(total, BLOCK_M, BLOCK_N, PARTS)
        for part in tl.static_range(PARTS):
            column = tile_n * BLOCK_N + part * WIDTH + tl.arange(0, WIDTH)
            mask = (row < M)[:, None] & (column < N)[None, :]
            offset = row[:, None] * N + column[None, :]
            value = parts[part]
            if HAS_BIAS:
                value += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
            if STORE_PRE:
                tl.store(pre + offset, value.to(pre.dtype.element_ty), mask=mask)
            if GELU:
                value = gelu(value, EXACT)
            if not HAS_RESIDUAL:
                tl.store(out + offset, value.to(out.dtype.element_ty), mask=mask)
            else:
                add_residual(
                    value, residual, gamma, row_scale, out, row, column, M, N, residual_stride, rows_per_scale,
                    HAS_GAMMA, HAS_SCALE,
                )  # fmt: skip


def default_tile(dtype: torch.dtype, major: int, residual: bool, rows: int = MANY_ROWS) -> LinearTile:
    """Layout for a dtype, a compute capability's major number, an epilogue with or without a residual, and rows."""
    if dtype == torch.float32:
        return _FLOAT32
    if major not in (9, 10):  # sm_86, sm_89 and sm_120 have 99 KB of shared memory, which the pointer tile fits
        return _POINTERS
    if residual:
        return _BLACKWELL_RESIDUAL if major >= 10 else _HOPPER
    return next(tile for most, tile in _BY_ROWS if rows <= most)


def _choose(x: Tensor, residual: bool, rows: int) -> LinearTile:
    if backends.interpreting():
        return _INTERPRETER
    return default_tile(x.dtype, backends.capability(x.device.index or 0)[0], residual, rows)


def _fits_tma(*matrices: Tensor) -> bool:
    """Whether descriptors can describe all of these: 16-byte aligned bases and rows, and rows that do not overlap."""
    return all(
        t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 and t.stride(0) >= t.shape[1]
        for t in matrices
    )


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Device memory for the descriptors that the kernel writes; the caching allocator aligns by 512 bytes."""
    return torch.empty(size, device="cuda", dtype=torch.int8)


def launch(
    x: Tensor,  # [M, K], unit stride in K
    weight: Tensor,  # [N, K], unit stride in K
    bias: Tensor | None,  # [N]
    out: Tensor,  # [M, N], contiguous
    *,
    pre: Tensor | None = None,  # [M, N], contiguous
    residual: Tensor | None = None,  # [M, N], unit stride in N
    gamma: Tensor | None = None,  # [N]
    row_scale: Tensor | None = None,  # [M / rows_per_scale]
    rows_per_scale: int = 1,
    tile: LinearTile | None = None,
    exact: bool | None = None,
    activate: bool = True,
) -> None:
    """With y = x weight^T + bias: out = gelu(y), `pre` = y; or, with a residual, out = residual + row_scale gamma y.

    `exact` takes erf in the epilogue instead of its polynomial; float32 always does. Without `activate` and a residual
    out = y.
    """
    (m, k), n = x.shape, weight.shape[0]
    tile = tile or _choose(x, residual is not None, m)
    tma = tile.tma and _fits_tma(x, weight, out)
    if tile.tma and not tma and not backends.interpreting():
        tile = _POINTERS
    count = min(triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n), tile.programs * processors(x.device))
    options: dict[str, Any] = {"num_warps": tile.warps, "num_stages": tile.stages}
    if tma:
        options["SPECIALIZE"] = tile.specialize
        # The allocator belongs to the current context, and backward runs in another thread: set it at every launch.
        triton.set_allocator(_scratch)
    unused = out
    with torch.cuda.device_of(x):
        (linear_tma_kernel if tma else linear_kernel)[(count,)](
            x,
            weight,
            unused if bias is None else bias.contiguous(),
            out,
            unused if pre is None else pre,
            unused if residual is None else residual,
            unused if gamma is None else gamma.contiguous(),
            unused if row_scale is None else row_scale.contiguous(),
            m,
            n,
            k,
            x.stride(0),
            weight.stride(0),
            0 if residual is None else residual.stride(0),
            rows_per_scale,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            GELU=activate and residual is None,
            EXACT=x.dtype == torch.float32 if exact is None else exact,
            STORE_PRE=pre is not None,
            HAS_GAMMA=gamma is not None,
            HAS_SCALE=row_scale is not None,
            PRECISION="tf32" if x.dtype == torch.float32 and matmul_allows_tf32() else "ieee",
            **tile.constants(),
            **options,
        )


def linear_case(name: str, dtype: str, tile: LinearTile, flags: Mapping[str, Any], targets: tuple[int, ...]) -> AotCase:
    """Ahead-of-time case; `flags` names what is true of the epilogue (GELU, STORE_PRE, HAS_GAMMA, HAS_SCALE)."""
    stream = dtype if flags.get("GELU") else "fp32"
    matrices = {"x": dtype, "weight": dtype, "out": stream, "pre": stream, "residual": "fp32"}
    pointers = {
        **{argument: f"*{kind}" for argument, kind in matrices.items()},
        **dict.fromkeys(("bias", "gamma", "row_scale"), "*fp32"),
    }
    sizes = ("N", "K", "x_stride", "weight_stride", "residual_stride")
    constants: dict[str, Any] = dict.fromkeys(("GELU", "STORE_PRE", "HAS_GAMMA", "HAS_SCALE"), False)
    constants |= {
        "HAS_RESIDUAL": not flags.get("GELU"),
        "HAS_BIAS": True,
        "EXACT": dtype == "fp32",
        "PRECISION": "ieee",
        **tile.constants(),
        **flags,
    }
    if tile.tma:
        constants["SPECIALIZE"] = tile.specialize
    return AotCase(
        name=name,
        kernel=linear_tma_kernel if tile.tma else linear_kernel,
        types={**pointers, **dict.fromkeys(("M", "rows_per_scale", *sizes), "i32")},
        constants=constants,
        aligned=(*pointers, *sizes),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
        targets=targets,
    )


def linear_cases(name: str, variants: Mapping[str, Mapping[str, Any]]) -> list[AotCase]:
    """Cases of every dtype and architecture for the given epilogues."""
    cases = []
    for label, flags in variants.items():
        for dtype in ("bf16", "fp16"):
            for target in (90, 100):
                tile = default_tile(torch.bfloat16, target // 10, not flags.get("GELU", False))
                cases.append(linear_case(f"{name}_{dtype}{label}_sm_{target}", dtype, tile, flags, (target,)))
            cases.append(linear_case(f"{name}_{dtype}{label}_pointers", dtype, _POINTERS, flags, (80, 90, 100)))
        for precision in ("ieee", "tf32"):
            exact = {**flags, "PRECISION": precision}
            cases.append(linear_case(f"{name}_fp32_{precision}{label}", "fp32", _FLOAT32, exact, (80, 90, 100)))
    return cases
