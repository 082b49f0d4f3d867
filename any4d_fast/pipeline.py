"""From files to a reconstruction in one call."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .checkpoint import packaged_weights
from .devices import pick_device
from .geometry import resize_intrinsics
from .inference import infer
from .io.frames import Frames, load_frames
from .io.images import UInt8Array
from .io.sensors import load_depth, load_intrinsics, load_poses
from .model import Any4D
from .reconstruction import Reconstruction
from .resize import resize_image, target_size
from .stages import StageTimes, peak_memory, timed, watched

PathLike = str | os.PathLike[str]
SEED = 0  # of a preset's random weights, so that two runs agree


@dataclass
class Run:
    """A reconstruction and what it took."""

    reconstruction: Reconstruction
    times: StageTimes = field(default_factory=StageTimes)
    peak_bytes: int = 0
    trained: bool = True


def load_model(
    checkpoint: PathLike | None, preset: str | None, device: torch.device | str | None = None
) -> tuple[Any4D, bool]:
    """A model in evaluation mode, and whether its weights are trained.

    Args:
        checkpoint: weights, as `Any4D.from_pretrained` takes them.
        preset: architecture; with a checkpoint it overrides what is stored beside the weights. Without one the weights
            are those in the package (of "tiny"), or random and seeded where it has none.
        device: as for `pick_device`.

    Raises:
        ValueError: neither a checkpoint nor a preset is given.
        CheckpointError, ConfigError: they cannot be used.
    """
    if checkpoint is None and preset is None:
        raise ValueError(
            "checkpoint: give Any4D weights (a .pth or .safetensors file or a Hugging Face id), or a preset: 'tiny' "
            "was trained on synthetic rooms, the weights of others are random"
        )
    target = pick_device(device)
    if checkpoint is not None:
        return Any4D.from_pretrained(checkpoint, config=preset, device=target), True
    assert preset is not None
    packaged = packaged_weights(preset)
    with torch.random.fork_rng(devices=[]):
        if packaged is not None:
            return Any4D.from_pretrained(packaged, device=target), True
        torch.manual_seed(SEED)
        model = Any4D.from_preset(preset)
    return model.to(target).eval(), False


def reconstruct(
    inputs: PathLike | Sequence[PathLike],
    *,
    checkpoint: PathLike | None = None,
    preset: str | None = None,
    model: Any4D | None = None,
    frames: int | None = None,
    stride: int = 1,
    reference: int = 0,
    size: int | tuple[int, int] | None = None,
    device: torch.device | str | None = None,
    intrinsics: PathLike | None = None,
    depth: PathLike | None = None,
    poses: PathLike | None = None,
    **options: Any,
) -> Reconstruction:
    """Reconstruct a video, a folder of images or image files.

    Args:
        inputs: one video, one folder, or image files in order.
        checkpoint: weights: a file or a Hugging Face id.
        preset: architecture; with a checkpoint it overrides what is stored beside the weights, without one the
            weights are the package's ("tiny": synthetic rooms only) or random (seeded).
        model: a loaded model, instead of `checkpoint`, `preset` and `device`.
        frames: at most so many frames; all by default.
        stride: every how-many-th frame.
        reference: index among the chosen frames of the view whose camera is the world.
        size: model size in pixels: None, the long side, or (H, W).
        device: "cuda", "cpu", ...; a GPU where there is one by default.
        intrinsics: "fx,fy,cx,cy" or a file; pixels of the images as given.
        depth: a folder or file of z-depth in metres (16-bit pictures: millimetres).
        poses: a file of camera-to-world poses.
        options: further options of `Any4D.infer`.

    Returns:
        The reconstruction at model size.

    Raises:
        MediaError: an input cannot be read; InputError: inputs contradict one another;
        CheckpointError, ConfigError: the model cannot be made; ValueError: an option is wrong.
    """
    trained = True
    if model is not None and not (checkpoint is None and preset is None and device is None):
        raise ValueError("model: it runs as it is and where it is; leave out checkpoint, preset and device")
    if model is None:
        model, trained = load_model(checkpoint, preset, device)
    return run(
        model, inputs, frames=frames, stride=stride, reference=reference, size=size, intrinsics=intrinsics,
        depth=depth, poses=poses, trained=trained, **options,
    ).reconstruction  # fmt: skip


def run(
    model: Any4D,
    inputs: PathLike | Sequence[PathLike],
    *,
    frames: int | None = None,
    stride: int = 1,
    reference: int = 0,
    size: int | tuple[int, int] | None = None,
    intrinsics: PathLike | None = None,
    depth: PathLike | None = None,
    poses: PathLike | None = None,
    trained: bool = True,
    on_step: Callable[[str], None] | None = None,
    on_read: Callable[[int], None] | None = None,
    **options: Any,
) -> Run:
    """`reconstruct` with a loaded model, timed by stage; `on_read(frame count)` and `on_step(stage)` tell progress."""
    times = StageTimes()
    with timed(times, "reading"):
        views, clip = read_views(
            inputs, frames, stride, size, model.encoder.patch_size, intrinsics=intrinsics, depth=depth, poses=poses
        )
    if on_read:
        on_read(len(clip))
    return run_views(
        model, views, names=clip.names, timestamps=clip.timestamps, reference=reference, size=size, trained=trained,
        times=times, on_step=on_step, **options,
    )  # fmt: skip


def run_views(
    model: Any4D,
    views: Sequence[dict[str, Any]],
    *,
    names: Sequence[str] | None = None,
    timestamps: Sequence[float] | None = None,
    reference: int = 0,
    size: int | tuple[int, int] | None = None,
    trained: bool = True,
    times: StageTimes | None = None,
    on_step: Callable[[str], None] | None = None,
    **options: Any,
) -> Run:
    """Reconstruct view dictionaries (batch size 1) into a `Reconstruction` on the CPU."""
    times = times or StageTimes()
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = sum(times.seconds.values())
    whole = StageTimes()
    with timed(whole, "all", device), watched(model, times, on_step):
        outputs = infer(model, views, reference=reference, size=size, **options)
    inside = sum(times.seconds.values()) - before
    times.add("composition and masks", whole.seconds["all"] - inside)
    with timed(times, "copying out", device):
        result = Reconstruction.from_outputs(outputs, reference=reference, timestamps=timestamps, names=names)
    return Run(result, times, peak_memory(device), trained)


def read_views(
    inputs: PathLike | Sequence[PathLike],
    frames: int | None,
    stride: int,
    size: int | tuple[int, int] | None,
    patch_size: int,
    *,
    intrinsics: PathLike | None,
    depth: PathLike | None,
    poses: PathLike | None,
) -> tuple[list[dict[str, Any]], Frames]:
    """View dictionaries for `infer` from files, and the frames that they came from.

    Without depth, images are resized as they are read, so that full-size frames of a long clip never pile up.
    """

    def shrink(image: UInt8Array) -> UInt8Array:
        hw = target_size(image.shape[:2], size, patch_size)
        if hw == image.shape[:2]:
            return image
        small = resize_image(torch.from_numpy(image).movedim(-1, 0)[None].float() / 255, hw)[0]
        resized: UInt8Array = (small.clamp(0, 1) * 255).round().to(torch.uint8).movedim(0, -1).contiguous().numpy()
        return resized

    clip = load_frames(inputs, frames, stride, transform=None if depth is not None else shrink)
    views: list[dict[str, Any]] = [{"img": torch.from_numpy(np.ascontiguousarray(image))} for image in clip.images]
    if intrinsics is not None:
        matrices = torch.from_numpy(load_intrinsics(intrinsics, clip)).float().expand(len(clip), 3, 3)
        for view, matrix in zip(views, matrices, strict=True):
            view["intrinsics"] = resize_intrinsics(matrix, clip.original_hw, view["img"].shape[:2])
    if depth is not None:
        for view, item in zip(views, load_depth(depth, clip), strict=True):
            view["depth_z"] = torch.from_numpy(item)
    if poses is not None:
        for view, pose in zip(views, load_poses(poses, clip), strict=True):
            view["camera_poses"] = torch.from_numpy(pose)  # float64, as the world may be UTM's
    return views, clip
