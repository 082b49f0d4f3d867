"""Tokenizers of the geometric inputs: dense maps to patch tokens, vectors to one token a view."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from . import dense_inference
from .block import NORM_EPS, layer_norm
from .dense_inference import CastStore, TokenizerWeights
from .plain import plain_conv


class ResidualConv(nn.Module):
    """Two 3x3 convolutions with GELU and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.conv2(F.gelu(self.conv1(x))) + self.shortcut(x))


class DenseTokenizer(nn.Module):
    """A dense map -> patch tokens (paper, section 3.2: rays, depth and Doppler)."""

    def __init__(self, channels: int, dim: int, patch_size: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.derived: CastStore[TokenizerWeights] = CastStore()
        self.patch_size = patch_size
        self.conv_in = nn.Conv2d(channels * patch_size**2, widths[0], 3, padding=1)
        layers: list[nn.Module] = [ResidualConv(a, b) for a, b in zip(widths, widths[1:], strict=False)]
        layers.append(nn.Conv2d(widths[-1], dim, 1))
        self.encoder = nn.Sequential(*layers)
        self.norm_layer = nn.LayerNorm(dim, eps=NORM_EPS)

    def units(self) -> list[ResidualConv]:
        """In the order in which they run."""
        return [unit for unit in self.encoder if isinstance(unit, ResidualConv)]

    def forward(self, x: Tensor, dtype: torch.dtype | None = None, flag: Tensor | None = None) -> Tensor:
        """[N, H, W, channels] -> [N, T, C].

        With a dtype of 16 bits and a flag ([1] int32), the maps are computed on in that dtype, without gradients; the
        flag is set where a value does not fit it. Tokens have the dtype of `x` all the same.
        """
        if dtype is not None and flag is not None:
            weights = self.derived.weights(self, dtype, dense_inference.pack_tokenizer)
            tokens = dense_inference.tokenize(weights, x, self.patch_size, dtype, flag)
            return layer_norm(tokens, self.norm_layer, x.dtype)
        conv = self.conv_in
        if plain_conv(conv):
            patches = ops.unshuffle_conv(x, conv.weight, conv.bias, self.patch_size)  # [N, h, w, widths[0]]
            patches = patches.permute(0, 3, 1, 2)
        else:
            patches = conv(F.pixel_unshuffle(x.permute(0, 3, 1, 2), self.patch_size))
        maps = self.encoder(patches)  # channels-last memory, [N, C, h, w]
        return layer_norm(maps.permute(0, 2, 3, 1).flatten(1, 2), self.norm_layer)


TOKENIZER_PARTS = (nn.Conv2d, nn.Identity, nn.Sequential, nn.LayerNorm, ResidualConv)
"""What a dense tokenizer is made of."""


class VectorTokenizer(nn.Module):
    """A vector per view -> one token that is added to every patch (rotation, translation, scales)."""

    def __init__(self, channels: int, dim: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        # Nested as upstream nests it, because state-dict keys carry the nesting.
        encoder = nn.Sequential(nn.Linear(channels, widths[0]), nn.GELU())
        for a, b in zip(widths, widths[1:], strict=False):
            encoder = nn.Sequential(encoder, nn.Linear(a, b), nn.GELU())
        self.encoder = nn.Sequential(encoder, nn.Linear(widths[-1], dim))
        self.norm_layer = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels] -> [N, C]."""
        return layer_norm(self.encoder(x), self.norm_layer)
