"""The demo: reconstruct a synthetic clip whose true geometry is known, and compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .io.export import check_output, save
from .masking import output_mask
from .model import Any4D
from .pipeline import Run, run_views
from .reconstruction import BoolArray, Reconstruction
from .train.scene import SceneConfig
from .train.synthetic import SyntheticClip, make_clip, to_views

FILES = ("demo.rrd", "demo.glb", "demo.ply", "demo.npz", "demo.png")
"""What the demo writes: Rerun recording, points and cameras, points, every factor, contact sheet."""

HEIGHT, WIDTH = 252, 336
"""Of the clip: what `tiny` was trained on (train/configs/tiny.toml)."""


@dataclass
class Errors:
    """Errors against ground truth over valid pixels; None where the model does not predict the quantity."""

    depth_abs_rel: float | None
    scale_ratio: float | None
    flow_epe: float | None
    flow_epe_of_no_motion: float
    rotation_degrees: float | None
    focal_percent: float | None


def run_demo(
    model: Any4D, folder: Path, *, frames: int, seed: int, trained: bool, on_step: Callable[[str], None] | None = None
) -> tuple[Run, Errors, list[Path]]:
    """Render a clip, reconstruct it from its images alone, write `FILES`, and measure the errors.

    Errors are over all pixels; the files leave out those that `Any4D.infer` would mask, if the weights are trained
    and any pixel is left.

    Raises:
        MediaError: the folder cannot be written; ImportError: the extra `viz` is not installed.
    """
    paths = [folder / name for name in FILES]
    for path in paths:
        check_output(path)
    clip = make_clip(seed, SceneConfig(num_views=frames, height=HEIGHT, width=WIDTH))
    result = run_views(
        model,
        to_views(clip),
        names=[f"frame {i}" for i in range(frames)],
        timestamps=clip.timestamps.tolist(),
        trained=trained,
        on_step=on_step,
        apply_mask=False,  # it zeroes what it masks, which would count as an error
    )
    errors = measure(result.reconstruction, clip)
    # An untrained mask is noise: it would hide points at random. One without a pixel would leave nothing to look at.
    mask = trusted(result.reconstruction) if trained else None
    result.reconstruction.mask = mask if mask is not None and mask.any() else None
    for path in paths:
        save(result.reconstruction, path)
    return result, errors, paths


def trusted(reconstruction: Reconstruction) -> BoolArray | None:
    """The mask [V, H, W] that `Any4D.infer` applies by default, of a reconstruction made without it."""
    fields = {"pts3d": reconstruction.pts3d, "non_ambiguous_mask": reconstruction.mask}
    if reconstruction.depth_z is not None:
        fields["depth_z"] = reconstruction.depth_z[..., None]
    mask = output_mask({name: torch.from_numpy(value) for name, value in fields.items() if value is not None})
    return None if mask is None else mask[..., 0].numpy()


def measure(reconstruction: Reconstruction, clip: SyntheticClip) -> Errors:
    """Compare with the clip that it was made from.

    Depth: mean of |d - d*| / d* after scaling by the ratio of medians (`scale_ratio`, 1 for perfect metric scale).
    Flow: mean distance in metres on the moving pixels of the reference view; beside it that of predicting no motion.
    Rotation: median angle between relative poses. Focal length: mean relative error.
    """
    valid = clip.valid_mask
    moving = clip.moving_mask[reconstruction.reference] & valid[reconstruction.reference]
    truth = clip.scene_flow[:, moving]  # [V, pixels, 3]
    still = truth.norm(dim=-1).mean().item() if truth.numel() else 0.0
    depth_error = ratio = flow_error = rotation = focal = None
    if reconstruction.depth_z is not None:
        predicted = torch.from_numpy(reconstruction.depth_z)[valid]
        true = clip.depth_z[..., 0][valid]
        ratio = (predicted.median() / true.median()).item()
        depth_error = ((predicted / ratio - true).abs() / true).mean().item()
    if reconstruction.scene_flow is not None and truth.numel():
        flow_error = (torch.from_numpy(reconstruction.scene_flow)[:, moving] - truth).norm(dim=-1).mean().item()
    if reconstruction.camera_poses is not None:
        true_rotation = clip.camera_poses[reconstruction.reference, :3, :3].T @ clip.camera_poses[:, :3, :3]
        delta = torch.from_numpy(reconstruction.camera_poses)[:, :3, :3].mT @ true_rotation
        cosine = (delta.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2
        rotation = torch.rad2deg(torch.acos(cosine.clamp(-1, 1))).median().item()
    if reconstruction.intrinsics is not None:
        ratios = torch.from_numpy(reconstruction.intrinsics)[:, 0, 0] / clip.intrinsics[:, 0, 0]
        focal = 100 * (ratios - 1).abs().mean().item()
    return Errors(depth_error, ratio, flow_error, still, rotation, focal)
