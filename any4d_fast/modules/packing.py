"""Inference weights of transformer blocks: cast to the compute dtype once, not at every call.

Used without gradients under autocast in a 16-bit dtype (`packed_dtype`); training, float32 and `use_backend("eager")`
run on the modules as they are.

Nothing is folded. LayerScale into the projection before it, and a LayerNorm's gain and shift into the layer after it,
are exact in real arithmetic, but `residual_norm` multiplies and adds them for nothing while it waits for memory, and a
folded weight or bias rounds alike in every token: measured on an H200 with the golden weights, rays erred 1.26 times as
much as with plain autocast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from .. import backends, ops
from ..ops.attention import Segments
from ..ops.linear_fp8 import Rows8
from .block import NORM_EPS, Block, LayerScale, Mlp, SelfAttention, SwiGLU
from .derived import Derived, caching, derivable
from .host_weights import home

PACKED_DTYPES = (torch.bfloat16, torch.float16)

Affine = tuple[Tensor | None, Tensor | None, Tensor | None]


class BlockWeights(NamedTuple):
    """What a block computes with at inference; None: nothing to multiply or add.

    `in` is the MLP's first layer, `out` its second. `after_attention` and `after_mlp` hold LayerScale's gamma and the
    gain and shift of the LayerNorm that follows the branch.
    """

    qkv_weight: Tensor
    qkv_bias: Tensor | None
    proj_weight: Tensor
    proj_bias: Tensor | None
    in_weight: Tensor
    in_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    after_attention: Affine
    after_mlp: Affine

    def infer(
        self,
        block: Block,
        x: Tensor,
        y: Tensor | Rows8,
        segments: Segments,
        scale: float,
        row_scale: Tensor | None,
        out_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """The block with these weights; see `Block.forward`."""
        assert isinstance(y, Tensor)
        return block.infer(x, y, segments, scale, row_scale, out_dtype, self)


class PackedBlocks(NamedTuple):
    """A stack of blocks: their weights, and gain and shift of the LayerNorm that feeds the first one."""

    blocks: list[BlockWeights]
    first_norm: tuple[Tensor | None, Tensor | None]

    def first_input(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What the first block reads: [R, C] normed rows of the stream."""
        return ops.layer_norm(x, *self.first_norm, NORM_EPS, out_dtype=dtype)


def packed_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that weights are packed in for a call made now, or None where modules run as they are."""
    if not (caching() and torch.is_autocast_enabled(device.type)) or backends.in_force() == backends.EAGER:
        return None
    dtype = torch.get_autocast_dtype(device.type)
    return dtype if dtype in PACKED_DTYPES else None


def packed_blocks(
    store: Derived, blocks: Sequence[Block], final_norm: nn.LayerNorm, dtype: torch.dtype
) -> PackedBlocks | None:
    """The blocks' weights in `dtype`, or None where a module is not what this file knows, or has hooks of its own."""
    if not blocks or not all(known(block) for block in blocks):
        return None
    if type(final_norm) is not nn.LayerNorm or final_norm.eps != NORM_EPS:
        return None
    parts = [_Parts(block) for block in blocks]
    found: list[BlockWeights] = []
    taken = iter(packed_tensors(store, blocks, dtype))
    for i, part in enumerate(parts):
        following = parts[i + 1].norm1 if i + 1 < len(parts) else None
        found.append(part.weights(taken, final_norm if following is None else following))
    first = parts[0].norm1
    return PackedBlocks(found, (first.weight, first.bias))


def packed_tensors(store: Derived, blocks: Sequence[Block], dtype: torch.dtype) -> list[Tensor]:
    """Weights and biases of known blocks in `dtype`, in the order in which `_Parts.weights` takes them."""
    return store.get(
        ("blocks", dtype, home(_Parts(blocks[0]).sources())),
        lambda: [t for block in blocks for t in _Parts(block).sources()],
        lambda: (t for block in blocks for t in _Parts(block).derive(dtype)),
    )


def known(block: Block) -> bool:
    """Whether a block is built of the modules that are packed here, without hooks, without dropout."""
    mlp = block.mlp
    if type(block) is not Block or type(block.attn) is not SelfAttention or type(mlp) not in (Mlp, SwiGLU):
        return False
    part = _Parts(block)
    linears = (part.qkv, part.proj, part.fc_in, part.fc_out)
    inner: list[nn.Module] = [block.attn, mlp, block.ls1, block.ls2, *part.norms(), *linears]
    return (
        all(type(linear) is nn.Linear and derivable(linear.weight, linear.bias) for linear in linears)
        and all(type(n) is nn.LayerNorm and n.eps == NORM_EPS and derivable(n.weight, n.bias) for n in part.norms())
        and all(type(scale) in (LayerScale, nn.Identity) for scale in (block.ls1, block.ls2))
        and not any(m._forward_hooks or m._forward_pre_hooks for m in inner)
    )


def matrices(block: Block) -> tuple[Tensor, ...]:
    """Weights of a known block that inference reads in 16 bits alone."""
    part = _Parts(block)
    return part.qkv.weight, part.proj.weight, part.fc_in.weight, part.fc_out.weight


class _Parts:
    """The modules of a block, and what is derived from them."""

    def __init__(self, block: Block) -> None:
        mlp = block.mlp
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.qkv, self.proj = block.attn.qkv, block.attn.proj
        self.gated = isinstance(mlp, SwiGLU)
        layers = (mlp.w12, mlp.w3) if isinstance(mlp, SwiGLU) else (mlp.fc1, mlp.fc2)
        self.fc_in, self.fc_out = cast(tuple[nn.Linear, nn.Linear], layers)
        self.gamma1 = block.ls1.gamma if isinstance(block.ls1, LayerScale) else None
        self.gamma2 = block.ls2.gamma if isinstance(block.ls2, LayerScale) else None

    def norms(self) -> tuple[nn.LayerNorm, nn.LayerNorm]:
        return self.norm1, self.norm2

    def sources(self) -> list[Tensor]:
        found: list[Tensor | None] = [self.gamma1, self.gamma2]
        for module in (self.qkv, self.proj, self.fc_in, self.fc_out, self.norm1, self.norm2):
            found += [module.weight, module.bias]
        return [t for t in found if t is not None]

    def derive(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Weight and bias of the four layers; a bias only where there is one."""
        device = home(self.sources())
        for linear in (self.qkv, self.proj, self.fc_in, self.fc_out):
            yield linear.weight.to(device).to(dtype)
            if _has_bias(linear):
                # `linear_gelu` adds its bias to the float32 sum, so there it needs no rounding.
                exact = linear is self.fc_in and not self.gated
                yield linear.bias.to(torch.float32 if exact else dtype)

    def weights(self, tensors: Iterator[Tensor], following: nn.LayerNorm) -> BlockWeights:
        """Take this block's tensors off the front of what `derive` made; `following` reads what the block returns."""
        qkv = next(tensors), next(tensors) if _has_bias(self.qkv) else None
        proj = next(tensors), next(tensors) if _has_bias(self.proj) else None
        fc_in = next(tensors), next(tensors)
        fc_out = next(tensors), next(tensors)
        after_attention = self.gamma1, self.norm2.weight, self.norm2.bias
        return BlockWeights(
            *qkv, *proj, *fc_in, *fc_out, after_attention, (self.gamma2, following.weight, following.bias)
        )


def _has_bias(linear: nn.Linear) -> bool:
    return isinstance(linear.bias, Tensor)
