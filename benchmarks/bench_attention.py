"""Attention over packed QKV rows: global at three lengths, frame, and the image encoder's; bfloat16, head dim 64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from any4d_fast import ops
from any4d_fast.ops.attention import Segments
from any4d_fast.reference.attention import split_segments

from .harness import FULL, Case, Sizes, flat, op_case, random

HEAD_DIM = 64
SCORES_AT_ONCE = 1 << 28  # float64 scores of the oracle in memory, 2 GB an array

FLOPS = {"fwd": 4, "bwd": 10}
"""Per (query, key) pair and channel: two matrix products of 2 FLOP forward; five backward (scores again, and the
gradients of probabilities, values, queries and keys), as FlashAttention counts."""

BYTES = {"fwd": 2 * (3 + 1), "bwd": 2 * (3 + 1 + 1 + 3)}
"""Per row and channel, bfloat16. Forward: q, k, v read, output written. Backward: q, k, v, output and its gradient
read, three gradients written."""


def run(segments: Segments, backend: str) -> Callable[..., Any]:
    return lambda qkv: ops.attention(qkv, segments=segments, backend=backend)


def blocks(groups: int, length: int) -> list[tuple[slice, slice]]:
    """(segments and heads, queries) to take at once: whole segments where they fit, else parts of one."""
    whole = max(1, SCORES_AT_ONCE // length**2)
    part = length if length**2 <= SCORES_AT_ONCE else max(1, SCORES_AT_ONCE // length)
    return [
        (slice(g, g + whole), slice(first, first + part))
        for g in range(0, groups, whole)
        for first in range(0, length, part)
    ]


def exact_forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v in float64 without all scores in memory; each [groups, L, D]."""
    out = torch.empty_like(q)
    for g, rows in blocks(*q.shape[:2]):
        scores = q[g, rows] @ k[g].mT * HEAD_DIM**-0.5
        out[g, rows] = scores.softmax(-1) @ v[g]
    return out


def exact_backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `exact_forward`, scores taken again block by block."""
    d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    scale = HEAD_DIM**-0.5
    for g, rows in blocks(*q.shape[:2]):
        p = (q[g, rows] @ k[g].mT * scale).softmax(-1)
        d_v[g] += p.mT @ grad[g, rows]
        d_p = grad[g, rows] @ v[g].mT
        d_s = p * (d_p - (p * d_p).sum(-1, keepdim=True)) * scale
        d_q[g, rows] = d_s @ k[g]
        d_k[g] += d_s.mT @ q[g, rows]
    return d_q, d_k, d_v


def by_segment(x: Tensor, segments: Segments) -> Tensor:
    """[rows, heads, D] -> [segments * heads, length, D]."""
    return split_segments(x, segments).flatten(0, 1).transpose(1, 2).flatten(0, 1)


def case(name: str, rows: int, heads: int, segments: Segments, direction: str, views: int) -> Callable[[Sizes], Case]:
    pairs = segments.total * segments.length**2

    def build(sizes: Sizes) -> Case:
        def inputs() -> list[Tensor]:
            return [random(rows, 3, heads, HEAD_DIM, device=sizes.device, dtype=torch.bfloat16)]

        def oracle(given: Any) -> list[Tensor]:
            qkv = (given[0] if direction == "fwd" else given[0][0]).double()
            q, k, v = (by_segment(part, segments) for part in qkv.unbind(1))
            if direction == "fwd":
                return [exact_forward(q, k, v)]
            return list(exact_backward(q, k, v, by_segment(given[1][0].double(), segments)))

        def compare(result: Any) -> list[Tensor]:
            """The gradients of queries, keys and values apart: one of them could hide the errors of the others."""
            (found,) = flat(result)
            parts = [found] if direction == "fwd" else list(found.unbind(1))
            return [by_segment(part, segments) for part in parts]

        return op_case(
            "attention",
            direction,
            f"{name} {rows}x{heads}x{HEAD_DIM} bf16",
            inputs=inputs,
            functions={
                "eager": run(segments, "eager"),
                "cudnn:cudnn": run(segments, "cudnn"),
                "flash2:flash": run(segments, "flash"),
                "any4d_fast:triton": run(segments, "triton"),
            },
            oracle=oracle,
            compare=compare,
            lean=False,
            flops=FLOPS[direction] * pairs * heads * HEAD_DIM,
            bytes=BYTES[direction] * rows * heads * HEAD_DIM,
            views=views,
        )

    return build


def cases(sizes: Sizes = FULL) -> list[Case]:
    many, tokens = sizes.views[0], sizes.tokens
    layouts: list[tuple[str, int, int, Segments, int]] = [
        ("global", sizes.rows(v), 12, Segments.global_(1, sizes.rows(v)), v) for v in sizes.views
    ]
    layouts.append(("frame", sizes.rows(many), 12, Segments.frame(1, many, tokens), many))
    encoder_rows = many * (tokens + 1)
    layouts.append(("encoder", encoder_rows, 16, Segments.batched(many, tokens + 1), many))
    return [
        case(name, rows, heads, segments, direction, views)(sizes)
        for name, rows, heads, segments, views in layouts
        for direction in ("fwd", "bwd")
    ]


def test_attention(case: Case, provider: str, bench: Callable[[Case, str], None]) -> None:
    bench(case, provider)
