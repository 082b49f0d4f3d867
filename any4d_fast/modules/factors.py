"""From the heads' raw channels to the factors of the scene, for every scene representation.

The released representation goes through `ops.compose_factors`, one pass; the others are composed here.
"""

from __future__ import annotations

import roma
import torch
from torch import Tensor

from .. import ops
from ..config import DENSE_PARTS, INF, PART_CHANNELS, AdaptorConfig, SceneConfig, ValueBounds

EPS = 1e-8  # upstream clamps every norm here before dividing

Outputs = dict[str, Tensor]


def compose(config: SceneConfig, geometry: Tensor, flow: Tensor, pose: Tensor | None, log_scale: Tensor) -> Outputs:
    """Every output of the model for a stack of views.

    Args:
        config: what the channels mean.
        geometry: [N, H, W, C] raw channels of the geometry head, N = views * B, row v*B + b.
        flow: [N, H, W, 3] raw channels of the scene-flow head.
        pose: [N, 7] raw translation and quaternion, None without a pose head.
        log_scale: [B, 1] raw metric scale.

    Returns:
        Upstream's keys, dense ones [N, H, W, ...] in metres, world = reference view's camera.
    """
    released = (
        config.representation == "raydirs+depth+pose"
        and config.confidence
        and config.mask
        and config.adaptors.is_released()
    )
    if released:
        assert pose is not None
        factors = ops.compose_factors(geometry, flow, pose[:, 3:], pose[:, :3], log_scale)
        return factors._asdict()
    return _compose_general(config, geometry, flow, pose, log_scale)


def _compose_general(
    config: SceneConfig, geometry: Tensor, flow: Tensor, pose: Tensor | None, log_scale: Tensor
) -> Outputs:
    adaptors = config.adaptors
    scale = _bounded(log_scale, adaptors.scale)  # [B, 1]
    per_row = scale.repeat(geometry.shape[0] // scale.shape[0], 1)  # [N, 1], row v*B + b
    dense_scale = per_row[:, :, None, None]  # [N, 1, 1, 1]
    names = DENSE_PARTS[config.representation]
    sizes = [PART_CHANNELS[n] for n in names] + [1] * (config.confidence + config.mask)
    channels = list(geometry.split(sizes, dim=-1))
    parts = {name: _dense_part(name, channels.pop(0), adaptors) for name in names}
    outputs = _points(config, parts, _pose(pose, adaptors))
    metric = ("pts3d", "pts3d_cam", "ray_origins", "depth_along_ray")
    outputs = {k: v * dense_scale if k in metric else v for k, v in outputs.items()}
    if "cam_trans" in outputs:
        outputs["cam_trans"] = outputs["cam_trans"] * per_row
    outputs["scene_flow"] = _bounded(flow, adaptors.scene_flow) * dense_scale
    outputs["metric_scaling_factor"] = scale
    if config.confidence:
        outputs["conf"] = _confidence(channels.pop(0), adaptors)[..., 0]
    if config.mask:
        logits = channels.pop(0)[..., 0]
        outputs["non_ambiguous_mask"] = logits.sigmoid() > 0.5
        outputs["non_ambiguous_mask_logits"] = logits
    return outputs


def _points(config: SceneConfig, parts: Outputs, pose: tuple[Tensor, Tensor] | None) -> Outputs:
    """The representation's outputs before the metric scale."""
    kind = config.representation
    if kind == "pointmap":
        return {"pts3d": parts["points"]}
    if kind == "raymap+depth":
        origins, rays, depth = parts["ray_origins"], parts["ray_directions"], parts["depth"]
        return {
            "pts3d": origins + rays * depth,
            "ray_origins": origins,
            "ray_directions": rays,
            "depth_along_ray": depth,
        }
    assert pose is not None
    quats, trans = pose
    if kind == "campointmap+pose":
        camera = parts["points"]
        depth = camera.norm(dim=-1, keepdim=True)
        rays = camera / depth.clamp(min=EPS)
    else:
        rays, depth = parts["ray_directions"], parts["depth"]
        camera = rays * depth
    if kind == "pointmap+raydirs+depth+pose" and not config.factored_points:
        world = parts["points"]
    else:
        rotation = roma.unitquat_to_rotmat(quats / quats.norm(dim=-1, keepdim=True).clamp(min=EPS))
        world = torch.einsum("nij,nhwj->nhwi", rotation, camera) + trans[:, None, None]
    return {
        "pts3d": world,
        "pts3d_cam": camera,
        "ray_directions": rays,
        "depth_along_ray": depth,
        "cam_trans": trans,
        "cam_quats": quats,
    }


def _pose(pose: Tensor | None, adaptors: AdaptorConfig) -> tuple[Tensor, Tensor] | None:
    if pose is None:
        return None
    trans = _scaled_vector(pose[:, :3], adaptors.cam_trans)
    quats = _clip(pose[:, 3:], adaptors.quaternions)
    if adaptors.quaternions_normalize:
        quats = quats / quats.norm(dim=-1, keepdim=True).clamp(min=EPS)
    return quats, trans


def _dense_part(name: str, x: Tensor, adaptors: AdaptorConfig) -> Tensor:
    if name == "depth":
        return _bounded(x, adaptors.depth)
    if name == "ray_origins":
        return _scaled_vector(x, adaptors.ray_origins)
    if name == "points":
        return _scaled_vector(x, adaptors.points)
    rays = _clip(x, adaptors.ray_directions)
    if adaptors.clamp_min_of_z_dir:
        rays = torch.cat([rays[..., :2], rays[..., 2:].clamp(min=adaptors.z_dir_min)], dim=-1)
    if adaptors.rays_on_unit_sphere:
        return rays / rays.norm(dim=-1, keepdim=True).clamp(min=EPS)
    if adaptors.rays_on_image_plane:
        return rays / rays[..., 2:]
    return rays


def _clip(x: Tensor, bounds: ValueBounds) -> Tensor:
    return x if (bounds.vmin, bounds.vmax) == (-INF, INF) else x.clip(bounds.vmin, bounds.vmax)


def _bounded(x: Tensor, bounds: ValueBounds) -> Tensor:
    """A scalar factor: linear, square or exp, then clipped."""
    value = {"linear": lambda: x, "square": x.square, "exp": x.exp}[bounds.mode]()
    return _clip(value, bounds)


def _scaled_vector(x: Tensor, bounds: ValueBounds) -> Tensor:
    """A vector whose length is remapped: unchanged, squared or expm1; `z_exp` is a point from (x/z, y/z, log z)."""
    if bounds.mode == "z_exp":
        z = x[..., 2:].exp()
        x = torch.cat([x[..., :2] * z, z], dim=-1)
    elif bounds.mode != "linear":
        length = x.norm(dim=-1, keepdim=True)
        unit = x / length.clamp(min=EPS)
        x = unit * (length.square() if bounds.mode == "square" else torch.expm1(length))
    return _clip(x, bounds)


def _confidence(x: Tensor, adaptors: AdaptorConfig) -> Tensor:
    """[N, H, W, 1] raw -> confidence."""
    low, high = adaptors.confidence_vmin, adaptors.confidence_vmax
    if adaptors.confidence_type == "exp":
        return low + x.exp().clip(max=high - low)
    if adaptors.confidence_type == "sigmoid":
        return x.sigmoid() * (high - low) + low
    pixels = x.shape[1] * x.shape[2]
    return x.flatten(1).softmax(dim=1).view_as(x) * pixels
