"""Unprojection of depth maps to world points, and the points that scene flow moves."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from any4d_fast import ops
from any4d_fast.reference.unproject import unproject as reference

from .harness import FULL, Case, Sizes, op_case, providers, random

BYTES = {"fwd": 4 + 12 + 12 + 12, "bwd": 4 + 12 + 12 + 4}
"""Per pixel, float32. Forward: depth and flow read, points and moved points written. Backward: depth and both incoming
gradients read, the gradient of depth written; the flow's is the moved points' incoming one, which need not move."""


def case(sizes: Sizes, direction: str) -> Case:
    views, height, width = sizes.views[0], sizes.height, sizes.width

    def inputs() -> list[Tensor]:
        depth = 0.5 + 5 * random(views, height, width, device=sizes.device).abs()
        focal, centre_x, centre_y = 0.9 * width, (width - 1) / 2, (height - 1) / 2
        camera = [[focal, 0.0, centre_x], [0.0, focal, centre_y], [0.0, 0.0, 1.0]]
        intrinsics = torch.tensor(camera, device=sizes.device).repeat(views, 1, 1)
        poses = torch.eye(4, device=sizes.device).repeat(views, 1, 1)
        poses[:, :3, :3] = torch.linalg.qr(random(views, 3, 3, device=sizes.device, seed=1)).Q
        poses[:, :3, 3] = random(views, 3, device=sizes.device, seed=2)
        return [depth, intrinsics, poses, 0.1 * random(views, height, width, 3, device=sizes.device, seed=3)]

    return op_case(
        "unproject",
        direction,
        f"{sizes.image} with flow",
        inputs=inputs,
        functions={
            **providers(ops.unproject, reference),
            "any4d_fast:cuda": functools.partial(ops.unproject, backend="cuda"),
        },
        exact=reference,
        bytes=views * sizes.pixels * BYTES[direction],
        views=views,
    )


def cases(sizes: Sizes = FULL) -> list[Case]:
    return [case(sizes, direction) for direction in ("fwd", "bwd")]


def test_unproject(case: Case, provider: str, bench: Callable[[Case, str], None]) -> None:
    bench(case, provider)
