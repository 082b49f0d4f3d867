"""Modules of UniCeption, which Any4D's original code and MapAnything are made of.

Its DINOv2 encoders hold DINOv2's own modules: see `dinov2`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..modules.dpt import doubled
from ..modules.plain import plain, unhooked
from ..ops import resize_conv
from .checks import (
    argument_reasons,
    attention_reasons,
    block_reasons,
    conv_reasons,
    missing,
    mlp_reasons,
)
from .dinov2 import DIFFERENTIAL, GATED
from .recogniser import Recogniser
from .swap import Swap, owner
from .timm import Mlp
from .transformer import FusedAttention, FusedBlock

_BLOCKS = r"uniception\.models\.utils\.transformer_blocks"
_CROCO = r"uniception\.models\.libs\.croco"
_HEADS = r"uniception\.models\.prediction_heads"


class Attention(FusedAttention):
    """Attention with its length-dependent scales in the kernel, and its positional encoding before it."""

    custom_positional_encoding: Any
    use_scalable_softmax: bool
    use_entropy_scaling: bool
    base_token_count_for_entropy_scaling: int
    entropy_scaling_growth_factor: float

    def forward(self, x: Tensor, xpos: Any = None) -> Tensor:
        encode = self.custom_positional_encoding
        if self.declined(x) or (encode is not None and xpos is None):
            found: Tensor = super().forward(x, xpos)
            return found
        scaling = {
            "scalable_softmax": self.use_scalable_softmax,
            "entropy_scaling": self.use_entropy_scaling,
            "base_token_count": self.base_token_count_for_entropy_scaling,
            "growth_factor": self.entropy_scaling_growth_factor,
        }
        return self.attend(x, None if encode is None else lambda part: encode(part, xpos), scaling)


class Block(FusedBlock):
    """A block with the positions of the tokens, where its attention encodes them."""

    def forward(self, x: Tensor, xpos: Any = None) -> Any:
        if not self.fits(x):
            return super().forward(x, xpos)
        return self.run(x, xpos=xpos)


class Features(Swap):
    """DPT's features from maps with channels last in memory, as convolutions and resizes want them."""

    hooks: list[int]

    def forward(self, dpt_input: Any) -> Any:
        maps = list(dpt_input.list_features)
        for hook in set(self.hooks):
            maps[hook] = channels_last(maps[hook])
        shape = dpt_input.target_output_shape
        return super().forward(type(dpt_input)(list_features=maps, target_output_shape=shape))


class Fusion(Swap):
    """A fusion block with its 1x1 convolution before the resize: they commute, and there it costs a quarter."""

    resConfUnit2: nn.Module
    skip_add: Any
    out_conv: nn.Module

    def forward(self, *xs: Tensor) -> Tensor:
        if len(xs) > 2 or _order_reasons(self) or not unhooked(self.out_conv):
            found: Tensor = super().forward(*xs)
            return found
        x = xs[0]
        if len(xs) == 2:
            x = self.skip_add.add(x, self.resConfUnit1(xs[1]))  # type: ignore[operator]
        return doubled(self.out_conv(self.resConfUnit2(x)))


class Regressor(Swap):
    """Resize, 3x3 convolution, ReLU and 1x1 convolution in one kernel."""

    conv1: nn.Module
    conv2: Any
    checkpoint_gradient: bool
    output: Any

    @classmethod
    def extras(cls, original: type) -> dict[str, Any]:
        return {"output": _result_class(original)}

    def forward(self, dpt_processor_input: Any) -> Any:
        if _convolution_reasons(self.conv2) or not unhooked(self.conv2, *self.conv2):
            return super().forward(dpt_processor_input)
        parameters = tuple(parameter for conv in self.conv2[::2] for parameter in (conv.weight, conv.bias))
        if not plain(*parameters):
            return super().forward(dpt_processor_input)
        features = channels_last(self.conv1(dpt_processor_input.features_upsampled_8x)).permute(0, 2, 3, 1)
        height, width = dpt_processor_input.target_output_shape
        arguments = (features, (height, width), *parameters)
        recompute = self.checkpoint_gradient
        out = checkpoint(resize_conv, *arguments, use_reentrant=False) if recompute else resize_conv(*arguments)
        return type(self).output(decoded_channels=out.permute(0, 3, 1, 2))


class PoseHead(Swap):
    """The pose head's 1x1 convolutions on a map with channels last in memory."""

    def forward(self, feature_input: Any) -> Any:
        return super().forward(type(feature_input)(last_feature=channels_last(feature_input.last_feature)))


def channels_last(x: Tensor) -> Tensor:
    """[N, C, h, w] with the channels of a pixel next to each other."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _result_class(original: type) -> Any:
    """The class that a head's forward returns its channels in; None where there is none of that name."""
    forward: Any = owner(original).forward  # type: ignore[attr-defined]
    return forward.__globals__.get("PixelTaskOutput")


def _attention_reasons(module: nn.Module) -> list[str]:
    names = ("custom_positional_encoding", "use_scalable_softmax", "use_entropy_scaling")
    return missing(module, *names) or attention_reasons(module, ("x", "xpos"))


def _fusion_reasons(module: nn.Module) -> list[str]:
    absent = missing(module, "out_conv", "resConfUnit2", "skip_add", "width_ratio", "expand", "align_corners")
    if absent:
        return absent
    return _order_reasons(module) + argument_reasons(module, ("xs",))


def _order_reasons(module: Any) -> list[str]:
    """Why the resize and what follows it are not those that commute here."""
    reasons = conv_reasons(module.out_conv, "out_conv", 1)
    if module.width_ratio != 1:
        reasons.append(f"it resizes by another ratio (width_ratio {module.width_ratio:g})")
    if not module.align_corners:
        reasons.append("its resize does not align corners")
    return reasons


def _regressor_reasons(module: nn.Module) -> list[str]:
    absent = missing(module, "conv1", "conv2", "checkpoint_gradient")
    if absent:
        return absent
    given: Any = module
    reasons = _convolution_reasons(given.conv2)
    if _result_class(type(module)) is None:
        reasons.append("the class of its result is not known here")
    return reasons + argument_reasons(module, ("dpt_processor_input",))


def _convolution_reasons(module: nn.Module) -> list[str]:
    """Why a module is not a 3x3 convolution, ReLU and a 1x1 convolution."""
    layers: list[Any] = list(module) if type(module) is nn.Sequential else []
    if len(layers) != 3 or type(layers[1]) is not nn.ReLU:
        return ["conv2 is not convolution, ReLU, convolution"]
    reasons = conv_reasons(layers[0], "conv2[0]", 3, padding=1) + conv_reasons(layers[2], "conv2[2]", 1)
    if not reasons and (layers[0].bias is None or layers[2].bias is None):
        reasons.append("a convolution of conv2 has no bias")
    return reasons


TABLE = (
    Recogniser(
        rf"{_BLOCKS}\.SelfAttentionBlock",
        Block,
        "layer_norm, residual_norm",
        lambda module: block_reasons(module, ("x", "xpos")),
    ),
    Recogniser(rf"{_BLOCKS}\.Attention", Attention, "attention", _attention_reasons),
    Recogniser(rf"(?:{_BLOCKS}|{_CROCO}\.blocks)\.Mlp", Mlp, "linear_gelu",
               lambda module: mlp_reasons(module) + missing(module, "drop1", "drop2")),
    Recogniser(r"uniception\.models\.info_sharing\.\w+\.Multi(?:View|Set)\w*", norms=("norm",)),
    Recogniser(r"uniception\.models\.encoders\.dense_rep_encoder\.DenseRepresentationEncoder",
               norms=("norm_layer", "post_pe_norm")),
    Recogniser(rf"{_HEADS}\.dpt\.DPTFeature(?:DoubleUpsampling)?", Features, "channels-last maps",
               lambda module: missing(module, "hooks") + argument_reasons(module, ("dpt_input",))),
    Recogniser(rf"{_CROCO}\.dpt_block\.FeatureFusionBlock_custom", Fusion, "resize_bilinear after the 1x1 convolution",
               _fusion_reasons),
    Recogniser(rf"{_HEADS}\.dpt\.DPTRegressionProcessor", Regressor, "resize_conv", _regressor_reasons),
    Recogniser(rf"{_HEADS}\.pose_head\.PoseHead", PoseHead, "channels-last maps",
               lambda module: argument_reasons(module, ("feature_input",))),
    Recogniser(rf"{_BLOCKS}\.SwiGLUFFN", unsupported=GATED),
    Recogniser(rf"{_BLOCKS}\.Cross\w+|{_CROCO}\.blocks\.(?:Cross\w+|DecoderBlock)",
               unsupported="there is no kernel for cross attention"),
    Recogniser(rf"{_BLOCKS}\.Diff\w+", unsupported=DIFFERENTIAL),
    Recogniser(rf"{_CROCO}\.blocks\.(?:Attention|Block)", unsupported="CroCo's rotation is not known here"),
    Recogniser(rf"{_HEADS}\.dpt\.DPTSegmentationProcessor", unsupported="it resizes after its last convolution"),
)  # fmt: skip
