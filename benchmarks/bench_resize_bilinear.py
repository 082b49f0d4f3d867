"""Bilinear doubling between the blocks of a dense head, in training: float32, channels-last, corners aligned.

Eager PyTorch is its channels-last kernel; the gradient is added atomically there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from any4d_fast import ops
from any4d_fast.reference.resize_bilinear import resize_bilinear as reference

from .harness import FULL, Case, Sizes, compiled, op_case, random

CHANNELS = 256


def case(sizes: Sizes, views: int, direction: str) -> Case:
    # From four times the patch grid to eight times.
    small = (sizes.height // 14 * 4, sizes.width // 14 * 4)
    size = (2 * small[0], 2 * small[1])

    def inputs() -> Sequence[Tensor]:
        return [random(views, *small, CHANNELS, device=sizes.device)]

    def run(backend: str) -> Callable[..., Any]:
        return lambda x: ops.resize_bilinear(x, size, backend=backend)

    def plain(x: Tensor) -> Tensor:
        return reference(x, size)

    return op_case(
        "resize_bilinear",
        direction,
        f"{small[1]}x{small[0]} doubled, {CHANNELS} channels fp32",
        inputs=inputs,
        functions={"eager": run("eager"), "compile": compiled(plain), "any4d_fast:triton": run("triton")},
        exact=plain,
        bytes=4 * views * CHANNELS * (small[0] * small[1] + size[0] * size[1]),
        matmul_dtype=torch.float32,
        views=views,
    )


def cases(sizes: Sizes = FULL) -> list[Case]:
    chunk = sizes.views[1]
    return [case(sizes, chunk, "fwd"), case(sizes, chunk, "bwd")]


def test_resize_bilinear(case: Case, provider: str, bench: Callable[[Case, str], None]) -> None:
    bench(case, provider)
