"""Bilinear resize, 3x3 convolution, ReLU and 1x1 convolution, with no full-resolution map in memory.

Two kernels take turns over stretches of all the views' pixels: one resizes a stretch into a strip that stays in the L2
cache (see `_resize`), the other reads it back as the left operand of nine shifted matmuls, and finishes bias, ReLU and
the 1x1 convolution on the tile that it holds. A stretch is a whole number of waves of tiles, whatever the image's size.

Interpolating inside the matmul instead would read four neighbours for each of nine taps: `notes/resize_conv.md`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._resize import Canvas, new_strip, resize, resize_case
from ._rows import processors
from ._tf32 import operand, rounded
from .aot import AotCase
from .tokenize import major, precision

COUT = 16
"""Output channels are padded to one `tl.dot` tile."""


class Tiles(NamedTuple):
    """Pixels of a tile, depth of one matmul step, warps, stages; how a launch walks over a stretch.

    `tma` loads through tensor descriptors. `pixel_rows` makes pixels the rows of the matmul's accumulator, otherwise
    channels are. `flatten` starts the next tile's loads during a tile's epilogue. `waves` is the length of a stretch:
    tiles for each multiprocessor.
    """

    pixels: int
    bk: int
    warps: int
    stages: int
    tma: bool = False
    pixel_rows: bool = False
    flatten: bool = False
    waves: int = 3
    per_sm: int = 1


def tiles(dtype: torch.dtype, hidden: int, index: int | None) -> Tiles:
    """Tile for a dtype, hidden channels padded to a power of two, and a device."""
    return forward_tiles(dtype.itemsize, precision(dtype) == "ieee", hidden, generation(index))


def generation(index: int | None) -> int:
    """Capability major of a device, the nearest that has tiles."""
    return min(max(major(index), 8), 10)


def forward_tiles(size: int, exact: bool, hidden: int, target: int) -> Tiles:
    """Tile for bytes of an element, float32 without TF32, hidden channels, and capability major."""
    if exact:
        # The FMA units take their operands from registers: small tiles.
        return Tiles(32 if hidden > 64 else 64, 16, 8, 1, pixel_rows=True)
    if hidden < 64:
        # Fewer rows than one wgmma has, so little arithmetic and few registers: what counts is loads in flight, with as
        # many blocks as a multiprocessor takes, and stretches as long in bytes as wide maps' are. On an H200, 16
        # channels, 32 maps of 252 x 336: 0.25 ms for 0.62 with one block and three waves.
        return Tiles(128, 64 * 2 // size, 4, 3, pixel_rows=True, waves=max(1, 128 // (hidden * size)), per_sm=12)
    if target == 8:
        # 163 KB of shared memory, and accumulators share the registers with mma.sync's operands.
        return Tiles(128 if hidden <= 128 else 64, 64 if size == 2 else 32, 8, 3, pixel_rows=True)
    # 16 bits on sm_90, measured: the next tile's loads under a tile's epilogue are worth 2 %.
    flat = target == 9 and size == 2
    # 128 channels x 256 pixels: the largest accumulator that 8 warps hold (128 registers a thread), with channels in
    # the rows, so that a wgmma is 64 x 256 and reads 80 bytes of shared memory a clock, where 64 x 128 would read 96.
    return Tiles(256 if hidden <= 128 else 128, 128 // size, 8, 3 if flat else 4, tma=True, flatten=flat)


@triton.jit
def convolve(
    strip,  # [places, CHANNELS], or its descriptor
    weight,  # [9 * ROWS, CHANNELS], or its descriptor
    place,
    pitch,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    PIXEL_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """3x3 convolution of BP places from `place` on: [BP, ROWS] with PIXEL_ROWS, [ROWS, BP] without."""
    STEPS: tl.constexpr = CHANNELS // BK
    lane = tl.arange(0, BK)[None, :]
    pixel_lane = tl.arange(0, BP)[:, None] * CHANNELS + lane
    weight_lane = tl.arange(0, ROWS)[:, None] * CHANNELS + lane
    if PIXEL_ROWS:
        acc = tl.zeros([BP, ROWS], tl.float32)
    else:
        acc = tl.zeros([ROWS, BP], tl.float32)
    for step in tl.range(0, 9 * STEPS):
        tap = step // STEPS
        k = step % STEPS * BK
        neighbour = place + (tap // 3 - 1) * pitch + (tap % 3 - 1)
        if TMA:
            pixels = strip.load([neighbour, k])
            taps = weight.load([tap * ROWS, k])
        else:
            pixels = tl.load(strip + (neighbour.to(tl.int64) * CHANNELS + k) + pixel_lane)
            taps = tl.load(weight + (tap * ROWS * CHANNELS + k) + weight_lane)
        if PIXEL_ROWS:
            acc = tl.dot(pixels, taps.T, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(taps, pixels.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def locate(place, places, height, width):
    """Pixel (n * H + y) * W + x of a place, and whether the place is one."""
    pitch = width + 1
    row = place // pitch
    x = place - row * pitch
    view = row // (height + 1)
    inside = (place < places) & (x < width) & (row - view * (height + 1) < height)
    return (row - view).to(tl.int64) * width + x, inside


@triton.jit(do_not_specialize=["start", "origin", "count", "places", "height", "width"])
def resize_conv_kernel(
    strip,  # [*, CHANNELS], or its descriptor
    weight3,  # [9 * ROWS, CHANNELS], or its descriptor
    bias3_ptr,  # [ROWS] float32
    weight1_ptr,  # [16, ROWS], zeros in the padding
    bias1_ptr,  # [cout]
    out_ptr,  # [N, H, W, cout]
    flag_ptr,  # int32, with CHECK
    start,
    origin,
    count,
    places,
    height,
    width,
    COUT: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    PIXEL_ROWS: tl.constexpr,
    FLATTEN: tl.constexpr,
    CHECK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`count` tiles from place `start` on; the strip's first row is place `origin`."""
    dtype = weight1_ptr.dtype.element_ty
    channel = tl.arange(0, 16)
    hidden = tl.arange(0, ROWS)
    for tile in tl.range(tl.program_id(0), count, tl.num_programs(0), flatten=FLATTEN):
        place = start + tile * BP
        acc = convolve(strip, weight3, place - origin, width + 1, ROWS, CHANNELS, BP, BK, TMA, PIXEL_ROWS, PRECISION)
        bias3 = tl.load(bias3_ptr + hidden)
        bias1 = tl.load(bias1_ptr + channel, mask=channel < COUT, other=0.0).to(tl.float32)
        pixel, inside = locate(place + tl.arange(0, BP), places, height, width)
        # Comparing, where a maximum would turn NaN into zero.
        if PIXEL_ROWS:
            acc += bias3[None, :]
            features = operand(tl.where(acc < 0.0, 0.0, acc).to(dtype), PRECISION)
            weight1 = tl.load(weight1_ptr + channel[None, :] * ROWS + hidden[:, None])
            result = tl.dot(features, weight1, input_precision=PRECISION) + bias1[None, :]
            out = out_ptr + pixel[:, None] * COUT + channel[None, :]
            mask = inside[:, None] & (channel < COUT)[None, :]
        else:
            acc += bias3[:, None]
            features = operand(tl.where(acc < 0.0, 0.0, acc).to(dtype), PRECISION)
            weight1 = tl.load(weight1_ptr + channel[:, None] * ROWS + hidden[None, :])
            result = tl.dot(weight1, features, input_precision=PRECISION) + bias1[:, None]
            out = out_ptr + pixel[None, :] * COUT + channel[:, None]
            mask = inside[None, :] & (channel < COUT)[:, None]
        if CHECK:
            lost = (~(tl.abs(result) <= 3.4028234e38)) & mask  # infinity or NaN
            if tl.max(tl.max(lost.to(tl.int32), axis=1), axis=0) != 0:
                tl.store(flag_ptr, 1)
        tl.store(out, result.to(out_ptr.dtype.element_ty), mask=mask)


def padded(channels: int, step: int) -> int:
    """Channels of a strip: whole matmul steps."""
    return triton.cdiv(channels, step) * step


def step_of(t: Tiles, channels: int) -> int:
    """Depth of a matmul step: a map with fewer channels takes fewer."""
    return min(t.bk, triton.next_power_of_2(channels))


def pack(weight: Tensor, rows: int, channels: int, dtype: torch.dtype, how: str) -> Tensor:
    """[M, C, 3, 3] to [9 * rows, channels], tap after tap, padded with zeros, rounded for matmuls of that precision."""
    m, c = weight.shape[:2]
    packed = weight.permute(2, 3, 0, 1).reshape(9, m, c).to(dtype)
    if (m, c) != (rows, channels):
        taps, packed = packed, torch.zeros(9, rows, channels, device=weight.device, dtype=dtype)
        packed[:, :m, :c] = taps
    return rounded(packed.reshape(9 * rows, channels).contiguous(), how)


def pack_rows(vectors: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[a, b] to [rows, columns], padded with zeros."""
    packed = torch.zeros(rows, columns, device=vectors.device, dtype=dtype)
    packed[: vectors.shape[0], : vectors.shape[1]] = vectors
    return packed


def operands(strip: Tensor, weight: Tensor, rows: int, step: int, t: Tiles) -> tuple[object, object]:
    """Strip and packed weight as `convolve` takes them."""
    if not t.tma:
        return strip, weight
    return (
        TensorDescriptor.from_tensor(strip, [t.pixels, step]),
        TensorDescriptor.from_tensor(weight, [rows, step]),
    )


def readable(x: Tensor) -> Tensor:
    """The map with unit stride in channels: a copy where it has another."""
    return x if x.stride(3) == 1 else x.contiguous()


def stretches(total: int, limit: int, wave: int) -> int:
    """Tiles of one stretch: stretches of equal length, whole waves, `limit` tiles at most."""
    count = triton.cdiv(total, limit)
    return min(limit, triton.cdiv(triton.cdiv(total, count), wave) * wave)


class Layers(NamedTuple):
    """Both convolutions as the kernel takes them."""

    weight3: Tensor
    """[9 * rows, channels]"""
    bias3: Tensor
    """[1, rows] float32"""
    weight1: Tensor
    """[16, rows]"""
    bias1: Tensor
    """[Cout]"""


def shape_of(weight3: Tensor, dtype: torch.dtype, index: int | None, config: Tiles | None = None) -> tuple[Tiles, int]:
    """Tile for these layers, and hidden channels as the kernel has them."""
    rows = max(16, triton.next_power_of_2(weight3.shape[0]))
    return config or tiles(dtype, rows, index), rows


def pack_layers(
    weight3: Tensor,  # [M, C, 3, 3]
    bias3: Tensor,  # [M]
    weight1: Tensor,  # [Cout, M]
    bias1: Tensor,  # [Cout]
    dtype: torch.dtype,
    config: Tiles | None = None,
) -> Layers:
    """Layers for maps in `dtype`, on the weights' device."""
    t, rows = shape_of(weight3, dtype, weight3.device.index, config)
    channels = padded(weight3.shape[1], step_of(t, weight3.shape[1]))
    return Layers(
        pack(weight3, rows, channels, dtype, precision(dtype)),
        pack_rows(bias3[None], 1, rows, torch.float32),
        rounded(pack_rows(weight1, COUT, rows, dtype), precision(dtype)),
        bias1.contiguous(),
    )


def resize_conv_forward(
    x: Tensor,  # [N, h, w, C]
    size: tuple[int, int],
    weight3: Tensor,  # [M, C, 3, 3]
    bias3: Tensor,  # [M]
    weight1: Tensor,  # [Cout, M]
    bias1: Tensor,  # [Cout]
    out_dtype: torch.dtype | None = None,
    config: Tiles | None = None,
) -> Tensor:
    """[N, H, W, Cout] in `out_dtype` (x's by default).

    One strip of scratch, a few dozen megabytes whatever the number of views.
    """
    out = torch.empty(x.shape[0], *size, weight1.shape[0], device=x.device, dtype=out_dtype or x.dtype)
    if out.numel():
        t, _ = shape_of(weight3, x.dtype, x.device.index, config)
        run_layers(x, pack_layers(weight3, bias3, weight1, bias1, x.dtype, t), out, None, t)
    return out


def run_layers(
    x: Tensor,  # [N, h, w, C]
    layers: Layers,
    out: Tensor,  # [N, H, W, Cout]
    flag: Tensor | None = None,  # [1] int32, set where a result is not finite
    config: Tiles | None = None,
) -> None:
    """The same from packed layers, written to `out` in its own dtype."""
    size, cout = (out.shape[1], out.shape[2]), out.shape[3]
    canvas = Canvas(x.shape[0], *size)
    x = readable(x)
    rows = layers.weight1.shape[1]
    t = config or tiles(x.dtype, rows, x.device.index)
    step = step_of(t, x.shape[3])
    channels = padded(x.shape[3], step)
    wave = processors(x.device) * t.per_sm
    total = triton.cdiv(canvas.places, t.pixels)
    count = stretches(total, wave * t.waves, wave)
    strip = new_strip(canvas, canvas.most_rows(min(count, total) * t.pixels), channels, x.device, x.dtype)
    pixels, weight = operands(strip, layers.weight3, rows, step, t)
    with torch.cuda.device_of(x):
        for first in range(0, total, count):
            tiles_now = min(count, total - first)
            start = first * t.pixels
            top, strip_rows = canvas.rows(start, tiles_now * t.pixels)
            resize(x, canvas, strip, top, strip_rows, precision(x.dtype))
            resize_conv_kernel[(min(tiles_now, wave),)](
                pixels, weight, layers.bias3, layers.weight1, layers.bias1, out, out if flag is None else flag,
                start, top * canvas.pitch, tiles_now, canvas.places, *size,
                COUT=cout, ROWS=rows, CHANNELS=channels, BP=t.pixels, BK=step, TMA=t.tma, PIXEL_ROWS=t.pixel_rows,
                FLATTEN=t.flatten, CHECK=flag is not None, PRECISION=precision(x.dtype), num_warps=t.warps,
                num_stages=t.stages,
            )  # fmt: skip


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def _case(kind: str, how: str, rows: int, target: int, check: bool = False) -> AotCase:
    t = forward_tiles(DTYPES[kind].itemsize, how == "ieee", rows, target)
    step = step_of(t, rows)
    types = dict.fromkeys(("start", "origin", "count", "places", "height", "width"), "i32")
    types |= {name: f"*{kind}" for name in ("weight1_ptr", "bias1_ptr", "out_ptr", "strip", "weight3")}
    types |= {"bias3_ptr": "*fp32", "flag_ptr": "*i32"}
    if check:
        types["out_ptr"] = "*fp32"  # inference keeps what the last matmul summed
    if t.tma:
        types |= {"strip": f"tensordesc<{kind}[{t.pixels}, {step}]>", "weight3": f"tensordesc<{kind}[{rows}, {step}]>"}
    constants: dict[str, object] = {"COUT": 6, "ROWS": rows, "CHANNELS": rows, "BP": t.pixels, "BK": step}
    constants |= {"TMA": t.tma, "PIXEL_ROWS": t.pixel_rows, "FLATTEN": t.flatten, "CHECK": check, "PRECISION": how}
    return AotCase(
        name=f"resize_conv_{kind}_{how}_{rows}_sm{target}0{'_checked' if check else ''}",
        kernel=resize_conv_kernel,
        types=types,
        constants=constants,
        aligned=tuple(name for name, kind in types.items() if kind.startswith("*")),
        options={"num_warps": t.warps, "num_stages": t.stages},
        targets=(target * 10,),
    )


def aot_cases() -> list[AotCase]:
    """The model's heads (128 channels) in every dtype, smaller and larger ones; and the resize."""
    cases = []
    for target in (8, 9, 10):
        cases += [_case(kind, "tf32", 128, target) for kind in DTYPES]
        cases.append(_case("fp16", "tf32", 128, target, check=True))
        for rows in (16, 32, 64, 256):
            cases += [_case("fp16", "tf32", rows, target), _case("fp32", "tf32", rows, target)]
        cases += [_case("fp32", "ieee", rows, target) for rows in (32, 64, 128, 256)]
    cases += [resize_case(f"resize_{kind}_tf32", kind, kind, "tf32", 128) for kind in DTYPES]
    return [*cases, resize_case("resize_fp32_ieee", "fp32", "fp32", "ieee", 128)]
