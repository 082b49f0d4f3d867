"""Factor composition: every output of the model from raw head channels in 32 and 16 bit."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from any4d_fast import ops
from any4d_fast.reference.compose_factors import compose_factors as reference

from .harness import FULL, Case, Sizes, op_case, providers, random

CHANNELS = 6 + 3  # geometry and scene flow
OUTPUTS = 3 + 3 + 3 + 1 + 3 + 1 + 1  # points, camera points, rays, depth, flow, confidence, logits: float32


def bytes_per_pixel(direction: str, channel_bytes: int) -> int:
    """Forward: channels read; float32 outputs and a byte of mask written. Backward: channels and the gradients of all
    outputs read, gradients of the channels written."""
    if direction == "fwd":
        return CHANNELS * channel_bytes + 4 * OUTPUTS + 1
    return 2 * CHANNELS * channel_bytes + 4 * OUTPUTS


def case(sizes: Sizes, direction: str, dtype: torch.dtype) -> Case:
    views, height, width = sizes.views[0], sizes.height, sizes.width

    def inputs() -> list[Tensor]:
        geometry = random(views, height, width, 6, device=sizes.device)
        geometry[..., 2] += 2  # cameras look forward
        flow = random(views, height, width, 3, device=sizes.device, seed=1)
        quats, trans = (random(views, n, device=sizes.device, seed=2) for n in (4, 3))
        return [geometry.to(dtype), flow.to(dtype), quats, trans, random(1, 1, device=sizes.device, seed=3)]

    name = {torch.float32: "fp32", torch.float16: "fp16"}[dtype]
    return op_case(
        "compose_factors",
        direction,
        f"{sizes.image} {name} channels",
        inputs=inputs,
        functions={
            **providers(ops.compose_factors, reference),
            "any4d_fast:cuda": functools.partial(ops.compose_factors, backend="cuda"),
        },
        exact=reference,
        bytes=views * sizes.pixels * bytes_per_pixel(direction, dtype.itemsize),
        views=views,
    )


def cases(sizes: Sizes = FULL) -> list[Case]:
    return [case(sizes, direction, dtype) for dtype in (torch.float32, torch.float16) for direction in ("fwd", "bwd")]


def test_compose_factors(case: Case, provider: str, bench: Callable[[Case, str], None]) -> None:
    bench(case, provider)
