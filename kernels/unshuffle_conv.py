"""PixelUnshuffle and 3x3 convolution as one matmul that gathers its left operand from the dense map.

The unshuffled map has Cin * P * P channels, one for each pixel of a patch; tap (dy, dx) of the convolution therefore
reads the whole patch at (ty + dy, tx + dx). For each tap the depth runs over (row, column, channel) of that patch,
which is the memory order of a channels-last map: runs of P * Cin contiguous elements. The weight is reordered to
match, and padded with zeros to whole matmul steps, in one small copy a call.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tf32 import operand, rounded
from .aot import AotCase
from .tokenize import EXACT_TILES, Tiles, extent, major, precision, quotient

TILES = {
    # The depth of one tap, 588 or 196, is padded to whole steps: 32 wastes 3 % and 14 %, 64 would waste 9 % and 31 %.
    # 128 registers and at most 98 KB let two blocks share a multiprocessor, one gathering while the other multiplies;
    # what spills is the epilogue's addresses, once a tile. In 16 bits, measured, small blocks do as much without it.
    (9, 2): Tiles(64, 128, 32, 4, 3),
    (9, 4): Tiles(128, 128, 32, 8, 3, 128),
    (10, 2): Tiles(128, 128, 32, 8, 4),
    (10, 4): Tiles(128, 128, 32, 8, 3),
    (8, 2): Tiles(128, 128, 32, 8, 4),
    (8, 4): Tiles(128, 64, 32, 4, 3),
}
"""Keyed by (compute capability major, bytes of the weight's dtype)."""


def tiles(dtype: torch.dtype, index: int | None) -> Tiles:
    """Tile sizes for a weight's dtype on a device."""
    if dtype == torch.float32 and precision(dtype) == "ieee":
        return EXACT_TILES
    return TILES[min(max(major(index), 8), 10), dtype.itemsize]


@triton.jit(do_not_specialize=["rows"])
def unshuffle_conv_kernel(
    x_ptr,  # [N, H, W, CIN], the last two dimensions contiguous
    weight_ptr,  # [COUT, 9, STEPS * BK], zeros past CIN * PATCH * PATCH
    bias_ptr,  # [COUT] or None
    out_ptr,  # [N, h, w, COUT]
    rows,
    grid_h,
    grid_w,
    channels,
    stride_n,
    stride_h,
    CIN: tl.constexpr,
    PATCH: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    DEPTH: tl.constexpr = CIN * PATCH * PATCH
    STEPS: tl.constexpr = (DEPTH + BK - 1) // BK
    RUN: tl.constexpr = CIN * PATCH
    dtype = weight_ptr.dtype.element_ty
    across = tl.cdiv(channels, BN)
    row = tl.program_id(0) // across * BM + tl.arange(0, BM)
    col = tl.program_id(0) % across * BN + tl.arange(0, BN)
    safe_col = tl.minimum(col, channels - 1)
    ty = row // grid_w % grid_h
    tx = row % grid_w
    corner = ty * PATCH * stride_h + tx * RUN
    image = row // (grid_h * grid_w)
    # A row's offset is kept for the whole loop: 32 bits where they reach take half the registers.
    corner += image.to(tl.int64) * stride_n if WIDE else image * stride_n
    corner = tl.multiple_of(corner, VEC)[:, None]
    weights = weight_ptr + safe_col[None, :].to(tl.int64) * (9 * STEPS * BK)
    lane = tl.arange(0, BK)

    # Taps outside the map read nothing: zero padding. One bit a tap, set once, is all that the loop has to test.
    taps = tl.zeros([BM], tl.int32)
    for index in tl.static_range(9):
        y = ty + (index // 3 - 1)
        x = tx + (index % 3 - 1)
        inside = (row < rows) & (y >= 0) & (y < grid_h) & (x >= 0) & (x < grid_w)
        taps |= inside.to(tl.int32) << index

    acc = tl.zeros([BM, BN], tl.float32)
    for step in range(0, 9 * STEPS):
        tap = step // STEPS
        shift = (tap // 3 - 1) * PATCH * stride_h + (tap % 3 - 1) * RUN
        k = step % STEPS * BK + lane
        # A step's padding has zero weights, and reads the first pixels of the same patch.
        k = tl.where(k < DEPTH, k, k % 2)
        line = quotient(k, DEPTH, RUN)
        offset = line * stride_h + (k - line * RUN)
        offset = tl.multiple_of(tl.max_contiguous(offset, VEC), VEC)
        patch = x_ptr + tl.multiple_of(shift, VEC)
        live = ((taps >> tap) & 1) != 0
        a = tl.load(patch + (corner + offset[None, :]), mask=live[:, None], other=0.0)
        w = tl.load(weights + (step * BK + lane)[:, None])
        acc = tl.dot(operand(a.to(dtype), PRECISION), w, acc, input_precision=PRECISION)

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + safe_col).to(tl.float32)[None, :]
    out = out_ptr + row.to(tl.int64)[:, None] * channels + col[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (col < channels)[None, :])


def reordered(weight: Tensor, cin: int, patch: int, step: int) -> Tensor:
    """[Cout, Cin * P * P, 3, 3] to [Cout, 9, depth], depth (row, column, channel) padded with zeros to whole steps.

    Rounded as the matmul takes it.
    """
    cout, depth = weight.shape[0], cin * patch * patch
    taps = weight.reshape(cout, cin, patch, patch, 3, 3).permute(0, 4, 5, 2, 3, 1)
    padded = weight.new_zeros(cout, 9, triton.cdiv(depth, step) * step)
    padded[:, :, :depth] = taps.reshape(cout, 9, depth)
    return rounded(padded, precision(weight.dtype))


def unshuffle_conv_forward(
    x: Tensor,  # [N, H, W, Cin] float
    weight: Tensor,  # [Cout, Cin * P * P, 3, 3]
    bias: Tensor | None,  # [Cout]
    patch: int,
    out_dtype: torch.dtype,
    config: Tiles | None = None,
) -> Tensor:
    """[N, H / P, W / P, Cout]; maps whose rows are not channels-last contiguous are copied first."""
    n, height, width, cin = x.shape
    cout = weight.shape[0]
    grid_h, grid_w = height // patch, width // patch
    out = torch.empty(n, grid_h, grid_w, cout, device=x.device, dtype=out_dtype)
    rows = n * grid_h * grid_w
    if rows == 0 or cout == 0:
        return out
    if x.stride(2) != cin or (cin > 1 and x.stride(3) != 1):
        x = x.contiguous()
    t = config or tiles(weight.dtype, x.device.index)
    even = patch * cin % 2 == 0 and x.stride(0) % 2 == 0 and x.stride(1) % 2 == 0
    aligned = x.data_ptr() % (2 * x.element_size()) == 0
    grid = (triton.cdiv(rows, t.bm) * triton.cdiv(cout, t.bn),)
    with torch.cuda.device_of(x):
        unshuffle_conv_kernel[grid](
            x, reordered(weight, cin, patch, t.bk), None if bias is None else bias.contiguous(), out,
            rows, grid_h, grid_w, cout, x.stride(0), x.stride(1),
            CIN=cin, PATCH=patch, VEC=2 if even and aligned else 1, WIDE=extent(x) > 2**31 - 1,
            PRECISION=precision(weight.dtype), BM=t.bm, BN=t.bn, BK=t.bk, **t.options(),
        )  # fmt: skip
    return out


def aot_cases() -> list[AotCase]:
    """Rays or flow (3 channels) and depth (1 channel), in 16 bits, TF32 and exact float32."""
    cases = []
    for generation in (8, 9, 10):
        targets = (generation * 10,)
        for x, weight, cin in (("fp32", "fp32", 3), ("fp32", "fp32", 1), ("fp32", "fp16", 3), ("bf16", "bf16", 3)):
            t = TILES[generation, 4 if weight == "fp32" else 2]
            cases.append(
                _case(f"unshuffle_conv_{x}_{weight}_cin{cin}_{generation}", x, weight, cin, t, "tf32", targets)
            )
    cases.append(_case("unshuffle_conv_ieee_cin3", "fp32", "fp32", 3, EXACT_TILES, "ieee", (80, 90, 100)))
    return cases


def _case(name: str, x: str, weight: str, cin: int, t: Tiles, how: str, targets: tuple[int, ...]) -> AotCase:
    integers = ("rows", "grid_h", "grid_w", "channels", "stride_n", "stride_h")
    pointers = {"x_ptr": x, "weight_ptr": weight, "bias_ptr": weight, "out_ptr": weight}
    return AotCase(
        name=name,
        kernel=unshuffle_conv_kernel,
        types={k: f"*{v}" for k, v in pointers.items()} | dict.fromkeys(integers, "i32"),
        constants=dict(CIN=cin, PATCH=14, VEC=2, WIDE=False, PRECISION=how, BM=t.bm, BN=t.bn, BK=t.bk),
        aligned=("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"),
        options=t.options(),
        targets=targets,
        # A register limit spills the epilogue's addresses, outside the loop (see TILES).
        max_spills=200 if t.registers else 0,
    )
