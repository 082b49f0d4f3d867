"""VGGT's aggregator and heads (facebookresearch/vggt): blocks whose attention normalises and rotates queries and keys.

Its image encoder is a copy of DINOv2's files: see `dinov2`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .checks import attention_reasons, block_reasons, missing
from .dinov2 import Block as Dinov2Block
from .recogniser import Recogniser
from .transformer import FusedAttention


class Attention(FusedAttention):
    """The module's own norms and rotation, then our attention on queries, keys and values packed again."""

    rope: nn.Module | None

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        if self.declined(x):
            found: Tensor = super().forward(x, pos)
            return found
        rope = self.rope
        return self.attend(x, None if rope is None else lambda part: rope(part, pos))


class Block(Dinov2Block):
    """DINOv2's block with the positions of the tokens."""

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Any:
        if not self.fits(x):
            return super(Dinov2Block, self).forward(x, pos)
        return self.run(x, pos=pos)


TABLE = (
    Recogniser(
        r"(?:.*\.)?vggt\.layers\.block\.Block",
        Block,
        "layer_norm, residual_norm",
        lambda module: block_reasons(module, ("x", "pos")) + missing(module, "sample_drop_ratio"),
    ),
    Recogniser(
        r"(?:.*\.)?vggt\.layers\.attention\.Attention",
        Attention,
        "attention; norm and rotation of queries and keys as they are",
        lambda module: attention_reasons(module, ("x", "pos")) + missing(module, "rope"),
    ),
    Recogniser(
        r"(?:.*\.)?vggt\.heads\.dpt_head\.DPTHead",
        norms=("norm",),
        unsupported="it adds positions between its resize and its last convolutions; only its LayerNorm is swapped",
    ),
)
