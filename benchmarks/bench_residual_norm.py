"""Residual stream + LayerScale x branch, and the next LayerNorm of the sum, at both widths of the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from any4d_fast import ops
from any4d_fast.reference.residual_norm import residual_norm as reference

from .harness import FULL, Case, Sizes, op_case, providers, random

BYTES = {"fwd": 4 + 2 + 4 + 2, "bwd": (4 + 2) + (4 + 2) + (4 + 2)}
"""Per element. Forward: residual (float32) and branch (bfloat16) read, sum and normalised sum written. Backward: both
incoming gradients, the saved sum and the branch (for LayerScale's gradient) read, gradients of residual and branch
written."""


def case(sizes: Sizes, channels: int, direction: str) -> Case:
    rows = sizes.rows(sizes.views[0])

    def inputs() -> list[Tensor]:
        residual = random(rows, channels, device=sizes.device)
        branch = random(rows, channels, device=sizes.device, dtype=torch.bfloat16, seed=1)
        gamma, gain, shift = (random(channels, device=sizes.device, seed=2 + i) for i in range(3))
        return [residual, branch, 1 + 0.1 * gamma, 1 + 0.1 * gain, shift]

    return op_case(
        "residual_norm",
        direction,
        f"{rows}x{channels}",
        inputs=inputs,
        functions=providers(ops.residual_norm, reference),
        exact=reference,
        bytes=rows * channels * BYTES[direction],
        views=sizes.views[0],
    )


def cases(sizes: Sizes = FULL) -> list[Case]:
    return [case(sizes, channels, direction) for channels in (768, 1024) for direction in ("fwd", "bwd")]


def test_residual_norm(case: Case, provider: str, bench: Callable[[Case, str], None]) -> None:
    bench(case, provider)
