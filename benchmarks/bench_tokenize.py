"""uint8 images to patch tokens with positions and class token, in DINOv2's row order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from any4d_fast import ops
from any4d_fast.reference.tokenize import tokenize as reference

from .harness import FULL, Case, Sizes, compiled, flat, op_case, random

PATCH, CHANNELS = 14, 1024
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHECKED_VIEWS = 2  # float64 convolutions of all views would take longer than everything else


def run(backend: str) -> Callable[..., Any]:
    return lambda *arguments: ops.tokenize(*arguments, mean=MEAN, std=STD, out_dtype=torch.float32, backend=backend)


def plain(*arguments: Tensor) -> Tensor:
    return reference(*arguments, mean=MEAN, std=STD, out_dtype=torch.float32)


def exact(given: Sequence[Tensor]) -> list[Tensor]:
    image, *parameters = given
    return [reference(image[:CHECKED_VIEWS], *(p.double() for p in parameters), mean=MEAN, std=STD)]


def cases(sizes: Sizes = FULL) -> list[Case]:
    views, tokens = sizes.views[0], sizes.tokens

    def inputs() -> list[Tensor]:
        generator = torch.Generator(sizes.device).manual_seed(0)
        shape = (views, 3, sizes.height, sizes.width)
        image = torch.randint(0, 256, shape, generator=generator, device=sizes.device, dtype=torch.uint8)
        weight = random(CHANNELS, 3, PATCH, PATCH, device=sizes.device) / 588**0.5
        rows = [random(n, CHANNELS, device=sizes.device, seed=1) for n in (1 + tokens, 1)]
        bias = random(CHANNELS, device=sizes.device, seed=2)
        return [image, weight.to(torch.bfloat16), bias, *rows]

    # Pixels are read as bytes; the rows of patches and the class token are written in float32, the residual stream's.
    moved = views * sizes.pixels * 3 + views * (tokens + 1) * CHANNELS * 4
    return [
        op_case(
            "tokenize",
            "fwd",
            f"{sizes.image} uint8",
            inputs=inputs,
            functions={
                "eager": run("eager"),
                "compile": compiled(plain),
                "any4d_fast:triton": run("triton"),
                "any4d_fast:cuda": run("cuda"),
            },
            oracle=exact,
            compare=lambda rows: [r[:CHECKED_VIEWS] for r in flat(rows)],
            flops=2 * views * tokens * (3 * PATCH**2) * CHANNELS,
            bytes=moved,
            views=views,
        )
    ]


def test_tokenize(case: Case, provider: str, bench: Callable[[Case, str], None]) -> None:
    bench(case, provider)
