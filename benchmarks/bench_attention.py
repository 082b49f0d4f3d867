"""Attention over packed QKV rows: global at four lengths, frame, and the image encoder's; bfloat16, head dim 64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from any4d_fast import ops
from any4d_fast.backends import BackendError
from any4d_fast.ops.attention import Segments
from any4d_fast.reference.attention import merge_segments, split_segments

from .harness import FULL, Case, Sizes, Unavailable, flat, op_case, random

HEAD_DIM = 64
SCORES_AT_ONCE = 1 << 28  # float64 scores of the oracle in memory, 2 GB an array
LONG_VIEWS = 100  # 88,801 rows: beyond the model's clip lengths, where the ceiling of a kernel shows

SAMPLED_FROM, SAMPLED_QUERIES = 50_000, 1_024
"""Rows of a segment from which on the oracle takes only so many queries: exact attention of 88,801 rows is 24 TFLOP in
float64 forward and 60 backward, and its scores are written and read ten times."""

FLOPS = {"fwd": 4, "bwd": 10}
"""Per (query, key) pair and channel: two matrix products of 2 FLOP forward; five backward (scores again, and the
gradients of probabilities, values, queries and keys), as FlashAttention counts."""

BYTES = {"fwd": 2 * (3 + 1), "bwd": 2 * (3 + 1 + 1 + 3)}
"""Per row and channel, bfloat16. Forward: q, k, v read, output written. Backward: q, k, v, output and its gradient
read, three gradients written."""


def run(segments: Segments, backend: str) -> Callable[..., Any]:
    return lambda qkv: ops.attention(qkv, segments=segments, backend=backend)


def where_offered(segments: Segments, backend: str) -> Callable[..., Any]:
    """`run` of a backend that a machine may lack."""

    def call(qkv: Tensor) -> Any:
        try:
            return ops.attention(qkv, segments=segments, backend=backend)
        except BackendError as reason:
            raise Unavailable(str(reason)) from reason

    return call


def blocks(groups: int, queries: int, keys: int) -> list[tuple[slice, slice]]:
    """(segments and heads, queries) to take at once: whole segments where they fit, else parts of one."""
    whole = max(1, SCORES_AT_ONCE // (queries * keys))
    part = queries if queries * keys <= SCORES_AT_ONCE else max(1, SCORES_AT_ONCE // keys)
    return [
        (slice(g, g + whole), slice(first, first + part))
        for g in range(0, groups, whole)
        for first in range(0, queries, part)
    ]


def exact_forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v in float64 without all scores in memory; [groups, queries, D], [groups, keys, D]."""
    out = torch.empty_like(q)
    for g, rows in blocks(*q.shape[:2], k.shape[1]):
        scores = q[g, rows] @ k[g].mT * HEAD_DIM**-0.5
        out[g, rows] = scores.softmax(-1) @ v[g]
    return out


def exact_backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `exact_forward`, scores taken again block by block."""
    d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    scale = HEAD_DIM**-0.5
    for g, rows in blocks(*q.shape[:2], k.shape[1]):
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


def sampled(segments: Segments) -> list[int]:
    """Queries of a long segment that the oracle takes, its first and last among them; all of a shorter one."""
    length = segments.length
    count = length if length < SAMPLED_FROM else SAMPLED_QUERIES
    return [i * (length - 1) // max(count - 1, 1) for i in range(count)]


def oracle(segments: Segments, direction: str) -> Callable[[Any], list[Tensor]]:
    """The exact result by segment and head, [segments * heads, length, D]; forward at the sampled queries only."""

    def forward(given: Any) -> list[Tensor]:
        q, k, v = (by_segment(part, segments) for part in given[0].double().unbind(1))
        return [exact_forward(q[:, sampled(segments)], k, v)]

    def backward(given: Any) -> list[Tensor]:
        (qkv,), (grad,) = given
        q, k, v = (by_segment(part, segments) for part in qkv.double().unbind(1))
        rows = sampled(segments)
        d_q = torch.zeros_like(q)
        d_q[:, rows], d_k, d_v = exact_backward(q[:, rows], k, v, by_segment(grad.double(), segments)[:, rows])
        return [d_q, d_k, d_v]

    return forward if direction == "fwd" else backward


def compare(segments: Segments, direction: str) -> Callable[[Any], list[Tensor]]:
    """A provider's result as the oracle gives it.

    The gradients of queries, keys and values apart: one of them could hide the errors of the others.
    """

    def parts(result: Any) -> list[Tensor]:
        (found,) = flat(result)
        if direction == "fwd":
            return [by_segment(found, segments)[:, sampled(segments)]]
        return [by_segment(part, segments) for part in found.unbind(1)]

    return parts


def only_sampled(case: Case, segments: Segments) -> Case:
    """The same backward pass with cotangents that are zero but at the sampled queries.

    Then only these queries have a part in any gradient, and the oracle needs no others. Every block of queries that a
    kernel takes has some of them. It is checked and not timed: products with zeros take less power, and run faster.
    """

    def inputs() -> Any:
        arguments, (grad,) = case.inputs()
        chosen = torch.zeros(segments.length, 1, 1, dtype=grad.dtype, device=grad.device)
        chosen[sampled(segments)] = 1
        return arguments, [merge_segments(split_segments(grad, segments) * chosen, segments, grad.shape[0])]

    return dataclasses.replace(case, inputs=inputs)


def case(name: str, rows: int, heads: int, segments: Segments, direction: str, views: int) -> Callable[[Sizes], Case]:
    pairs = segments.total * segments.length**2

    def build(sizes: Sizes) -> Case:
        built = op_case(
            "attention",
            direction,
            f"{name} {rows}x{heads}x{HEAD_DIM} bf16",
            inputs=lambda: [random(rows, 3, heads, HEAD_DIM, device=sizes.device, dtype=torch.bfloat16)],
            functions={
                "eager": run(segments, "eager"),
                "cudnn:cudnn": run(segments, "cudnn"),
                "flash2:flash": run(segments, "flash"),
                "flash_attn:flash_attn": where_offered(segments, "flash_attn"),
                "flash4:flash_attn_4": where_offered(segments, "flash_attn_4"),
                "any4d_fast:triton": run(segments, "triton"),
                "any4d_fast:cuda": where_offered(segments, "cuda"),
            },
            oracle=oracle(segments, direction),
            compare=compare(segments, direction),
            lean=False,
            flops=FLOPS[direction] * pairs * heads * HEAD_DIM,
            bytes=BYTES[direction] * rows * heads * HEAD_DIM,
            views=views,
        )
        if direction == "fwd" or segments.length < SAMPLED_FROM:
            return built
        return dataclasses.replace(built, oracle=None, gate=only_sampled(built, segments))

    return build


def cases(sizes: Sizes = FULL) -> list[Case]:
    many, tokens = sizes.views[0], sizes.tokens
    layouts: list[tuple[str, int, int, Segments, int]] = [
        ("global", sizes.rows(v), 12, Segments.global_(1, sizes.rows(v)), v) for v in (LONG_VIEWS, *sizes.views)
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
