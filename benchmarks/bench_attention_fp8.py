"""The 8-bit attention forward beside the 16-bit one, at the sizes of bench_attention, with the errors of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from any4d_fast.backends import BackendError
from any4d_fast.ops.attention import Segments
from any4d_fast.ops.attention_fp8 import attention_fp8

from . import bench_attention
from .harness import FULL, Case, Sizes, Unavailable, op_case, random

BUDGET = 0.0625
"""Roundings to e4m3 err by 0.0265 rms. Normal inputs have scores of deviation 1, which err by sqrt(2) of that; values
and probabilities add one more each: 0.055 in all, where bfloat16 errs by 0.003."""


def fp8(segments: Segments, backend: str) -> Callable[[Tensor], Any]:
    def call(qkv: Tensor) -> Any:
        try:
            return attention_fp8(qkv, segments=segments, backend=backend)
        except BackendError as reason:
            raise Unavailable(str(reason)) from reason

    return call


def case(name: str, rows: int, heads: int, segments: Segments, views: int) -> Callable[[Sizes], Case]:
    head_dim = bench_attention.HEAD_DIM

    def build(sizes: Sizes) -> Case:
        return op_case(
            "attention_fp8",
            "fwd",
            f"{name} {rows}x{heads}x{head_dim} bf16",
            inputs=lambda: [random(rows, 3, heads, head_dim, device=sizes.device, dtype=torch.bfloat16)],
            functions={
                "eager": fp8(segments, "eager"),
                "any4d_fast:cuda 16 bit": bench_attention.where_offered(segments, "cuda"),
                "any4d_fast:cuda": fp8(segments, "cuda"),
            },
            oracle=bench_attention.oracle(segments, "fwd"),
            compare=bench_attention.compare(segments, "fwd"),
            budgets=lambda errors, outputs: [BUDGET] * len(outputs),
            flops=bench_attention.FLOPS["fwd"] * segments.total * segments.length**2 * heads * head_dim,
            bytes=bench_attention.BYTES["fwd"] * rows * heads * head_dim,
            views=views,
        )

    return build


def cases(sizes: Sizes = FULL) -> list[Case]:
    many, tokens = sizes.views[0], sizes.tokens
    layouts: list[tuple[str, int, int, Segments, int]] = [
        ("global", sizes.rows(v), 12, Segments.global_(1, sizes.rows(v)), v)
        for v in (bench_attention.LONG_VIEWS, *sizes.views)
    ]
    layouts.append(("frame", sizes.rows(many), 12, Segments.frame(1, many, tokens), many))
    layouts.append(("encoder", many * (tokens + 1), 16, Segments.batched(many, tokens + 1), many))
    return [case(*layout)(sizes) for layout in layouts]


def test_attention_fp8(case: Case, provider: str, bench: Callable[[Case, str], None]) -> None:
    bench(case, provider)
