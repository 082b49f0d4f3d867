"""Linear layers on e4m3 rows at the model's sizes, beside cuBLAS in bfloat16 and its product of e4m3 rows with scales.

`eager` emulates the roundings in float32. What rounding the inputs costs is in no error here: the oracle has them too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from any4d_fast import ops
from any4d_fast.backends import BackendError
from any4d_fast.ops.linear_fp8 import Rows8

from .harness import FULL, Case, Sizes, Unavailable, op_case, random

LAYERS = {  # inputs, outputs, GELU
    "qkv": (768, 2304, False),
    "fc1": (768, 3072, True),
    "fc2": (3072, 768, False),
    "encoder fc1": (1024, 4096, True),
}
FP8_OVER_BF16 = 2.0  # the tensor cores' rates


def rows8(rows: int, channels: int, device: str, seed: int) -> list[Tensor]:
    rounded = ops.quantize_rows(random(rows, channels, device=device, seed=seed))
    assert rounded.scale is not None
    return [rounded.values, rounded.scale]


def run(backend: str, gelu: bool) -> Callable[..., Any]:
    def call(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, inverse: Tensor) -> Any:
        try:
            found = ops.linear_fp8(
                Rows8(x, x_scale), Rows8(weight, weight_scale), bias,
                inverse=inverse if gelu else None, backend=backend,
            )  # fmt: skip
        except BackendError as reason:
            raise Unavailable(str(reason)) from reason
        return found.float() if gelu and backend == "eager" else found

    return call


def case(sizes: Sizes, name: str) -> Case:
    k, n, gelu = LAYERS[name]
    rows = sizes.rows(sizes.views[0])

    def inputs() -> list[Tensor]:
        bias = random(n, device=sizes.device, seed=2)
        return [
            *rows8(rows, k, sizes.device, 0),
            *rows8(n, k, sizes.device, 1),
            bias,
            torch.full((n,), k**-0.5, device=sizes.device),
        ]

    def oracle(given: list[Tensor]) -> list[Tensor]:
        x, x_scale, weight, weight_scale, bias, inverse = given
        wide = Rows8(x, x_scale).wide().double()
        found = F.linear(wide, Rows8(weight, weight_scale).wide().double(), bias.double())
        return [F.gelu(found) * inverse.double() if gelu else found]

    names = {"eager": "eager", "any4d_fast:triton": "triton", "any4d_fast:cublas": "cublas"}
    return op_case(
        "linear_fp8",
        "fwd",
        f"{name} {rows}x{k}x{n}",
        inputs=inputs,
        functions={provider: run(backend, gelu) for provider, backend in names.items()},
        oracle=oracle,
        compare=lambda result: [result.float()],
        # e4m3 has half the bits of what sums of 14 bits leave, bfloat16 about as many.
        budgets=lambda errors, outputs: [0.03 if gelu else 5e-3] * len(outputs),
        flops=2 * rows * k * n / FP8_OVER_BF16,
        bytes=rows * k + n * k + rows * n * (1 if gelu else 2),
        views=sizes.views[0],
        precision="fp8",
    )


def cases(sizes: Sizes = FULL) -> list[Case]:
    return [case(sizes, name) for name in LAYERS]


def test_linear_fp8(case: Case, provider: str, bench: Callable[[Case, str], None]) -> None:
    bench(case, provider)
