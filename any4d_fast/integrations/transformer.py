"""Transformer parts that the families share: block, attention, MLP and LayerNorm on `any4d_fast.ops`.

Each part computes from its module's own parameters and calls its submodules where it can, so that hooks, adapters and
dropout in them go on working. What a call asks for that the kernels have not (a mask, attention dropout), what was
changed since (a hook on a module that would be passed over, a layer that became another one), and what has so few
tokens that launches take the time (`checks.launch_bound`), runs as it always did.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..modules.plain import plain, plain_linear, unhooked
from ..ops import Segments, attention_scale
from .checks import drop_path, erf_gelu, launch_bound, layer_scale, matmul_dtype, norm_dtype, plain_norm
from .swap import Swap


class FusedLayerNorm(Swap):
    """LayerNorm in one pass, and its gradients in one."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        if not plain(self.weight, self.bias) or not x.is_floating_point() or launch_bound(x):
            found: Tensor = super().forward(x)
            return found
        return ops.layer_norm(x, self.weight, self.bias, self.eps, out_dtype=norm_dtype(x))


class FusedMlp(Swap):
    """Linear and erf GELU in one kernel; then whatever follows them in the family."""

    fc1: nn.Linear
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        known = plain_linear(self.fc1) and erf_gelu(self.act) and unhooked(self.act)
        if not known or launch_bound(x):
            found: Tensor = super().forward(x)
            return found
        dtype = matmul_dtype(x)
        # The bias is added to the float32 sum: it needs no rounding.
        hidden = ops.linear_gelu(x.to(dtype), self.fc1.weight, self.fc1.bias)
        return self.finish(hidden)

    def finish(self, hidden: Tensor) -> Tensor:
        """From the hidden layer to the result, dropout included."""
        raise NotImplementedError


class FusedAttention(Swap):
    """Self-attention on the projection's output as it lies in memory."""

    qkv: nn.Module
    proj: nn.Module
    proj_drop: nn.Module
    num_heads: int
    attn_drop: nn.Dropout | float

    def declined(self, x: Tensor) -> bool:
        """Whether a call is the module's own: attention weights are dropped or looked at, or it is launch-bound."""
        if launch_bound(x):
            return True
        drop = self.attn_drop
        if isinstance(drop, nn.Module) and not (type(drop) is nn.Dropout and unhooked(drop)):
            return True
        return self.training and (drop.p if isinstance(drop, nn.Module) else drop) > 0

    def attend(
        self, x: Tensor, rotate: Callable[[Tensor], Tensor] | None = None, scaling: dict[str, Any] | None = None
    ) -> Tensor:
        """Attention within each sample.

        Args:
            x: [B, N, C] normed tokens.
            rotate: positional encoding of queries and of keys, [B, heads, N, head_dim] to the same.
            scaling: corrections of `attention_scale`.

        Returns:
            [B, N, C] branch.
        """
        batch, length, _ = x.shape
        packed = self.qkv(x)
        head_dim = packed.shape[-1] // (3 * self.num_heads)
        qkv = packed.reshape(batch * length, 3, self.num_heads, head_dim).to(matmul_dtype(packed))
        norms = [self._part(name) for name in ("q_norm", "k_norm")]
        if rotate is not None or norms != [None, None]:
            qkv = self._encoded(qkv.unflatten(0, (batch, length)), norms, rotate)
        scale = attention_scale(head_dim, length, **(scaling or {}))
        out = ops.attention(qkv, segments=Segments.batched(batch, length), scale=scale)
        assert isinstance(out, Tensor)
        found: Tensor = self.proj_drop(self.proj(out.flatten(1).unflatten(0, (batch, length))))
        return found

    def _encoded(self, qkv: Tensor, norms: list[nn.Module | None], rotate: Callable[[Tensor], Tensor] | None) -> Tensor:
        """[B, N, 3, heads, head_dim] -> [B * N, 3, heads, head_dim] with queries and keys normed and rotated."""
        values = qkv.select(2, 2)
        parts = []
        for index, norm in enumerate(norms):
            part = qkv.select(2, index).transpose(1, 2)  # [B, heads, N, head_dim], as the encodings want it
            part = part if norm is None else norm(part)
            part = part if rotate is None else rotate(part)
            parts.append(part.transpose(1, 2).to(values.dtype))
        return torch.stack([*parts, values], dim=2).flatten(0, 1)


class FusedBlock(Swap):
    """Residual, LayerScale, stochastic depth and the next LayerNorm in one pass after each branch."""

    norm1: nn.LayerNorm
    attn: nn.Module
    norm2: nn.LayerNorm
    mlp: nn.Module

    def fits(self, x: Any) -> bool:
        """Whether this call is one for `run`."""
        if not isinstance(x, Tensor) or x.ndim != 3 or not x.is_floating_point() or launch_bound(x):
            return False
        scales = [m for m in (self._part("ls1"), self._part("ls2")) if m is not None]
        paths = [m for m in self.paths() if m is not None]
        if not all(map(layer_scale, scales)) or not all(map(drop_path, paths)) or not unhooked(*scales, *paths):
            return False
        if not plain(*(_gamma(scale) for scale in scales)):
            return False
        return plain_norm(self.norm1) and plain_norm(self.norm2)

    def paths(self) -> tuple[nn.Module | None, nn.Module | None]:
        """Stochastic depth of the two branches, where there is any."""
        return self._part("drop_path1"), self._part("drop_path2")

    def run(self, x: Tensor, **arguments: Any) -> Tensor:
        """The block on a stream.

        Args:
            x: [B, N, C] residual stream.
            **arguments: what attention takes besides.

        Returns:
            [B, N, C] new stream.
        """
        first, second = self.paths()
        norm1, norm2 = self.norm1, self.norm2
        y = ops.layer_norm(x, norm1.weight, norm1.bias, norm1.eps, out_dtype=_dtype_for(self.attn, x))
        x, normed = self._add(x, self.attn(y, **arguments), _gamma(self._part("ls1")), first, norm2)
        assert normed is not None
        return self._add(x, self.mlp(normed), _gamma(self._part("ls2")), second, None)[0]

    def _add(
        self, x: Tensor, branch: Tensor, gamma: Tensor | None, path: nn.Module | None, norm: nn.LayerNorm | None
    ) -> tuple[Tensor, Tensor | None]:
        """The stream with a branch added, and its LayerNorm where one follows."""
        dtype = branch.dtype if gamma is None else torch.promote_types(branch.dtype, gamma.dtype)
        row_scale = None
        if path is not None and self.training:
            # The module draws its own factors, one a sample, in the dtype that it would see.
            row_scale = path(torch.ones((x.shape[0], 1, 1), dtype=dtype, device=x.device)).detach().flatten()
        x = x.to(torch.promote_types(x.dtype, dtype))
        scale: dict[str, Any] = {"row_scale": row_scale, "rows_per_scale": x.shape[1]}
        if norm is None:
            return ops.residual_norm(x, branch, gamma, normalize=False, **scale)
        out_dtype = _dtype_for(self.mlp, x)
        return ops.residual_norm(x, branch, gamma, norm.weight, norm.bias, norm.eps, out_dtype=out_dtype, **scale)


def _gamma(scale: nn.Module | None) -> Tensor | None:
    found = None if scale is None else scale.gamma
    assert found is None or isinstance(found, Tensor)
    return found


def _dtype_for(reader: nn.Module, x: Tensor) -> torch.dtype:
    """Dtype in which to hand a LayerNorm to its reader: that of its matrix product, where it begins with one."""
    begins = isinstance(reader, (FusedAttention, FusedMlp)) and unhooked(reader)
    return matmul_dtype(x) if begins else norm_dtype(x)
