"""Gradients of `resize_conv`, a few views at a time, from its inputs alone.

For each group of views: resize again; convolve again, and turn the tile of hidden activations into their gradient
without writing the activations; the weight's gradient, one matmul over pixels for each tap; the resized map's gradient,
the same convolution with the weight flipped; the transposed resize. Two strips of scratch, one group's size, whatever
the number of views. Every sum runs in a fixed order: results are bitwise equal from run to run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._resize import Canvas, new_strip, resize, resize_transpose, resize_transpose_kernel
from ._rows import processors
from ._tf32 import operand, rounded
from .aot import AotCase
from .resize_conv import (
    COUT,
    DTYPES,
    Tiles,
    convolve,
    forward_tiles,
    generation,
    locate,
    operands,
    pack,
    pack_rows,
    padded,
    readable,
    step_of,
)
from .tokenize import precision

SCRATCH = 256 * 2**20
"""Bytes of scratch for a group of views (never less than one view's): two views of 518 x 336 in 16 bits."""


class Config(NamedTuple):
    """Tiles of the three matmuls; `split` has pixels as the depth of a step (`bk`) and channels as rows."""

    hidden: Tiles
    inputs: Tiles
    split: Tiles


def config(dtype: torch.dtype, hidden: int, channels: int, index: int | None) -> Config:
    """Tiles for a dtype, hidden and input channels padded to powers of two, and a device."""
    return _config(dtype.itemsize, precision(dtype) == "ieee", hidden, channels, generation(index))


def _config(size: int, exact: bool, hidden: int, channels: int, target: int) -> Config:
    # That kernel does not flatten its loops, and was measured with four stages.
    inputs = forward_tiles(size, exact, channels, target)
    inputs = inputs._replace(stages=4, flatten=False) if inputs.flatten else inputs
    if exact:
        return Config(forward_tiles(size, exact, hidden, target), inputs, Tiles(64, 16, 8, 1))
    tma = target > 8
    # The epilogue holds activations and their gradient beside the accumulator: half the forward pass's pixels.
    narrow = hidden > 128 or (target == 8 and (size == 4 or hidden < 64))
    tile = Tiles(64 if narrow else 128, 128 // size, 8, 3, tma=tma, pixel_rows=True)
    # Two blocks on one multiprocessor hide each other's loads: 128 x 128 channels, 3 stages of 32 KB. mma.sync takes
    # transposed float32 operands from registers only, so that they get fewer. 16 bits on sm_90, measured: one block
    # of 6 stages is 5 % faster.
    split = Tiles(128, 128 // size, 8, 3 if size == 2 else 2, tma=tma, per_sm=2)
    if target == 9 and size == 2:
        split = split._replace(stages=6, per_sm=1)
    return Config(tile, inputs, split)


@triton.jit(do_not_specialize=["origin", "count", "places", "height", "width"])
def hidden_gradient_kernel(
    strip,  # [*, CHANNELS] resized map, or its descriptor
    weight3,  # [9 * ROWS, CHANNELS], or its descriptor
    bias3_ptr,  # [ROWS] float32
    weight1_ptr,  # [16, ROWS]
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
    PRECISION: tl.constexpr,
):
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
        acc += tl.load(bias3_ptr + hidden)[None, :]
        features = operand(tl.where(acc < 0.0, 0.0, acc).to(dtype), PRECISION)
        lane = place + tl.arange(0, BP)
        pixel, inside = locate(lane, places, height, width)
        mask = inside[:, None] & (channel < COUT)[None, :]
        grad = operand(tl.load(grad_ptr + pixel[:, None] * COUT + channel[None, :], mask=mask, other=0.0), PRECISION)
        weight1_sum = tl.dot(grad.T, features, weight1_sum, input_precision=PRECISION)
        weight1 = tl.load(weight1_ptr + channel[:, None] * ROWS + hidden[None, :])
        gradient = tl.dot(grad, weight1, input_precision=PRECISION)
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
    PRECISION: tl.constexpr,
):
    row = tl.arange(0, ROWS)
    for tile in tl.range(tl.program_id(0), count, tl.num_programs(0)):
        place = tile * BP - origin
        acc = convolve(strip, weight, place, pitch, ROWS, CHANNELS, BP, BK, TMA, PIXEL_ROWS, PRECISION)
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


class _Pass:
    """Scratch, packed operands and running sums of one backward call."""

    def __init__(
        self,
        x: Tensor,
        size: tuple[int, int],
        weight3: Tensor,
        bias3: Tensor,
        weight1: Tensor,
        given: Config | None,
        scratch: int,
    ) -> None:
        self.m, self.c = weight3.shape[:2]
        self.cout, self.size, dtype = weight1.shape[0], size, x.dtype
        self.rows = max(16, triton.next_power_of_2(self.m))
        self.columns = max(16, triton.next_power_of_2(self.c))
        self.tiles = given or config(dtype, self.rows, self.columns, x.device.index)
        self.step, self.back_step = step_of(self.tiles.hidden, self.c), step_of(self.tiles.inputs, self.m)
        channels, hidden = padded(self.c, self.step), padded(self.m, self.back_step)
        self.precision = precision(dtype)
        self.processors = processors(x.device)
        view = Canvas(1, *size)
        bytes_a_view = view.places * (channels + hidden) * x.element_size()
        self.group = max(1, min(x.shape[0], scratch // bytes_a_view))
        # Whole tiles of either matmul, and whole steps of the weight's.
        self.unit = max(self.tiles.hidden.pixels, self.tiles.inputs.pixels, self.tiles.split.bk)
        count = self.count(self.group)
        self.top, rows = view.rows(0, count)
        self.origin = self.top * view.pitch
        self.pixels = new_strip(view, rows, channels, x)
        # The places before the first and behind the last tile are padding too, and stay zero for every group.
        self.hidden = new_strip(view, rows, hidden, x).zero_()
        self.weight3 = pack(weight3, self.rows, channels, dtype)
        self.flipped = pack(weight3.transpose(0, 1).flip(2, 3), self.columns, hidden, dtype)
        self.bias3 = pack_rows(bias3[None], 1, self.rows, torch.float32)
        self.weight1 = rounded(pack_rows(weight1, COUT, self.rows, dtype), self.precision)
        wave = self.processors * self.tiles.hidden.per_sm
        self.programs = min(wave, count // self.tiles.hidden.pixels)
        self.weight1_sum = torch.zeros(self.programs, COUT, self.rows, device=x.device, dtype=torch.float32)
        self.bias3_sum = torch.zeros_like(self.weight1_sum)

    def count(self, views: int) -> int:
        """Places of so many views, rounded up to whole tiles."""
        return triton.cdiv(Canvas(views, *self.size).places, self.unit) * self.unit

    def hidden_gradient(self, x: Tensor, grad: Tensor, store: bool) -> None:
        canvas, t, count = Canvas(x.shape[0], *self.size), self.tiles.hidden, self.count(x.shape[0])
        resize(x, canvas, self.pixels, self.top, canvas.rows(0, count)[1])
        hidden_gradient_kernel[(self.programs,)](
            *operands(self.pixels, self.weight3, self.rows, self.step, t), self.bias3, self.weight1, grad,
            self.hidden, self.weight1_sum, self.bias3_sum, self.origin, count // t.pixels, canvas.places, *self.size,
            COUT=self.cout, ROWS=self.rows, CHANNELS=self.pixels.shape[1], HIDDEN=self.hidden.shape[1], STORE=store,
            BP=t.pixels, BK=self.step, TMA=t.tma, PRECISION=self.precision, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip

    def weight_sums(self) -> Tensor:
        """[splits, 9, rows, columns] zeros, as many splits as keep every multiprocessor busy."""
        bm, bn = self.split_tile()
        blocks = 9 * (self.rows // bm) * (self.columns // bn)
        splits = max(1, self.processors * self.tiles.split.per_sm // blocks)
        return torch.zeros(splits, 9, self.rows, self.columns, device=self.pixels.device, dtype=torch.float32)

    def split_tile(self) -> tuple[int, int]:
        return min(self.rows, self.tiles.split.pixels), min(self.columns, self.tiles.split.pixels)

    def weight_gradient(self, views: int, sums: Tensor) -> None:
        t, (bm, bn), count = self.tiles.split, self.split_tile(), self.count(views)
        a, b = self.hidden, self.pixels
        if t.tma:
            a, b = TensorDescriptor.from_tensor(a, [t.bk, bm]), TensorDescriptor.from_tensor(b, [t.bk, bn])
        weight_gradient_kernel[(9 * sums.shape[0], self.rows // bm, self.columns // bn)](
            a, b, sums, self.origin, count // t.bk, sums.shape[0], self.size[1] + 1,
            HIDDEN=self.hidden.shape[1], CHANNELS=self.pixels.shape[1], ROWS=self.rows, COLUMNS=self.columns,
            BM=bm, BN=bn, BK=t.bk, TMA=t.tma, PRECISION=self.precision, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip

    def input_gradient(self, out: Tensor) -> None:
        """Overwrites the resized map."""
        canvas, t, count = Canvas(out.shape[0], *self.size), self.tiles.inputs, self.count(out.shape[0])
        tiles = count // t.pixels
        input_gradient_kernel[(min(tiles, self.processors * t.per_sm),)](
            *operands(self.hidden, self.flipped, self.columns, self.back_step, t), self.pixels, self.origin, tiles,
            canvas.pitch, ROWS=self.columns, CHANNELS=self.hidden.shape[1], OUT=self.pixels.shape[1], BP=t.pixels,
            BK=self.back_step, TMA=t.tma, PIXEL_ROWS=t.pixel_rows, PRECISION=self.precision,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        resize_transpose(self.pixels, canvas, -self.origin, out)


def resize_conv_backward(
    grad: Tensor,  # [N, H, W, Cout]
    x: Tensor,  # [N, h, w, C]
    weight3: Tensor,  # [M, C, 3, 3]
    bias3: Tensor,  # [M]
    weight1: Tensor,  # [Cout, M]
    needed: tuple[bool, bool, bool, bool],
    given: Config | None = None,
    scratch: int = SCRATCH,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (in its dtype), weight3, bias3, weight1 (float32); empty ones where not needed."""
    (m, c), cout, views = weight3.shape[:2], weight1.shape[0], x.shape[0]
    need_x, need_weight3, need_bias3, need_weight1 = needed
    d_x = torch.empty(x.shape if need_x else (0,), device=x.device, dtype=x.dtype)
    if grad.numel() == 0 or x.numel() == 0:
        d_weight3 = x.new_zeros((m, c, 3, 3) if need_weight3 else 0, dtype=torch.float32)
        d_bias3 = x.new_zeros(m if need_bias3 else 0, dtype=torch.float32)
        d_weight1 = x.new_zeros((cout, m) if need_weight1 else 0, dtype=torch.float32)
        return d_x.zero_(), d_weight3, d_bias3, d_weight1
    x, grad = readable(x), grad.to(x.dtype).contiguous()
    with torch.cuda.device_of(x):
        run = _Pass(x, (grad.shape[1], grad.shape[2]), weight3, bias3, weight1, given, scratch)
        sums = run.weight_sums() if need_weight3 else x.new_empty(0, dtype=torch.float32)
        for first in range(0, views, run.group):
            some = slice(first, min(first + run.group, views))
            run.hidden_gradient(x[some], grad[some], need_x or need_weight3)
            if need_weight3:
                run.weight_gradient(some.stop - first, sums)
            if need_x:
                run.input_gradient(d_x[some])
    # A result that nobody needs is an empty tensor of its own: an operator's outputs must not share memory.
    d_weight3, d_bias3, d_weight1 = (torch.empty(0, device=x.device) for _ in range(3))
    if need_weight3:
        d_weight3 = sums.sum(0)[:, :m, :c].permute(1, 2, 0).reshape(m, c, 3, 3).contiguous()
    if need_bias3:
        d_bias3 = run.bias3_sum[:, 0, :m].sum(0)
    if need_weight1:
        d_weight1 = run.weight1_sum[:, :cout, :m].sum(0)
    return d_x, d_weight3, d_bias3, d_weight1


def _constants(t: Tiles, rows: int, step: int, how: str) -> dict[str, object]:
    return {"ROWS": rows, "CHANNELS": rows, "BP": t.pixels, "BK": step, "TMA": t.tma, "PRECISION": how}


def _case(name: str, kernel: object, kind: str, t: Tiles, constants: dict[str, object], target: int) -> AotCase:
    """Everything that is not a constant is an integer, a float32 sum or a pointer or descriptor of `kind`."""
    names = [n for n in kernel.arg_names if n not in constants]  # type: ignore[attr-defined]
    tensors = {n: f"*{kind}" for n in names if n in ("strip", "weight3", "weight", "hidden") or n.endswith("_ptr")}
    tensors |= {n: "*fp32" for n in tensors if "sum" in n or n == "bias3_ptr"}
    tensors |= {n: f"tensordesc<{kind}{list(constants[n + '_block'])}>" for n in names if n + "_block" in constants}  # type: ignore[call-overload]
    return AotCase(
        name=name,
        kernel=kernel,
        types=dict.fromkeys(names, "i32") | tensors,
        constants={n: v for n, v in constants.items() if not n.endswith("_block")},
        aligned=tuple(n for n, v in tensors.items() if v.startswith("*")),
        options={"num_warps": t.warps, "num_stages": t.stages},
        targets=(target * 10,),
        # Not the model's heads: 256 hidden channels spill between the loop and the stores, once a tile.
        max_spills=60 if constants.get("ROWS") == 256 and "STORE" in constants else 0,
    )


def _blocks(t: Tiles, **blocks: tuple[int, int]) -> dict[str, object]:
    return {f"{name}_block": block for name, block in blocks.items()} if t.tma else {}


def _cases(kind: str, how: str, rows: int, target: int) -> list[AotCase]:
    c = _config(DTYPES[kind].itemsize, how == "ieee", rows, rows, target)
    label = f"{kind}_{how}_{rows}_sm{target}0"
    t, step = c.hidden, step_of(c.hidden, rows)
    hidden = _constants(t, rows, step, how) | {"COUT": 6, "HIDDEN": rows, "STORE": True}
    hidden |= _blocks(t, strip=(t.pixels, step), weight3=(rows, step))
    u, step = c.inputs, step_of(c.inputs, rows)
    inputs = _constants(u, rows, step, how) | {"OUT": rows, "PIXEL_ROWS": u.pixel_rows}
    inputs |= _blocks(u, strip=(u.pixels, step), weight=(rows, step))
    v, tile = c.split, min(rows, c.split.pixels)
    split: dict[str, object] = {"HIDDEN": rows, "CHANNELS": rows, "ROWS": rows, "COLUMNS": rows, "BM": tile, "BN": tile}
    split |= {"BK": v.bk, "TMA": v.tma, "PRECISION": how} | _blocks(v, hidden=(v.bk, tile), strip=(v.bk, tile))
    return [
        _case(f"resize_conv_hidden_gradient_{label}", hidden_gradient_kernel, kind, t, hidden, target),
        _case(f"resize_conv_input_gradient_{label}", input_gradient_kernel, kind, u, inputs, target),
        _case(f"resize_conv_weight_gradient_{label}", weight_gradient_kernel, kind, v, split, target),
    ]


def aot_cases() -> list[AotCase]:
    """The model's heads (128 channels) in every dtype, smaller and larger ones; and the transposed resize."""
    cases = []
    for target in (8, 9, 10):
        for kind in DTYPES:
            cases += _cases(kind, "tf32", 128, target)
        for rows in (32, 256):
            cases += _cases("fp16", "tf32", rows, target) + _cases("fp32", "tf32", rows, target)
        for rows in (32, 128, 256):
            cases += _cases("fp32", "ieee", rows, target)
    return cases + [_transpose_case(kind) for kind in DTYPES]


def _transpose_case(kind: str) -> AotCase:
    floats = ("scale_y", "scale_x", "inverse_y", "inverse_x")
    integers = ("origin", "small_h", "small_w", "height", "width", "channels", "count_y", "count_x")
    types = dict.fromkeys(integers, "i32") | dict.fromkeys(floats, "fp32")
    return AotCase(
        name=f"resize_transpose_{kind}",
        kernel=resize_transpose_kernel,
        types=types | {"strip_ptr": f"*{kind}", "out_ptr": f"*{kind}"},
        constants={"CHANNELS": 128, "BX": 64, "BC": 128},
        aligned=("strip_ptr", "out_ptr", "channels"),
        options={"num_warps": 8},
    )
