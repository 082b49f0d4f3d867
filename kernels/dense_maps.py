"""What runs between the convolutions of dense heads and tokenizers in inference, one pass over memory each.

Every kernel looks at the values it writes and raises one flag where a value leaves the range of the map's dtype: a
ReLU after it would hide a NaN or a negative infinity, so all of them are looked at before a ReLU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._linear import gelu as gelu_of
from ._resize import scale, source
from .aot import AotCase

# Bound by memory. A warp reads 16 bytes a lane; 16 values a thread for each operand keep registers below 64, so that
# a multiprocessor holds 32 and more warps, and one reduction of the range check serves 2,048 values.
_VALUES, _CHANNELS, _WARPS = 2048, 256, 4


@triton.jit
def watch(value, mask, limit, flag_ptr):
    """Raise the flag if a value is NaN or beyond the limit."""
    outside = (~(tl.abs(value) <= limit)) & mask
    if tl.max(tl.max(outside.to(tl.int32), axis=1), axis=0) != 0:
        tl.store(flag_ptr, 1)


@triton.jit
def rectified(value):
    """ReLU by comparison: a maximum would turn NaN into zero."""
    return tl.where(value < 0.0, 0.0, value)


@triton.jit
def interpolated(coarse_ptr, pixel, c, mask, height, width, small_h, small_w, scale_y, scale_x, channels):
    """Values of a coarser map [N, small_h, small_w, channels] at pixels of [N, height, width], corners aligned."""
    row = pixel // width
    x = pixel - row * width
    view = row // height
    y = row - view * height
    y0, y1, below = source(y, scale_y, small_h)
    x0, x1, right = source(x, scale_x, small_w)
    upper = (view.to(tl.int64) * small_h + y0) * small_w
    lower = (view.to(tl.int64) * small_h + y1) * small_w
    a = tl.load(coarse_ptr + (upper + x0)[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(coarse_ptr + (upper + x1)[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
    d = tl.load(coarse_ptr + (lower + x0)[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
    e = tl.load(coarse_ptr + (lower + x1)[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
    right = right[:, None]
    below = below[:, None]
    return (1.0 - below) * ((1.0 - right) * a + right * b) + below * ((1.0 - right) * d + right * e)


@triton.jit(do_not_specialize=["pixels", "height", "width", "small_h", "small_w"])
def finish_kernel(
    map_ptr,  # [pixels, channels], a convolution's result
    bias_ptr,  # [channels] or unused
    residual_ptr,  # [pixels, channels] or unused
    coarse_ptr,  # [N, small_h, small_w, channels] or unused
    out_ptr,  # [pixels, channels] or unused
    relu_ptr,  # [pixels, channels] or unused
    flag_ptr,  # int32
    pixels,
    height,
    width,
    small_h,
    small_w,
    scale_y,
    scale_x,
    channels,
    limit,
    HAS_MAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_COARSE: tl.constexpr,
    OUT: tl.constexpr,
    RELU: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """sum = map + bias + residual + resized coarse map; written to `out` with OUT, its ReLU to `relu` with RELU."""
    pixel = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = (pixel < pixels)[:, None] & (c < channels)[None, :]
    offset = pixel.to(tl.int64)[:, None] * channels + c[None, :]
    value = tl.zeros([BP, BC], tl.float32)
    if HAS_MAP:
        value = tl.load(map_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        value += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if HAS_COARSE:
        value += interpolated(coarse_ptr, pixel, c, mask, height, width, small_h, small_w, scale_y, scale_x, channels)
    watch(value, mask, limit, flag_ptr)
    if OUT:
        tl.store(out_ptr + offset, value.to(out_ptr.dtype.element_ty), mask=mask)
    if RELU:
        tl.store(relu_ptr + offset, rectified(value).to(relu_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "batch", "length"])
def narrow_kernel(
    x_ptr,  # [views, batch, length, channels] by strides, unit stride in channels
    out_ptr,  # [views * batch * length, channels]
    flag_ptr,  # int32
    rows,
    batch,
    length,
    stride_view,
    stride_batch,
    stride_row,
    channels,
    limit,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Rows in the map's dtype."""
    row = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = (row < rows)[:, None] & (c < channels)[None, :]
    image = row // length
    token = row - image * length
    view = image // batch
    sample = image - view * batch
    start = view.to(tl.int64) * stride_view + sample.to(tl.int64) * stride_batch + token.to(tl.int64) * stride_row
    value = tl.load(x_ptr + start[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    watch(value, mask, limit, flag_ptr)
    offset = row.to(tl.int64)[:, None] * channels + c[None, :]
    tl.store(out_ptr + offset, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["pixels"])
def gelu_kernel(
    map_ptr,  # [pixels, channels], a convolution's result
    bias_ptr,  # [channels]
    residual_ptr,  # [pixels, channels] or unused
    out_ptr,  # [pixels, channels]
    flag_ptr,  # int32
    pixels,
    channels,
    limit,
    HAS_RESIDUAL: tl.constexpr,
    EXACT: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """gelu(map + bias + residual)."""
    pixel = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = (pixel < pixels)[:, None] & (c < channels)[None, :]
    offset = pixel.to(tl.int64)[:, None] * channels + c[None, :]
    value = tl.load(map_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        value += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    watch(value, mask, limit, flag_ptr)
    tl.store(out_ptr + offset, gelu_of(value, EXACT).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["pixels", "height", "width", "stride_n", "stride_h"])
def patches_kernel(
    x_ptr,  # [N, height * PATCH, width * PATCH, CIN] by strides, contiguous in the last two
    out_ptr,  # [pixels, channels], pixels = N * height * width
    flag_ptr,  # int32
    pixels,
    height,
    width,
    channels,
    stride_n,
    stride_h,
    limit,
    PATCH: tl.constexpr,
    CIN: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """Patches as rows, (row, column, channel) in each, zeros behind them."""
    RUN: tl.constexpr = PATCH * CIN
    pixel = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    line = pixel // width
    view = line // height
    start = view.to(tl.int64) * stride_n + (line - view * height).to(tl.int64) * PATCH * stride_h
    start += (pixel - line * width) * RUN
    inner = c // RUN
    shift = inner.to(tl.int64) * stride_h + (c - inner * RUN)
    live = (pixel < pixels)[:, None]
    mask = live & (c < PATCH * RUN)[None, :]
    value = tl.load(x_ptr + start[:, None] + shift[None, :], mask=mask, other=0.0).to(tl.float32)
    watch(value, mask, limit, flag_ptr)
    offset = pixel.to(tl.int64)[:, None] * channels + c[None, :]
    tl.store(out_ptr + offset, value.to(out_ptr.dtype.element_ty), mask=live & (c < channels)[None, :])


def _block(channels: int) -> tuple[int, int]:
    """Pixels and channels of a block."""
    width = min(triton.next_power_of_2(channels), _CHANNELS)
    return _VALUES // width, width


def finish(
    value: Tensor | None,  # [N, H, W, C] contiguous
    bias: Tensor | None,  # [C]
    residual: Tensor | None,  # [N, H, W, C] contiguous
    coarse: Tensor | None,  # [N, h, w, C] contiguous
    double: tuple[int, int],
    out: Tensor | None,  # [N, H, W, C]
    relu: Tensor | None,  # [N, H, W, C]
    flag: Tensor,  # [1] int32
) -> None:
    """Write the sum to `out` and its ReLU to `relu`; `double` is the size that `coarse` has when it is resized."""
    like = out if out is not None else relu
    assert like is not None
    views, height, width, channels = like.shape
    pixels = views * height * width
    if pixels == 0:
        return
    small_h, small_w = (1, 1) if coarse is None else (coarse.shape[1], coarse.shape[2])
    bp, bc = _block(channels)
    with torch.cuda.device_of(like):
        finish_kernel[(triton.cdiv(pixels, bp), triton.cdiv(channels, bc))](
            like if value is None else value,
            like if bias is None else bias,
            like if residual is None else residual,
            like if coarse is None else coarse,
            like if out is None else out,
            like if relu is None else relu,
            flag, pixels, height, width, small_h, small_w, scale(small_h, double[0]), scale(small_w, double[1]),
            channels, torch.finfo(like.dtype).max,
            HAS_MAP=value is not None, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
            HAS_COARSE=coarse is not None, OUT=out is not None, RELU=relu is not None, BP=bp, BC=bc, num_warps=_WARPS,
        )  # fmt: skip


def narrow(x: Tensor, out: Tensor, flag: Tensor) -> None:
    """Write [views, batch, length, C] (any strides, unit in C) to [views * batch * length, C] in another dtype."""
    views, batch, length, channels = x.shape
    rows = views * batch * length
    if rows == 0:
        return
    bp, bc = _block(channels)
    with torch.cuda.device_of(out):
        narrow_kernel[(triton.cdiv(rows, bp), triton.cdiv(channels, bc))](
            x, out, flag, rows, batch, length, *x.stride()[:3], channels, torch.finfo(out.dtype).max,
            BP=bp, BC=bc, num_warps=_WARPS,
        )  # fmt: skip


def gelu(
    value: Tensor,  # [N, H, W, C] contiguous
    bias: Tensor,  # [C]
    residual: Tensor | None,  # [N, H, W, C] contiguous
    out: Tensor,  # [N, H, W, C] contiguous
    flag: Tensor,  # [1] int32
) -> None:
    """Write gelu(value + bias + residual) to `out`."""
    channels = value.shape[3]
    pixels = value.shape[0] * value.shape[1] * value.shape[2]
    if pixels == 0:
        return
    bp, bc = _block(channels)
    with torch.cuda.device_of(value):
        gelu_kernel[(triton.cdiv(pixels, bp), triton.cdiv(channels, bc))](
            value, bias, value if residual is None else residual, out, flag, pixels, channels,
            torch.finfo(out.dtype).max, HAS_RESIDUAL=residual is not None, EXACT=out.dtype == torch.float32,
            BP=bp, BC=bc, num_warps=_WARPS,
        )  # fmt: skip


def patches(x: Tensor, patch: int, out: Tensor, flag: Tensor) -> None:
    """Write the patches of [N, H, W, Cin] (contiguous in W and Cin) to [N, H / patch, W / patch, channels]."""
    n, height, width, channels = out.shape
    pixels = n * height * width
    if pixels == 0:
        return
    bp, bc = _block(channels)
    with torch.cuda.device_of(out):
        patches_kernel[(triton.cdiv(pixels, bp), triton.cdiv(channels, bc))](
            x, out, flag, pixels, height, width, channels, x.stride(0), x.stride(1), torch.finfo(out.dtype).max,
            PATCH=patch, CIN=x.shape[3], BP=bp, BC=bc, num_warps=_WARPS,
        )  # fmt: skip


_FINISHES = {
    "check": {"RELU": True},
    "relu": {"HAS_BIAS": True, "RELU": True},
    "bias": {"HAS_BIAS": True, "OUT": True},
    "residual": {"HAS_BIAS": True, "HAS_RESIDUAL": True, "OUT": True},
    "fusion": {"HAS_BIAS": True, "HAS_RESIDUAL": True, "HAS_COARSE": True, "OUT": True, "RELU": True},
    "upsample": {"HAS_MAP": False, "HAS_COARSE": True, "OUT": True},
}


def aot_cases() -> list[AotCase]:
    """Every kind of pass that heads and tokenizers make, at their widths, and the conversions of rows and patches."""
    cases = []
    flags = ("HAS_BIAS", "HAS_RESIDUAL", "HAS_COARSE", "OUT", "RELU")
    for name, chosen in _FINISHES.items():
        for kind in ("fp16", "bf16"):
            channels = 128 if name == "bias" else 256
            bp, bc = _block(channels)
            maps = ("map_ptr", "bias_ptr", "residual_ptr", "coarse_ptr", "out_ptr", "relu_ptr")
            types: dict[str, str] = dict.fromkeys(maps, f"*{kind}") | {"flag_ptr": "*i32"}
            types |= dict.fromkeys(("pixels", "height", "width", "small_h", "small_w", "channels"), "i32")
            types |= dict.fromkeys(("scale_y", "scale_x", "limit"), "fp32")
            constants: dict[str, Any] = {"HAS_MAP": True, **dict.fromkeys(flags, False), **chosen, "BP": bp, "BC": bc}
            cases.append(
                AotCase(f"dense_maps_{name}_{kind}", finish_kernel, types, constants, (*maps, "flag_ptr", "channels"),
                        {"num_warps": _WARPS})
            )  # fmt: skip
    for source_kind in ("fp32", "bf16"):
        bp, bc = _block(1024)
        types = {"x_ptr": f"*{source_kind}", "out_ptr": "*fp16", "flag_ptr": "*i32", "limit": "fp32"}
        integers = ("rows", "batch", "length", "stride_view", "stride_batch", "stride_row", "channels")
        types |= dict.fromkeys(integers, "i32")
        aligned = ("x_ptr", "out_ptr", "flag_ptr", "stride_view", "stride_batch", "stride_row", "channels")
        cases.append(
            AotCase(f"dense_maps_narrow_{source_kind}", narrow_kernel, types, {"BP": bp, "BC": bc}, aligned,
                    {"num_warps": _WARPS})
        )  # fmt: skip
    return cases + _tokenizer_cases()


def _tokenizer_cases() -> list[AotCase]:
    cases = []
    for kind in ("fp16", "bf16"):
        maps = ("map_ptr", "bias_ptr", "residual_ptr", "out_ptr")
        for residual in (False, True):
            bp, bc = _block(1024)
            types: dict[str, str] = dict.fromkeys(maps, f"*{kind}") | {"flag_ptr": "*i32", "limit": "fp32"}
            types |= dict.fromkeys(("pixels", "channels"), "i32")
            constants: dict[str, Any] = {"HAS_RESIDUAL": residual, "EXACT": False, "BP": bp, "BC": bc}
            cases.append(
                AotCase(f"dense_maps_gelu_{'residual_' if residual else ''}{kind}", gelu_kernel, types, constants,
                        (*maps, "flag_ptr", "channels"), {"num_warps": _WARPS})
            )  # fmt: skip
        for cin, channels in ((3, 592), (1, 200)):
            bp, bc = _block(channels)
            types = {"x_ptr": "*fp32", "out_ptr": f"*{kind}", "flag_ptr": "*i32", "limit": "fp32"}
            types |= dict.fromkeys(("pixels", "height", "width", "channels", "stride_n", "stride_h"), "i32")
            constants = {"PATCH": 14, "CIN": cin, "BP": bp, "BC": bc}
            cases.append(
                AotCase(f"dense_maps_patches_{kind}_cin{cin}", patches_kernel, types, constants,
                        ("x_ptr", "out_ptr", "flag_ptr"), {"num_warps": _WARPS})
            )  # fmt: skip
    return cases
