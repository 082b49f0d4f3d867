"""The pre-norm transformer block that the image encoder and the multi-view transformer share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..ops.attention import Segments
from .plain import plain_linear

if TYPE_CHECKING:
    from ..ops.linear_fp8 import Rows8
    from .packing import BlockWeights
    from .packing_fp8 import BlockWeights8

NORM_EPS = 1e-6  # DINOv2's and upstream's epsilon for every LayerNorm


def compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype of matrix products on this tensor: autocast's where it is on, else the tensor's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`; where `x` has the dtype of matrix products, through the op, from the parameters as they are."""
    if plain_linear(layer) and x.dtype == compute_dtype(x):
        return ops.linear(x, layer.weight, layer.bias)
    result: Tensor = layer(x)
    return result


def _last(layer: nn.Module, x: Tensor, again: bool) -> Tensor:
    """`_linear` for the last layer of what may be computed again.

    A checkpoint stops computing when everything saved is there again. PyTorch's own layer saves its rows before it
    multiplies them, so that its product is left out the second time; an autograd function saves them after it.
    """
    return layer(x) if again else _linear(layer, x)


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch (arXiv 2103.17239)."""

    def __init__(self, dim: int, init_value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_value))


class SelfAttention(nn.Module):
    """Multi-head self-attention over segments of one buffer of rows."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(self.head_dim, eps=NORM_EPS) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim, eps=NORM_EPS) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, y: Tensor, segments: Segments, scale: float, weights: BlockWeights | None = None) -> Tensor:
        """[R, C] normed rows -> [R, C] branch; rows outside every segment attend to nothing."""
        packed = _linear(self.qkv, y) if weights is None else F.linear(y, weights.qkv_weight, weights.qkv_bias)
        out = ops.attention(self.arrange(packed), segments=segments, scale=scale)  # [R, heads, head_dim]
        assert isinstance(out, Tensor)
        rows = out.flatten(1)
        return _linear(self.proj, rows) if weights is None else F.linear(rows, weights.proj_weight, weights.proj_bias)

    def arrange(self, packed: Tensor) -> Tensor:
        """[R, 3C] queries, keys and values -> [R, 3, heads, head_dim], normed where configured."""
        qkv = packed.view(-1, 3, self.num_heads, self.head_dim)
        if isinstance(self.q_norm, nn.LayerNorm):
            q, k, v = qkv.unbind(1)
            qkv = torch.stack([self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v], dim=1)
        return qkv


class Mlp(nn.Module):
    """Linear, erf GELU, dropout, Linear."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.drop = drop
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, y: Tensor, weights: BlockWeights | None = None, again: bool = False) -> Tensor:
        """[R, C] rows -> [R, C]; `again`: this is computed once more for the backward pass (see `_last`)."""
        if weights is not None:
            hidden = ops.linear_gelu(y, weights.in_weight, weights.in_bias)
            return F.linear(hidden, weights.out_weight, weights.out_bias)
        hidden = ops.linear_gelu(y, self.fc1.weight, self.fc1.bias) if plain_linear(self.fc1) else F.gelu(self.fc1(y))
        return _last(self.fc2, F.dropout(hidden, self.drop, self.training), again)


class SwiGLU(nn.Module):
    """Gated MLP of DINOv2's giant encoder; its hidden width is two thirds of the plain one, rounded up to 8."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        hidden = (hidden * 2 // 3 + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, y: Tensor, weights: BlockWeights | None = None, again: bool = False) -> Tensor:
        """As `Mlp.forward`."""
        both = _linear(self.w12, y) if weights is None else F.linear(y, weights.in_weight, weights.in_bias)
        gate, value = both.chunk(2, dim=-1)
        hidden = F.silu(gate) * value
        if weights is not None:
            return F.linear(hidden, weights.out_weight, weights.out_bias)
        return _last(self.w3, hidden, again)


class Block(nn.Module):
    """Attention branch, then MLP branch, on a residual stream that carries its own next LayerNorm.

    A block takes the stream `x` together with `y`, the LayerNorm of it that its attention reads, and returns both
    for the block after it, so that residual, LayerScale and the following LayerNorm are one pass over memory.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        init_values: float | None = None,
        proj_drop: float = 0.0,
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = SelfAttention(dim, num_heads, qkv_bias=qkv_bias, qk_norm=qk_norm)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        hidden = int(dim * mlp_ratio)
        self.mlp: nn.Module = SwiGLU(dim, hidden) if gated else Mlp(dim, hidden, proj_drop)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.proj_drop = proj_drop
        self.recompute_mlp = False

    def forward(
        self,
        x: Tensor,
        y: Tensor | Rows8,
        segments: Segments,
        scale: float,
        next_norm: nn.LayerNorm,
        row_scales: tuple[Tensor | None, Tensor | None] = (None, None),
        out_dtype: torch.dtype | None = None,
        weights: BlockWeights | BlockWeights8 | None = None,
    ) -> tuple[Tensor, Tensor | Rows8]:
        """Run the block.

        Args:
            x: [R, C] residual stream.
            y: [R, C] `norm1(x)` in the dtype of matrix products; for 8-bit weights as they want it.
            segments: which rows attend to which.
            scale: factor on the attention logits.
            next_norm: the LayerNorm that reads the result.
            row_scales: [R] factors on the two branches (stochastic depth; 0 leaves a row as it is).
            out_dtype: dtype of the second result; that of `y` by default.
            weights: this block's inference weights. The stream is then overwritten, and `y` and the second result are
                as `weights` wants them.

        Returns:
            The new residual stream and `next_norm` of it.
        """
        if weights is not None:
            return weights.infer(self, x, y, segments, scale, row_scales[0], out_dtype or compute_dtype(x))
        assert isinstance(y, Tensor)
        branch = F.dropout(self.attn(y, segments, scale), self.proj_drop, self.training)
        x, y = _residual_norm(x, branch, self.ls1, self.norm2, row_scales[0], y.dtype)
        recompute = self.recompute_mlp and self.training
        branch = checkpoint(self.mlp, y, again=True, use_reentrant=False) if recompute else self.mlp(y)
        branch = F.dropout(branch, self.proj_drop, self.training)
        return _residual_norm(x, branch, self.ls2, next_norm, row_scales[1], out_dtype or y.dtype)

    def infer(
        self,
        x: Tensor,
        y: Tensor,
        segments: Segments,
        scale: float,
        row_scale: Tensor | None,
        out_dtype: torch.dtype,
        weights: BlockWeights,
    ) -> tuple[Tensor, Tensor]:
        """`forward` in place with inference weights in 16 bits."""
        branch = self.attn(y, segments, scale, weights)
        gamma, gain, shift = weights.after_attention
        x, y = ops.residual_norm(
            x, branch, gamma, gain, shift, NORM_EPS, row_scale=row_scale, inplace=True, out_dtype=y.dtype
        )
        branch = self.mlp(y, weights)
        gamma, gain, shift = weights.after_mlp
        return ops.residual_norm(
            x, branch, gamma, gain, shift, NORM_EPS, row_scale=row_scale, inplace=True, out_dtype=out_dtype
        )


def _residual_norm(
    x: Tensor, branch: Tensor, scale: nn.Module, norm: nn.LayerNorm, row_scale: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    gamma = scale.gamma if isinstance(scale, LayerScale) else None
    return ops.residual_norm(x, branch, gamma, norm.weight, norm.bias, norm.eps, row_scale=row_scale, out_dtype=dtype)


def layer_norm(x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype | None = None) -> Tensor:
    """`norm(x)` through the op, in `dtype` (that of `x` by default)."""
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps, out_dtype=dtype)
