"""What runs between the convolutions of a dense head: bias, residual, resized coarser map and ReLU in one pass.

Forward, and the gradients of all four as dense heads train: the maps of 16 views of 518 x 336 at four times the patch
grid, in float16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from any4d_fast.ops import dense_maps
from any4d_fast.reference import dense_maps as reference

from .harness import FULL, Case, Sizes, compiled, op_case, random

VIEWS, CHANNELS = 16, 256


def fusion(backend: str) -> Callable[..., list[Tensor]]:
    def run(value: Tensor, bias: Tensor, residual: Tensor, coarse: Tensor) -> list[Tensor]:
        flag = dense_maps.new_flag(value.device)
        return list(dense_maps.finish(value, bias, flag, residual=residual, coarse=coarse, relu=True, backend=backend))

    return run


def plain(value: Tensor, bias: Tensor, residual: Tensor, coarse: Tensor) -> list[Tensor]:
    total = reference.finish(
        value, bias, residual, coarse, (2 * coarse.shape[1], 2 * coarse.shape[2]), (value.shape[1], value.shape[2]),
        dense_maps.new_flag(value.device),
    )  # fmt: skip
    return [total.to(value.dtype), total.relu().to(value.dtype)]


# Maps read and written, the coarser one a quarter. Forward: map, residual and coarser map; the sum and its ReLU.
# Backward: both gradients and the ReLU; the total, which is read again for the coarser map's.
TRAFFIC = {"fwd": 4.25, "bwd": 5.25}


def case(sizes: Sizes, direction: str) -> Case:
    # Four times the patch grid; the coarser map is half of that.
    height, width = 4 * sizes.height // 14, 4 * sizes.width // 14
    shape, half = (VIEWS, height, width, CHANNELS), (VIEWS, height // 2, width // 2, CHANNELS)
    make = functools.partial(random, device=sizes.device, dtype=torch.float16)

    def inputs() -> list[Tensor]:
        return [make(*shape, seed=0), make(CHANNELS, seed=1), make(*shape, seed=2), make(*half, seed=3)]

    elements = VIEWS * height * width * CHANNELS
    return op_case(
        "dense_maps",
        direction,
        f"{height}x{width}x{CHANNELS} fusion fp16",
        inputs=inputs,
        functions={"eager": fusion("eager"), "compile": compiled(plain), "any4d_fast:triton": fusion("triton")},
        exact=plain,
        bytes=elements * 2 * TRAFFIC[direction],
        views=VIEWS,
    )


def cases(sizes: Sizes = FULL) -> list[Case]:
    return [case(sizes, direction) for direction in TRAFFIC]


def test_dense_maps(case: Case, provider: str, bench: Callable[[Case, str], None]) -> None:
    bench(case, provider)
