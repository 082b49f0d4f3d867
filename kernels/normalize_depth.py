"""Masked mean depth of each map, then division by it and logarithmic scaling: two passes, no atomics, no host read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase

BLOCK = 4096
"""Pixels a program takes: 16 KB of float32, and more programs than multiprocessors from four views on."""

MAX_PARTS = 65_536
"""Partial sums that one program may add again in the second pass (268 million pixels a map)."""


@triton.jit
def _log(x):
    """Natural logarithm of positive normal float32 numbers to about one unit in the last place.

    The hardware's approximation (`tl.log`) is off by 1e-7 near one, where its result is near zero.
    """
    bits = x.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    exponent = (bits >> 23) - 127
    mantissa = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    f = mantissa - 1.0  # in [sqrt(1/2) - 1, sqrt(2) - 1]
    s = f / (2.0 + f)
    z = s * s
    # atanh series of log((1 + s) / (1 - s)) / s - 2, |s| < 0.1716: the first term left out is below 1e-9.
    series = z * (0.66666667 + z * (0.4 + z * (0.2857143 + z * (0.22222222 + z * 0.18181818))))
    half = 0.5 * f * f
    k = exponent.to(tl.float32)
    return k * 0.693147182 + (f - (half - s * (half + series)))


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0: the rounding of 1 + x is put back to first order."""
    u = 1.0 + x
    result = _log(u) + (x - (u - 1.0)) / u
    return tl.where(x < float("inf"), result, x)


@triton.jit
def depth_sums_kernel(
    depth_ptr,  # [N, P] by strides
    sums_ptr,  # [N, parts, 2]: sum and count of positive depths
    pixels,
    parts,
    stride_n,
    stride_p,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    pixel = part * BLOCK + tl.arange(0, BLOCK)
    source = depth_ptr + n * stride_n + pixel.to(tl.int64) * stride_p
    depth = tl.load(source, mask=pixel < pixels, other=0.0).to(tl.float32)
    positive = depth > 0
    out = sums_ptr + (n * parts + part) * 2
    tl.store(out, tl.sum(tl.where(positive, depth, 0.0), 0))
    tl.store(out + 1, tl.sum(positive.to(tl.float32), 0))


@triton.jit
def depth_scale_kernel(
    depth_ptr,  # [N, P] by strides
    sums_ptr,  # [N, parts, 2]
    out_ptr,  # [N, P]
    log_factor_ptr,  # [N]
    pixels,
    parts,
    stride_n,
    stride_p,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, PARTS)
    sums = sums_ptr + (n * parts + lane) * 2
    total = tl.sum(tl.load(sums, mask=lane < parts, other=0.0), 0)
    count = tl.sum(tl.load(sums + 1, mask=lane < parts, other=0.0), 0)
    factor = tl.maximum(total / (count + 1e-8), 1e-8)
    if tl.program_id(1) == 0:
        tl.store(log_factor_ptr + n, tl.where(factor < float("inf"), _log(factor + 1e-8), factor))
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = depth_ptr + n * stride_n + pixel.to(tl.int64) * stride_p
    scaled = tl.load(source, mask=pixel < pixels, other=0.0).to(tl.float32) / factor
    magnitude = tl.abs(scaled)
    # Comparing, not tl.maximum: a NaN pixel stays NaN, and NaN alone.
    result = scaled / tl.where(magnitude < 1e-8, 1e-8, magnitude) * _log1p(magnitude)
    result = tl.where(scaled == scaled, result, scaled)
    tl.store(out_ptr + n * pixels + pixel, result.to(out_ptr.dtype.element_ty), mask=pixel < pixels)


def normalize_depth_forward(depth: Tensor) -> tuple[Tensor, Tensor]:
    """(log-scaled depth [N, H, W, 1], log factor [N] float32) of depth [N, H, W, 1]."""
    n, height, width, _ = depth.shape
    pixels = height * width
    out = torch.empty(depth.shape, device=depth.device, dtype=depth.dtype)
    log_factor = torch.empty(n, device=depth.device, dtype=torch.float32)
    if n == 0 or pixels == 0:
        return out, log_factor.fill_(2e-8).log_()
    if height > 1 and depth.stride(1) != width * depth.stride(2):
        depth = depth.contiguous()
    parts = triton.cdiv(pixels, BLOCK)
    if parts > MAX_PARTS:
        raise ValueError(f"depth: expected at most {MAX_PARTS * BLOCK} pixels a map, got {pixels}; use backend='eager'")
    sums = torch.empty(n, parts, 2, device=depth.device, dtype=torch.float32)
    strides = depth.stride(0), depth.stride(2)
    with torch.cuda.device_of(depth):
        depth_sums_kernel[n, parts](depth, sums, pixels, parts, *strides, BLOCK=BLOCK, num_warps=4)
        depth_scale_kernel[n, parts](
            depth, sums, out, log_factor, pixels, parts, *strides,
            BLOCK=BLOCK, PARTS=triton.next_power_of_2(parts), num_warps=4,
        )  # fmt: skip
    return out, log_factor


def aot_cases() -> list[AotCase]:
    """float32 and 16-bit maps of 518 x 336 pixels (43 partial sums)."""
    integers = dict.fromkeys(("pixels", "parts", "stride_n"), "i32")
    cases = []
    for dtype in ("fp32", "bf16"):
        pointers = {"depth_ptr": f"*{dtype}", "sums_ptr": "*fp32", "out_ptr": f"*{dtype}", "log_factor_ptr": "*fp32"}
        for kernel, constants in (
            (depth_sums_kernel, {"BLOCK": BLOCK, "stride_p": 1}),
            (depth_scale_kernel, {"BLOCK": BLOCK, "PARTS": 64, "stride_p": 1}),
        ):
            types = {k: v for k, v in (pointers | integers).items() if k in kernel.arg_names}
            aligned = tuple(k for k in (*types,) if k != "parts")
            name = f"{kernel.__name__.removesuffix('_kernel')}_{dtype}"
            cases.append(AotCase(name, kernel, types, constants, aligned, {"num_warps": 4}))
    return cases
