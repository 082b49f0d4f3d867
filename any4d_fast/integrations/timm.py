"""Vision transformers of timm (`timm.models.vision_transformer`), DINOv2's among them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .checks import attention_reasons, block_reasons, missing, mlp_reasons
from .dinov2 import DIFFERENTIAL, GATED
from .recogniser import Recogniser
from .transformer import FusedAttention, FusedBlock, FusedMlp

_ARGUMENTS = ("x", "attn_mask", "is_causal")


class Mlp(FusedMlp):
    """A dropout module after each layer; UniCeption's is the same, without a place for a norm."""

    drop1: nn.Module
    fc2: nn.Module
    drop2: nn.Module

    def finish(self, hidden: Tensor) -> Tensor:
        hidden = self.drop1(hidden)
        norm = self._part("norm")
        found: Tensor = self.drop2(self.fc2(hidden if norm is None else norm(hidden)))
        return found


class Attention(FusedAttention):
    """Attention without a mask; masked and causal attention run as they always did."""

    def forward(self, x: Tensor, *masks: Any, **named_masks: Any) -> Tensor:
        masked = any(mask is not None and mask is not False for mask in (*masks, *named_masks.values()))
        if masked or self.declined(x) or self._part("norm") is not None:
            found: Tensor = super().forward(x, *masks, **named_masks)
            return found
        return self.attend(x)


class Block(FusedBlock):
    """A block without a mask."""

    def forward(self, x: Tensor, *masks: Any, **named_masks: Any) -> Any:
        masked = any(mask is not None and mask is not False for mask in (*masks, *named_masks.values()))
        if masked or not self.fits(x):
            return super().forward(x, *masks, **named_masks)
        return self.run(x)


def _attention_reasons(module: nn.Module) -> list[str]:
    reasons = attention_reasons(module, _ARGUMENTS)
    if getattr(module, "gate", None) is not None:
        reasons.append("it has a gate on its output")
    if not isinstance(getattr(module, "norm", nn.Identity()), nn.Identity):
        reasons.append("it normalises its output")
    return reasons


TABLE = (
    Recogniser(r"timm\.models\.vision_transformer\.VisionTransformer", norms=("norm", "fc_norm", "norm_pre")),
    Recogniser(
        r"timm\.models\.vision_transformer\.Block",
        Block,
        "layer_norm, residual_norm",
        lambda module: block_reasons(module, _ARGUMENTS),
    ),
    Recogniser(r"timm\.(?:layers\.attention|models\.vision_transformer)\.Attention", Attention, "attention",
               _attention_reasons),
    Recogniser(r"timm\.layers\.mlp\.Mlp", Mlp, "linear_gelu", lambda m: mlp_reasons(m) + missing(m, "drop1", "drop2")),
    Recogniser(r"timm\.layers\.mlp\.(?:GluMlp|SwiGLU)", unsupported=GATED),
    Recogniser(r"timm\.layers\.attention\.AttentionRope", unsupported="its rotation is not known here"),
    Recogniser(r"timm\.layers\.diff_attention\.DiffAttention", unsupported=DIFFERENTIAL),
    Recogniser(
        r"timm\.models\.vision_transformer\.(?:ResPostBlock|ParallelScalingBlock|ParallelThingsBlock|DiffParallel\w*)",
        unsupported="its branches are not those of a pre-norm block",
    ),
)  # fmt: skip
