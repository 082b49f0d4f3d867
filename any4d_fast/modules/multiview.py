"""Multi-view transformer: global and frame attention over one buffer of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import TransformerConfig
from ..ops.attention import Segments, attention_scale
from ..precision import EXACT, FP8, PrecisionError
from . import packing_fp8
from .block import NORM_EPS, Block, compute_dtype, layer_norm
from .derived import Derived, derivable
from .host_weights import require_here
from .packing import PackedBlocks, packed_blocks, packed_dtype
from .packing_fp8 import PackedBlocks8, packed_blocks_fp8


def sinusoid_table(positions: int, dim: int) -> Tensor:
    """[positions, dim] sine at even and cosine at odd channels, base 10000 (arXiv 1706.03762, section 3.5)."""
    channel = torch.arange(dim, dtype=torch.float64)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] / 10000 ** (2 * (channel // 2) / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


class MultiViewTransformer(nn.Module):
    """Alternating (even blocks global, odd blocks within each view) or purely global attention."""

    view_pos_table: Tensor

    def __init__(self, config: TransformerConfig, input_dim: int) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.dim = dim
        self.gradient_checkpointing = config.gradient_checkpointing
        self.proj_embed = nn.Identity() if input_dim == dim else nn.Linear(input_dim, dim)
        self.self_attention_blocks = nn.ModuleList(
            [
                Block(
                    dim,
                    config.num_heads,
                    mlp_ratio=config.mlp_ratio,
                    qkv_bias=config.qkv_bias,
                    qk_norm=config.qk_norm,
                    init_values=config.init_values,
                    proj_drop=config.proj_drop,
                )
                for _ in range(config.depth)
            ]
        )
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.derived = Derived()
        if config.distinguish_ref_and_non_ref_views:
            rows = config.max_num_views_for_pe if config.use_pe_for_non_reference_views else 1
            self.register_buffer("view_pos_table", sinusoid_table(rows, dim))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.derived.drop_stale()
        return self

    def forward(self, tokens: Tensor, views: int, precision: str = EXACT) -> tuple[list[Tensor], Tensor]:
        """Run all blocks.

        Args:
            tokens: [B, V*T + 1, C_in] fused tokens, view by view, then the sample's scale token.
            views: V.
            precision: as in `Any4D.forward`.

        Returns:
            The tapped features [B, V*T + 1, C] (after the final LayerNorm where configured), and the last ones.
        """
        config = self.config
        batch, rows, _ = tokens.shape
        per_view = (rows - 1) // views
        blocks = [b for b in self.self_attention_blocks if isinstance(b, Block)]
        dtype = compute_dtype(tokens)
        packed = self._packed_fp8(blocks, dtype) if precision == FP8 else self._packed(blocks)
        if packed is None:
            require_here("info_sharing", blocks[0].attn.qkv.weight, tokens)
        x = self._project(tokens, packed is not None)
        x = self._add_view_positions(x, views, per_view)
        x = x.flatten(0, 1)  # [B * (V*T + 1), C]
        y = layer_norm(x, blocks[0].norm1, dtype) if packed is None else packed.first_input(x, dtype)
        rows_once: tuple[Tensor | None, Tensor | None] | None = None
        taps: list[Tensor] = []
        for i, block in enumerate(blocks):
            frame = config.kind == "alternating_attention" and i % 2 == 1
            segments = Segments.frame(batch, views, per_view, extra=1) if frame else Segments.global_(batch, rows)
            if packed is None or not frame:
                scales = self._row_scales(x, batch, views, per_view, frame)
            else:  # nothing is drawn: the same for all frame blocks
                scales = rows_once = rows_once or self._row_scales(x, batch, views, per_view, frame)
            last = i + 1 == len(blocks)
            args = (
                x, y, segments, self._attention_scale(per_view if frame else rows),
                self.norm if last else blocks[i + 1].norm1, scales, x.dtype if last else dtype,
                None if packed is None else packed.blocks[i],
            )  # fmt: skip
            if self.gradient_checkpointing and self.training:
                x, y = checkpoint(block, *args, use_reentrant=False)
            else:
                x, y = block(*args)
            if config.indices is not None and i in config.indices:
                taps.append(self._tap(x, y, last, packed is not None))
        assert isinstance(y, Tensor)  # e4m3 rows are for blocks
        return [t.view(batch, rows, -1) for t in taps], y.view(batch, rows, -1)

    def _tap(self, x: Tensor, y: Tensor, last: bool, overwritten: bool) -> Tensor:
        """Features that a dense head reads: the stream, after the final LayerNorm where configured."""
        if self.config.norm_intermediate:
            return y if last else layer_norm(x, self.norm)
        return x.clone() if overwritten and not last else x

    def _packed(self, blocks: list[Block]) -> PackedBlocks | PackedBlocks8 | None:
        """Inference weights, where they may be used: see `packing`."""
        dtype = packed_dtype(self.norm.weight.device)
        if dtype is None or self.training or not self._plain_projection():
            return None
        return packed_blocks(self.derived, blocks, self.norm, dtype)

    def _packed_fp8(self, blocks: list[Block], dtype: torch.dtype) -> PackedBlocks8:
        """Inference weights in 8 bits: see `packing_fp8`."""
        name = "the multi-view transformer"
        if not self._plain_projection():
            raise PrecisionError(f'precision="fp8" cannot run this call: the projection before {name} is not plain')
        return packed_blocks_fp8(self.derived, name, blocks, self.norm, dtype, packing_fp8.TRANSFORMER)

    def _plain_projection(self) -> bool:
        projection = self.proj_embed
        plain = type(projection) is nn.Identity or (
            type(projection) is nn.Linear and derivable(projection.weight, projection.bias)
        )
        return plain and not projection._forward_hooks and not projection._forward_pre_hooks

    def _project(self, tokens: Tensor, packed: bool) -> Tensor:
        """[B, rows, C_in] -> [B, rows, C] in the tokens' dtype; with `packed` in memory that may be overwritten."""
        if not packed:
            result: Tensor = self.proj_embed(tokens).to(tokens.dtype)
            return result
        projection = self.proj_embed
        if not isinstance(projection, nn.Linear):
            return tokens.clone()
        dtype, device = compute_dtype(tokens), tokens.device
        found = self.derived.get(
            ("projection", dtype, device),
            lambda: [projection.weight, projection.bias],
            lambda: [projection.weight.to(device).to(dtype), projection.bias.to(dtype)],
        )
        return torch.nn.functional.linear(tokens.to(dtype), *found).to(tokens.dtype)

    def _attention_scale(self, length: int) -> float:
        config = self.config
        return attention_scale(
            self.dim // config.num_heads,
            length,
            scalable_softmax=config.use_scalable_softmax,
            entropy_scaling=config.use_entropy_scaling,
            base_token_count=config.base_token_count_for_entropy_scaling,
            growth_factor=config.entropy_scaling_growth_factor,
        )

    def _add_view_positions(self, x: Tensor, views: int, per_view: int) -> Tensor:
        """Mark the reference view's tokens (and the other views' where configured); the scale token gets nothing."""
        config = self.config
        if not config.distinguish_ref_and_non_ref_views:
            return x
        if isinstance(self.proj_embed, nn.Identity):
            x = x.clone()  # without a projection `x` is still the fused map that the dense heads read
        x[:, :per_view] += self.view_pos_table[0]
        if config.use_pe_for_non_reference_views and views > 1:
            if views > config.max_num_views_for_pe:
                raise ValueError(
                    f"views: expected at most max_num_views_for_pe = {config.max_num_views_for_pe}, got {views}"
                )
            if config.use_rand_idx_pe_for_non_reference_views:
                index = torch.randint(1, config.max_num_views_for_pe, (views - 1,))
            else:
                index = torch.arange(1, views)
            table = self.view_pos_table[index.to(x.device)].repeat_interleave(per_view, dim=0)
            x[:, per_view : views * per_view] += table
        return x

    def _row_scales(
        self, x: Tensor, batch: int, views: int, per_view: int, frame: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """[R] factors of both branches: stochastic depth per attended sample, and 0 on scale tokens in frame blocks."""
        drop = self.config.drop_path if self.training else 0.0
        if not frame and not drop:
            return None, None
        samples, length = (batch * views, per_view) if frame else (batch, views * per_view + 1)

        def scale() -> Tensor:
            keep = torch.ones(samples, device=x.device)
            if drop:
                keep = keep.bernoulli_(1 - drop) / (1 - drop)
            rows = keep[:, None].expand(samples, length).reshape(batch, -1)
            if frame:
                rows = torch.nn.functional.pad(rows, (0, 1))
            return rows.flatten()

        first = scale()
        return first, scale() if drop else first
