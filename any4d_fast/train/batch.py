"""What training reads: clips with whatever ground truth each of them has, as one batch of fixed shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..geometry import invert_pose, pose_to_quats_trans
from ..views import normalise_image

INPUTS = ("rays", "depth", "poses")
"""What `Batch.views` can give to the model besides images."""


@dataclass(frozen=True)
class Batch:
    """B clips of V views; pixels are [B, V, H, W]. World = view 0's camera, OpenCV axes, metres.

    What a sample lacks is zero, and its flag or mask says so: shapes never depend on what is known. A sample whose
    `is_metric` is False has geometry up to one unknown scale.

    Attributes:
        images: [B, V, 3, H, W] sRGB, 0 to 1.
        ray_directions: [B, V, H, W, 3] unit vectors in each view's camera frame.
        depth_along_ray: [B, V, H, W, 1] distance from the camera centre; 0 where unknown.
        camera_poses: [B, V, 4, 4] camera-to-world; the identity for view 0.
        scene_flow: [B, V, H, W, 3] motion of view 0's points from time 0 to time i, on view 0's pixels, world axes.
        depth_mask: [B, V, H, W] bool: depth is known.
        flow_mask: [B, V, H, W] bool: flow to view i is known, on view 0's pixels.
        dynamic_mask: [B, V, H, W] bool: the point of view 0's pixel belongs to something that moves.
        surface_mask: [B, V, H, W] bool: something is seen, so that depth has a meaning (upstream's non-ambiguous mask).
        has_rays, has_poses: [B] bool.
        has_surface: [B] bool: `surface_mask` is known.
        is_metric: [B] bool.
    """

    images: Tensor
    ray_directions: Tensor
    depth_along_ray: Tensor
    camera_poses: Tensor
    scene_flow: Tensor
    depth_mask: Tensor
    flow_mask: Tensor
    dynamic_mask: Tensor
    surface_mask: Tensor
    has_rays: Tensor
    has_poses: Tensor
    has_surface: Tensor
    is_metric: Tensor

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def num_views(self) -> int:
        """V."""
        return self.images.shape[1]

    @property
    def points_mask(self) -> Tensor:
        """Where world points are known, [B, V, H, W] bool: depth, rays and pose are."""
        return self.depth_mask & (self.has_rays & self.has_poses)[:, None, None, None]

    @property
    def pts3d_cam(self) -> Tensor:
        """Points in each view's camera frame, [B, V, H, W, 3] metres; 0 where unknown."""
        return self.ray_directions * self.depth_along_ray

    @property
    def pts3d(self) -> Tensor:
        """World points, [B, V, H, W, 3] metres; meaningful under `points_mask`."""
        # Elementwise: a matmul might run in TF32, and this is ground truth.
        rotation, place = self.camera_poses[..., None, None, :3, :3], self.camera_poses[..., None, None, :3, 3]
        return (rotation * self.pts3d_cam[..., None, :]).sum(-1) + place

    def to(self, device: str | torch.device, *, non_blocking: bool = False) -> Batch:
        """The batch with every tensor on `device`."""
        return Batch(**{k: v.to(device, non_blocking=non_blocking) for k, v in self._tensors().items()})

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; torch's DataLoader calls it when it is asked to pin."""
        return Batch(**{k: v.pin_memory() for k, v in self._tensors().items()})

    def views(self, norm_type: str = "dinov2", inputs: Sequence[str] = ()) -> list[dict[str, Any]]:
        """The views that `Any4D.forward` takes.

        Args:
            norm_type: how the encoder wants images normalised.
            inputs: what to give besides images, of `INPUTS`. Every sample of the batch must have it; where a depth is
                unknown it is 0, which the model reads as unknown.

        Raises:
            ValueError: an unknown name.
        """
        unknown = sorted(set(inputs) - set(INPUTS))
        if unknown:
            raise ValueError(f"inputs: unknown {', '.join(unknown)}; expected names among {', '.join(INPUTS)}")
        images = normalise_image(self.images, norm_type)
        quats, trans = pose_to_quats_trans(self.camera_poses)
        sources = {
            "rays": {"ray_directions_cam": self.ray_directions},
            "depth": {"depth_along_ray": self.depth_along_ray.masked_fill(~self.depth_mask[..., None], 0.0)},
            "poses": {"camera_pose_quats": quats, "camera_pose_trans": trans},
        }
        given = {key: value for name in inputs for key, value in sources[name].items()}
        return [
            {
                "img": images[:, view].contiguous(),
                "data_norm_type": [norm_type],
                "is_metric_scale": self.is_metric,
                **{key: value[:, view].contiguous() for key, value in given.items()},
            }
            for view in range(self.num_views)
        ]

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def collate(batches: Sequence[Batch]) -> Batch:
    """Batches of one shape as one batch, in order.

    Raises:
        ValueError: no batch, or views or sizes that differ.
    """
    if not batches:
        raise ValueError("batches: expected at least one, got none")
    shapes = {tuple(batch.images.shape[1:]) for batch in batches}
    if len(shapes) > 1:
        raise ValueError(f"batches: one batch needs one number of views and one size, got [V, 3, H, W] of {shapes}")
    first = batches[0]
    return Batch(**{key: torch.cat([getattr(batch, key) for batch in batches]) for key in first._tensors()})


def to_first_view(camera_poses: Tensor) -> Tensor:
    """Camera poses in any world -> in view 0's camera, [..., V, 4, 4]; exactly the identity for view 0."""
    relative = invert_pose(camera_poses[..., :1, :, :]) @ camera_poses
    relative[..., 0, :, :] = torch.eye(4, dtype=camera_poses.dtype, device=camera_poses.device)
    return relative
