"""The matmuls of `resize_conv`'s backward pass (see `resize_conv_backward`), their tiles and configurations."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ._resize import resize_case, transpose_case
from ._tf32 import operand
from .aot import AotCase
from .resize_conv import DTYPES, Tiles, convolve, forward_tiles, generation, locate, step_of


class Config(NamedTuple):
    """Tiles of the three matmuls; `split` has pixels as the depth of a step (`bk`) and channels as rows."""

    hidden: Tiles
    inputs: Tiles
    split: Tiles


def config(exact: bool, hidden: int, channels: int, index: int | None) -> Config:
    """Tiles for 16 bits or exact float32, hidden and input channels padded to powers of two, and a device."""
    return _config(exact, hidden, channels, generation(index))


def _config(exact: bool, hidden: int, channels: int, target: int) -> Config:
    if exact:
        tile, inputs = (forward_tiles(4, True, wide, target) for wide in (hidden, channels))
        return Config(tile, inputs, Tiles(64, 16, 8, 1))
    # That kernel does not flatten its loops, and was measured with four stages.
    inputs = forward_tiles(2, False, channels, target)
    inputs = inputs._replace(stages=4, flatten=False) if inputs.flatten else inputs
    tma = target > 8
    if max(hidden, channels) < 64:
        # As forward. The weight's gradient has tiles of 16 x 16 or 32 x 32, work for one warp: 0.17 ms for 0.82 with
        # eight. The hidden map's: 0.21 for 0.67; the input's: 0.13 for 0.30 (16 channels, 32 maps of 252 x 336, H200).
        return Config(inputs._replace(per_sm=8), inputs, Tiles(32, 128, 1, 3, per_sm=8))
    # The epilogue holds activations and their gradient beside the accumulator: half the forward pass's pixels.
    narrow = hidden > 128 or (target == 8 and hidden < 64)
    tile = Tiles(64 if narrow else 128, 64, 8, 3, tma=tma, pixel_rows=True)
    # Two blocks on one multiprocessor hide each other's loads: 128 x 128 channels, 3 stages of 32 KB. On sm_90,
    # measured: one block of 6 stages is 5 % faster.
    split = Tiles(128, 64, 8, 3, tma=tma, per_sm=2)
    if target == 9:
        split = split._replace(stages=6, per_sm=1)
    return Config(tile, inputs, split)


@triton.jit(do_not_specialize=["origin", "count", "places", "height", "width"])
def hidden_gradient_kernel(
    strip,  # [*, CHANNELS] resized map, or its descriptor
    weight3,  # [9 * ROWS, CHANNELS], or its descriptor
    bias3_ptr,  # [ROWS] float32
    weight1_ptr,  # [16, ROWS]
    factor_ptr,  # [2] float32, with SCALED
    grad_ptr,  # [views, H, W, COUT] contiguous
    hidden_ptr,  # [*, HIDDEN] gradient of the hidden map
    weight1_sum_ptr,  # [programs, 16, ROWS] float32, added to
    bias3_sum_ptr,  # [programs, 16, ROWS] float32, 16 times the same, added to
    origin,
    count,
    places,
    height,
    width,
    COUT: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    STORE: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """SCALED: the sums times the first factor are the hidden map's, and times the second its gradient's."""
    dtype = grad_ptr.dtype.element_ty
    channel = tl.arange(0, 16)
    hidden = tl.arange(0, ROWS)
    program = tl.program_id(0)
    weight1_sums = weight1_sum_ptr + (program * 16 + channel)[:, None] * ROWS + hidden[None, :]
    bias3_sums = bias3_sum_ptr + (program * 16 + channel)[:, None] * ROWS + hidden[None, :]
    ones = tl.full([16, BP], 1.0, tl.float32).to(dtype)
    weight1_sum = tl.load(weight1_sums)
    bias3_sum = tl.load(bias3_sums)
    for tile in tl.range(program, count, tl.num_programs(0)):
        place = tile * BP
        acc = convolve(strip, weight3, place - origin, width + 1, ROWS, CHANNELS, BP, BK, TMA, True, PRECISION)
        if SCALED:
            acc *= tl.load(factor_ptr)
        acc += tl.load(bias3_ptr + hidden)[None, :]
        features = operand(tl.where(acc < 0.0, 0.0, acc).to(dtype), PRECISION)
        lane = place + tl.arange(0, BP)
        pixel, inside = locate(lane, places, height, width)
        mask = inside[:, None] & (channel < COUT)[None, :]
        grad = operand(tl.load(grad_ptr + pixel[:, None] * COUT + channel[None, :], mask=mask, other=0.0), PRECISION)
        weight1_sum = tl.dot(grad.T, features, weight1_sum, input_precision=PRECISION)
        weight1 = tl.load(weight1_ptr + channel[:, None] * ROWS + hidden[None, :])
        gradient = tl.dot(grad, weight1, input_precision=PRECISION)
        if SCALED:
            gradient *= tl.load(factor_ptr + 1)
        gradient = operand(tl.where(features > 0.0, gradient, 0.0).to(dtype), PRECISION)
        # A matmul with ones: a sum's 32 running values a thread would spill. Exact up to the rounding of the gradient.
        bias3_sum = tl.dot(ones, gradient, bias3_sum, input_precision=PRECISION)
        if STORE:
            # Places that are no pixels have no gradient: they are the next convolution's zero padding.
            out = hidden_ptr + (lane - origin).to(tl.int64)[:, None] * HIDDEN + hidden[None, :]
            tl.store(out, gradient, mask=(hidden < HIDDEN)[None, :])
    tl.store(weight1_sums, weight1_sum)
    tl.store(bias3_sums, bias3_sum)


@triton.jit(do_not_specialize=["origin", "count", "pitch"])
def input_gradient_kernel(
    strip,  # [*, CHANNELS] gradient of the hidden map, or its descriptor
    weight,  # [9 * ROWS, CHANNELS] flipped and transposed, or its descriptor
    out_ptr,  # [*, OUT]
    factor_ptr,  # [1] float32, with SCALED
    origin,
    count,
    pitch,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    PIXEL_ROWS: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.arange(0, ROWS)
    for tile in tl.range(tl.program_id(0), count, tl.num_programs(0)):
        place = tile * BP - origin
        acc = convolve(strip, weight, place, pitch, ROWS, CHANNELS, BP, BK, TMA, PIXEL_ROWS, PRECISION)
        if SCALED:
            acc *= tl.load(factor_ptr)
        acc = acc.to(out_ptr.dtype.element_ty)
        lane = (place + tl.arange(0, BP)).to(tl.int64) * OUT
        if PIXEL_ROWS:
            tl.store(out_ptr + lane[:, None] + row[None, :], acc, mask=(row < OUT)[None, :])
        else:
            tl.store(out_ptr + lane[None, :] + row[:, None], acc, mask=(row < OUT)[:, None])


@triton.jit(do_not_specialize=["origin", "steps", "splits", "pitch"])
def weight_gradient_kernel(
    hidden,  # [*, HIDDEN] gradient of the hidden map, or its descriptor
    strip,  # [*, CHANNELS] resized map, or its descriptor
    sum_ptr,  # [splits, 9, ROWS, COLUMNS] float32, added to
    origin,
    steps,
    splits,
    pitch,
    HIDDEN: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tap `program % 9` over every `splits`-th block of BK places: the nine taps of a block share it in the cache."""
    tap = tl.program_id(0) % 9
    split = tl.program_id(0) // 9
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(2) * BN + tl.arange(0, BN)
    shift = (tap // 3 - 1) * pitch + (tap % 3 - 1)
    sums = sum_ptr + ((split * 9 + tap) * ROWS + m)[:, None] * COLUMNS + n[None, :]
    lane = tl.arange(0, BK)[:, None]
    acc = tl.load(sums)
    for step in tl.range(split, steps, splits):
        place = step * BK - origin
        if TMA:
            a = hidden.load([place, tl.program_id(1) * BM])
            b = strip.load([place + shift, tl.program_id(2) * BN])
        else:
            first, second = place.to(tl.int64) * HIDDEN, (place + shift).to(tl.int64) * CHANNELS
            a = tl.load(hidden + first + (lane * HIDDEN + m[None, :]), mask=(m < HIDDEN)[None, :], other=0.0)
            b = tl.load(strip + second + (lane * CHANNELS + n[None, :]), mask=(n < CHANNELS)[None, :], other=0.0)
        acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
    tl.store(sums, acc)


def _constants(t: Tiles, rows: int, step: int, how: str) -> dict[str, object]:
    return {"ROWS": rows, "CHANNELS": rows, "BP": t.pixels, "BK": step, "TMA": t.tma, "PRECISION": how}


def _case(name: str, kernel: object, kind: str, t: Tiles, constants: dict[str, object], target: int) -> AotCase:
    """Everything that is not a constant is an integer, a float32 sum or a pointer or descriptor of `kind`."""
    names = [n for n in kernel.arg_names if n not in constants]  # type: ignore[attr-defined]
    tensors = {n: f"*{kind}" for n in names if n in ("strip", "weight3", "weight", "hidden") or n.endswith("_ptr")}
    tensors |= {n: "*fp32" for n in tensors if "sum" in n or n in ("bias3_ptr", "factor_ptr")}
    tensors |= {n: "*fp32" for n in tensors if n == "out_ptr" and constants.get("SCALED")}
    tensors |= {n: f"tensordesc<{kind}{list(constants[n + '_block'])}>" for n in names if n + "_block" in constants}  # type: ignore[call-overload]
    return AotCase(
        name=name,
        kernel=kernel,
        types=dict.fromkeys(names, "i32") | tensors,
        constants={n: v for n, v in constants.items() if not n.endswith("_block")},
        # A factor is one element of four.
        aligned=tuple(n for n, v in tensors.items() if v.startswith("*") and n != "factor_ptr"),
        options={"num_warps": t.warps, "num_stages": t.stages},
        targets=(target * 10,),
        # Not the model's heads: 256 hidden channels spill between the loop and the stores, once a tile.
        max_spills=60 if constants.get("ROWS") == 256 and "STORE" in constants else 0,
    )


def _blocks(t: Tiles, **blocks: tuple[int, int]) -> dict[str, object]:
    return {f"{name}_block": block for name, block in blocks.items()} if t.tma else {}


def _cases(kind: str, how: str, rows: int, target: int) -> list[AotCase]:
    scaled = {"SCALED": kind == "fp32" and how == "tf32"}
    c = _config(how == "ieee", rows, rows, target)
    label = f"{kind}_{how}_{rows}_sm{target}0"
    kind = "fp16" if scaled["SCALED"] else kind
    t, step = c.hidden, step_of(c.hidden, rows)
    hidden = _constants(t, rows, step, how) | {"COUT": 6, "HIDDEN": rows, "STORE": True, **scaled}
    hidden |= _blocks(t, strip=(t.pixels, step), weight3=(rows, step))
    u, step = c.inputs, step_of(c.inputs, rows)
    inputs = _constants(u, rows, step, how) | {"OUT": rows, "PIXEL_ROWS": u.pixel_rows, **scaled}
    inputs |= _blocks(u, strip=(u.pixels, step), weight=(rows, step))
    v, tile = c.split, min(rows, c.split.pixels)
    split: dict[str, object] = {"HIDDEN": rows, "CHANNELS": rows, "ROWS": rows, "COLUMNS": rows, "BM": tile, "BN": tile}
    split |= {"BK": v.bk, "TMA": v.tma, "PRECISION": how} | _blocks(v, hidden=(v.bk, tile), strip=(v.bk, tile))
    return [
        _case(f"resize_conv_hidden_gradient_{label}", hidden_gradient_kernel, kind, t, hidden, target),
        _case(f"resize_conv_input_gradient_{label}", input_gradient_kernel, kind, u, inputs, target),
        *([] if scaled["SCALED"] else [
            _case(f"resize_conv_weight_gradient_{label}", weight_gradient_kernel, kind, v, split, target)
        ]),
    ]  # fmt: skip


def aot_cases() -> list[AotCase]:
    """The model's heads (128 channels) in every dtype, smaller and larger ones; and both resizes."""
    cases = []
    for target in (8, 9, 10):
        for kind in DTYPES:
            cases += _cases(kind, "tf32", 128, target)
        for rows in (16, 32, 256):
            cases += _cases("fp16", "tf32", rows, target) + _cases("fp32", "tf32", rows, target)
        for rows in (32, 128, 256):
            cases += _cases("fp32", "ieee", rows, target)
    cases += [transpose_case(f"resize_transpose_{kind}", kind, 128) for kind in DTYPES]
    return [*cases, resize_case("resize_fp32_scaled", "fp32", "fp16", "tf32", 128)]
