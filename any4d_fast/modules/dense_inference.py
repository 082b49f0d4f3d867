"""Heads and dense tokenizers in 16 bits: channels-last maps, one pass between convolutions.

For inference weights are converted once; `dense_training` calls these functions with weights that have gradients. Every
function here works on [N, h, w, C] maps (or rows) whose channels are contiguous, in the dtype of the maps that it is
given, and raises `flag` where a value does not fit that dtype (`ops.dense_maps`).
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import dense_maps
from ..ops.resize_conv import Layers, pack_layers, resize_conv_checked
from .derived import Derived, caching, derivable
from .host_weights import home, resident

if TYPE_CHECKING:
    from .dpt import DPTFeatures, DPTRegressor, FusionBlock, ResidualConvUnit
    from .heads import PoseHead
    from .tokenizers import DenseTokenizer

T = TypeVar("T")


class CastStore(Derived, Generic[T]):
    """Weights of one module in another dtype, as a tree of named tuples; see `Derived` for when they are renewed."""

    def __init__(self) -> None:
        super().__init__()
        self._trees: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], T]] = {}

    def weights(self, module: nn.Module, dtype: torch.dtype, pack: Callable[[Any, torch.dtype], T]) -> T:
        """`pack(module, dtype)`, or what it returned when a parameter last changed."""
        parameters = list(module.parameters())
        if not (caching() and derivable(*parameters)):
            return pack(module, dtype)
        with self._lock:
            return self._current(module, (dtype, home(parameters)), pack)

    def _current(
        self, module: nn.Module, key: tuple[torch.dtype, torch.device], pack: Callable[[Any, torch.dtype], T]
    ) -> T:
        dtype, device = key
        made: list[T] = []

        this = weakref.proxy(module)  # the module holds this store: a cycle would keep both

        def recipe() -> Iterator[Tensor]:
            with resident(this.parameters(), device):
                tree = pack(this, dtype)
            made[:] = [_rebuilt(tree, itertools.repeat(torch.empty(0)))]  # its shape alone outlives this call
            yield from _leaves(tree)

        tensors = self.get(("cast", *key), lambda: list(this.parameters()), recipe)
        held = self._trees.get(key)
        if held is None or held[0] is not tensors:
            tree = made[-1] if made or held is None else held[1]
            self._trees[key] = held = (tensors, _rebuilt(tree, iter(tensors)))
        return held[1]

    def clear(self) -> None:
        super().clear()
        self._trees.clear()

    def drop_stale(self) -> None:
        super().drop_stale()
        self._trees = {key: held for key, held in self._trees.items() if ("cast", *key) in self._kept}

    def __deepcopy__(self, memo: dict[int, Any]) -> CastStore[T]:
        return CastStore()

    def __reduce__(self) -> tuple[Any, ...]:
        return CastStore, ()


def _leaves(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _leaves(item)


def _rebuilt(tree: Any, tensors: Iterator[Tensor]) -> Any:
    """The tree with other tensors in the order of `_leaves`."""
    if isinstance(tree, Tensor):
        return next(tensors)
    if not isinstance(tree, (list, tuple)):
        return tree
    items = [_rebuilt(item, tensors) for item in tree]
    return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)


class Conv(NamedTuple):
    """A convolution's weight as cuDNN reads it (channels last), or as a matrix for a 1x1 one; and its bias."""

    weight: Tensor
    bias: Tensor | None


class FusionWeights(NamedTuple):
    """Convolutions of the two residual units (none where no finer map comes in), and the projection."""

    first: tuple[Conv, Conv] | None
    second: tuple[Conv, Conv]
    project: Conv


class FeatureWeights(NamedTuple):
    """Per map: its 1x1 projection, its change of size (convolution, stride; negative: enlarged), and 3x3 projection."""

    projections: list[Conv]
    changes: list[tuple[Conv, int] | None]
    widths: list[Conv]
    fusions: list[FusionWeights]


def _cast(parameter: Tensor, dtype: torch.dtype, layout: torch.memory_format = torch.preserve_format) -> Tensor:
    """In another dtype; with gradients of the parameter where they are enabled."""
    return (parameter if torch.is_grad_enabled() else parameter.detach()).to(dtype, memory_format=layout)


def pack_conv(conv: nn.Conv2d, dtype: torch.dtype) -> Conv:
    """Weights of a 3x3 convolution."""
    weight = _cast(conv.weight, dtype, torch.channels_last)
    return Conv(weight, None if conv.bias is None else _cast(conv.bias, dtype))


def _matrix(conv: nn.Conv2d, dtype: torch.dtype) -> Conv:
    assert conv.bias is not None
    return Conv(_cast(conv.weight, dtype).flatten(1), _cast(conv.bias, dtype))


def _shuffle(conv: nn.ConvTranspose2d, dtype: torch.dtype) -> tuple[Conv, int]:
    """A transposed convolution whose kernel is its stride, as one matrix of [k * k * Cout, Cin], row (ky, kx, c)."""
    assert conv.bias is not None
    stride = conv.stride[0]
    weight = _cast(conv.weight, dtype).permute(2, 3, 1, 0).flatten(0, 2)
    return Conv(weight.contiguous(), _cast(conv.bias, dtype).repeat(stride * stride)), -stride


def _unit(unit: ResidualConvUnit, dtype: torch.dtype) -> tuple[Conv, Conv]:
    return pack_conv(unit.conv1, dtype), pack_conv(unit.conv2, dtype)


def _fusion(block: FusionBlock, dtype: torch.dtype) -> FusionWeights:
    first = _unit(block.resConfUnit1, dtype) if hasattr(block, "resConfUnit1") else None
    return FusionWeights(first, _unit(block.resConfUnit2, dtype), _matrix(block.out_conv, dtype))


def pack_features(module: DPTFeatures, dtype: torch.dtype) -> FeatureWeights:
    """Weights of `features`."""
    projections: list[Conv] = []
    changes: list[tuple[Conv, int] | None] = []
    widths: list[Conv] = []
    for process in module.input_process:
        assert isinstance(process, nn.Sequential)
        layers, width = process
        assert isinstance(layers, nn.Sequential) and isinstance(width, nn.Conv2d)
        first, change = layers[0], layers[1] if len(layers) > 1 else None
        assert isinstance(first, nn.Conv2d)
        projections.append(_matrix(first, dtype))
        if isinstance(change, nn.ConvTranspose2d):
            changes.append(_shuffle(change, dtype))
        else:
            changes.append((pack_conv(change, dtype), change.stride[0]) if isinstance(change, nn.Conv2d) else None)
        widths.append(pack_conv(width, dtype))
    scratch = module.scratch
    blocks = (scratch.refinenet1, scratch.refinenet2, scratch.refinenet3, scratch.refinenet4)
    return FeatureWeights(projections, changes, widths, [_fusion(block, dtype) for block in blocks])


def convolve(x: Tensor, conv: Conv, stride: int = 1) -> Tensor:
    """3x3 convolution of [N, h, w, C] without its bias -> [N, h', w', C'] contiguous."""
    out = F.conv2d(x.permute(0, 3, 1, 2), conv.weight, stride=stride, padding=1)
    return out.permute(0, 2, 3, 1).contiguous()


def _entry(x: Tensor, project: Conv, change: tuple[Conv, int] | None, width: Conv) -> Tensor:
    """Token map [N, h, w, C] -> [N, h', w', feature_dim]: nothing here but matrix products, so nothing to check."""
    x = F.linear(x, project.weight, project.bias)
    if change is not None:
        conv, stride = change
        if stride < 0:
            n, rows, columns, _ = x.shape
            x = F.linear(x, conv.weight, conv.bias).view(n, rows, columns, -stride, -1).transpose(2, 3)
            x = x.reshape(n, rows * -stride, columns * -stride, -1)
        else:
            x = convolve(x, conv, stride)
            x = x if conv.bias is None else x.add_(conv.bias)
    return convolve(x, width)


def fuses_activation(x: Tensor) -> bool:
    """Whether cuDNN may add the bias and take the ReLU in a convolution's own kernel: at no cost, on an H200."""
    device = x.is_cuda and torch.backends.cudnn.enabled and torch.backends.cudnn.is_available()
    plain = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    return device and plain and x.dtype == torch.float16 and x.shape[3] % 8 == 0 and x.numel() > 0


def _activated(x: Tensor, conv: Conv, flag: Tensor, fuse: bool) -> Tensor:
    """ReLU of a 3x3 convolution with its bias, of finite values.

    Where cuDNN does it in one kernel, if `fuse` says that it may, nothing is checked here: what is too large becomes
    infinity, which the next convolution's products carry on to its own check (0 x infinity is NaN), and what is too
    small is rightly zero.
    """
    if fuse and conv.bias is not None and fuses_activation(x):
        one = (1, 1)
        out = torch.cudnn_convolution_relu(x.permute(0, 3, 1, 2), conv.weight, conv.bias, one, one, one, 1)
        return out.permute(0, 2, 3, 1).contiguous()
    return dense_maps.finish(convolve(x, conv), conv.bias, flag, out=False, relu=True)[1]


def _refine(
    x: Tensor, positive: Tensor, unit: tuple[Conv, Conv], flag: Tensor, fuse: bool, **finish: Any
) -> tuple[Tensor, Tensor]:
    """Residual unit on a map and its ReLU; `finish` says what else is added, and whether its ReLU is wanted."""
    first, second = unit
    hidden = _activated(positive, first, flag, fuse)
    return dense_maps.finish(convolve(hidden, second), second.bias, flag, residual=x, **finish)


def _positive(x: Tensor, flag: Tensor) -> Tensor:
    return dense_maps.finish(x, None, flag, out=False, relu=True)[1]


COARSE_LEVELS, FINEST_LEVEL = (3, 2, 1), (0,)


def features(
    module: DPTFeatures,
    weights: FeatureWeights,
    maps: list[Tensor],
    flag: Tensor,
    levels: Sequence[int] = (*COARSE_LEVELS, *FINEST_LEVEL),
    coarse: Tensor | None = None,
    fuse: bool = True,
) -> Tensor:
    """Fuse [N, h, w, C_i] token maps from coarse to fine, in the maps' dtype: `DPTFeatures.forward` with all levels.

    A coarser map waits at its own size: where it joins a finer one, it is resized in the pass that adds it.

    Args:
        module, weights: the head's.
        maps: four token maps.
        flag: [1] int32.
        levels: which of them to add, from coarse to fine.
        coarse: what coarser levels gave, [N, h', w', feature_dim].
        fuse: whether a convolution's own kernel may take its bias and ReLU, and so round once. Not in a pass that is to
            be computed again with gradients: it would not be the same bits.

    Returns:
        [N, 8h, 8w, feature_dim] after the finest level, else what the next finer one takes as `coarse`.
    """
    for level in levels:
        fusion = weights.fusions[level]
        layer = _entry(
            maps[module.hooks[level]], weights.projections[level], weights.changes[level], weights.widths[level]
        )
        positive = _positive(layer, flag)
        if fusion.first is not None:
            layer, positive = _refine(layer, positive, fusion.first, flag, fuse, coarse=coarse, relu=True)
        refined = _refine(layer, positive, fusion.second, flag, fuse)[0]
        coarse = F.linear(refined, fusion.project.weight, fusion.project.bias)
        del layer, positive, refined  # the next level is four times as large
    assert coarse is not None
    return dense_maps.upsample(coarse, flag) if level == 0 else coarse


class RegressorWeights(NamedTuple):
    conv1: Conv
    last: Layers


def pack_regressor(module: DPTRegressor, dtype: torch.dtype) -> RegressorWeights:
    """Weights of `regress`."""
    weight3, bias3, weight1, bias1 = (p.detach() for p in module.conv2.parameters())
    return RegressorWeights(pack_conv(module.conv1, dtype), pack_layers(weight3, bias3, weight1, bias1, dtype))


def hidden_map(conv1: Conv, x: Tensor, flag: Tensor) -> Tensor:
    """[N, 8h, 8w, feature_dim] after the first convolution of the regressor."""
    return dense_maps.finish(convolve(x, conv1), conv1.bias, flag)[0]


def regress(weights: RegressorWeights, x: Tensor, size: tuple[int, int], flag: Tensor) -> Tensor:
    """[N, 8h, 8w, feature_dim] -> [N, H, W, output_dim] float32."""
    return resize_conv_checked(hidden_map(weights.conv1, x, flag), size, weights.last, flag)


class PoseWeights(NamedTuple):
    project: Conv
    blocks: list[list[Conv]]


def pack_pose(module: PoseHead, dtype: torch.dtype) -> PoseWeights:
    """Weights of `pose_features`."""
    blocks = [[_matrix(conv, dtype) for conv in block.convolutions()] for block in module.residual_blocks()]
    return PoseWeights(_matrix(module.proj, dtype), blocks)


def pose_features(weights: PoseWeights, tokens: Tensor, flag: Tensor) -> Tensor:
    """[N, T, C] -> [N, width] float32: the pose head up to its mean over tokens."""
    x = F.linear(tokens, weights.project.weight, weights.project.bias)[:, None]  # [N, 1, T, width]
    for block in weights.blocks:
        y = x
        for conv in block:
            y = dense_maps.finish(F.linear(y, conv.weight), conv.bias, flag, out=False, relu=True)[1]
        x = dense_maps.finish(x, None, flag, residual=y)[0]
    if not weights.blocks:
        x = dense_maps.finish(x, None, flag)[0]
    return x[:, 0].mean(dim=1, dtype=torch.promote_types(x.dtype, torch.float32))


class UnitWeights(NamedTuple):
    """A residual unit of a tokenizer: two 3x3 convolutions, and the shortcut's matrix where widths differ."""

    conv1: Conv
    conv2: Conv
    shortcut: Conv | None


class TokenizerWeights(NamedTuple):
    """The convolution of the patches, the residual units, and the projection to tokens."""

    first: Conv
    units: list[UnitWeights]
    last: Conv


def _padded_conv(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, outputs: int) -> Conv:
    """A convolution with zero weights for the channels that pad its input, and `outputs` channels."""
    assert bias is not None
    more, behind = outputs - weight.shape[0], dense_maps.padded(weight.shape[1]) - weight.shape[1]
    weight = F.pad(weight.detach(), (0, 0, 0, 0, 0, behind, 0, more)).to(dtype)
    bias = F.pad(bias.detach(), (0, more)).to(dtype)
    if weight.shape[2:] == (1, 1):
        return Conv(weight.flatten(1).contiguous(), bias)
    return Conv(weight.contiguous(memory_format=torch.channels_last), bias)


def pack_tokenizer(module: DenseTokenizer, dtype: torch.dtype) -> TokenizerWeights:
    """Weights of `tokenize`; widths are padded as `dense_maps.patches` pads its channels."""
    first, patch = module.conv_in, module.patch_size
    cin = first.in_channels // patch**2
    # Channels of a patch in memory order, (row, column, channel).
    weight = first.weight.detach().unflatten(1, (cin, patch, patch)).permute(0, 2, 3, 1, 4, 5).flatten(1, 3)
    units = []
    for unit in module.units():
        width, short = dense_maps.padded(unit.conv1.out_channels), unit.shortcut
        units.append(
            UnitWeights(
                _padded_conv(unit.conv1.weight, unit.conv1.bias, dtype, width),
                _padded_conv(unit.conv2.weight, unit.conv2.bias, dtype, width),
                _padded_conv(short.weight, short.bias, dtype, width) if isinstance(short, nn.Conv2d) else None,
            )
        )
    last = module.encoder[-1]
    assert isinstance(last, nn.Conv2d)
    return TokenizerWeights(
        _padded_conv(weight, first.bias, dtype, dense_maps.padded(first.out_channels)),
        units,
        _padded_conv(last.weight, last.bias, dtype, last.out_channels),
    )


PATCHES_AT_ONCE = 21_312
"""Patches that a tokenizer's convolutions take at once: 24 images of 24 x 37.

cuDNN's 3x3 convolutions of 592 to 1,024 channels reach 680 to 750 TFLOP/s there, and fall to 250 at 41 images, where
it takes another algorithm (kernels/notes/tokenize.md).
"""


def tokenize(weights: TokenizerWeights, x: Tensor, patch: int, dtype: torch.dtype, flag: Tensor) -> Tensor:
    """[N, H, W, channels] -> [N, T, C] in `dtype`: a dense tokenizer up to its LayerNorm."""
    patches = x.shape[0] * (x.shape[1] // patch) * (x.shape[2] // patch)
    parts = x.chunk(-(-patches // PATCHES_AT_ONCE))
    found = [_tokenize_part(weights, part, patch, dtype, flag) for part in parts]
    return found[0] if len(found) == 1 else torch.cat(found)


def _tokenize_part(weights: TokenizerWeights, x: Tensor, patch: int, dtype: torch.dtype, flag: Tensor) -> Tensor:
    x = dense_maps.patches(x, patch, dtype, flag)
    x = dense_maps.finish(convolve(x, weights.first), weights.first.bias, flag)[0]
    for conv1, conv2, shortcut in weights.units:
        assert conv1.bias is not None and conv2.bias is not None
        hidden = dense_maps.gelu(convolve(x, conv1), conv1.bias, flag)
        residual = x if shortcut is None else F.linear(x, shortcut.weight, shortcut.bias)
        x = dense_maps.gelu(convolve(hidden, conv2), conv2.bias, flag, residual=residual)
    tokens = F.linear(x, weights.last.weight)
    return dense_maps.finish(tokens, weights.last.bias, flag)[0].flatten(1, 2)
