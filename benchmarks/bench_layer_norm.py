"""LayerNorm of the float32 residual stream into what a bfloat16 matmul reads, at both widths of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from any4d_fast import ops
from any4d_fast.reference.layer_norm import layer_norm as reference

from .harness import FULL, Case, Sizes, compiled, op_case, random

BYTES = {"fwd": 4 + 2, "bwd": 4 + 2 + 4}
"""Per element. Forward: x read in float32, result written in bfloat16. Backward: x and the incoming gradient read, the
gradient of x written; the statistics and the gradients of gain and shift are a thousandth of that."""


def run(backend: str) -> Callable[..., Any]:
    return lambda x, weight, bias: ops.layer_norm(x, weight, bias, out_dtype=torch.bfloat16, backend=backend)


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reference(x, weight, bias, out_dtype=torch.bfloat16)


def case(sizes: Sizes, channels: int, direction: str) -> Case:
    rows = sizes.rows(sizes.views[0])

    def inputs() -> list[Tensor]:
        gain = 1 + 0.1 * random(channels, device=sizes.device, seed=1)
        return [random(rows, channels, device=sizes.device), gain, random(channels, device=sizes.device, seed=2)]

    return op_case(
        "layer_norm",
        direction,
        f"{rows}x{channels}",
        inputs=inputs,
        functions={"eager": run("eager"), "compile": compiled(plain), "any4d_fast:triton": run("triton")},
        exact=reference,
        bytes=rows * channels * BYTES[direction],
        views=sizes.views[0],
    )


def cases(sizes: Sizes = FULL) -> list[Case]:
    return [case(sizes, channels, direction) for channels in (768, 1024) for direction in ("fwd", "bwd")]


def test_layer_norm(case: Case, provider: str, bench: Callable[[Case, str], None]) -> None:
    bench(case, provider)
