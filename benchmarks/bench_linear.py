"""The multi-view transformer's QKV projection in a training step: float32 parameters under 16-bit rows.

Eager PyTorch rounds the weight's gradient to 16 bits and copies it to float32; so does torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from any4d_fast import ops
from any4d_fast.reference.linear import linear as reference

from .harness import FULL, Case, Sizes, op_case, providers, random

WIDTHS = (768, 2304)  # inputs, outputs


def case(sizes: Sizes, rows: int, direction: str) -> Case:
    inner, outer = WIDTHS

    def inputs() -> list[Tensor]:
        x = random(rows, inner, device=sizes.device, dtype=torch.bfloat16)
        master = random(outer, inner, device=sizes.device, seed=1) / inner**0.5
        return [x, master, random(outer, device=sizes.device, seed=2)]

    # Forward reads rows and the float32 weight and writes the result; backward reads the incoming gradient, the rows
    # and the 16-bit weight, and writes the gradients of the rows and, in float32, of the weight.
    result, given, weight = 2 * rows * outer, 2 * rows * inner, 4 * inner * outer
    return op_case(
        "linear",
        direction,
        f"{rows}x{inner}x{outer}",
        inputs=inputs,
        functions=providers(ops.linear, reference),
        exact=reference,
        flops=(2 if direction == "fwd" else 4) * rows * inner * outer,
        bytes=result + given + weight + (given + weight // 2 if direction == "bwd" else 0),
        views=sizes.views[0],
    )


def cases(sizes: Sizes = FULL) -> list[Case]:
    rows = sizes.rows(sizes.views[0])
    return [case(sizes, rows, "fwd"), case(sizes, rows, "bwd")]


def test_linear(case: Case, provider: str, bench: Callable[[Case, str], None]) -> None:
    bench(case, provider)
