"""Image encoder: DINOv2 ViT/14 (arXiv 2304.07193), patch tokens after the final LayerNorm."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..config import EncoderConfig
from ..ops.attention import Segments, attention_scale
from ..precision import EXACT, FP8
from . import packing_fp8
from .block import NORM_EPS, Block, compute_dtype, layer_norm
from .derived import Derived, caching, derivable
from .host_weights import require_here
from .packing import PackedBlocks, packed_blocks, packed_dtype
from .packing_fp8 import PackedBlocks8, packed_blocks_fp8
from .plain import plain_conv

TRAINED_GRID = 37  # patches a side at DINOv2's 518-pixel training size
REGISTERS = 4


class PatchEmbed(nn.Module):
    """Holder of the patch projection's parameters under DINOv2's name."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)


class VisionTransformer(nn.Module):
    """DINOv2's transformer; parameters are named as in its repository."""

    register_tokens: nn.Parameter | None

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        dim, heads = config.dim, config.num_heads
        self.patch_size = config.patch_size
        self.num_heads = heads
        self.gradient_checkpointing = config.gradient_checkpointing
        # DINOv2 resizes for its register variants with antialiasing and no offset, for the others the other way round.
        self.pos_offset = 0.0 if config.with_registers else 0.1
        self.pos_antialias = config.with_registers
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, TRAINED_GRID**2 + 1, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, REGISTERS, dim)) if config.with_registers else None
        self.patch_embed = PatchEmbed(dim, config.patch_size)
        self.blocks = nn.ModuleList(
            [Block(dim, heads, init_values=1.0, gated=config.size == "giant") for _ in range(config.depth)]
        )
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS) if config.norm_returned_features else nn.Identity()
        self.derived = Derived()
        self._initialize()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.derived.drop_stale()
        return self

    def _initialize(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def position_embedding(self, rows: int, columns: int) -> Tensor:
        """[1 + rows * columns, C]: the class token's row, then the patches', resized bicubically to the grid.

        The offset of 0.1 enters the scale factor and so every sample position; it is part of the trained weights.
        """
        if not caching() or not derivable(self.pos_embed):
            return self._resized(rows, columns)
        key = ("positions", rows, columns, self.pos_embed.device)
        this = weakref.proxy(self)
        return self.derived.get(key, lambda: [this.pos_embed], lambda: [this._resized(rows, columns)])[0]

    def _resized(self, rows: int, columns: int) -> Tensor:
        table = self.pos_embed[0]  # [1 + 37 * 37, C]
        if rows == columns == TRAINED_GRID:
            return table
        # In float64 tensor cores are exact, whatever TF32's setting, and autocast leaves it alone.
        grid = table[1:].double().view(TRAINED_GRID, -1)  # [37, 37 * C]
        tall = (self._cubic(rows, table.device) @ grid).view(rows, TRAINED_GRID, -1)
        patches = (self._cubic(columns, table.device) @ tall).flatten(0, 1)  # [rows * columns, C]
        return torch.cat([table[:1].float(), patches.float()])

    def _cubic(self, size: int, device: torch.device) -> Tensor:
        """[size, 37] float64: bicubic weights of one axis, which are the resized columns of an identity matrix.

        PyTorch's own bicubic resize has a thread for every pixel, which walks through all channels: 11 ms forward and
        backward, where two matmuls take a tenth of one.
        """
        identity = torch.eye(TRAINED_GRID, device=device, dtype=torch.float32)[None, None]
        if self.pos_offset:
            scale = ((size + self.pos_offset) / TRAINED_GRID, 1.0)
            found = F.interpolate(identity, scale_factor=scale, mode="bicubic", antialias=self.pos_antialias)
        else:
            target = (size, TRAINED_GRID)
            found = F.interpolate(identity, size=target, mode="bicubic", antialias=self.pos_antialias)
        return found[0, 0].double()

    def _patch_weight(self, dtype: torch.dtype) -> Tensor:
        weight = self.patch_embed.proj.weight
        if packed_dtype(weight.device) is None or not derivable(weight):
            return weight.to(dtype)
        proj = self.patch_embed.proj
        return self.derived.get(
            ("patch", dtype, weight.device), lambda: [proj.weight], lambda: [proj.weight.to(dtype)]
        )[0]

    def _tokens(self, images: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """[N, 1 + registers + T, C]: class token, registers, patches, in the images' dtype."""
        proj: nn.Module = self.patch_embed.proj
        registers = None if self.register_tokens is None else self.register_tokens[0]
        if plain_conv(proj):
            weight = self._patch_weight(dtype)
            bias, first = proj.bias, self.cls_token[0, 0]
            return ops.tokenize(images.to(dtype), weight, bias, positions, first, registers, out_dtype=images.dtype)
        patches = proj(images).flatten(2).transpose(1, 2).to(images.dtype) + positions[1:]
        rows = [self.cls_token[0] + positions[:1]] + ([] if registers is None else [registers])
        return torch.cat([*(row.to(images.dtype).expand(len(images), -1, -1) for row in rows), patches], dim=1)

    def forward(self, images: Tensor, precision: str = EXACT) -> Tensor:
        """[N, 3, H, W] normalised images -> [N, T, C] patch tokens, float32 (a view without the class token)."""
        n, _, height, width = images.shape
        rows, columns = height // self.patch_size, width // self.patch_size
        dtype = compute_dtype(images)
        tokens = self._tokens(images, self.position_embedding(rows, columns), dtype)
        length = tokens.shape[1]
        x = tokens.flatten(0, 1)  # [N * length, C]
        segments = Segments.batched(n, length)
        scale = attention_scale(x.shape[-1] // self.num_heads, length)
        blocks = [b for b in self.blocks if isinstance(b, Block)]
        # Without a final norm the last block still takes one; what it makes of the stream is not used.
        final_norm = self.norm if isinstance(self.norm, nn.LayerNorm) else blocks[-1].norm2
        packed: PackedBlocks | PackedBlocks8 | None = None
        if precision == FP8:
            packed = packed_blocks_fp8(self.derived, "the encoder", blocks, final_norm, dtype, packing_fp8.ENCODER)
        elif packed_dtype(x.device) is not None:
            packed = packed_blocks(self.derived, blocks, final_norm, dtype)
        if packed is None:
            require_here("encoder", blocks[0].attn.qkv.weight, x)
        y = layer_norm(x, blocks[0].norm1, dtype) if packed is None else packed.first_input(x, dtype)
        for i, block in enumerate(blocks):
            last = i + 1 == len(blocks)
            args = (x, y, segments, scale, final_norm if last else blocks[i + 1].norm1, (None, None))
            out_dtype = x.dtype if last else dtype
            if self.gradient_checkpointing and self.training:
                x, y = checkpoint(block, *args, out_dtype, use_reentrant=False)
            else:
                x, y = block(*args, out_dtype, None if packed is None else packed.blocks[i])
        assert isinstance(y, Tensor)  # e4m3 rows are for blocks
        out = y if isinstance(self.norm, nn.LayerNorm) else x
        return out.view(n, length, -1)[:, length - rows * columns :]


class ImageEncoder(nn.Module):
    """The image encoder under upstream's name and attributes."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.enc_embed_dim = config.dim
        self.patch_size = config.patch_size
        self.data_norm_type = config.data_norm_type
        self.model = VisionTransformer(config)

    def forward(self, images: Tensor, precision: str = EXACT) -> Tensor:
        """[N, 3, H, W] normalised images -> [N, T, C] patch tokens; `precision` as in `Any4D.forward`."""
        tokens: Tensor = self.model(images, precision)
        return tokens


def grid_of(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches.

    Raises:
        ValueError: when the size is not a multiple of the patch size.
    """
    if height % patch_size or width % patch_size or not height or not width:
        nearest = tuple(max(1, math.floor(s / patch_size + 0.5)) * patch_size for s in (height, width))
        raise ValueError(
            f"img: expected height and width to be positive multiples of {patch_size}, got {height} x {width}; "
            f"resize to {nearest[0]} x {nearest[1]}, or use model.infer, which resizes"
        )
    return height // patch_size, width // patch_size
