"""Random predictions and ground truth for the tests of the losses, with NaN wherever nothing is known."""

from __future__ import annotations

import torch
from torch import Tensor

from any4d_fast.geometry import quats_trans_to_pose
from any4d_fast.ops import PredictedMaps, TargetMaps

NAN = float("nan")


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def make_targets(batch: int, views: int, height: int, width: int, seed: int = 0, known: float = 0.7) -> TargetMaps:
    """Sample 0 has everything, sample 1 no poses, sample 2 no rays and no surface mask, and so on."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, views, height, width)

    def mask(share: float) -> Tensor:
        return torch.rand(shape, generator=generator) < share

    def normal(*more: int) -> Tensor:
        return torch.randn(*shape, *more, generator=generator)

    sample = torch.arange(batch)
    has_rays, has_poses, has_surface = sample % 3 != 2, sample % 3 != 1, sample % 3 != 2
    depth_mask, flow_mask, dynamic = mask(known), mask(known), mask(0.3)
    flow = 0.3 * normal(3)
    flow = flow.masked_fill(~dynamic[..., None], 0.0)  # resting points move by exactly nothing
    poses = quats_trans_to_pose(
        torch.randn(batch, views, 4, generator=generator), torch.randn(batch, views, 3, generator=generator)
    )
    per_map = (batch, 1, 1, 1, 1)
    return TargetMaps(
        ray_directions=unit(normal(3)).masked_fill(~has_rays.view(per_map), NAN),
        depth_along_ray=(1 + 4 * normal(1).abs()).masked_fill(~depth_mask[..., None], NAN),
        camera_poses=poses.masked_fill(~has_poses[:, None, None, None], NAN),
        scene_flow=flow.masked_fill(~flow_mask[..., None], NAN),
        depth_mask=depth_mask,
        flow_mask=flow_mask,
        dynamic_mask=dynamic,
        surface_mask=mask(0.9),
        has_rays=has_rays,
        has_poses=has_poses,
        has_surface=has_surface,
    )


def make_maps(
    batch: int, views: int, height: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 1
) -> PredictedMaps:
    generator = torch.Generator().manual_seed(seed)
    shape = (views, batch, height, width)

    def normal(*more: int) -> Tensor:
        return torch.randn(*shape, *more, generator=generator)

    maps = (
        2 * normal(3),
        0.2 * normal(3),
        (0.5 + 2 * normal(1).abs()),
        unit(normal(3)),
        2 * normal(),
        1 + normal().exp(),
    )
    return PredictedMaps(*(m.to(dtype) for m in maps))


def wide(inputs: PredictedMaps | TargetMaps) -> list[Tensor | None]:
    """Floating-point tensors in float64."""
    return [t.double() if t is not None and t.is_floating_point() else t for t in inputs]
