"""Dense heads: DPT (arXiv 2103.13413) on four token maps, as in DUSt3R and UniCeption."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..config import DenseHeadConfig
from ..ops import resize_bilinear, resize_conv
from ..switches import matmul_allows_tf32, matmul_tf32
from . import dense_inference
from .dense_inference import CastStore, FeatureWeights, RegressorWeights
from .plain import plain_conv, unhooked


class ResidualConvUnit(nn.Module):
    """ReLU, 3x3 convolution, ReLU, 3x3 convolution, plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(F.relu(x)))) + x


class FusionBlock(nn.Module):
    """Add a finer map, refine, double the size."""

    def __init__(self, channels: int, *, takes_finer_map: bool) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(channels, channels, 1)
        if takes_finer_map:
            self.resConfUnit1 = ResidualConvUnit(channels)
        self.resConfUnit2 = ResidualConvUnit(channels)

    def forward(self, x: Tensor, finer: Tensor | None = None, double: bool = True) -> Tensor:
        if finer is not None:
            x = x + self.resConfUnit1(finer)
        # A 1x1 convolution commutes with bilinear resizing (its weights sum to 1), and costs a quarter before it.
        x = self.out_conv(self.resConfUnit2(x))
        return doubled(x) if double else x


def doubled(x: Tensor) -> Tensor:
    """[N, C, h, w] -> [N, C, 2h, 2w], corners aligned."""
    size = (2 * x.shape[2], 2 * x.shape[3])
    return resize_bilinear(x.permute(0, 2, 3, 1), size).permute(0, 3, 1, 2)


def recomputed(function: Callable[..., Tensor], *args: Tensor | bool | tuple[int, int]) -> Tensor:
    """`function(*args)`, computed again in the backward pass, where TF32 is allowed then if it is now."""
    options: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": _same_precision}
    out: Tensor = checkpoint(function, *args, use_reentrant=False, **options)
    return out


def _same_precision() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of the first and of the second computation: a backend is chosen by TF32's setting."""
    return nullcontext(), matmul_tf32(matmul_allows_tf32())


class Scratch(nn.Module):
    """Holder of the projections and fusion blocks under upstream's names."""

    def __init__(self, widths: tuple[int, ...], channels: int) -> None:
        super().__init__()
        projections = [nn.Conv2d(w, channels, 3, padding=1, bias=False) for w in widths]
        self.layer1_rn, self.layer2_rn, self.layer3_rn, self.layer4_rn = projections
        self.layer_rn = nn.ModuleList(projections)
        self.refinenet1 = FusionBlock(channels, takes_finer_map=True)
        self.refinenet2 = FusionBlock(channels, takes_finer_map=True)
        self.refinenet3 = FusionBlock(channels, takes_finer_map=True)
        self.refinenet4 = FusionBlock(channels, takes_finer_map=False)


class DPTFeatures(nn.Module):
    """Four token maps -> one feature map at eight times the patch grid."""

    def __init__(self, config: DenseHeadConfig, input_dims: tuple[int, ...]) -> None:
        super().__init__()
        self.derived: CastStore[FeatureWeights] = CastStore()
        self.hooks = config.hooks
        self.checkpoint_gradient = config.checkpoint_gradient
        widths = config.layer_dims
        self.scratch = Scratch(widths, config.feature_dim)
        resample = [
            nn.ConvTranspose2d(widths[0], widths[0], 4, stride=4),
            nn.ConvTranspose2d(widths[1], widths[1], 2, stride=2),
            None,
            nn.Conv2d(widths[3], widths[3], 3, stride=2, padding=1),
        ]
        self.input_process = nn.ModuleList()
        for dim, width, change, projection in zip(input_dims, widths, resample, self.scratch.layer_rn, strict=True):
            layers: list[nn.Module] = [nn.Conv2d(dim, width, 1)]
            if change is not None:
                layers.append(change)
            self.input_process.append(nn.Sequential(nn.Sequential(*layers), projection))

    def forward(
        self,
        maps: list[Tensor],
        flag: Tensor | None = None,
        double: bool = True,
        coarse: Tensor | None = None,
        coarse_only: bool = False,
    ) -> Tensor:
        """Four [N, C_i, h, w] maps -> [N, feature_dim, 8h, 8w], or half of that where the regressor is to double it.

        With a flag ([1] int32), maps of 16 bits in channels-last memory are computed on in their dtype, without
        gradients; the flag is set where a value does not fit it. Then two calls may share the work: one with
        `coarse_only` returns the map that the coarser levels give, the other takes it as `coarse`.
        """
        if flag is not None:
            weights = self.derived.weights(self, maps[0].dtype, dense_inference.pack_features)
            last = [m.permute(0, 2, 3, 1) for m in maps]
            levels: tuple[int, ...] = () if coarse is not None else dense_inference.COARSE_LEVELS
            levels += () if coarse_only else dense_inference.FINEST_LEVEL
            before = None if coarse is None else coarse.permute(0, 2, 3, 1)
            return dense_inference.features(self, weights, last, flag, levels, before).permute(0, 3, 1, 2)

        def run(module: nn.Module, *args: Tensor | bool) -> Tensor:
            if self.checkpoint_gradient and self.training:
                return recomputed(module, *args)
            out: Tensor = module(*args)
            return out

        layers = [run(process, maps[hook]) for process, hook in zip(self.input_process, self.hooks, strict=True)]
        rows, columns = layers[2].shape[-2:]
        # The coarsest map is half the grid rounded up: after doubling, an odd grid has one row or column too many.
        x = run(self.scratch.refinenet4, layers[3])[:, :, :rows, :columns]
        x = run(self.scratch.refinenet3, x, layers[2])
        x = run(self.scratch.refinenet2, x, layers[1])
        return run(self.scratch.refinenet1, x, layers[0], double)


class DPTRegressor(nn.Module):
    """Features at eight times the patch grid -> channels at image size."""

    def __init__(self, config: DenseHeadConfig) -> None:
        super().__init__()
        self.derived: CastStore[RegressorWeights] = CastStore()
        first, second = config.hidden_dims or (config.feature_dim // 2, config.feature_dim // 2)
        self.checkpoint_gradient = config.checkpoint_gradient
        self.conv1 = nn.Conv2d(config.feature_dim, first, 3, padding=1)
        self.conv2 = nn.Sequential(
            nn.Conv2d(first, second, 3, padding=1), nn.ReLU(), nn.Conv2d(second, config.output_dim, 1)
        )

    @property
    def doubles(self) -> bool:
        """Whether it should double the features itself: so that they need not be kept for the backward pass."""
        return self.checkpoint_gradient and self.training and torch.is_grad_enabled()

    def forward(self, x: Tensor, size: tuple[int, int], flag: Tensor | None = None, double: bool = False) -> Tensor:
        """[N, feature_dim, 8h, 8w] (or half of that, to be doubled) -> [N, H, W, output_dim].

        With a flag from 16 bits to float32, as `DPTFeatures`.
        """
        if flag is not None:
            weights = self.derived.weights(self, x.dtype, dense_inference.pack_regressor)
            return dense_inference.regress(weights, x.permute(0, 2, 3, 1), size, flag)
        if self.checkpoint_gradient and self.training:
            return recomputed(self._regress, x, size, double)
        return self._regress(x, size, double)

    def _regress(self, x: Tensor, size: tuple[int, int], double: bool) -> Tensor:
        return self.enlarge(self.conv1(doubled(x) if double else x), size)

    def enlarge(self, features: Tensor, size: tuple[int, int], out_dtype: torch.dtype | None = None) -> Tensor:
        """What follows the first convolution: [N, C, 8h, 8w] -> [N, H, W, output_dim]."""
        first, relu, last = self.conv2
        if not (plain_conv(first) and plain_conv(last) and unhooked(self.conv2, relu)):
            resized = resize_bilinear(features.permute(0, 2, 3, 1), size).permute(0, 3, 1, 2)
            channels: Tensor = self.conv2(resized)
            return channels.permute(0, 2, 3, 1)
        assert first.bias is not None and last.bias is not None
        weights = first.weight, first.bias, last.weight, last.bias
        return resize_conv(features.permute(0, 2, 3, 1), size, *weights, out_dtype=out_dtype)


def token_maps(tokens: Tensor, views: slice, grid: tuple[int, int], num_views: int) -> Tensor:
    """Patch maps of some views out of the token buffer, without their scale token.

    Args:
        tokens: [B, V*T + 1, C].
        views: which views.
        grid: rows and columns of patches, T = rows * columns.
        num_views: V.

    Returns:
        [views * B, C, rows, columns] in channels-last memory, row v*B + b; the buffer itself where B is 1.
    """
    rows, columns = grid
    maps = token_rows(tokens, views, grid, num_views).reshape(-1, rows, columns, tokens.shape[2])
    return maps.permute(0, 3, 1, 2)


def token_rows(tokens: Tensor, views: slice, grid: tuple[int, int], num_views: int) -> Tensor:
    """The same rows as a view of the buffer, [views, B, T, C]."""
    per_view = grid[0] * grid[1]
    return tokens[:, : num_views * per_view].unflatten(1, (num_views, per_view))[:, views].transpose(0, 1)


def to_head_dtype(maps: list[Tensor]) -> list[Tensor]:
    """Heads run in float32 (TF32 allowed) whatever the transformer ran in, as upstream does."""
    return [m.to(torch.float32) if m.dtype in (torch.bfloat16, torch.float16) else m for m in maps]
