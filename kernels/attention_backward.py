"""Attention backward over packed QKV rows: the launcher.

Two ways, both recomputing the probabilities from the log-sum-exp:
- two passes, 7 matrix products, no atomics, so bitwise equal from run to run: `query_kernel`, then `key_kernel`;
- one pass, 5 matrix products: `key_kernel` also adds its share of dQ into a float32 buffer, in whatever order the
  programs finish, between `prepare_kernel` and `finish_kernel`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from any4d_fast.layout import zero_uncovered

from ._attention_backward import finish_kernel, key_kernel, prepare_kernel, query_kernel
from ._attention_tiles import (
    BackwardTiles,
    KeyTile,
    QueryTile,
    aot_case,
    aot_sizes,
    backward_tiles,
    block_type,
    major_capability,
    padded,
)
from .aot import AotCase
from .attention import LOG2E, descriptor, in_place, precision, tma_reasons


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: list[int],
    scale: float,
    deterministic: bool,
    tiles: BackwardTiles | None = None,
) -> Tensor:
    """Run the backward.

    Args:
        grad_out: [rows, heads, head_dim] gradient of `out`.
        grad_lse: [heads, rows] gradient of `lse`, or None.
        qkv: [rows, 3, heads, head_dim], as the forward had it.
        out, lse: what the forward returned.
        segments: [start, length, count, stride, groups, group_stride].
        scale: factor on q k^T.
        deterministic: bitwise equal from run to run: no atomic additions.
        tiles: configuration to run instead of the table's (for tuning).

    Returns:
        [rows, 3, heads, head_dim] contiguous gradient of qkv; zero in rows of no segment.
    """
    rows, _, heads, head_dim = qkv.shape
    grad = torch.empty((rows, 3, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    zero_uncovered(grad, segments)
    start, length, count, stride, groups, group_stride = segments
    if groups * count * length == 0:
        return grad
    qkv, grad_out, out = in_place(qkv), in_place(grad_out.to(qkv.dtype)), out.contiguous()
    tiles = tiles or backward_tiles(length, head_dim, qkv.dtype, major_capability(qkv.device), deterministic)
    padded_rows = groups * count * heads * triton.cdiv(length, tiles.pad) * tiles.pad
    stats = torch.empty((2, padded_rows), dtype=torch.float32, device=qkv.device)
    call = _Call(grad_out, grad_lse, qkv, out, lse.contiguous(), segments, scale, grad, stats, tiles.pad)
    if tiles.key.single:
        call.single_pass(tiles.key)
    else:
        call.queries(tiles.query)
        call.keys(tiles.key, None)
    return grad


@dataclass(frozen=True)
class _Call:
    """Arguments that the kernels of one backward share."""

    grad_out: Tensor
    grad_lse: Tensor | None
    qkv: Tensor
    out: Tensor
    lse: Tensor
    segments: list[int]
    scale: float
    grad: Tensor
    stats: Tensor  # [2, segments * heads * padded length] float32: log-sum-exp in log2 units, delta
    pad: int

    def _geometry(self) -> dict[str, int]:
        start, length, count, stride, _, group_stride = self.segments
        names = {"start": start, "length": length, "count": count, "stride": stride, "group_stride": group_stride}
        return {**names, "heads": self.qkv.shape[2]}

    def _sizes(self) -> dict[str, Any]:
        return {"segments": self.segments[2] * self.segments[4], "rows": self.qkv.shape[0]}

    def _constants(self) -> dict[str, Any]:
        head_dim = self.qkv.shape[3]
        return {"HEAD_DIM": head_dim, "WIDTH": padded(head_dim)}

    def _programs(self, block: int) -> tuple[int]:
        _, length, count, _, groups, _ = self.segments
        return (triton.cdiv(length, block) * self.qkv.shape[2] * groups * count,)

    def _grad_lse(self) -> dict[str, Any]:
        given = self.grad_lse is not None
        return {
            "grad_lse_ptr": self.grad_lse.contiguous() if self.grad_lse is not None else self.lse,
            "HAS_GRAD_LSE": given,
        }

    def queries(self, tile: QueryTile) -> None:
        """dQ and delta."""
        q, k, v = self.qkv.unbind(1)
        tma = tile.tma and tma_reasons(k) is None
        if tma:
            k, v = (descriptor(x, self.segments, tile.keys, padded(x.shape[2])) for x in (k, v))
        query_kernel[self._programs(tile.queries)](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            out_ptr=self.out,
            grad_ptr=self.grad_out,
            lse_ptr=self.lse,
            stats_ptr=self.stats,
            dq_ptr=self.grad,
            row_stride=self.qkv.stride(0),
            head_stride=self.qkv.stride(2),
            out_stride=self.out.stride(0),
            grad_stride=self.grad_out.stride(0),
            grad_head_stride=self.grad_out.stride(1),
            dq_stride=self.grad.stride(0),
            **self._sizes(),
            scale=self.scale,
            scale_log2=self.scale * LOG2E,
            PAD=self.pad,
            PRECISION=precision(self.qkv.dtype),
            **{**tile.constants(), "TMA": tma},
            **tile.options(),
            **self._geometry(),
            **self._constants(),
            **self._grad_lse(),
        )

    def keys(self, tile: KeyTile, buffer: Tensor | None) -> None:
        """dK and dV, and dQ's shares into `buffer` [blocks * tile.queries, head_dim] float32 if there is one."""
        q, k, v = self.qkv.unbind(1)
        grad_out: Any = self.grad_out
        stats: Any = self.stats
        width = padded(k.shape[2])
        # The copy engine's coordinates have 32 bits.
        tma = tile.tma and stats.numel() < 2**31 and not (tma_reasons(q) or tma_reasons(grad_out))
        if tma:
            q, grad_out = (descriptor(x, self.segments, tile.queries, width) for x in (q, grad_out))
            stats = TensorDescriptor(stats, [stats.numel()], [1], [tile.queries])
        target: Any = stats if buffer is None else buffer
        if buffer is not None and tile.reduce:
            target = TensorDescriptor(buffer, list(target.shape), list(target.stride()), [tile.queries, width])
        key_kernel[self._programs(tile.keys)](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            grad_ptr=grad_out,
            stats_ptr=stats,
            dk_ptr=self.grad[:, 1],
            dv_ptr=self.grad[:, 2],
            dq_ptr=target,
            row_stride=self.qkv.stride(0),
            head_stride=self.qkv.stride(2),
            grad_stride=self.grad_out.stride(0),
            grad_head_stride=self.grad_out.stride(1),
            dk_stride=self.grad.stride(0),
            **self._sizes(),
            scale=self.scale,
            scale_log2=self.scale * LOG2E,
            PAD=self.pad,
            PRECISION=precision(self.qkv.dtype),
            **{**tile.constants(), "TMA": tma},
            **tile.options(),
            **self._geometry(),
            **self._constants(),
        )

    def single_pass(self, tile: KeyTile) -> None:
        """All three gradients, dQ through a float32 buffer of whole blocks for every (segment, head)."""
        grid = self._programs(tile.queries)
        buffer = self.stats.new_empty((self.stats.shape[1], self.qkv.shape[3]))
        prepare_kernel[grid](
            out_ptr=self.out,
            grad_ptr=self.grad_out,
            lse_ptr=self.lse,
            stats_ptr=self.stats,
            dq_ptr=buffer,
            out_stride=self.out.stride(0),
            grad_stride=self.grad_out.stride(0),
            grad_head_stride=self.grad_out.stride(1),
            **self._sizes(),
            BM=tile.queries,
            **self._geometry(),
            **self._constants(),
            **self._grad_lse(),
        )
        self.keys(tile, buffer)
        finish_kernel[grid](
            buffer_ptr=buffer,
            dq_ptr=self.grad,
            dq_stride=self.grad.stride(0),
            scale=self.scale,
            BM=tile.queries,
            **self._geometry(),
            **self._constants(),
        )


def key_case(tile: KeyTile, dtype: torch.dtype, head_dim: int, target: int) -> AotCase:
    """Ahead-of-time case of one configuration of `key_kernel`."""
    special = {"dq_ptr": "*fp32"}
    if tile.tma:
        special |= {n: block_type(dtype, tile.queries, head_dim) for n in ("q_ptr", "grad_ptr")}
        special["stats_ptr"] = f"tensordesc<fp32[{tile.queries}]>"
    if tile.single and tile.reduce:
        special["dq_ptr"] = f"tensordesc<fp32[{tile.queries}, {padded(head_dim)}]>"
    kind = ("single" if tile.single else "keys") + ("-tma" if tile.tma else "")
    name = f"attention-backward-{kind}-{tile.queries}x{tile.keys}"
    constants = {**tile.constants(), "PAD": tile.queries}
    return aot_case(name, key_kernel, dtype, head_dim, constants, tile.options(), special, target)


def query_case(tile: QueryTile, dtype: torch.dtype, head_dim: int, target: int) -> AotCase:
    """Ahead-of-time case of one configuration of `query_kernel`."""
    special = {n: block_type(dtype, tile.keys, head_dim) for n in ("k_ptr", "v_ptr")} if tile.tma else {}
    name = f"attention-backward-queries-{tile.queries}x{tile.keys}{'-tma' if tile.tma else ''}"
    constants = {**tile.constants(), "PAD": tile.queries, "HAS_GRAD_LSE": False}
    return aot_case(name, query_kernel, dtype, head_dim, constants, tile.options(), special, target)


def _small_cases(target: int) -> list[AotCase]:
    """The kernels before and after the single pass, which have one configuration."""
    dtype, options = torch.bfloat16, {"num_warps": 4, "num_stages": 1}
    constants = {"BM": 64, "HAS_GRAD_LSE": True}
    special = {"dq_ptr": "*fp32"}
    return [
        aot_case("attention-backward-prepare", prepare_kernel, dtype, 64, constants, options, special, target),
        aot_case("attention-backward-finish", finish_kernel, dtype, 64, constants, options, {}, target),
    ]


def aot_cases() -> list[AotCase]:
    """Every production configuration of the backward."""
    found: dict[str, AotCase] = {}
    for target, deterministic in itertools.product((80, 90, 100), (False, True)):
        for length, dtype, head_dim in aot_sizes():
            tiles = backward_tiles(length, head_dim, dtype, target // 10, deterministic)
            cases = [key_case(tiles.key, dtype, head_dim, target)]
            if not tiles.key.single:
                cases.append(query_case(tiles.query, dtype, head_dim, target))
            found |= {case.name: case for case in cases}
        found |= {case.name: case for case in _small_cases(target)}
    return list(found.values())
