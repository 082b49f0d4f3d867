"""Masked normalisation and logarithmic scaling of depth maps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from any4d_fast import ops
from any4d_fast.reference.normalize_depth import normalize_depth as reference

from .harness import FULL, Case, Sizes, op_case, providers, random

BYTES = 4 + 4
"""Per pixel: read once, written once. The mean is needed before the first pixel can be written, but 41 views are 29 MB:
the second read can come from the L2 cache."""


def cases(sizes: Sizes = FULL) -> list[Case]:
    views = sizes.views[0]

    def inputs() -> list[Tensor]:
        depth = 5 * random(views, sizes.height, sizes.width, 1, device=sizes.device).abs()
        known = random(views, sizes.height, sizes.width, 1, device=sizes.device, seed=1) > -1.3  # nine pixels in ten
        return [torch.where(known, depth, torch.zeros_like(depth))]

    return [
        op_case(
            "normalize_depth",
            "fwd",
            sizes.image,
            inputs=inputs,
            functions=providers(ops.normalize_depth, reference),
            exact=reference,
            bytes=views * sizes.pixels * BYTES,
            views=views,
        )
    ]


def test_normalize_depth(case: Case, provider: str, bench: Callable[[Case, str], None]) -> None:
    bench(case, provider)
