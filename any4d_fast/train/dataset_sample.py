"""From a clip's files to one sample: which frames, and their ground truth at the model's size."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..geometry import depth_z_to_along_ray, rays_from_intrinsics, resize_intrinsics
from ..io.errors import MediaError
from ..io.images import load_image
from ..resize import resize_image, resize_rays
from .batch import Batch, to_first_view
from .dataset_files import LARGEST, Clip, check_same_view, read_depth, read_flow, read_mask, read_rays

PARTS = ("rays", "depth", "poses", "flow", "surface")
"""What a clip may lack and `DatasetConfig.require` may ask for."""

_PATCH = 14


@dataclass(frozen=True)
class DatasetConfig:
    """How samples are drawn from clips.

    Attributes:
        views: frames of a sample.
        sizes: (height, width) in pixels, multiples of 14; of several, each step takes one. Lists, and one bare pair,
            are taken too.
        stride: (low, high) frames from one view to the next, both included; as far as the clip is long enough.
        reference: which frame of the window is view 0: the "first", or a "random" one.
        fit: "crop" cuts the middle of the image that has the wanted aspect ratio and then scales; "stretch" keeps all
            of it and scales each axis on its own.
        split: "train", "held_out" or "all" clips. A hash of the name decides (of the first folder's name, where clips
            lie in folders, so that clips of one place stay together): it never changes when clips are added.
        held_out: fraction of clips that are held out.
        require: parts that every view of a sample must have, of `PARTS`; a clip without them counts as bad.
        max_depth: depth beyond it, in the clip's unit, is unknown.
        dynamic_threshold: length of flow, in the clip's unit, beyond which a pixel counts as moving, in flow files
            that do not say what moves.
        on_error: "raise" on bad data, or "skip" it: another clip takes its place, and the skip is counted.

    Raises:
        ValueError: a value outside what is possible; the message names it.
    """

    views: int = 4
    sizes: tuple[tuple[int, int], ...] = ((168, 224),)
    stride: tuple[int, int] = (1, 4)
    reference: str = "first"
    fit: str = "crop"
    split: str = "train"
    held_out: float = 0.1
    require: tuple[str, ...] = ()
    max_depth: float | None = None
    dynamic_threshold: float = 0.01
    on_error: str = "raise"

    def __post_init__(self) -> None:
        for name, choices in (
            ("reference", ("first", "random")),
            ("fit", ("crop", "stretch")),
            ("split", ("train", "held_out", "all")),
            ("on_error", ("raise", "skip")),
        ):
            value = getattr(self, name)
            _require(value in choices, name, value, " or ".join(map(repr, choices)))
        _require(_is_int(self.views) and self.views >= 1, "views", self.views, "an int of at least 1")
        object.__setattr__(self, "sizes", _pairs(self.sizes))
        stride = self.stride
        ordered = isinstance(stride, Sequence) and len(stride) == 2 and all(map(_is_int, stride))
        _require(ordered and 1 <= stride[0] <= stride[1], "stride", stride, "a pair of ints 1 <= low <= high")
        object.__setattr__(self, "stride", (stride[0], stride[1]))
        fraction = _is_number(self.held_out) and 0 <= self.held_out <= 1
        _require(fraction, "held_out", self.held_out, "a fraction from 0 to 1")
        given: Any = self.require
        require = (given,) if isinstance(given, str) else tuple(given)
        object.__setattr__(self, "require", require)
        _require(set(require) <= set(PARTS), "require", require, f"names among {', '.join(PARTS)}")
        limit, threshold = self.max_depth, self.dynamic_threshold
        _require(limit is None or (_is_number(limit) and limit > 0), "max_depth", limit, "a positive length or None")
        _require(_is_number(threshold) and threshold >= 0, "dynamic_threshold", threshold, "a length, 0 or more")


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"DatasetConfig.{name}: expected {expected}, got {value!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _pairs(sizes: Any) -> tuple[tuple[int, int], ...]:
    expected = "one (height, width) or several, positive multiples of 14"
    _require(isinstance(sizes, Sequence) and len(sizes) > 0, "sizes", sizes, expected)
    pairs = [sizes] if all(map(_is_int, sizes)) else sizes
    for pair in pairs:
        right = isinstance(pair, Sequence) and len(pair) == 2 and all(map(_is_int, pair))
        _require(right and all(side > 0 and side % _PATCH == 0 for side in pair), "sizes", sizes, expected)
    return tuple((pair[0], pair[1]) for pair in pairs)


def choose_frames(clip: Clip, config: DatasetConfig, generator: random.Random) -> list[int]:
    """Frames of a sample, the reference first, then the others in order of time.

    Where the clip has flow, the reference is one of the frames that flow starts from, if any of them leaves room for a
    window. The stride is drawn from what then fits.

    Raises:
        MediaError: the clip is too short.
    """
    count, span, (low, high) = len(clip.names), config.views - 1, config.stride
    if count <= span * low:
        raise MediaError(
            f"{clip.folder / 'images'}: holds {count} images, expected at least {span * low + 1} for {config.views} "
            f"views {low} frames apart; leave the clip out, or lower DatasetConfig.views or stride"
        )
    # (reference, how many views come before it)
    places = range(config.views) if config.reference == "random" else range(1)
    fitting = [(frame, place) for place in places for frame in range(place * low, count - (span - place) * low)]
    with_flow = set(clip.with_flow)
    candidates = [pair for pair in fitting if pair[0] in with_flow] or fitting
    reference, place = candidates[generator.randrange(len(candidates))]
    longest = high
    if place:
        longest = min(longest, reference // place)
    if place < span:
        longest = min(longest, (count - 1 - reference) // (span - place))
    stride = low + generator.randrange(longest - low + 1)
    first = reference - place * stride
    return [reference, *(first + i * stride for i in range(config.views) if i != place)]


@dataclass(frozen=True)
class Framing:
    """The part of the images that is kept, and the size that it gets.

    Attributes:
        image_hw: size of the stored images.
        corner: (top, left) of the part, pixels.
        part_hw: its size.
        size: (height, width) that it is scaled to.
    """

    image_hw: tuple[int, int]
    corner: tuple[int, int]
    part_hw: tuple[int, int]
    size: tuple[int, int]

    @classmethod
    def of(cls, image_hw: tuple[int, int], size: tuple[int, int], fit: str) -> Framing:
        """The middle of the image with the aspect ratio of `size`, or for "stretch" all of it."""
        if fit == "stretch":
            return cls(image_hw, (0, 0), image_hw, size)
        scale = max(size[0] / image_hw[0], size[1] / image_hw[1])
        height, width = (min(old, max(1, round(new / scale))) for old, new in zip(image_hw, size, strict=True))
        return cls(image_hw, ((image_hw[0] - height) // 2, (image_hw[1] - width) // 2), (height, width), size)

    def image(self, pixels: Tensor) -> Tensor:
        """[H, W, 3] uint8 -> [3, *size] float32, 0 to 1, antialiased."""
        part = self._cut(pixels).movedim(-1, 0)[None].float() / 255
        return resize_image(part, self.size)[0].clamp(0, 1)

    def intrinsics(self, matrices: Tensor) -> Tensor:
        """[..., 3, 3] pixels of the stored images -> pixels of the new ones."""
        moved = matrices.clone()
        moved[..., 0, 2] -= self.corner[1]
        moved[..., 1, 2] -= self.corner[0]
        return resize_intrinsics(moved, self.part_hw, self.size)

    def rays(self, rays: Tensor) -> Tensor:
        """[H, W, 3] unit -> [*size, 3] unit."""
        return resize_rays(self._cut(rays)[None], self.size)[0]

    def nearest(self, values: Tensor) -> Tensor:
        """A map [h, w, ...] of the image's field of view in any resolution -> [*size, ...]: at each new pixel's centre
        the old pixel that holds it."""
        for axis in (0, 1):
            centre = torch.arange(self.size[axis], dtype=torch.float64) + 0.5
            in_image = centre * (self.part_hw[axis] / self.size[axis]) + self.corner[axis]
            old = values.shape[axis]
            index = (in_image * (old / self.image_hw[axis])).floor().long().clamp(0, old - 1)
            values = values.index_select(axis, index)
        return values

    def _cut(self, values: Tensor) -> Tensor:
        (top, left), (height, width) = self.corner, self.part_hw
        return values[top : top + height, left : left + width]


def read_sample(clip: Clip, frames: Sequence[int], config: DatasetConfig, size: tuple[int, int]) -> Batch:
    """Frames of a clip as a batch of one, view 0 first.

    Raises:
        MediaError: a file that cannot be read or cannot be right, or a part that `config.require` asks for is missing.
    """
    pixels = _read_images(clip, frames)
    framing = Framing.of((pixels[0].shape[0], pixels[0].shape[1]), size, config.fit)
    views, known = len(frames), set[str]()
    rays, depth = _read_rays(clip, frames, framing), torch.zeros(views, *size, 1)
    if rays is not None:
        known.add("rays")
    maps = _read_depth(clip, frames, framing, rays)
    if maps is not None:
        depth = maps
        if all(clip.names[frame] in clip.depth for frame in frames):
            known.add("depth")
    depth_mask = depth[..., 0] > 0
    poses = torch.eye(4).repeat(views, 1, 1)
    if clip.poses is not None:
        known.add("poses")
        poses = _relative(clip, frames)
    surface = _read_surface(clip, frames, framing)
    if surface is not None:
        known.add("surface")
    seen = depth_mask[0] if surface is None else depth_mask[0] | surface[0]
    flow, flow_mask, dynamic, complete = _read_flow(clip, frames, framing, seen, config.dynamic_threshold)
    if complete:
        known.add("flow")
    if config.max_depth is not None:
        depth_mask = depth_mask & (depth[..., 0] <= config.max_depth)
    _check_required(clip, frames, config.require, known)
    batch = Batch(
        images=torch.stack([framing.image(image) for image in pixels])[None],
        ray_directions=(torch.zeros(views, *size, 3) if rays is None else rays.float())[None],
        depth_along_ray=torch.where(depth_mask[..., None], depth, 0.0)[None],
        camera_poses=poses[None],
        scene_flow=flow[None],
        depth_mask=depth_mask[None],
        flow_mask=flow_mask[None],
        dynamic_mask=dynamic[None],
        surface_mask=(torch.zeros_like(depth_mask) if surface is None else surface)[None],
        has_rays=torch.tensor(["rays" in known]),
        has_poses=torch.tensor(["poses" in known]),
        has_surface=torch.tensor(["surface" in known]),
        is_metric=torch.tensor([clip.info.is_metric]),
    )
    for field in dataclasses.fields(batch):
        # The last line of defence: one NaN here is a NaN in every weight.
        if not bool(getattr(batch, field.name).isfinite().all()):
            raise MediaError(f"{clip.folder}: {field.name} of frames {_names(clip, frames)} is not finite")
    return batch


def _names(clip: Clip, frames: Sequence[int]) -> str:
    return ", ".join(clip.names[frame] for frame in frames)


def _read_images(clip: Clip, frames: Sequence[int]) -> list[Tensor]:
    pixels = [torch.from_numpy(load_image(clip.images[frame])) for frame in frames]
    for frame, image in zip(frames, pixels, strict=True):
        if image.shape != pixels[0].shape:
            (height, width), first = image.shape[:2], pixels[0].shape
            raise MediaError(
                f"{clip.images[frame]}: is {width}x{height} but {clip.images[frames[0]].name} is "
                f"{first[1]}x{first[0]}; expected one size for all images of a clip"
            )
    return pixels


def _read_rays(clip: Clip, frames: Sequence[int], framing: Framing) -> Tensor | None:
    """[V, *size, 3] float64 unit."""
    if clip.intrinsics is not None:
        return rays_from_intrinsics(framing.intrinsics(clip.intrinsics[list(frames)]), *framing.size)
    if clip.rays is None:
        return None
    count = len(clip.names)
    return torch.stack([framing.rays(read_rays(clip.rays, frame, count, framing.image_hw)) for frame in frames])


def _read_depth(clip: Clip, frames: Sequence[int], framing: Framing, rays: Tensor | None) -> Tensor | None:
    """Distance along the rays [V, *size, 1] float32, 0 where unknown; None where no view has any."""
    files = [clip.depth.get(clip.names[frame]) for frame in frames]
    if not any(files) or (rays is None and clip.info.depth == "z"):
        return None
    depth, any_known = torch.zeros(len(frames), *framing.size, 1), False
    for view, file in enumerate(files):
        if file is None:
            continue
        values = _read_same_view(file, read_depth(file, clip.info.depth_unit), framing)
        any_known = any_known or bool(values.any())
        sampled = framing.nearest(values)[..., None]
        if clip.info.depth == "z" and rays is not None:
            sampled = depth_z_to_along_ray(sampled.double(), rays[view]).float()
            sampled = torch.where(sampled <= LARGEST, sampled, 0.0)
        depth[view] = sampled
    if not any_known:
        raise MediaError(
            f"{clip.folder / 'depth'}: no known pixel in the depth of frames {_names(clip, frames)}; expected positive "
            "finite depth somewhere, or no file"
        )
    return depth


def _relative(clip: Clip, frames: Sequence[int]) -> Tensor:
    """Poses in view 0's camera, [V, 4, 4] float32."""
    assert clip.poses is not None
    # Relative in float64: worlds such as UTM put cameras millions of metres from the origin.
    poses = to_first_view(clip.poses[list(frames)])
    farthest = poses[:, :3, 3].abs().max().item()
    if not farthest <= LARGEST:
        raise MediaError(
            f"{clip.folder}: poses of frames {_names(clip, frames)}: expected cameras at most {LARGEST:g} apart, got "
            f"{farthest:g}"
        )
    return poses.float()


def _read_surface(clip: Clip, frames: Sequence[int], framing: Framing) -> Tensor | None:
    """[V, *size] bool; None unless every view has a mask."""
    files = [clip.masks[clip.names[frame]] for frame in frames if clip.names[frame] in clip.masks]
    if len(files) < len(frames):
        return None
    masks = [_read_same_view(file, read_mask(file), framing) for file in files]
    if not any(bool(mask.any()) for mask in masks):
        raise MediaError(
            f"{clip.folder / 'masks'}: the masks of frames {_names(clip, frames)} are all empty; expected pixels other "
            "than 0 where something is seen, or no file"
        )
    return torch.stack([framing.nearest(mask) for mask in masks])


def _read_flow(
    clip: Clip, frames: Sequence[int], framing: Framing, seen: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Flow [V, *size, 3], where it is known and what moves, both [V, *size], and whether it is for every view.

    Args:
        seen: [*size] view 0's pixels with something on them, where a static scene's flow is known.
    """
    views, size = len(frames), framing.size
    flow, mask = torch.zeros(views, *size, 3), torch.zeros(views, *size, dtype=torch.bool)
    dynamic = torch.zeros_like(mask)
    if clip.info.static:
        return flow, seen.expand_as(mask).clone(), dynamic, bool(seen.any())
    targets = clip.flow.get(clip.names[frames[0]], {})
    files = [targets.get(clip.names[frame]) for frame in frames]
    any_known = False
    for view, file in enumerate(files):
        if file is None:
            continue
        values, valid, moving = read_flow(file)
        _read_same_view(file, values, framing)
        any_known = any_known or bool(valid.any())
        if moving is None:
            moving = valid & (values.norm(dim=-1) > threshold)
        flow[view], mask[view], dynamic[view] = (framing.nearest(item) for item in (values, valid, moving))
    if any(files) and not any_known:
        raise MediaError(
            f"{clip.folder / 'flow' / clip.names[frames[0]]}: no known pixel in the flow to frames "
            f"{_names(clip, frames[1:])}; expected some, or no file"
        )
    if files[0] is None:
        # From view 0 to itself nothing moves, as far as it is known what its pixels show.
        mask[0], dynamic[0] = mask.any(0), dynamic.any(0)
    return flow, mask, dynamic, any_known and all(files[1:])


def _read_same_view(file: Path, values: Tensor, framing: Framing) -> Tensor:
    check_same_view(file, values, framing.image_hw)
    return values


def _check_required(clip: Clip, frames: Sequence[int], require: Sequence[str], known: set[str]) -> None:
    missing = [part for part in require if part not in known]
    if missing:
        raise MediaError(
            f"{clip.folder}: frames {_names(clip, frames)} have no {', no '.join(missing)}, expected for every view as "
            "DatasetConfig.require says; add the files, or leave the clip out"
        )
