"""Gradients of `resize_conv`, a few views at a time, from its inputs alone.

For each group of views: resize again; convolve again, and turn the tile of hidden activations into their gradient
without writing the activations; the weight's gradient, one matmul over pixels for each tap; the resized map's gradient,
the same convolution with the weight flipped; the transposed resize. Two strips of scratch, one group's size, whatever
the number of views. Every sum runs in a fixed order: results are bitwise equal from run to run.

Where float32 may be multiplied in TF32, operands are float16 times powers of two (see `_powers`): the same mantissa at
twice the rate. The depth of the weight gradient's operands is not contiguous, and wgmma takes such in 16 bits only.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._powers import powers
from ._resize import Canvas, new_strip, resize, resize_transpose
from ._resize_conv_gradients import (
    Config,
    config,
    hidden_gradient_kernel,
    input_gradient_kernel,
    weight_gradient_kernel,
)
from ._rows import processors
from ._tf32 import rounded
from .resize_conv import COUT, operands, pack, pack_rows, padded, readable, step_of

SCRATCH = 256 * 2**20
"""Bytes of scratch for a group of views (never less than one view's): two views of 518 x 336 in 16 bits."""


class _Pass:
    """Scratch, packed operands and running sums of one backward call."""

    def __init__(
        self,
        grad: Tensor,
        x: Tensor,
        weight3: Tensor,
        bias3: Tensor,
        weight1: Tensor,
        tf32: bool,
        given: Config | None,
        scratch: int,
    ) -> None:
        self.m, self.c = weight3.shape[:2]
        self.cout, self.size = weight1.shape[0], (grad.shape[1], grad.shape[2])
        exact = x.dtype == torch.float32 and not tf32
        self.precision = "ieee" if exact else "tf32"
        self.powers = powers(grad, x, weight3, bias3, weight1) if x.dtype == torch.float32 and tf32 else None
        self.factors = x.new_empty(4, dtype=torch.float32) if self.powers is None else self.powers.factors()
        self.dtype = dtype = x.dtype if self.powers is None else torch.float16
        self.rows = max(16, triton.next_power_of_2(self.m))
        self.columns = max(16, triton.next_power_of_2(self.c))
        self.tiles = given or config(exact, self.rows, self.columns, x.device.index)
        self.step, self.back_step = step_of(self.tiles.hidden, self.c), step_of(self.tiles.inputs, self.m)
        channels, hidden = padded(self.c, self.step), padded(self.m, self.back_step)
        self.processors = processors(x.device)
        view = Canvas(1, *self.size)
        bytes_a_view = view.places * (channels + hidden) * dtype.itemsize
        if dtype != x.dtype:
            bytes_a_view += view.places * channels * x.element_size()
        self.group = max(1, min(x.shape[0], scratch // bytes_a_view))
        # Whole tiles of either matmul, and whole steps of the weight's.
        self.unit = max(self.tiles.hidden.pixels, self.tiles.inputs.pixels, self.tiles.split.bk)
        count = self.count(self.group)
        self.top, rows = view.rows(0, count)
        self.origin = self.top * view.pitch
        self.pixels = new_strip(view, rows, channels, x.device, dtype)
        # The resized map's gradient takes its place, unless it has another dtype.
        self.output = self.pixels if dtype == x.dtype else new_strip(view, rows, channels, x.device, x.dtype)
        # The places before the first and behind the last tile are padding too, and stay zero for every group.
        self.hidden = new_strip(view, rows, hidden, x.device, dtype).zero_()
        self._pack(weight3, bias3, weight1, channels, hidden)
        wave = self.processors * self.tiles.hidden.per_sm
        self.programs = min(wave, count // self.tiles.hidden.pixels)
        self.weight1_sum = torch.zeros(self.programs, COUT, self.rows, device=x.device, dtype=torch.float32)
        self.bias3_sum = torch.zeros_like(self.weight1_sum)

    def _pack(self, weight3: Tensor, bias3: Tensor, weight1: Tensor, channels: int, hidden: int) -> None:
        if self.powers is not None:
            weight3 = weight3 * self.powers.weight3.float()
            bias3 = bias3 * self.powers.hidden.float()
            weight1 = weight1 * self.powers.weight1.float()
        self.weight3 = pack(weight3, self.rows, channels, self.dtype, self.precision)
        self.flipped = pack(weight3.transpose(0, 1).flip(2, 3), self.columns, hidden, self.dtype, self.precision)
        self.bias3 = pack_rows(bias3[None], 1, self.rows, torch.float32)
        self.weight1 = rounded(pack_rows(weight1, COUT, self.rows, self.dtype), self.precision)

    def count(self, views: int) -> int:
        """Places of so many views, rounded up to whole tiles."""
        return triton.cdiv(Canvas(views, *self.size).places, self.unit) * self.unit

    def hidden_gradient(self, x: Tensor, grad: Tensor, store: bool) -> None:
        canvas, t, count = Canvas(x.shape[0], *self.size), self.tiles.hidden, self.count(x.shape[0])
        if self.powers is not None:
            grad = (grad * self.powers.grad.float()).to(self.dtype)
        factor = None if self.powers is None else self.factors[3:]
        resize(x, canvas, self.pixels, self.top, canvas.rows(0, count)[1], self.precision, factor)
        hidden_gradient_kernel[(self.programs,)](
            *operands(self.pixels, self.weight3, self.rows, self.step, t), self.bias3, self.weight1,
            self.factors, grad, self.hidden, self.weight1_sum, self.bias3_sum, self.origin, count // t.pixels,
            canvas.places, *self.size,
            COUT=self.cout, ROWS=self.rows, CHANNELS=self.pixels.shape[1], HIDDEN=self.hidden.shape[1], STORE=store,
            BP=t.pixels, BK=self.step, TMA=t.tma, SCALED=self.powers is not None, PRECISION=self.precision,
            num_warps=t.warps, num_stages=t.stages,
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
        """May overwrite the resized map."""
        canvas, t, count = Canvas(out.shape[0], *self.size), self.tiles.inputs, self.count(out.shape[0])
        tiles = count // t.pixels
        input_gradient_kernel[(min(tiles, self.processors * t.per_sm),)](
            *operands(self.hidden, self.flipped, self.columns, self.back_step, t), self.output, self.factors[2:],
            self.origin, tiles, canvas.pitch, ROWS=self.columns, CHANNELS=self.hidden.shape[1],
            OUT=self.output.shape[1], BP=t.pixels, BK=self.back_step, TMA=t.tma, PIXEL_ROWS=t.pixel_rows,
            SCALED=self.powers is not None, PRECISION=self.precision, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        resize_transpose(self.output, canvas, -self.origin, out)

    def results(self, sums: Tensor, needed: tuple[bool, bool, bool, bool]) -> list[Tensor]:
        """Gradients of weight3, bias3 and weight1, float32, from the sums of all groups."""
        _, need_weight3, need_bias3, need_weight1 = needed
        # A result that nobody needs is an empty tensor of its own: an operator's outputs must not share memory.
        found = [torch.empty(0, device=sums.device) for _ in range(3)]
        if need_weight3:
            taps = sums.sum(0)[:, : self.m, : self.c]
            found[0] = taps.permute(1, 2, 0).reshape(self.m, self.c, 3, 3).contiguous()
        if need_bias3:
            found[1] = self.bias3_sum[:, 0, : self.m].sum(0)
        if need_weight1:
            found[2] = self.weight1_sum[:, : self.cout, : self.m].sum(0)
        if self.powers is None:
            return found
        p = self.powers
        products = (p.x * p.hidden_grad, p.hidden_grad, p.grad * p.hidden)
        return [(f.double() / s).float() for f, s in zip(found, products, strict=True)]


def resize_conv_backward(
    grad: Tensor,  # [N, H, W, Cout]
    x: Tensor,  # [N, h, w, C]
    weight3: Tensor,  # [M, C, 3, 3]
    bias3: Tensor,  # [M]
    weight1: Tensor,  # [Cout, M]
    needed: tuple[bool, bool, bool, bool],
    given: Config | None = None,
    scratch: int = SCRATCH,
    tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (in its dtype), weight3, bias3, weight1 (float32); empty ones where not needed.

    `tf32` allows a float32 map tensor cores.
    """
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
        run = _Pass(grad, x, weight3, bias3, weight1, tf32, given, scratch)
        sums = run.weight_sums() if need_weight3 else x.new_empty(0, dtype=torch.float32)
        for first in range(0, views, run.group):
            some = slice(first, min(first + run.group, views))
            run.hidden_gradient(x[some], grad[some], need_x or need_weight3)
            if need_weight3:
                run.weight_gradient(some.stop - first, sums)
            if need_x:
                run.input_gradient(d_x[some])
        d_weight3, d_bias3, d_weight1 = run.results(sums, needed)
    return d_x, d_weight3, d_bias3, d_weight1
