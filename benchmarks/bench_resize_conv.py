"""Last stage of a dense head: resize to the image, 3x3 convolution, ReLU, 1x1 convolution; float16, channels-last.

Eager PyTorch is cuDNN's channels-last convolutions here. Every provider takes the views in the same chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from any4d_fast import ops
from any4d_fast.reference.resize_conv import resize_conv as reference

from .harness import FULL, Case, Sizes, flat, op_case, random

CHANNELS, HIDDEN, OUT = 128, 128, 6  # the geometry head's; the flow head differs in the 3 channels of its result
CHUNK = 8
CHECKED_VIEWS = 2  # of the first chunk, and the last chunk: float64 convolutions of all views would take too long


def run(size: tuple[int, int], backend: str) -> Callable[..., Any]:
    def chunked(x: Tensor, *weights: Tensor) -> list[Tensor]:
        return [ops.resize_conv(part, size, *weights, backend=backend) for part in x.split(CHUNK)]

    return chunked


def checked(chunks: Sequence[Tensor]) -> list[Tensor]:
    return [chunks[0][:CHECKED_VIEWS], chunks[-1][-1:]]


def case(sizes: Sizes, views: int, direction: str) -> Case:
    size = (sizes.height, sizes.width)
    small = (sizes.height // 14 * 8, sizes.width // 14 * 8)

    def inputs() -> list[Tensor]:
        x = random(views, *small, CHANNELS, device=sizes.device)
        weight3 = random(HIDDEN, CHANNELS, 3, 3, device=sizes.device, seed=1) / (9 * CHANNELS) ** 0.5
        weight1 = random(OUT, HIDDEN, 1, 1, device=sizes.device, seed=2) / HIDDEN**0.5
        bias3, bias1 = random(HIDDEN, device=sizes.device, seed=3), random(OUT, device=sizes.device, seed=4)
        return [t.to(torch.float16) for t in (x, weight3, bias3, weight1, bias1)]

    def exact(given: Sequence[Tensor]) -> list[Tensor]:
        x, *weights = (t.double() for t in given)
        return [reference(part, size, *weights) for part in (x[:CHECKED_VIEWS], x[-1:])]

    def exact_function(x: Tensor, *weights: Tensor) -> Tensor:
        return reference(x, size, *weights)

    # Both convolutions; backward is two products of the same size for each. Backward counts what the op must touch:
    # incoming gradient and map read, gradient of the map written; recomputed features are not counted as work.
    products = 2 * views * sizes.pixels * (9 * CHANNELS * HIDDEN + HIDDEN * OUT)
    maps = views * small[0] * small[1] * CHANNELS
    forward = direction == "fwd"
    options: dict[str, Any] = {"oracle": exact, "compare": lambda found: checked(flat(found))} if forward else {}
    return op_case(
        "resize_conv",
        direction,
        f"{small[1]}x{small[0]} to {sizes.image} fp16",
        inputs=inputs,
        functions={"eager": run(size, "eager"), "any4d_fast:triton": run(size, "triton")},
        exact=None if forward else exact_function,
        flops=products if forward else 2 * products,
        bytes=2 * ((1 if forward else 2) * maps + views * sizes.pixels * OUT),
        matmul_dtype=torch.float16,
        views=views,
        **options,
    )


def cases(sizes: Sizes = FULL) -> list[Case]:
    many, chunk, few = sizes.views
    # Backward is checked at a size whose float64 convolutions can be differentiated in a moment.
    backward = replace(case(sizes, chunk, "bwd"), oracle=None, gate=case(sizes, few, "bwd"))
    return [case(sizes, many, "fwd"), backward]


def test_resize_conv(case: Case, provider: str, bench: Callable[[Case, str], None]) -> None:
    bench(case, provider)
