"""First stage of the dense tokenizers, PixelUnshuffle and 3x3 convolution, in float32 with TF32 products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from any4d_fast import ops
from any4d_fast.reference.unshuffle_conv import unshuffle_conv as reference

from .harness import FULL, Case, Sizes, flat, op_case, random

PATCH, WIDTH = 14, 588
CHECKED_VIEWS = 2  # float64 convolutions of all views would take longer than everything else


def run(backend: str) -> Callable[..., Any]:
    return lambda x, weight, bias: ops.unshuffle_conv(x, weight, bias, PATCH, backend=backend)


def exact(given: Sequence[Tensor]) -> list[Tensor]:
    x, weight, bias = given
    return [reference(x[:CHECKED_VIEWS].double(), weight.double(), bias.double(), PATCH)]


def case(sizes: Sizes, channels: int, name: str) -> Case:
    views, depth = sizes.views[0], channels * PATCH**2

    def inputs() -> list[Tensor]:
        x = random(views, sizes.height, sizes.width, channels, device=sizes.device)
        weight = random(WIDTH, depth, 3, 3, device=sizes.device, seed=1) / (9 * depth) ** 0.5
        return [x, weight, random(WIDTH, device=sizes.device, seed=2)]

    # Nine taps of every patch, edges counted in full; the map is read once, the features are written once.
    return op_case(
        "unshuffle_conv",
        "fwd",
        f"{sizes.image} {name}",
        inputs=inputs,
        functions={"eager": run("eager"), "any4d_fast:triton": run("triton")},
        oracle=exact,
        compare=lambda maps: [m[:CHECKED_VIEWS] for m in flat(maps)],
        flops=2 * views * sizes.tokens * 9 * depth * WIDTH,
        bytes=4 * (views * (sizes.pixels * channels + sizes.tokens * WIDTH) + WIDTH * depth * 9),
        matmul_dtype=torch.float32,
        views=views,
    )


def cases(sizes: Sizes = FULL) -> list[Case]:
    return [case(sizes, 3, "rays"), case(sizes, 1, "depth")]


def test_unshuffle_conv(case: Case, provider: str, bench: Callable[[Case, str], None]) -> None:
    bench(case, provider)
