"""Per-pixel training losses: mean distances, losses and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from any4d_fast import ops
from any4d_fast.reference.map_losses import map_losses as reference

from .harness import FULL, Case, Sizes, op_case, providers, random

LOSS_BYTES = 2 * 12 + 2 * 4 + 12 + 2 * 12 + 4 + 4 + 4
"""Read by the losses per pixel, float32: rays, depth and flow of both sides, points of the prediction (the target's are
composed), logits, confidence and four masks."""
BYTES = {"fwd": 12 + 12 + 4 + 1 + LOSS_BYTES, "bwd": LOSS_BYTES + 3 * 12 + 3 * 4}
"""Forward: points, target rays, target depth and its mask for the mean distances, which the losses need first; then
the losses. Backward: the losses' inputs read, six gradients written."""


def of_tensors(function: Callable[..., ops.MapLosses]) -> Callable[..., ops.MapLosses]:
    """The op as a function of plain tensors, maps first; targets get no gradients."""
    count = len(ops.PredictedMaps._fields)

    def call(*tensors: Tensor) -> Any:
        maps, targets = ops.PredictedMaps(*tensors[:count]), ops.TargetMaps(*(t.detach() for t in tensors[count:]))
        return function(maps, targets)

    return call


def unit_rays(*shape: int, device: str, seed: int) -> Tensor:
    return torch.nn.functional.normalize(random(*shape, 3, device=device, seed=seed), dim=-1)


def away_from_zero(maps: list[Tensor], targets: list[Tensor]) -> None:
    """Move depths whose residual is so small that rounding decides its sign, and with it a gradient's."""
    found = reference(ops.PredictedMaps(*maps), ops.TargetMaps(*targets))
    residual = maps[2] / found.pred_distance - targets[1].transpose(0, 1) / found.distance  # [V, 1, H, W, 1]
    maps[2] += 1e-3 * found.pred_distance * (residual.abs() < 1e-4)  # the mean distance is the points': it stays


def case(sizes: Sizes, direction: str) -> Case:
    views, height, width = sizes.views[0], sizes.height, sizes.width

    def inputs() -> list[Tensor]:
        device = sizes.device
        predicted, true = (views, 1, height, width), (1, views, height, width)

        def mask(seed: int) -> Tensor:
            return random(*true, device=device, seed=seed) > -1.3  # nine tenths

        poses = torch.eye(4, device=device).repeat(1, views, 1, 1)
        poses[..., :3, :3] = torch.linalg.qr(random(1, views, 3, 3, device=device, seed=1)).Q
        poses[..., :3, 3] = random(1, views, 3, device=device, seed=2)
        maps = [
            2 * random(*predicted, 3, device=device, seed=3),
            0.1 * random(*predicted, 3, device=device, seed=4),
            1 + random(*predicted, 1, device=device, seed=5).abs(),
            unit_rays(*predicted, device=device, seed=6),
            random(*predicted, device=device, seed=7),
            1 + random(*predicted, device=device, seed=8).exp(),
        ]
        targets = [
            unit_rays(*true, device=device, seed=9),
            1 + 4 * random(*true, 1, device=device, seed=10).abs(),
            poses,
            0.2 * random(*true, 3, device=device, seed=11),
            *(mask(seed) for seed in (12, 13, 14, 15)),
            *(torch.ones(1, dtype=torch.bool, device=device) for _ in range(3)),
        ]
        away_from_zero(maps, targets)
        return [*maps, *targets]

    return op_case(
        "map_losses",
        direction,
        sizes.image,
        inputs=inputs,
        functions={name: of_tensors(function) for name, function in providers(ops.map_losses, reference).items()},
        exact=of_tensors(reference),
        bytes=views * sizes.pixels * BYTES[direction],
        views=views,
    )


def cases(sizes: Sizes = FULL) -> list[Case]:
    return [case(sizes, direction) for direction in ("fwd", "bwd")]


def test_map_losses(case: Case, provider: str, bench: Callable[[Case, str], None]) -> None:
    bench(case, provider)
