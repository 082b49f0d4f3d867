"""The MLP's first layer, matmul + bias + erf GELU, in the multi-view transformer and in the image encoder.

Eager PyTorch is cuBLAS and a GELU kernel; torch.compile is cuBLAS and a fused one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from any4d_fast import ops
from any4d_fast.reference.linear_gelu import linear_gelu as reference

from .harness import FULL, Case, Sizes, op_case, providers, random

WIDTHS = (768, 1024)  # transformer, encoder; the hidden layer has four times as many


def case(sizes: Sizes, rows: int, channels: int, direction: str) -> Case:
    hidden = 4 * channels

    def inputs() -> list[Tensor]:
        x = random(rows, channels, device=sizes.device, dtype=torch.bfloat16)
        weight = random(hidden, channels, device=sizes.device, seed=1) / channels**0.5
        return [x, weight.to(torch.bfloat16), random(hidden, device=sizes.device, dtype=torch.bfloat16, seed=2)]

    # Backward is two products of the forward's size. In bfloat16 forward reads x and weight and writes the result;
    # backward reads the incoming gradient, the pre-activation, x and weight, and writes the gradients of both.
    small = rows * channels + hidden * channels
    elements = rows * hidden + small if direction == "fwd" else 2 * rows * hidden + 2 * small
    return op_case(
        "linear_gelu",
        direction,
        f"{rows}x{channels}x{hidden}",
        inputs=inputs,
        functions=providers(ops.linear_gelu, reference),
        exact=reference,
        flops=(2 if direction == "fwd" else 4) * rows * channels * hidden,
        bytes=2 * elements,
        views=sizes.views[0],
    )


def cases(sizes: Sizes = FULL) -> list[Case]:
    views = sizes.views[0]
    transformer, encoder = sizes.rows(views), views * (sizes.tokens + 1)
    return [
        case(sizes, transformer, WIDTHS[0], "fwd"),
        case(sizes, transformer, WIDTHS[0], "bwd"),
        case(sizes, encoder, WIDTHS[1], "fwd"),
    ]


def test_linear_gelu(case: Case, provider: str, bench: Callable[[Case, str], None]) -> None:
    bench(case, provider)
