"""DINOv2 as in torch.hub (facebookresearch/dinov2), and the copies of its files in other packages, VGGT's among them.

Class names and files are the same in all: `dinov2/layers` (torch.hub, MoGe), `dinov2_layers` (Depth Anything V2) and
`vggt/layers`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..modules.plain import plain, unhooked
from .checks import (
    argument_reasons,
    attention_reasons,
    block_reasons,
    conv_reasons,
    matmul_dtype,
    missing,
    mlp_reasons,
)
from .recogniser import Recogniser
from .swap import Swap, owner
from .transformer import FusedAttention, FusedBlock, FusedMlp

LAYERS = r"(?:.*\.)?(?:dinov2\.layers|dinov2_layers|vggt\.layers)"
TRANSFORMER = r"(?:.*\.)?(?:dinov2\.models\.vision_transformer|dinov2|vggt\.layers\.vision_transformer)"
_SDPA_WRAPPER = (
    r"uniception\.models\.encoders\.dinov2\.DINOv2Encoder\.wrap_dinov2_attention_with_sdpa\.<locals>\._AttentionWrapper"
)

SUBSETS_FROM = 0.1
"""Rate of stochastic depth above which DINOv2 computes a branch for a part of the samples only."""


class Mlp(FusedMlp):
    """One dropout module after each layer."""

    drop: nn.Module
    fc2: nn.Module

    def finish(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.drop(self.fc2(self.drop(hidden)))
        return found


class Attention(FusedAttention):
    """Attention without positions; xFormers' masks and causal attention run as they always did."""

    def forward(self, x: Tensor, *masks: Any, **named_masks: Any) -> Tensor:
        masked = any(mask is not None and mask is not False for mask in (*masks, *named_masks.values()))
        if masked or self.declined(x):
            found: Tensor = super().forward(x, *masks, **named_masks)
            return found
        return self.attend(x)


class Block(FusedBlock):
    """A block of one tensor; lists of tensors (xFormers' nested ones) run as they always did."""

    sample_drop_ratio: float

    def paths(self) -> tuple[nn.Module | None, nn.Module | None]:
        path = self._part("drop_path1") if self.sample_drop_ratio > 0 else None
        return path, path  # DINOv2 drops both branches with the first module

    def fits(self, x: Any) -> bool:
        return super().fits(x) and not (self.training and self.sample_drop_ratio > SUBSETS_FROM)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or not self.fits(args[0]):
            return super().forward(*args, **kwargs)
        return self.run(args[0])


class VisionTransformer(Swap):
    """Patches, positions, class token and registers in one kernel."""

    patch_embed: nn.Module
    patch_size: int
    cls_token: Tensor
    register_tokens: Tensor | None

    def _passed_over(self) -> bool:
        """Whether patches may be projected and tokens put together without calling the modules that do it."""
        embed: Any = self.patch_embed
        tensors = (embed.proj.weight, embed.proj.bias, self.cls_token, self.register_tokens)
        return unhooked(embed, embed.proj, embed.norm) and plain(*tensors)

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        patch, embed = self.patch_size, self.patch_embed
        whole = x.shape[-2] % patch == 0 and x.shape[-1] % patch == 0
        if masks is not None or not whole or _embed_reasons(embed, patch) or not self._passed_over():
            found: Tensor = super().prepare_tokens_with_masks(x, masks)  # type: ignore[misc,operator]
            return found
        proj: Any = embed.proj
        height, width = x.shape[-2:]
        tokens = (height // patch) * (width // patch)
        dtype = matmul_dtype(x)
        out_dtype = torch.promote_types(dtype, self.cls_token.dtype)
        # Of the tokens only shape and dtype are read.
        like = x.new_empty((1, 1 + tokens, self.cls_token.shape[-1]), dtype=out_dtype)
        positions: Tensor = self.interpolate_pos_encoding(like, height, width)  # type: ignore[operator]
        registers = None if self.register_tokens is None else self.register_tokens[0]
        weight = proj.weight.to(dtype)
        return ops.tokenize(x, weight, proj.bias, positions[0], self.cls_token[0], registers, out_dtype=out_dtype)


def _transformer_reasons(module: nn.Module) -> list[str]:
    names = ("patch_embed", "patch_size", "cls_token", "register_tokens", "prepare_tokens_with_masks")
    absent = missing(module, *names, "interpolate_pos_encoding")
    if absent:
        # Copies made before registers keep their tokens' order in a method of their own.
        return absent
    given: Any = module
    embed = given.patch_embed
    reasons = _embed_reasons(embed, given.patch_size)
    if owner(type(module), "prepare_tokens_with_masks") is not owner(type(module)):
        reasons.append("its prepare_tokens_with_masks is another class's")
    return reasons + argument_reasons(embed, ("x",))


def _embed_reasons(embed: Any, patch: int) -> list[str]:
    """Why patches are not made by one convolution of an image."""
    reasons = missing(embed, "proj", "norm") or conv_reasons(embed.proj, "patch_embed.proj", patch, patch)
    if not reasons and embed.proj.in_channels != 3:
        reasons.append(f"images have {embed.proj.in_channels} channels, not 3")
    if not reasons and not isinstance(embed.norm, nn.Identity):
        reasons.append("it normalises its patches")
    return reasons


GATED = "there is no kernel for gated MLPs; its layers run as they are"
DIFFERENTIAL = "there is no kernel for differential attention"

TABLE = (
    Recogniser(
        rf"{TRANSFORMER}\.DinoVisionTransformer", VisionTransformer, "tokenize", _transformer_reasons, ("norm",)
    ),
    Recogniser(
        r"(?:.*\.)?(?:dinov2\.layers|dinov2_layers)\.block\.(?:Block|NestedTensorBlock)"
        r"|(?:.*\.)?vggt\.layers\.block\.NestedTensorBlock",
        Block,
        "layer_norm, residual_norm",
        lambda module: block_reasons(module, ("x", "x_or_x_list")) + missing(module, "sample_drop_ratio"),
    ),
    Recogniser(
        rf"{LAYERS}\.attention\.MemEffAttention|(?:.*\.)?(?:dinov2\.layers|dinov2_layers)\.attention\.Attention"
        rf"|{_SDPA_WRAPPER}",
        Attention,
        "attention",
        lambda module: (
            attention_reasons(module, ("x", "attn_bias", "is_causal", "pos"))
            + (["it rotates queries and keys"] if getattr(module, "rope", None) is not None else [])
        ),
    ),
    Recogniser(
        rf"{LAYERS}\.mlp\.Mlp", Mlp, "linear_gelu", lambda module: mlp_reasons(module) + missing(module, "drop")
    ),
    Recogniser(rf"{LAYERS}\.swiglu_ffn\.\w+|xformers\.ops\..*SwiGLU\w*", unsupported=GATED),
)
