"""Linear layers on e4m3 rows: the persistent product, rows to e4m3, and the bias that makes up for rounded weights."""

# Kernels grow tuples of blocks, which mypy takes for tuples of fixed length.
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from any4d_fast import backends
from any4d_fast.reference.linear_fp8 import SAMPLES

from ._linear import LinearTile, _scratch, gelu, halves, tile_origin
from ._rows import RowTile, as_rows, load_rows, processors, programs, store_e4m3
from .aot import AotCase
from .layer_norm import forward_tile

E4M3 = torch.float8_e4m3fn

# The tile of the 16-bit product with steps twice as deep, which are as many bytes: two programs a multiprocessor, so
# that one multiplies while the other is in its epilogue, which GELU makes two thirds as long as the product at K = 768.
TILE = LinearTile(m=128, n=128, k=128, warps=4, stages=3, parts=2, programs=2, tma=True)
# On sm_100, 8 warps: with 4, the sums spill on their way out of tensor memory.
_BLACKWELL = LinearTile(m=128, n=128, k=128, warps=8, stages=3, parts=2, programs=2, tma=True)
# Sums in float32 beside the tensor cores' need twice the registers.
PROMOTING_TILE = LinearTile(m=128, n=128, k=128, warps=8, stages=3, parts=2, programs=1, tma=True)
_INTERPRETER = LinearTile(m=16, n=32, k=32, warps=4, stages=1, parts=2, group=2, tma=True)

# 16 outputs a program start enough of them on 768 outputs to read the weight's bytes at once; 256 inputs a step.
_OUTPUTS, _INPUTS, _WARPS = 16, 256, 4


@triton.jit(do_not_specialize=["M"])
def linear_fp8_kernel(
    x,  # [M, K] e4m3, contiguous
    x_scale,  # [M] float32 or unused
    weight,  # [N, K] e4m3, contiguous
    weight_scale,  # [N] float32
    bias,  # [N] or unused
    inverse,  # [N] float32 or unused
    out,  # [M, N], contiguous
    M,
    N,
    K,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    PROMOTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """out = x_scale weight_scale (x weight^T) + bias; with GELU, inverse times its GELU.

    With PROMOTE the tensor cores' sums of about 14 bits go into float32 after every BLOCK_K products.
    """
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    x_tiles = tl.make_tensor_descriptor(x, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    weight_tiles = tl.make_tensor_descriptor(weight, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    out_tiles = tl.make_tensor_descriptor(out, [M, N], [N, 1], [BLOCK_M, WIDTH])
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=not SPECIALIZE, warp_specialize=SPECIALIZE
    ):
        tile_m, tile_n = tile_origin(tile, tiles_m, tiles_n, GROUP)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(tl.cdiv(K, BLOCK_K)):
            a = x_tiles.load([tile_m * BLOCK_M, step * BLOCK_K])
            b = weight_tiles.load([tile_n * BLOCK_N, step * BLOCK_K])
            if PROMOTE:
                total += tl.dot(a, b.T)
            else:
                total = tl.dot(a, b.T, total)
        row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        if HAS_SCALE:
            row_factor = tl.load(x_scale + row, mask=row < M, other=0.0)
        parts = halves(total, BLOCK_M, BLOCK_N, PARTS)
        for part in tl.static_range(PARTS):
            start = tile_n * BLOCK_N + part * WIDTH
            column = start + tl.arange(0, WIDTH)
            inside = column < N
            value = parts[part] * tl.load(weight_scale + column, mask=inside, other=0.0)[None, :]
            if HAS_SCALE:
                value = value * row_factor[:, None]
            if HAS_BIAS:
                value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            if GELU:
                value = gelu(value, False) * tl.load(inverse + column, mask=inside, other=0.0)[None, :]
            out_tiles.store([tile_m * BLOCK_M, start], value.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["rows"])
def quantize_rows_kernel(
    x,  # [rows, C]
    out,  # [rows, C] e4m3, contiguous
    scales,  # [rows] float32
    rows,
    x_stride,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rows to e4m3; the program walks over tiles when there are more tiles than programs."""
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        valid = row < rows
        blocks = load_rows(x, x_stride, row, valid, C, CHUNK, CHUNKS)
        store_e4m3(blocks, out, scales, row, valid, C, ROWS, CHUNK, CHUNKS)


@triton.jit(do_not_specialize=["M"])
def correct_bias_kernel(
    x,  # [M, K] e4m3, contiguous
    x_scale,  # [M] float32 or unused
    lost,  # [N, K] e4m3, contiguous
    lost_scale,  # [N] float32
    bias,  # [N] or unused
    out,  # [N] float32
    M,
    N,
    K,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAMPLE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """out = bias + lost @ mean of SAMPLE rows of x; every program takes the mean for itself, from the L2 cache."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = output < N
    row = tl.arange(0, SAMPLE).to(tl.int64) * M // SAMPLE
    factor = tl.full([SAMPLE], 1.0 / SAMPLE, tl.float32)
    if HAS_SCALE:
        factor = factor * tl.load(x_scale + row)
    total = tl.zeros([OUTPUTS, INPUTS], tl.float32)
    for start in range(0, K, INPUTS):
        column = start + tl.arange(0, INPUTS)
        read = column < K
        sample = tl.load(x + row[:, None] * K + column[None, :], mask=read[None, :], other=0.0).to(tl.float32)
        mean = tl.sum(sample * factor[:, None], axis=0)
        mask = inside[:, None] & read[None, :]
        block = tl.load(lost + output.to(tl.int64)[:, None] * K + column[None, :], mask=mask, other=0.0)
        total += block.to(tl.float32) * mean[None, :]
    found = tl.sum(total, axis=1) * tl.load(lost_scale + output, mask=inside, other=0.0)
    if HAS_BIAS:
        found += tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + output, found, mask=inside)


def default_tile(major: int, promote: bool = False) -> LinearTile:
    """Layout for a compute capability's major number, with sums in the tensor cores or in float32."""
    if promote:
        return PROMOTING_TILE
    return TILE if major == 9 else _BLACKWELL


def linear_fp8(
    x: Tensor,  # [M, K] e4m3, contiguous
    x_scale: Tensor | None,  # [M] float32
    weight: Tensor,  # [N, K] e4m3, contiguous
    weight_scale: Tensor,  # [N] float32
    bias: Tensor | None,  # [N]
    inverse: Tensor | None,  # [N]
    out_dtype: torch.dtype,
    tile: LinearTile | None = None,
    promote: bool = False,
) -> Tensor:
    """x weight^T + bias, [M, N] in `out_dtype`; with `inverse`, e4m3 of its GELU times that.

    K and N are multiples of 16.
    """
    (m, k), n = x.shape, weight.shape[0]
    out = torch.empty(m, n, device=x.device, dtype=out_dtype if inverse is None else E4M3)
    if not m:
        return out
    if tile is None:
        own = (0, 0) if backends.interpreting() else backends.capability(x.device.index or 0)
        tile = default_tile(own[0], promote) if own[0] else _INTERPRETER
    count = min(triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n), tile.programs * processors(x.device))
    # The allocator belongs to the current context: set it at every launch.
    triton.set_allocator(_scratch)
    unused = weight_scale
    with torch.cuda.device_of(x):
        linear_fp8_kernel[(count,)](
            x,
            unused if x_scale is None else x_scale,
            weight,
            weight_scale,
            unused if bias is None else bias.contiguous(),
            unused if inverse is None else inverse.contiguous(),
            out,
            m,
            n,
            k,
            HAS_SCALE=x_scale is not None,
            HAS_BIAS=bias is not None,
            GELU=inverse is not None,
            PROMOTE=promote,
            SPECIALIZE=tile.specialize,
            **tile.constants(),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out


def quantize_rows(x: Tensor, tile: RowTile | None = None) -> tuple[Tensor, Tensor]:
    """Rows [..., C] in e4m3, and their scales [...] float32."""
    flat = as_rows(x)
    rows, channels = flat.shape
    out = torch.empty(x.shape, device=x.device, dtype=E4M3)
    scales = torch.empty(x.shape[:-1], device=x.device, dtype=torch.float32)
    if not rows:
        return out, scales
    tile = tile or forward_tile(channels)
    with torch.cuda.device_of(x):
        quantize_rows_kernel[(programs(rows, tile, x.device),)](
            flat, out, scales, rows, flat.stride(0), **tile.constants(channels), num_warps=tile.warps
        )
    return out, scales


def correct_bias(
    x: Tensor,  # [M, K] e4m3, contiguous
    x_scale: Tensor | None,  # [M] float32
    lost: Tensor,  # [N, K] e4m3, contiguous
    lost_scale: Tensor,  # [N] float32
    bias: Tensor | None,  # [N]
) -> Tensor:
    """bias + lost @ mean of rows of x spread evenly; [N] float32."""
    (m, k), n = x.shape, lost.shape[0]
    if not m:
        return torch.zeros(n, device=x.device) if bias is None else bias.float().clone()
    out = torch.empty(n, device=x.device, dtype=torch.float32)
    with torch.cuda.device_of(x):
        correct_bias_kernel[(triton.cdiv(n, _OUTPUTS),)](
            x,
            lost_scale if x_scale is None else x_scale,
            lost,
            lost_scale,
            lost_scale if bias is None else bias.contiguous(),
            out,
            m,
            n,
            k,
            HAS_SCALE=x_scale is not None,
            HAS_BIAS=bias is not None,
            SAMPLE=SAMPLES,
            OUTPUTS=_OUTPUTS,
            INPUTS=_INPUTS,
            num_warps=_WARPS,
        )
    return out


def linear_case(name: str, out: str, scaled: bool, target: int, promote: bool = False) -> AotCase:
    """Ahead-of-time case of the product: `out` is a Triton type, that of e4m3 for the epilogue with GELU."""
    tile, activated = default_tile(target // 10, promote), out == "fp8e4nv"
    kinds = {"x": "*fp8e4nv", "weight": "*fp8e4nv", "out": f"*{out}"}
    pointers = {**kinds, **dict.fromkeys(("x_scale", "weight_scale", "bias", "inverse"), "*fp32")}
    constants: dict[str, Any] = {"HAS_SCALE": scaled, "HAS_BIAS": True, "GELU": activated, "PROMOTE": promote}
    return AotCase(
        name=f"{name}_sm_{target}",
        kernel=linear_fp8_kernel,
        types={**pointers, **dict.fromkeys(("M", "N", "K"), "i32")},
        constants={**constants, "SPECIALIZE": tile.specialize, **tile.constants()},
        aligned=(*pointers, "N", "K"),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
        targets=(target,),
    )


def aot_cases() -> list[AotCase]:
    """Every production configuration: the three products of a block, and the two kernels around them."""
    cases = []
    for target in (90, 100):
        for out in ("bf16", "fp16"):
            cases.append(linear_case(f"linear_fp8_{out}", out, True, target))
            cases.append(linear_case(f"linear_fp8_unscaled_{out}", out, False, target))
        cases.append(linear_case("linear_fp8_gelu", "fp8e4nv", True, target))
        cases.append(linear_case("linear_fp8_bf16_promoting", "bf16", True, target, promote=True))
    for channels in (768, 1024, 4096):
        tile = forward_tile(channels)
        pointers = {"x": "*bf16", "out": "*fp8e4nv", "scales": "*fp32"}
        cases.append(
            AotCase(
                name=f"quantize_rows_{channels}_bf16",
                kernel=quantize_rows_kernel,
                types={**pointers, "rows": "i32", "x_stride": "i32"},
                constants=tile.constants(channels),
                aligned=(*pointers, "x_stride"),
                options={"num_warps": tile.warps},
                targets=(90, 100),
            )
        )
    for scaled in (True, False):
        pointers = {**dict.fromkeys(("x", "lost"), "*fp8e4nv")}
        pointers |= dict.fromkeys(("x_scale", "lost_scale", "bias", "out"), "*fp32")
        sizes = {"SAMPLE": SAMPLES, "OUTPUTS": _OUTPUTS, "INPUTS": _INPUTS}
        cases.append(
            AotCase(
                name=f"correct_bias{'' if scaled else '_unscaled'}",
                kernel=correct_bias_kernel,
                types={**pointers, **dict.fromkeys(("M", "N", "K"), "i32")},
                constants={"HAS_SCALE": scaled, "HAS_BIAS": True, **sizes},
                aligned=(*pointers, "N", "K"),
                options={"num_warps": _WARPS},
                targets=(90, 100),
            )
        )
    return cases
