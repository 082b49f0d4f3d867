"""What the keys of the views and the arguments alone show to be wrong, before any value is read."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from any4d_fast.views import IMAGE_NORMALISATIONS, InputError, InputTypeError, describe, fail

VIEW_KEYS = (
    "img", "data_norm_type", "intrinsics", "ray_directions", "depth_z", "camera_poses", "imu", "is_metric_scale",
    "doppler", "timestamps", "true_shape", "idx", "instance",
)  # fmt: skip
"""What a view may hold."""

_FORWARD_KEYS = {
    "ray_directions_cam": "ray_directions",
    "depth_along_ray": "depth_z",
    "camera_pose_quats": "camera_poses",
    "camera_pose_trans": "camera_poses",
    "radial_scene_flow": "doppler with timestamps",
    "pts3d_cam": "depth_z",
    "valid_mask": "depth_z (0 or NaN where unknown)",
}
"""Keys of the model's own views -> what to give here instead."""


def check_list(views: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if not isinstance(views, (list, tuple)):
        fail("views", "a list with one dictionary a view", describe(views), "write [view]", kind=InputTypeError)
    if not views:
        fail("views", "at least one view", "an empty list", "check the path or pattern the images come from")
    for index, view in enumerate(views):
        where = f"views[{index}]"
        if not isinstance(view, Mapping):
            fail(where, 'a dictionary with the key "img"', describe(view), 'write {"img": image}', kind=InputTypeError)
        for key in view:
            if key in VIEW_KEYS:
                continue
            if key in _FORWARD_KEYS:
                raise InputError(
                    f"{where}: the key {key!r} belongs to model.forward(views); give {_FORWARD_KEYS[key]} here, or "
                    "call model.forward with views that are already converted"
                )
            close = difflib.get_close_matches(str(key), VIEW_KEYS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "remove it."
            raise InputError(f"{where}: unknown key {key!r}; {hint} Allowed keys: {', '.join(VIEW_KEYS)}")
        if view.get("img") is None:
            fail(where, 'the key "img"', f"keys {sorted(map(str, view))}", "give every view an image")
    return list(views)


def check_arguments(count: int, size: Any, reference: Any, data_norm_type: Any, patch_size: Any) -> None:
    if isinstance(reference, bool) or not isinstance(reference, int):
        fail("reference", "the index of a view", describe(reference), "pass an int", kind=InputTypeError)
    if not 0 <= reference < count:
        fail("reference", f"0 to {count - 1} for {count} views", str(reference), "count the views from 0")
    if isinstance(patch_size, bool) or not isinstance(patch_size, int) or patch_size < 1:
        fail("patch_size", "a positive int", describe(patch_size), "pass the encoder's patch side, 14 for DINOv2")
    if data_norm_type not in IMAGE_NORMALISATIONS:
        fail("data_norm_type", f"one of {sorted(IMAGE_NORMALISATIONS)}", describe(data_norm_type),
             "pass the encoder's data_norm_type")  # fmt: skip
    if size is None:
        return
    sides = size if isinstance(size, tuple) else (size,)
    if len(sides) > 2 or not sides or any(isinstance(side, bool) or not isinstance(side, int) for side in sides):
        fail("size", "None, an int (long side) or a tuple (H, W) of ints", f"{size!r}", "see prepare_views",
             kind=InputTypeError)  # fmt: skip
    if min(sides) < patch_size:
        fail("size", f"at least one patch of {patch_size} pixels", f"{size!r}", f"pass {patch_size} or more")
    if isinstance(size, tuple):
        if len(size) != 2:
            fail("size", "a tuple (H, W)", f"{size!r}", "name both sides, or pass an int for the long side")
        if any(side % patch_size for side in size):
            near = tuple(max(1, round(side / patch_size)) * patch_size for side in size)
            fail("size", f"multiples of {patch_size}", f"{size!r}", f"{near} is the nearest")


def check_combinations(given: list[dict[str, Any]], reference: int) -> None:
    """Contradictions that the keys alone show."""
    for index, view in enumerate(given):
        where = f"views[{index}]"
        if "intrinsics" in view and "ray_directions" in view:
            raise InputError(f"{where}: both intrinsics and ray_directions describe the lens; give only one of them")
        for key in ("depth_z", "doppler"):
            if key in view and "intrinsics" not in view and "ray_directions" not in view:
                raise InputError(
                    f"{where}: {key} needs the directions of its pixels; add intrinsics or ray_directions to this view"
                )
        if "doppler" in view:
            for late in sorted({reference, index}):
                if "timestamps" not in given[late]:
                    raise InputError(
                        f"{where}: doppler becomes a flow over the time since the reference view; views[{late}] has no "
                        "timestamps: add them in seconds to this view and to the reference view"
                    )
    posed = [index for index, view in enumerate(given) if "camera_poses" in view]
    moved = [index for index, view in enumerate(given) if "imu" in view]
    if posed and moved:
        raise InputError(
            f"views: both camera_poses (views {posed}) and imu (views {moved}) describe the cameras' motion; give only "
            "one of them in all views"
        )
    if posed and reference not in posed:
        raise InputError(
            f"views: camera_poses are given for views {posed} but not for the reference view {reference}, to which "
            "they are relative; add its pose, or choose reference among those"
        )
