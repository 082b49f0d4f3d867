"""Golden outputs of the original model: weights, views and outputs by rule (tests/golden/README.md)."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "golden"
ALL_INPUTS = [
    "ray_directions_cam", "depth_along_ray", "camera_pose_quats", "camera_pose_trans", "is_metric_scale",
    "radial_scene_flow", "pts3d_cam", "valid_mask",
]  # fmt: skip
"""Everything that a view of `golden_views` can give besides its image."""

CASES = ("images_only", "all_inputs", "partial_inputs", "pointmap_direct", "pointmap_factored")


def load_case(name: str) -> dict[str, Any]:
    """Configuration and views of a case."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def load_outputs(name: str) -> dict[str, Tensor]:
    """What the original returned."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def golden_weights(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Fill parameters by their names, the same in any implementation; or by the same rule from another generator."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            source = generator or torch.Generator().manual_seed(zlib.crc32(name.encode()))
            r = torch.randn(p.shape, generator=source, device=source.device)
            last = name.rsplit(".", 1)[-1]
            if last == "gamma":
                value = 0.5 + 0.1 * r
            elif last == "weight" and p.ndim == 1:
                value = 1 + 0.1 * r
            elif last == "bias":
                value = 0.05 * r
            elif last in ("cls_token", "pos_embed", "scale_token"):
                value = 0.1 * r
            else:
                value = r / (p[0].numel() ** 0.5)
            p.copy_(value)


def golden_views(
    num_views: int, batch: int, height: int, width: int, seed: int, provided: list[list[str]]
) -> list[dict[str, Any]]:
    """Views by rule; every number is drawn whether or not it is provided."""
    g = torch.Generator().manual_seed(seed)
    views = []
    for v in range(num_views):
        image = torch.randn(batch, 3, height, width, generator=g)
        rays = torch.randn(batch, height, width, 3, generator=g)
        rays[..., 2] = rays[..., 2].abs() + 1
        rays = rays / rays.norm(dim=-1, keepdim=True)
        depth = torch.rand(batch, height, width, 1, generator=g) * 5 + 0.5
        depth = depth * (torch.rand(batch, height, width, 1, generator=g) > 0.1)
        quats = torch.randn(batch, 4, generator=g)
        quats = quats / quats.norm(dim=-1, keepdim=True)
        trans = torch.randn(batch, 3, generator=g)
        flow = torch.randn(batch, height, width, 3, generator=g) * 0.1
        values = {
            "ray_directions_cam": rays,
            "depth_along_ray": depth,
            "camera_pose_quats": quats,
            "camera_pose_trans": trans,
            "is_metric_scale": torch.tensor([(b + v) % 2 == 0 for b in range(batch)]),
            "radial_scene_flow": flow,
            "pts3d_cam": rays * depth,
            "valid_mask": depth[..., 0] > 0,
        }
        views.append({"img": image, "data_norm_type": ["dinov2"], **{k: values[k] for k in provided[v]}})
    return views
