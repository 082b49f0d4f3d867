"""Twins of classes of timm and of VGGT, which the test environment lacks: same names, attributes and arithmetic.

timm needs torchvision, and VGGT is on no registry. `accelerate` recognises a class by its qualified name, so a twin's
module says what it stands in for. Written for these tests from what the originals compute, not from their files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

C = TypeVar("C", bound=type)


def stands_in_for(module: str, name: str = "") -> Callable[[C], C]:
    """Give a class the module and, where it differs, the name of the one that it stands in for."""

    def rename(cls: C) -> C:
        cls.__module__ = module
        cls.__qualname__ = cls.__name__ = name or cls.__name__
        return cls

    return rename


class LayerScale(nn.Module):
    def __init__(self, dim: int, init_values: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_prob:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep).div_(keep)


class _Attention(nn.Module):
    """What both attentions hold."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool, attn_drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.fused_attn = True
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed queries and keys, and values: [B, heads, N, head_dim] each."""
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.q_norm(heads[0]), self.k_norm(heads[1]), heads[2]

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        dropped = self.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropped)
        return self.proj_drop(self.proj(self.after(out.transpose(1, 2).flatten(2))))

    def after(self, rows: Tensor) -> Tensor:
        return rows


@stands_in_for("timm.layers.norm", "LayerNorm")
class TimmLayerNorm(nn.LayerNorm):
    _fast_norm = False


@stands_in_for("timm.layers.attention", "Attention")
class TimmAttention(_Attention):
    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False, attn_drop: float = 0.0) -> None:
        super().__init__(dim, num_heads, qk_norm, attn_drop)
        self.norm = nn.Identity()
        self.gate = None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self.mix(*self.split(x), mask=attn_mask)

    def after(self, rows: Tensor) -> Tensor:
        return self.norm(rows)


@stands_in_for("timm.layers.mlp", "Mlp")
class TimmMlp(nn.Module):
    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


@stands_in_for("timm.models.vision_transformer", "Block")
class TimmBlock(nn.Module):
    def __init__(
        self, dim: int, num_heads: int, *, drop: float = 0.0, drop_path: float = 0.0, **attention: Any
    ) -> None:
        super().__init__()
        self.norm1 = TimmLayerNorm(dim, eps=1e-6)
        self.attn = TimmAttention(dim, num_heads, **attention)
        self.ls1 = LayerScale(dim, 1.0)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = TimmLayerNorm(dim, eps=1e-6)
        self.mlp = TimmMlp(dim, 4 * dim, drop)
        self.ls2 = LayerScale(dim, 1.0)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        branch = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = x + self.drop_path1(self.ls1(branch))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


@stands_in_for("timm.models.vision_transformer", "VisionTransformer")
class TimmTransformer(nn.Module):
    """Tokens in, tokens out: timm's patches and positions are not swapped."""

    def __init__(self, depth: int, dim: int, num_heads: int, **options: Any) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(TimmBlock(dim, num_heads, **options) for _ in range(depth)))
        self.norm = TimmLayerNorm(dim, eps=1e-6)
        self.fc_norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(x))


class Rope(nn.Module):
    """Rotation of halves of a head by the row and the column of a token."""

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return torch.cat([self._turn(t, positions[..., i]) for i, t in enumerate(tokens.chunk(2, dim=-1))], dim=-1)

    @staticmethod
    def _turn(x: Tensor, position: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        rates = 100.0 ** -(torch.arange(a.shape[-1], device=x.device) / a.shape[-1])
        angle = position[:, None, :, None] * rates
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


@stands_in_for("vggt.layers.attention", "Attention")
class VggtAttention(_Attention):
    def __init__(self, dim: int, num_heads: int, rope: nn.Module | None) -> None:
        super().__init__(dim, num_heads, qk_norm=True)
        self.rope = rope

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        q, k, v = self.split(x)
        if self.rope is not None:
            q, k = self.rope(q, pos), self.rope(k, pos)
        return self.mix(q.to(v.dtype), k.to(v.dtype), v)


@stands_in_for("vggt.layers.mlp", "Mlp")
class VggtMlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * dim, dim)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


@stands_in_for("vggt.layers.block", "Block")
class VggtBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, rope: nn.Module | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = VggtAttention(dim, num_heads, rope)
        self.ls1 = LayerScale(dim, 0.01)
        self.drop_path1 = nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = VggtMlp(dim)
        self.ls2 = LayerScale(dim, 0.01)
        self.drop_path2 = nn.Identity()
        self.sample_drop_ratio = 0.0

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), pos=pos))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VggtAggregator(nn.Module):
    """Frame attention, then global attention, over [B, V, N, C] tokens on a grid."""

    def __init__(self, depth: int, dim: int, num_heads: int) -> None:
        super().__init__()
        self.rope = Rope()
        self.frame_blocks = nn.ModuleList([VggtBlock(dim, num_heads, self.rope) for _ in range(depth)])
        self.global_blocks = nn.ModuleList([VggtBlock(dim, num_heads, self.rope) for _ in range(depth)])

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """[B, V, N, C] tokens and [N, 2] rows and columns -> [B, V, N, C]."""
        batch, views, length, _ = tokens.shape
        x = tokens.flatten(0, 1)
        for frame, overall in zip(self.frame_blocks, self.global_blocks, strict=True):
            x = frame(x, pos=positions.expand(batch * views, -1, -1))
            x = overall(x.unflatten(0, (batch, views)).flatten(1, 2), pos=positions.repeat(batch, views, 1))
            x = x.unflatten(1, (views, length)).flatten(0, 1)
        return x.unflatten(0, (batch, views))


@stands_in_for("vggt.heads.dpt_head", "DPTHead")
class VggtHead(nn.Module):
    """Of the head only what is swapped in it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)
