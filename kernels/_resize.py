"""Bilinear resizing (align_corners) into a strip of padded pixels or a plain map, and its transpose.

A strip is a stretch of all the views' pixels in one line, rows of one map after the other, with one zero pixel after
each row of W and one zero row after each map. Pixel (n, y, x) has place (n * (H + 1) + y) * (W + 1) + x, and its
neighbour (y + dy, x + dx) lies dy * (W + 1) + dx places on, or on a zero where it is outside the map: a 3x3
convolution with zero padding is nine matmuls of shifted rows of the strip, without a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tf32 import operand
from .aot import AotCase


@dataclass(frozen=True)
class Canvas:
    """Views of H x W pixels as places of a strip, `gap` zero pixels after each row and rows after each map (1 or 0)."""

    views: int
    height: int
    width: int
    gap: int = 1

    @property
    def pitch(self) -> int:
        """Places from one row to the next."""
        return self.width + self.gap

    @property
    def places(self) -> int:
        """Places of all views, padding included."""
        return self.views * (self.height + self.gap) * self.pitch

    @property
    def reach(self) -> int:
        """Places from a pixel to its farthest neighbour."""
        return self.pitch + 1

    def rows(self, start: int, count: int) -> tuple[int, int]:
        """First row and number of whole rows that hold these places and all their neighbours."""
        top = (start - self.reach) // self.pitch
        return top, triton.cdiv(start + count + self.reach, self.pitch) - top

    def most_rows(self, count: int) -> int:
        """Rows that hold any `count` places in a line and all their neighbours."""
        return triton.cdiv(count + 2 * self.reach, self.pitch) + 1


@triton.jit
def source(position, scale, size):
    """Neighbours (lower, upper) of an output position in the input, and the upper one's weight, as PyTorch has them."""
    place = position.to(tl.float32) * scale
    lower = tl.minimum(place.to(tl.int32), size - 1)
    return lower, tl.minimum(lower + 1, size - 1), place - lower.to(tl.float32)


@triton.jit(do_not_specialize=["top", "views", "small_h", "small_w", "height", "width"])
def resize_kernel(
    x_ptr,  # [N, h, w, channels] by strides, unit stride in channels
    strip_ptr,  # [rows, W + GAP, CHANNELS]
    factor_ptr,  # [1] float32, with SCALED
    top,
    views,
    small_h,
    small_w,
    height,
    width,
    channels,
    stride_n,
    stride_h,
    stride_w,
    scale_y,
    scale_x,
    CHANNELS: tl.constexpr,
    BX: tl.constexpr,
    BC: tl.constexpr,
    GAP: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The strip is written as matmuls take it: PRECISION is theirs. SCALED multiplies by a factor first."""
    line = tl.program_id(0)
    row = top + line
    view = row // (height + GAP)
    y = row - view * (height + GAP)
    x = tl.program_id(1) * BX + tl.arange(0, BX)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    inside = (row >= 0) & (y < height) & (view < views) & (x < width)
    y0, y1, below = source(y, scale_y, small_h)
    x0, x1, right = source(x, scale_x, small_w)
    mask = inside[:, None] & (c < channels)[None, :]
    image = x_ptr + view.to(tl.int64) * stride_n + c[None, :]
    upper, lower = image + y0.to(tl.int64) * stride_h, image + y1.to(tl.int64) * stride_h
    first, second = x0[:, None] * stride_w, x1[:, None] * stride_w
    a = tl.load(upper + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(upper + second, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(lower + first, mask=mask, other=0.0).to(tl.float32)
    e = tl.load(lower + second, mask=mask, other=0.0).to(tl.float32)
    right = right[:, None]
    left = 1.0 - right
    value = (1.0 - below) * (left * a + right * b) + below * (left * d + right * e)
    if SCALED:
        value *= tl.load(factor_ptr)
    place = line.to(tl.int64) * (width + GAP) + x
    out = strip_ptr + place[:, None] * CHANNELS + c[None, :]
    value = operand(value.to(strip_ptr.dtype.element_ty), PRECISION)
    written = (x < width + GAP)[:, None]
    if CHANNELS % BC != 0:
        written = written & (c < CHANNELS)[None, :]
    tl.store(out, value, mask=written)


@triton.jit(do_not_specialize=["origin", "small_h", "small_w", "height", "width", "count_y", "count_x"])
def resize_transpose_kernel(
    strip_ptr,  # [origin + places, CHANNELS], gradient of the resized map
    out_ptr,  # [N, h, w, channels] contiguous
    origin,
    small_h,
    small_w,
    height,
    width,
    channels,
    scale_y,
    scale_x,
    inverse_y,
    inverse_x,
    count_y,
    count_x,
    CHANNELS: tl.constexpr,
    BX: tl.constexpr,
    BC: tl.constexpr,
    GAP: tl.constexpr,
):
    """Every input pixel gathers from the at most count_y x count_x output pixels that read it: no atomics."""
    view = tl.program_id(0) // small_h
    y = tl.program_id(0) % small_h
    x = tl.program_id(1) * BX + tl.arange(0, BX)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    # Readers of pixel y lie strictly between (y - 1) / scale and (y + 1) / scale; 0.01 is for rounding.
    first_y = tl.maximum(tl.ceil((y - 1).to(tl.float32) * inverse_y - 0.01).to(tl.int32), 0)
    first_x = tl.maximum(tl.ceil((x - 1).to(tl.float32) * inverse_x - 0.01).to(tl.int32), 0)
    strip = strip_ptr + (origin + view.to(tl.int64) * (height + GAP) * (width + GAP)) * CHANNELS
    total = tl.zeros([BX, BC], tl.float32)
    for j in range(0, count_y):
        out_y = first_y + j
        y0, y1, below = source(out_y, scale_y, small_h)
        share_y = tl.where(y0 == y, 1.0 - below, 0.0) + tl.where(y1 == y, below, 0.0)
        if (out_y < height) & (share_y != 0.0):
            for i in range(0, count_x):
                out_x = first_x + i
                x0, x1, right = source(out_x, scale_x, small_w)
                share = tl.where(x0 == x, 1.0 - right, 0.0) + tl.where(x1 == x, right, 0.0)
                mask = ((out_x < width) & (x < small_w) & (share != 0.0))[:, None] & (c < channels)[None, :]
                place = out_y.to(tl.int64) * (width + GAP) + out_x
                value = tl.load(strip + place[:, None] * CHANNELS + c[None, :], mask=mask, other=0.0)
                total += (share_y * share)[:, None] * value.to(tl.float32)
    pixel = tl.program_id(0).to(tl.int64) * small_w + x
    mask = (x < small_w)[:, None] & (c < channels)[None, :]
    tl.store(out_ptr + pixel[:, None] * channels + c[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


# 64 pixels x 128 channels at 8 warps: 32 values a thread, four 16-byte loads in flight for each of four pixels. Both
# kernels are bound by memory, and neither uses shared memory.
_PIXELS, _CHANNELS, _WARPS = 64, 128, 8


def resized_pixels(size: int) -> int:
    """Pixels of a resize's block, from the wider element's bytes: 64 of float32 would take 172 registers a thread."""
    return _PIXELS if size == 2 else 32


def channel_block(channels: int) -> int:
    """Channels of one block: a power of two, 128 at most."""
    return min(triton.next_power_of_2(channels), _CHANNELS)


def scale(size: int, out: int) -> float:
    """Input pixels per output pixel, corners aligned."""
    return (size - 1) / (out - 1) if out > 1 else 0.0


def resize(
    x: Tensor,  # [N, h, w, C], unit stride in C
    canvas: Canvas,
    strip: Tensor,  # [places, channels]
    top: int,
    rows: int,
    how: str,
    factor: Tensor | None = None,  # [1] float32
) -> None:
    """Write `rows` rows of the views, from row `top` on, to the start of a strip, times a factor.

    `how` is the precision of the matmuls that read it.
    """
    _, small_h, small_w, channels = x.shape
    wide = strip.shape[1]
    block, pixels = channel_block(wide), resized_pixels(max(x.element_size(), strip.element_size()))
    grid = (rows, triton.cdiv(canvas.pitch, pixels), triton.cdiv(wide, block))
    resize_kernel[grid](
        x, strip, strip if factor is None else factor, top, canvas.views, small_h, small_w, canvas.height,
        canvas.width, channels, *x.stride()[:3], scale(small_h, canvas.height), scale(small_w, canvas.width),
        CHANNELS=wide, BX=pixels, BC=block, GAP=canvas.gap, SCALED=factor is not None, PRECISION=how,
        num_warps=_WARPS,
    )  # fmt: skip


def _readers(size: int, out: int) -> tuple[float, float, int]:
    """Scale, its inverse, and the most output pixels that read one input pixel."""
    step = scale(size, out)
    if step == 0.0:
        return 0.0, 0.0, out
    # An open interval of 2 / step holds at most that many whole numbers, rounded up; 0.02 is for its two ends.
    return step, 1.0 / step, min(out, int(2.0 / step + 0.02) + 1)


def resize_transpose(strip: Tensor, canvas: Canvas, origin: int, out: Tensor) -> None:
    """Transpose of `resize`: gradient of the map [N, h, w, C] from that of its views, from place `origin` on."""
    views, small_h, small_w, channels = out.shape
    block = channel_block(channels)
    scale_y, inverse_y, count_y = _readers(small_h, canvas.height)
    scale_x, inverse_x, count_x = _readers(small_w, canvas.width)
    grid = (views * small_h, triton.cdiv(small_w, _PIXELS), triton.cdiv(channels, block))
    resize_transpose_kernel[grid](
        strip, out, origin, small_h, small_w, canvas.height, canvas.width, channels,
        scale_y, scale_x, inverse_y, inverse_x, count_y, count_x,
        CHANNELS=strip.shape[1], BX=_PIXELS, BC=block, GAP=canvas.gap, num_warps=_WARPS,
    )  # fmt: skip


def new_strip(canvas: Canvas, rows: int, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Uninitialised strip [rows * (W + 1), channels]."""
    return torch.empty(rows * canvas.pitch, channels, device=device, dtype=dtype)


def transpose_case(name: str, kind: str, channels: int, gap: int = 1) -> AotCase:
    """Ahead-of-time case of the transposed resize."""
    floats = ("scale_y", "scale_x", "inverse_y", "inverse_x")
    integers = ("origin", "small_h", "small_w", "height", "width", "channels", "count_y", "count_x")
    types = dict.fromkeys(integers, "i32") | dict.fromkeys(floats, "fp32")
    return AotCase(
        name=name,
        kernel=resize_transpose_kernel,
        types=types | {"strip_ptr": f"*{kind}", "out_ptr": f"*{kind}"},
        constants={"CHANNELS": channels, "BX": _PIXELS, "BC": channel_block(channels), "GAP": gap},
        aligned=("strip_ptr", "out_ptr", "channels"),
        options={"num_warps": _WARPS},
    )


def resize_case(name: str, kind: str, strip: str, how: str, channels: int, gap: int = 1) -> AotCase:
    """Ahead-of-time case of the resize; scaled where the strip has another dtype than the map."""
    integers = ("top", "views", "small_h", "small_w", "height", "width", "channels", "stride_n", "stride_h", "stride_w")
    types = {"x_ptr": f"*{kind}", "strip_ptr": f"*{strip}", "factor_ptr": "*fp32"} | dict.fromkeys(integers, "i32")
    size = 4 if "fp32" in (kind, strip) else 2
    constants = {"CHANNELS": channels, "BX": resized_pixels(size), "BC": channel_block(channels), "GAP": gap}
    return AotCase(
        name=name,
        kernel=resize_kernel,
        types=types | {"scale_y": "fp32", "scale_x": "fp32"},
        constants=constants | {"SCALED": strip != kind, "PRECISION": how},
        aligned=("x_ptr", "strip_ptr", "channels", "stride_n", "stride_h", "stride_w"),
        options={"num_warps": _WARPS},
    )
