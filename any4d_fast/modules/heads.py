"""Pose head and scale head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import dense_inference
from .dense_inference import CastStore, PoseWeights
from .plain import plain_conv


def _pointwise(conv: nn.Module, rows: Tensor) -> Tensor:
    """A 1x1 convolution on token-major rows [N, T, C]."""
    if plain_conv(conv):
        return F.linear(rows, conv.weight.flatten(1), conv.bias)
    out: Tensor = conv(rows.transpose(1, 2)[..., None])  # [N, C, T, 1]
    return out[..., 0].transpose(1, 2)


class ResConvBlock(nn.Module):
    """Three 1x1 convolutions with ReLU, plus the input (Reloc3r's pose head, arXiv 2412.08376)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.res_conv1 = nn.Conv2d(channels, channels, 1)
        self.res_conv2 = nn.Conv2d(channels, channels, 1)
        self.res_conv3 = nn.Conv2d(channels, channels, 1)

    def convolutions(self) -> tuple[nn.Conv2d, nn.Conv2d, nn.Conv2d]:
        """In the order in which they run."""
        return self.res_conv1, self.res_conv2, self.res_conv3

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in self.convolutions():
            y = F.relu(_pointwise(conv, y))
        return x + y


class PoseHead(nn.Module):
    """Patch tokens of a view -> translation and quaternion, before normalisation."""

    def __init__(self, dim: int, patch_size: int, num_blocks: int) -> None:
        super().__init__()
        self.derived: CastStore[PoseWeights] = CastStore()
        width = 4 * patch_size**2
        self.proj = nn.Conv2d(dim, width, 1)
        self.res_conv = nn.ModuleList([ResConvBlock(width) for _ in range(num_blocks)])
        self.more_mlps = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.fc_t = nn.Linear(width, 3)
        self.fc_rot = nn.Linear(width, 4)

    def residual_blocks(self) -> list[ResConvBlock]:
        """In the order in which they run."""
        return [block for block in self.res_conv if isinstance(block, ResConvBlock)]

    def forward(self, tokens: Tensor, flag: Tensor | None = None) -> Tensor:
        """[N, T, C] -> [N, 7]: translation, then quaternion (x, y, z, w).

        With a flag ([1] int32), tokens of 16 bits are computed on in their dtype up to the mean over tokens, without
        gradients, and in float32 from there; the flag is set where a value does not fit.
        """
        if flag is not None:
            weights = self.derived.weights(self, tokens.dtype, dense_inference.pack_pose)
            mean = dense_inference.pose_features(weights, tokens, flag)
        else:
            x = _pointwise(self.proj, tokens)
            for block in self.res_conv:
                x = block(x)
            mean = x.mean(dim=1)
        x = self.more_mlps(mean)
        return torch.cat([self.fc_t(x), self.fc_rot(x)], dim=1)


POSE_PARTS = (nn.Conv2d, nn.Linear, nn.ReLU, nn.Sequential, nn.ModuleList, ResConvBlock)
"""What a pose head is made of."""


class ScaleHead(nn.Module):
    """The scale token -> the metric scale before its adaptor."""

    def __init__(self, dim: int, hidden: int, num_layers: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden)
        self.mlp = nn.ModuleList([nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU()) for _ in range(num_layers)])
        self.output_proj = nn.Linear(hidden, 1)

    def forward(self, token: Tensor) -> Tensor:
        """[B, C] -> [B, 1]."""
        x = self.proj(token)
        for layer in self.mlp:
            x = layer(x)
        scale: Tensor = self.output_proj(x)
        return scale
