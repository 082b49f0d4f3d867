"""From the views a person has to the views the model takes: validation and conversion.

docs/inputs.md has the one table of which combinations mean what.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from any4d_fast import geometry
from any4d_fast.egomotion import (
    MAX_SECONDS,
    compose_egomotion,
    doppler_flow,
    flow_normaliser,
    read_pose,
    relative_to,
)
from any4d_fast.input_checks import check_arguments, check_combinations, check_list
from any4d_fast.prepared import KnownCamera, PreparedViews, ViewSize
from any4d_fast.resize import resize_image, resize_rays, resize_sparse, target_size
from any4d_fast.views import (
    InputError,
    InputTypeError,
    fail,
    load_image,
    normalise_image,
    read_depth,
    read_doppler,
    read_intrinsics,
    read_metric_scale,
    read_rays,
    read_timestamps,
)

__all__ = ["InputError", "InputTypeError", "KnownCamera", "PreparedViews", "ViewSize", "prepare_views"]

_INFORMATION_KEYS = ("true_shape", "idx", "instance")


def prepare_views(
    views: Sequence[Mapping[str, Any]],
    *,
    size: int | tuple[int, int] | None = None,
    reference: int = 0,
    ignore_calibration_inputs: bool = False,
    ignore_depth_inputs: bool = False,
    ignore_pose_inputs: bool = False,
    ignore_depth_scale_inputs: bool = False,
    ignore_pose_scale_inputs: bool = False,
    ignore_doppler_inputs: bool = False,
    data_norm_type: str = "dinov2",
    patch_size: int = 14,
    device: torch.device | str | None = None,
) -> PreparedViews:
    """Check a person's views and convert them to the model's.

    Args:
        views: one mapping a view. A value of None counts as not given. Keys (docs/inputs.md has the details):
            `img` path, PIL image, or uint8 or float 0..1 [H, W, 3], [3, H, W] or a batch of either;
            `data_norm_type` if `img` is already normalised, as upstream's loaders return it;
            `intrinsics` [3, 3] or [B, 3, 3] pixels of the given image, or `ray_directions` [.., H, W, 3] camera frame;
            `depth_z` [.., H, W] or [.., H, W, 1] metres, 0 or NaN unknown;
            `camera_poses` [4, 4], [B, 4, 4] or (quaternions, translations), cam2world in any one world, or `imu`
            (rotation, translation) of this frame's camera in the frame of the previous frame's camera;
            `is_metric_scale` whether depth and poses are in metres (the default);
            `doppler` [.., H, W] m/s, positive moving away, NaN none, with `timestamps` in seconds;
            `true_shape`, `idx`, `instance` are passed on.
        size: model size. None keeps multiples of `patch_size` and otherwise takes the trained size (long side 518) of
            the nearest aspect ratio; an int is the long side, rounded; (H, W) is exact.
        reference: index of the view whose camera is the world and on whose pixels scene flow lives.
        ignore_calibration_inputs: rays are not shown to the model (depth and Doppler are still converted with them).
        ignore_depth_inputs: `depth_z` is as good as not given.
        ignore_pose_inputs: `camera_poses` and `imu` are as good as not given.
        ignore_depth_scale_inputs: the model is not told the metric scale of depth.
        ignore_pose_scale_inputs: the model is not told the metric scale of poses.
        ignore_doppler_inputs: `doppler` is as good as not given.
        data_norm_type: the encoder's image normalisation.
        patch_size: the encoder's patch side in pixels.
        device: where tensors go; by default where the reference view's `img` is, the CPU if it is no tensor.

    Returns:
        PreparedViews, with the reference view first.

    Raises:
        InputError: a ValueError that names the view and the key, what it was, what was expected, and how to fix it.
        InputTypeError: the same for a wrong type; also a TypeError.
    """
    views = check_list(views)
    check_arguments(len(views), size, reference, data_norm_type, patch_size)
    ignored = {"depth_z"} if ignore_depth_inputs else set()
    ignored |= {"camera_poses", "imu"} if ignore_pose_inputs else set()
    ignored |= {"doppler"} if ignore_doppler_inputs else set()
    given = [{k: v for k, v in view.items() if v is not None and k not in ignored} for view in views]
    check_combinations(given, reference)
    if device is None:
        source = given[reference]["img"]
        device = source.device if isinstance(source, Tensor) else torch.device("cpu")
    device = torch.device(device)

    order = [reference] + [index for index in range(len(given)) if index != reference]
    read = [_read_view(given[i], i, size, data_norm_type, patch_size, device) for i in order]
    _check_one_size(read, order)
    batch = read[0].image.shape[0]
    poses = _relative_poses(given, order, batch, device)
    depths = [_depth_along_ray(view, index) for view, index in zip(read, order, strict=True)]
    flows = _radial_flows(read, depths, order)

    out = [_model_view(given[i], r, data_norm_type) for i, r in zip(order, read, strict=True)]
    known = []
    for index, view in enumerate(read):
        pose, depth, flow = poses[index], depths[index], flows[index]
        if view.rays is not None and not ignore_calibration_inputs:
            out[index]["ray_directions_cam"] = view.rays
        if depth is not None:
            out[index]["depth_along_ray"] = depth
        if pose is not None:
            out[index]["camera_pose_quats"], out[index]["camera_pose_trans"] = (
                part.float() for part in geometry.pose_to_quats_trans(pose)
            )
        if flow is not None:
            out[index]["radial_scene_flow"] = flow
        known.append(_known_camera(view, pose, ignore_calibration_inputs))
    if any(flow is not None for flow in flows):
        out[0]["pts3d_cam"], out[0]["valid_mask"] = flow_normaliser(depths, read[0].rays, read[0].image)
    config = _geometric_input_config(out, ignore_depth_scale_inputs, ignore_pose_scale_inputs)
    sources = [(given[i]["img"], "data_norm_type" in given[i]) for i in order]
    return PreparedViews(out, order, known, [view.size for view in read], config, sources)


@dataclass(frozen=True)
class _ReadView:
    """One view at model size; depth and Doppler have NaN where unknown."""

    image: Tensor  # [B, 3, H, W] normalised
    size: ViewSize
    metric: Tensor  # [B] bool
    intrinsics: Tensor | None  # [B, 3, 3] float64
    intrinsics_given: Tensor | None
    rays: Tensor | None  # [B, H, W, 3] unit
    rays_given: Tensor | None
    depth: Tensor | None  # [B, H, W, 1] metres along z
    doppler: Tensor | None  # [B, H, W, 1] m/s
    times: Tensor | None  # [B] float64 seconds


def _read_view(
    view: Mapping[str, Any],
    index: int,
    size: int | tuple[int, int] | None,
    norm_type: str,
    patch_size: int,
    device: torch.device,
) -> _ReadView:
    def where(key: str) -> str:
        return f'views[{index}]["{key}"]'

    normalised = "data_norm_type" in view
    if normalised:
        _check_norm_type(view["data_norm_type"], where("data_norm_type"), norm_type)
    image = load_image(view["img"], where("img"), normalised=normalised, device=device)
    batch, hw = image.shape[0], (image.shape[2], image.shape[3])
    model_hw = target_size(hw, size, patch_size)
    resized = resize_image(image, model_hw)
    if not normalised:
        # Bicubic filters overshoot at edges; 0..1 is what the camera can have seen.
        resized = normalise_image(resized.clamp(0, 1), norm_type)
    intrinsics = intrinsics_given = rays = rays_given = depth = doppler = times = None
    if "intrinsics" in view:
        intrinsics_given = read_intrinsics(view["intrinsics"], where("intrinsics"), batch, hw).to(device)
        intrinsics = geometry.resize_intrinsics(intrinsics_given, hw, model_hw)
        rays = geometry.rays_from_intrinsics(intrinsics, *model_hw).float()
    if "ray_directions" in view:
        rays_given = read_rays(view["ray_directions"], where("ray_directions"), batch, hw).to(device)
        rays = resize_rays(rays_given, model_hw)
    if "depth_z" in view:
        depth = resize_sparse(read_depth(view["depth_z"], where("depth_z"), batch, hw).to(device), model_hw)
    if "doppler" in view:
        doppler = resize_sparse(read_doppler(view["doppler"], where("doppler"), batch, hw).to(device), model_hw)
    if "timestamps" in view:
        times = read_timestamps(view["timestamps"], where("timestamps"), batch).to(device)
    metric = read_metric_scale(view.get("is_metric_scale", True), where("is_metric_scale"), batch).to(device)
    view_size = ViewSize(hw, model_hw)
    return _ReadView(resized, view_size, metric, intrinsics, intrinsics_given, rays, rays_given, depth, doppler, times)


def _check_norm_type(value: Any, where: str, norm_type: str) -> None:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not names or any(name != norm_type for name in names):
        fail(where, f"{norm_type!r}, the encoder's normalisation", f"{value!r}",
             "normalise with the encoder's mean and standard deviation, or remove the key and pass 0..1")  # fmt: skip


def _check_one_size(read: list[_ReadView], order: list[int]) -> None:
    first = read[0]
    for view, index in zip(read[1:], order[1:], strict=True):
        if view.image.shape[0] != first.image.shape[0]:
            raise InputError(
                f'views[{index}]["img"]: expected a batch of {first.image.shape[0]} as in views[{order[0]}], got '
                f"{view.image.shape[0]}; every view must have the same number of images"
            )
        if view.size.model != first.size.model:
            raise InputError(
                f'views[{index}]["img"]: expected the size {first.size.model} of views[{order[0]}] at the model, got '
                f"{view.size.model} from {view.size.given}; pass size=(H, W) to bring all views to one size"
            )


def _relative_poses(
    given: list[dict[str, Any]], order: list[int], batch: int, device: torch.device
) -> list[Tensor | None]:
    """Poses in the reference camera's frame, [B, 4, 4] float64 each, in the model's order."""
    if any("imu" in view for view in given):
        composed = compose_egomotion([view.get("imu") for view in given], batch, device)
        world: list[Tensor | None] = [composed[index] for index in order]
    else:
        world = [
            read_pose(given[index]["camera_poses"], f'views[{index}]["camera_poses"]', batch).to(device)
            if "camera_poses" in given[index]
            else None
            for index in order
        ]
    return world if world[0] is None else relative_to(world[0], world)


def _depth_along_ray(view: _ReadView, index: int) -> Tensor | None:
    """[B, H, W, 1] metres, 0 where unknown; None if nothing is known."""
    if view.depth is None or view.rays is None:
        return None
    depth = geometry.depth_z_to_along_ray(torch.where(view.depth.isnan(), 0, view.depth), view.rays)
    known = (depth > 0).flatten(1).any(1)
    if not bool(known.any()):
        warnings.warn(f'views[{index}]["depth_z"]: no pixel is known (all 0 or NaN); it is left out', stacklevel=3)
        return None
    if not bool(known.all()):
        empty = (~known).nonzero()[:, 0].tolist()
        raise InputError(
            f'views[{index}]["depth_z"]: expected a known pixel in every image of the batch, got none in {empty}; the '
            "model takes a view's depth for the whole batch or not at all: split the batch"
        )
    return depth


def _radial_flows(read: list[_ReadView], depths: list[Tensor | None], order: list[int]) -> list[Tensor | None]:
    """Radial scene flow [B, H, W, 3] metres of each view with Doppler, in the model's order."""
    flows: list[Tensor | None] = []
    start = read[0].times
    for view, index in zip(read, order, strict=True):
        if view.doppler is None or view.rays is None or view.times is None or start is None:
            flows.append(None)
            continue
        if bool(view.doppler.isnan().all()):
            flows.append(None)
            continue
        seconds = view.times - start
        if float(seconds.abs().max()) > MAX_SECONDS:
            fail(f'views[{index}]["timestamps"]', f"at most {MAX_SECONDS:g} s from the reference view",
                 f"{float(seconds.abs().max()):.4g} s", "convert nanoseconds or milliseconds to seconds")  # fmt: skip
        flows.append(doppler_flow(view.doppler, view.rays, seconds))
    given_flows = [position for position, flow in enumerate(flows) if flow is not None]
    if given_flows == [0]:
        warnings.warn(
            f"views[{order[0]}]: doppler is given for the reference view only, from which to itself no time passes; "
            "it says no more than a flow of zero: give it for other views too",
            stacklevel=3,
        )
    for position, depth in enumerate(depths):
        if given_flows and depth is not None and not bool(read[position].metric.all()):
            raise InputError(
                f"views[{order[position]}]: doppler is in metres per second and is measured against depth_z, which "
                "is_metric_scale=False says is not in metres; convert depth_z to metres, or leave one of them out"
            )
    return flows


def _model_view(given: Mapping[str, Any], view: _ReadView, norm_type: str) -> dict[str, Any]:
    out: dict[str, Any] = {"img": view.image, "data_norm_type": [norm_type], "is_metric_scale": view.metric}
    out.update({key: given[key] for key in _INFORMATION_KEYS if key in given})
    return out


def _known_camera(view: _ReadView, pose: Tensor | None, ignore_calibration: bool) -> KnownCamera:
    cam2world = None if pose is None else pose.float()
    if ignore_calibration:
        return KnownCamera(cam2world=cam2world)
    return KnownCamera(
        intrinsics=None if view.intrinsics is None else view.intrinsics.float(),
        intrinsics_given=None if view.intrinsics_given is None else view.intrinsics_given.float(),
        ray_directions=view.rays,
        ray_directions_given=view.rays_given,
        cam2world=cam2world,
    )


def _geometric_input_config(
    views: list[dict[str, Any]], ignore_depth_scale: bool, ignore_pose_scale: bool
) -> dict[str, float]:
    """Upstream's modality probabilities, all 0 or 1, under which exactly what `views` hold is used."""

    def used(key: str) -> float:
        return float(any(key in view for view in views))

    return {
        "overall_prob": 1.0,
        "dropout_prob": 0.0,
        "ray_dirs_prob": used("ray_directions_cam"),
        "depth_prob": used("depth_along_ray"),
        "cam_prob": used("camera_pose_quats"),
        "doppler_prob": used("radial_scene_flow"),
        "sparse_depth_prob": 0.0,
        "sparsification_removal_percent": 0.0,
        "depth_scale_norm_all_prob": float(ignore_depth_scale),
        "pose_scale_norm_all_prob": float(ignore_pose_scale),
    }
