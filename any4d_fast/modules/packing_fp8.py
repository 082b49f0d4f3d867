"""Inference weights of transformer blocks in e4m3, and a block that computes with them.

Every 8-bit weight is kept as [outputs, inputs] with a scale an output, beside what it lost in rounding, again in e4m3:
`ops.correct_bias` takes the error of the rows' mean out of every product with it. That error is the same in all rows
and adds up over the layers, where the roundings of the rows average out.

The hidden rows of an MLP need no scale of their own. A LayerNorm's rows have length sqrt(C) before gain and shift, so
that Cauchy and Schwarz bound every hidden channel by the weights alone; powers of two from these bounds go into the
columns of the second weight. A typical value is 1 / sqrt(C) of its bound: five octaves of the fifteen that e4m3 has.

Attention's projection stays in 16 bits: its input comes from attention in 16 bits, and rounding it would take as long
as the product saves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import backends, ops
from ..ops.attention import Segments
from ..ops.linear_fp8 import Rows8
from ..precision import PrecisionError
from ..reference.attention_fp8 import power_of_two
from ..reference.linear_fp8 import quantize_rows
from .block import NORM_EPS, Block
from .derived import Derived
from .host_weights import home
from .packing import Affine, _has_bias, _Parts, known, packed_tensors

MARGIN = 1.25
"""On the bound of hidden values, for the roundings of rows and weights to e4m3: 2^-4 each at most."""


class Layers(NamedTuple):
    """Which layers of a stack of blocks are in 8 bits."""

    qkv: bool = True
    mlp: bool = True
    attention: bool = True


ENCODER, TRANSFORMER = Layers(qkv=False, mlp=False, attention=False), Layers(qkv=False, mlp=False)
"""What `precision="fp8"` takes: what keeps errors within five times those of bfloat16 (kernels/notes/linear_fp8.md)."""

LONG = 4096
"""Rows of a segment from which attention in 8 bits is faster (csrc/notes/attention_fp8.md: 700 TFLOP/s against 594 at
7,105 rows, 330 against 373 at 1,777): frames, and the encoder's images, stay in 16 bits."""


class Linear8(NamedTuple):
    """A linear layer in 8 bits."""

    weight: Rows8  # [N, K]
    lost: Rows8  # [N, K]
    bias: Tensor | None  # [N] float32

    def __call__(self, x: Rows8, out_dtype: torch.dtype, inverse: Tensor | None = None) -> Tensor:
        bias = ops.correct_bias(x, self.lost, self.bias)
        return ops.linear_fp8(x, self.weight, bias, inverse=inverse, out_dtype=out_dtype)


class Linear16(NamedTuple):
    """A linear layer in 16 bits."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Mlp8(NamedTuple):
    """Both layers of an MLP in 8 bits, and what the hidden values are multiplied by."""

    first: Linear8
    inverse: Tensor
    second: Linear8


@dataclass(frozen=True)
class BlockWeights8:
    """What a block computes with; 16-bit layers where it has no 8-bit ones."""

    qkv: Linear8 | Linear16
    proj: Linear16
    mlp: Mlp8 | tuple[Linear16, Linear16]
    after_attention: Affine
    after_mlp: Affine
    attention: bool
    dtype: torch.dtype
    next_in_8: bool

    def infer(
        self,
        block: Block,
        x: Tensor,
        y: Tensor | Rows8,
        segments: Segments,
        scale: float,
        row_scale: Tensor | None,
        out_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | Rows8]:
        """`Block.forward` in place, without gradients; `y` and the second result are as their readers want them."""
        packed = self.qkv(y, self.dtype) if isinstance(self.qkv, Linear8) else self.qkv(y)  # type: ignore[arg-type]
        branch = self.proj(self._attend(block.attn.arrange(packed), segments, scale))
        in_8 = isinstance(self.mlp, Mlp8)
        x, y = _add_and_norm(x, branch, self.after_attention, row_scale, None if in_8 else self.dtype)
        branch = self._hidden_and_back(y)
        return _add_and_norm(x, branch, self.after_mlp, row_scale, None if self.next_in_8 else out_dtype)

    def _attend(self, qkv: Tensor, segments: Segments, scale: float) -> Tensor:
        """[R, C]; in 8 bits where there is a kernel for it, or it is emulated."""
        in_8 = (
            self.attention
            and segments.length >= LONG
            and (
                backends.select("attention_fp8", None, qkv, segments=segments) != backends.EAGER
                or backends.in_force() == backends.EAGER
            )
        )
        run = ops.attention_fp8 if in_8 else ops.attention
        out = run(qkv, segments=segments, scale=scale)
        assert isinstance(out, Tensor)
        return out.flatten(1)

    def _hidden_and_back(self, y: Tensor | Rows8) -> Tensor:
        if isinstance(self.mlp, Mlp8):
            assert isinstance(y, Rows8)
            hidden = Rows8(self.mlp.first(y, self.dtype, self.mlp.inverse), None)
            return self.mlp.second(hidden, self.dtype)
        assert isinstance(y, Tensor)
        first, second = self.mlp
        return second(ops.linear_gelu(y, first.weight, first.bias))


def _add_and_norm(
    x: Tensor, branch: Tensor, affine: Affine, row_scale: Tensor | None, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | Rows8]:
    """The stream with the branch added, and its LayerNorm in `dtype`, or in e4m3 for None."""
    if dtype is None:
        return ops.residual_norm_fp8(x, branch, *affine, NORM_EPS, row_scale=row_scale)
    return ops.residual_norm(x, branch, *affine, NORM_EPS, row_scale=row_scale, inplace=True, out_dtype=dtype)


@dataclass(frozen=True)
class PackedBlocks8:
    """A stack of blocks: their weights, and gain and shift of the LayerNorm that feeds the first one."""

    blocks: list[BlockWeights8]
    first_norm: tuple[Tensor | None, Tensor | None]

    def first_input(self, x: Tensor, dtype: torch.dtype) -> Tensor | Rows8:
        """What the first block reads: [R, C] normed rows of the stream."""
        if isinstance(self.blocks[0].qkv, Linear8):
            return ops.layer_norm_fp8(x, *self.first_norm, NORM_EPS)
        return ops.layer_norm(x, *self.first_norm, NORM_EPS, out_dtype=dtype)


def packed_blocks_fp8(
    store: Derived, name: str, blocks: Sequence[Block], final_norm: nn.LayerNorm, dtype: torch.dtype, layers: Layers
) -> PackedBlocks8:
    """The blocks' weights in 8 bits where `layers` says so, else in `dtype`; without 8-bit weights, those of `packing`.

    Raises:
        PrecisionError: a module of the stack `name` is not what this file knows, or has hooks of its own.
    """
    plain = type(final_norm) is nn.LayerNorm and final_norm.eps == NORM_EPS
    if not plain or not all(known(block) and not _Parts(block).gated for block in blocks):
        raise PrecisionError(
            f'precision="fp8" cannot run this call: {name} has a block with hooks, adapters, inference tensors or '
            'modules that have no 8-bit form; use precision="exact"'
        )
    parts = [_Parts(block) for block in blocks]
    if layers.qkv or layers.mlp:
        tensors = store.get(
            ("blocks fp8", dtype, layers, home(parts[0].sources())),
            lambda: [t for block in blocks for t in _Parts(block).sources()],
            lambda: (t for block in blocks for t in _derive(_Parts(block), dtype, layers)),
        )
    else:
        tensors = packed_tensors(store, blocks, dtype)
    taken = iter(tensors)
    found = []
    for i, part in enumerate(parts):
        last = i + 1 == len(parts)
        following = final_norm if last else parts[i + 1].norm1
        found.append(_weights(part, taken, following, dtype, layers, layers.qkv and not last))
    return PackedBlocks8(found, (parts[0].norm1.weight, parts[0].norm1.bias))


def hidden_bound(part: _Parts) -> Tensor:
    """[hidden] powers of two by which an MLP's activated values stay within 448, whatever its input."""
    weight = _here(part.fc_in, part)
    norm, width = part.norm2, weight.shape[1]
    stretched = weight if norm.weight is None else weight * norm.weight.float()
    most = math.sqrt(width) * stretched.norm(dim=1)
    shift = torch.zeros_like(most)
    if norm.bias is not None:
        shift = shift + weight @ norm.bias.float()
    if _has_bias(part.fc_in):
        shift = shift + part.fc_in.bias.float()
    return power_of_two(MARGIN * (most + shift.abs()))


def _here(linear: nn.Linear, part: _Parts) -> Tensor:
    return linear.weight.to(home(part.sources())).float()


def _derive(part: _Parts, dtype: torch.dtype, layers: Layers) -> Iterator[Tensor]:
    """All of a block's tensors, in the order in which `_weights` takes them."""
    yield from _eight(_here(part.qkv, part)) if layers.qkv else _sixteen(part.qkv, part, dtype)
    yield from _sixteen(part.proj, part, dtype)
    if layers.mlp:
        bound = hidden_bound(part)
        yield from _eight(_here(part.fc_in, part))
        yield 1 / bound
        yield from _eight(_here(part.fc_out, part) * bound)
    else:
        yield from _sixteen(part.fc_in, part, dtype, torch.float32)  # `linear_gelu` adds its bias to the float32 sum
        yield from _sixteen(part.fc_out, part, dtype)


def _eight(weight: Tensor) -> Iterator[Tensor]:
    rounded = quantize_rows(weight)
    yield from rounded  # type: ignore[misc]
    yield from quantize_rows(weight - rounded.wide())  # type: ignore[misc]


def _sixteen(
    linear: nn.Linear, part: _Parts, dtype: torch.dtype, bias_dtype: torch.dtype | None = None
) -> Iterator[Tensor]:
    yield _here(linear, part).to(dtype)
    if _has_bias(linear):
        yield linear.bias.to(bias_dtype or dtype)


def _weights(
    part: _Parts,
    tensors: Iterator[Tensor],
    following: nn.LayerNorm,
    dtype: torch.dtype,
    layers: Layers,
    next_in_8: bool,
) -> BlockWeights8:
    """Take a block's tensors off the front of what `_derive` made; `following` reads what the block returns."""

    def eight(linear: nn.Linear) -> Linear8:
        weight, lost = Rows8(next(tensors), next(tensors)), Rows8(next(tensors), next(tensors))
        return Linear8(weight, lost, linear.bias if _has_bias(linear) else None)

    def sixteen(linear: nn.Linear) -> Linear16:
        return Linear16(next(tensors), next(tensors) if _has_bias(linear) else None)

    qkv = eight(part.qkv) if layers.qkv else sixteen(part.qkv)
    proj = sixteen(part.proj)
    mlp: Mlp8 | tuple[Linear16, Linear16]
    if layers.mlp:
        first, inverse = eight(part.fc_in), next(tensors)
        mlp = Mlp8(first, inverse, eight(part.fc_out))
    else:
        mlp = sixteen(part.fc_in), sixteen(part.fc_out)
    return BlockWeights8(
        qkv,
        proj,
        mlp,
        (part.gamma1, part.norm2.weight, part.norm2.bias),
        (part.gamma2, following.weight, following.bias),
        layers.attention,
        dtype,
        next_in_8,
    )
