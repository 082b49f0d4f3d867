"""Dense heads: DPT (arXiv 2103.13413) on four token maps, as in DUSt3R and UniCeption."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..config import DenseHeadConfig
from ..ops import resize_conv


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

    def forward(self, x: Tensor, finer: Tensor | None = None) -> Tensor:
        if finer is not None:
            x = x + self.resConfUnit1(finer)
        # A 1x1 convolution commutes with bilinear resizing (its weights sum to 1), and costs a quarter before it.
        x = self.out_conv(self.resConfUnit2(x))
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


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

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Four [N, C_i, h, w] maps -> [N, feature_dim, 8h, 8w]."""

        def run(module: nn.Module, *args: Tensor) -> Tensor:
            if self.checkpoint_gradient and self.training:
                out: Tensor = checkpoint(module, *args, use_reentrant=False)
            else:
                out = module(*args)
            return out

        layers = [run(process, maps[hook]) for process, hook in zip(self.input_process, self.hooks, strict=True)]
        rows, columns = layers[2].shape[-2:]
        # The coarsest map is half the grid rounded up: after doubling, an odd grid has one row or column too many.
        x = run(self.scratch.refinenet4, layers[3])[:, :, :rows, :columns]
        x = run(self.scratch.refinenet3, x, layers[2])
        x = run(self.scratch.refinenet2, x, layers[1])
        return run(self.scratch.refinenet1, x, layers[0])


class DPTRegressor(nn.Module):
    """Features at eight times the patch grid -> channels at image size."""

    def __init__(self, config: DenseHeadConfig) -> None:
        super().__init__()
        first, second = config.hidden_dims or (config.feature_dim // 2, config.feature_dim // 2)
        self.checkpoint_gradient = config.checkpoint_gradient
        self.conv1 = nn.Conv2d(config.feature_dim, first, 3, padding=1)
        self.conv2 = nn.Sequential(
            nn.Conv2d(first, second, 3, padding=1), nn.ReLU(), nn.Conv2d(second, config.output_dim, 1)
        )

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """[N, feature_dim, 8h, 8w] -> [N, H, W, output_dim]."""
        features = self.conv1(x).permute(0, 2, 3, 1)
        weight3, bias3, weight1, bias1 = self.conv2.parameters()
        if self.checkpoint_gradient and self.training:
            out: Tensor = checkpoint(resize_conv, features, size, weight3, bias3, weight1, bias1, use_reentrant=False)
            return out
        return resize_conv(features, size, weight3, bias3, weight1, bias1)


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
    batch, _, dim = tokens.shape
    rows, columns = grid
    maps = tokens[:, : num_views * rows * columns].unflatten(1, (num_views, rows, columns))[:, views]
    maps = maps.transpose(0, 1).reshape(-1, rows, columns, dim)
    return maps.permute(0, 3, 1, 2)


def to_head_dtype(maps: list[Tensor]) -> list[Tensor]:
    """Heads run in float32 (TF32 allowed) whatever the transformer ran in, as upstream does."""
    return [m.to(torch.float32) if m.dtype in (torch.bfloat16, torch.float16) else m for m in maps]
