"""From the model's raw outputs to what a person uses: derived keys, masks, known cameras, the given size."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from any4d_fast import geometry, ops
from any4d_fast.head_loop import Outputs
from any4d_fast.masking import MASK_KEYS, output_mask
from any4d_fast.prepared import PreparedViews
from any4d_fast.resize import resize_dense, resize_nearest, resize_rays
from any4d_fast.views import InputError, describe, fail

_MASKED_KEYS = ("pts3d", "pts3d_cam", "depth_along_ray", "depth_z")
"""Dense geometry that is zeroed outside the mask."""

PIXELS_AT_ONCE = 1_400_000
"""Pixels that are finished together: 8 views of 518 x 336. A view's 250 small operations take longer to launch than to
run; those of 8 take some 300 MB while they run."""

_LOGIT_KEYS = ("conf", "non_ambiguous_mask_logits", "motion_mask_logits")
_BOOL_KEYS = ("non_ambiguous_mask", "motion_mask")


def postprocess(
    raw_outputs: Sequence[Outputs],
    prepared: PreparedViews,
    *,
    apply_mask: bool = True,
    mask_edges: bool = True,
    edge_normal_threshold: float = 5.0,
    edge_depth_threshold: float = 0.03,
    apply_confidence_mask: bool = False,
    confidence_percentile: float = 10,
    known: str = "hint",
    original_size: bool = False,
) -> list[Outputs]:
    """Add to the model's outputs what follows from them.

    Every raw output is kept, and where the scene representation has what they need, these are added:
    `img_no_norm` [B, H, W, 3] within 0..1; `depth_z` [B, H, W, 1] metres along the optical axis; `intrinsics` [B, 3, 3]
    pixels, the pinhole that fits `ray_directions` best; `camera_poses` [B, 4, 4] cam2world; `mask` [B, H, W, 1] bool.
    The world is the reference view's camera. `scene_flow` of every view lives on the reference view's pixels.

    With `known="keep"`, cameras that the caller supplied are returned as they were given instead of as the model saw
    them: intrinsics (or rays) in `ray_directions` and `intrinsics`, poses relative to the reference camera in
    `camera_poses`, `cam_quats` and `cam_trans`; and `pts3d_cam`, `depth_z` and `pts3d` are composed anew from them and
    the predicted `depth_along_ray`. What was not supplied stays the model's; so does `scene_flow`.

    With `original_size=True`, every map has the size of the image that the caller gave (`scene_flow` that of the
    reference view's): values are interpolated bilinearly before masking, masks are taken from the nearest pixel, points
    are composed anew from the interpolated rays and depth, `intrinsics` are in pixels of that size, and `img_no_norm`
    is the given image.

    Args:
        raw_outputs: one dictionary a view, in the order of `prepared.views`.
        prepared: the views that the outputs belong to.
        apply_mask: compute `mask` and zero `pts3d`, `pts3d_cam`, `depth_along_ray` and `depth_z` outside it.
        mask_edges: leave out pixels where both depth and normals have an edge.
        edge_normal_threshold: degrees between neighbouring normals from which on there is an edge.
        edge_depth_threshold: relative difference of neighbouring depths from which on there is an edge.
        apply_confidence_mask: leave out the least confident pixels of each image.
        confidence_percentile: how many of them, in percent.
        known: "hint" or "keep".
        original_size: map outputs back to the given sizes.

    Returns:
        One dictionary a view in the order in which the caller gave the views. `raw_outputs` is not changed.

    Raises:
        InputError: for an argument out of its range, outputs that do not fit `prepared`, or `known="keep"` with a scene
            representation that has no rays, depth and poses to compose.
    """
    if len(raw_outputs) != len(prepared.views):
        fail("raw_outputs", f"one dictionary for each of {len(prepared.views)} views", f"{len(raw_outputs)}",
             "pass what model.forward returned for prepared.views")  # fmt: skip
    finish = ViewFinisher(
        prepared,
        apply_mask=apply_mask,
        mask_edges=mask_edges,
        edge_normal_threshold=edge_normal_threshold,
        edge_depth_threshold=edge_depth_threshold,
        apply_confidence_mask=apply_confidence_mask,
        confidence_percentile=confidence_percentile,
        known=known,
        original_size=original_size,
    )
    return prepared.in_given_order(finish(0, raw_outputs))


class ViewFinisher:
    """`postprocess` of some views: `finisher(first, raw_outputs)` of those from the model's index `first` on."""

    def __init__(
        self,
        prepared: PreparedViews,
        *,
        apply_mask: bool = True,
        mask_edges: bool = True,
        edge_normal_threshold: float = 5.0,
        edge_depth_threshold: float = 0.03,
        apply_confidence_mask: bool = False,
        confidence_percentile: float = 10,
        known: str = "hint",
        original_size: bool = False,
    ) -> None:
        """Options and errors are those of `postprocess`."""
        if not 0 <= confidence_percentile <= 100:
            fail("confidence_percentile", "0 to 100", describe(confidence_percentile), "it is a percentage")
        for name, value in (
            ("edge_normal_threshold", edge_normal_threshold),
            ("edge_depth_threshold", edge_depth_threshold),
        ):
            if not value > 0:
                fail(name, "a positive number", describe(value), "use mask_edges=False to keep every edge")
        prepared.check_known(known)
        self.prepared = prepared
        self.apply_mask = apply_mask
        self.normal_threshold = edge_normal_threshold if mask_edges else None
        self.depth_threshold = edge_depth_threshold
        self.percentile = confidence_percentile if apply_confidence_mask else None
        self.keep = known == "keep"
        self.original_size = original_size

    def __call__(self, first: int, raw_outputs: Sequence[Outputs]) -> list[Outputs]:
        found: list[Outputs] = []
        for _, alike in itertools.groupby(raw_outputs, _shapes):
            views = list(alike)
            step = max(1, PIXELS_AT_ONCE // self._pixels)
            for begin in range(0, len(views), step):
                found += self._finish(first + len(found), views[begin : begin + step])
        return found

    @property
    def _pixels(self) -> int:
        """Of a view of all samples."""
        height, width = self.prepared.sizes[0].model
        return len(self.prepared.views[0]["img"]) * height * width

    def _finish(self, first: int, raw_outputs: Sequence[Outputs]) -> list[Outputs]:
        """Views whose outputs have the same keys and shapes."""
        prepared, outs = self.prepared, [dict(raw) for raw in raw_outputs]
        _derive(outs, prepared, first, keep=self.keep)
        masks: Sequence[Tensor | None] = [None] * len(outs)
        if self.apply_mask:
            together = output_mask(
                {key: _joined(outs, key) for key in MASK_KEYS if key in outs[0]},
                normal_threshold=self.normal_threshold,
                depth_threshold=self.depth_threshold,
                confidence_percentile=self.percentile,
            )
            masks = masks if together is None else together.chunk(len(outs))
        for index, (out, mask) in enumerate(zip(outs, masks, strict=True), start=first):
            if self.original_size:
                _to_given_size(out, prepared, index, keep=self.keep)
            if mask is not None:
                if self.original_size:
                    mask = resize_nearest(mask, prepared.sizes[index].given)
                out["mask"] = mask
                for key in _MASKED_KEYS:
                    if key in out:
                        out[key] = torch.where(mask, out[key], 0)
        return outs


def _shapes(out: Outputs) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in out.items()}


def _joined(outs: Sequence[Outputs], key: str) -> Tensor:
    """[views * B, ...]"""
    return outs[0][key] if len(outs) == 1 else torch.cat([out[key] for out in outs])


def _derive(outs: list[Outputs], prepared: PreparedViews, first: int, *, keep: bool) -> None:
    """Add image, pose matrix, intrinsics and z-depth to the views' outputs, and put known cameras in their place."""
    if "cam_quats" in outs[0] and "cam_trans" in outs[0]:
        poses = geometry.quats_trans_to_pose(_joined(outs, "cam_quats"), _joined(outs, "cam_trans"))
        _share(outs, "camera_poses", poses)
    if keep:
        for index, out in enumerate(outs, start=first):
            _keep_known(out, prepared, index)
    # A ray map's directions are in the world's frame, where they say nothing about the lens.
    unknown = [out for out in outs if "ray_origins" not in out and "intrinsics" not in out]
    if unknown and "ray_directions" in unknown[0]:
        _share(unknown, "intrinsics", ops.recover_intrinsics(_joined(unknown, "ray_directions")))
    for out in outs:
        if "pts3d_cam" in out:
            out["depth_z"] = out["pts3d_cam"][..., 2:3]
    _share(outs, "img_no_norm", prepared.images(range(first, first + len(outs))))


def _share(outs: Sequence[Outputs], key: str, joined: Tensor) -> None:
    """Give each view its part of [views * B, ...]."""
    for out, part in zip(outs, joined.chunk(len(outs)), strict=True):
        out[key] = part


def _keep_known(out: dict[str, Tensor], prepared: PreparedViews, index: int) -> None:
    """Replace the predicted camera by the supplied one and compose the points anew."""
    camera = prepared.known[index]
    if camera.ray_directions is None and camera.cam2world is None:
        return
    missing = [key for key in ("ray_directions", "depth_along_ray", "camera_poses") if key not in out]
    if missing or "ray_origins" in out:
        raise InputError(
            f'known: expected outputs with rays, depth and poses to compose for known="keep", got {sorted(out)}; this '
            'scene representation has no camera to put in place: use known="hint"'
        )
    like = out["depth_along_ray"]
    if camera.ray_directions is not None:
        out["ray_directions"] = camera.ray_directions.to(like)
        if camera.intrinsics is not None:
            out["intrinsics"] = camera.intrinsics.to(like)
    if camera.cam2world is not None:
        pose = camera.cam2world.to(like)
        out["camera_poses"] = pose
        out["cam_quats"], out["cam_trans"] = geometry.pose_to_quats_trans(pose)
    _compose(out)


def _compose(out: dict[str, Tensor]) -> None:
    """Points in both frames and z-depth from rays, distance along them, and the pose."""
    out["pts3d_cam"] = out["ray_directions"] * out["depth_along_ray"]
    out["depth_z"] = out["pts3d_cam"][..., 2:3]
    out["pts3d"] = geometry.transform_points(out["camera_poses"], out["pts3d_cam"])


def _to_given_size(out: dict[str, Tensor], prepared: PreparedViews, index: int, *, keep: bool) -> None:
    """Map one view's outputs from model size to the size of the given image, in place."""
    size, reference_size = prepared.sizes[index], prepared.sizes[0]
    if "scene_flow" in out:
        out["scene_flow"] = resize_dense(out["scene_flow"], reference_size.given)
    if size.given == size.model:
        return
    hw = size.given
    out["img_no_norm"] = prepared.image(index, given_size=True)
    for key in _LOGIT_KEYS:
        if key in out:
            out[key] = resize_dense(out[key][..., None], hw)[..., 0]
    for key in _BOOL_KEYS:
        if key in out:
            out[key] = resize_nearest(out[key], hw)
    for key in ("depth_along_ray", "ray_origins"):
        if key in out:
            out[key] = resize_dense(out[key], hw)
    if "ray_directions" in out:
        out["ray_directions"] = resize_rays(out["ray_directions"], hw, camera_frame="ray_origins" not in out)
    if "intrinsics" in out:
        out["intrinsics"] = geometry.resize_intrinsics(out["intrinsics"], size.model, hw)
    if keep:
        _known_at_given_size(out, prepared, index)
    factored = "ray_directions" in out and "depth_along_ray" in out
    if factored and "camera_poses" in out:
        _compose(out)
    elif factored and "ray_origins" in out:
        out["pts3d"] = out["ray_origins"] + out["ray_directions"] * out["depth_along_ray"]
    else:
        for key in ("pts3d", "pts3d_cam", "depth_z"):
            if key in out:
                out[key] = resize_dense(out[key], hw)


def _known_at_given_size(out: dict[str, Tensor], prepared: PreparedViews, index: int) -> None:
    """The supplied lens at the size it was supplied for, untouched by resizing there and back."""
    camera, hw = prepared.known[index], prepared.sizes[index].given
    if camera.ray_directions is None:
        return
    like = out["depth_along_ray"]
    if camera.ray_directions_given is not None:
        out["ray_directions"] = camera.ray_directions_given.to(like)
    if camera.intrinsics_given is not None:
        out["intrinsics"] = camera.intrinsics_given.to(like)
        out["ray_directions"] = geometry.rays_from_intrinsics(camera.intrinsics_given.double(), *hw).to(like)
