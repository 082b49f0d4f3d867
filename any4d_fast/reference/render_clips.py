"""Ray casting of a batch of synthetic clips in plain PyTorch: what `kernels/render_clips.py` computes.

Works in float32 and float64 and on every device. Scenes come as tables, `ClipTables`; frames, shapes and textures are
those of `train.shapes` and `train.textures`, which this module applies to many clips at once.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..train.shapes import SHAPES, apply_affine, intersect, normals, rotate
from ..train.textures import texture_colours, value_noise

OCCLUSION_TOLERANCE = 1e-3
"""A surface less than this far, in metres, in front of a point casts no shadow on it: rounding stays below."""

NO_SHAPE = -1
"""Kind of a slot that holds nothing."""

ROOM_SLOTS = 6
"""The first slots are the room's, ceiling and walls and at last the floor: a convex room casts no shadow."""

CLIP_COLUMNS = {
    "focal": 2, "centre": 2, "blur": 1, "ambient": 1, "power": 1, "softness": 1, "gain": 3, "gamma": 1, "noise": 1,
    "seed": 1, "first": 1, "end": 1, "horizon": 3, "zenith": 3,
}  # fmt: skip
"""Columns of `ClipTables.clips` and how many numbers each takes, in order."""

PRIMITIVE_COLUMNS = {
    "from_view": 12, "light": 3, "up": 3, "size": 3, "kind": 1, "moving": 1, "ball": 3, "eye_tangent": 1,
    "lamp_tangent": 1,
}  # fmt: skip
"""Columns of `ClipTables.primitives`, in order."""


def slices(columns: dict[str, int]) -> dict[str, slice]:
    """Where each of some columns lies."""
    ends = list(itertools.accumulate(columns.values()))
    return {name: slice(end - width, end) for (name, width), end in zip(columns.items(), ends, strict=True)}


CLIP_WIDTH, PRIMITIVE_WIDTH = sum(CLIP_COLUMNS.values()), sum(PRIMITIVE_COLUMNS.values())
VIEW_WIDTH, TEXTURE_WIDTH = 6, 17

_MAX_RAYS_CPU, _MAX_RAYS = 1 << 16, 1 << 21  # rays cast at once: memory does not grow with the batch
_TRIANGLE = math.sqrt(6)  # the sum of two uniform numbers in [-1/2, 1/2] has a standard deviation of 1 / sqrt(6)


class ClipTables(NamedTuple):
    """B scenes of V views with N slots for shapes, all of one floating-point dtype.

    Attributes:
        clips: [B, CLIP_WIDTH]. Focal lengths and principal point in pixels; side of the square, in pixels, that a
            pixel's samples are spread over; light from everywhere, the lamp's power and its softness in m^2 (irradiance
            is power / (distance^2 + softness)); gain of red, green and blue, the gamma, the standard deviation of the
            noise and its seed, an integer below 2^20; the first slot in use and the one after the last; the sky's
            linear RGB at the horizon and above.
        views: [B, V, VIEW_WIDTH], the world's up and the lamp in the camera's frame.
        primitives: [B, V, N, PRIMITIVE_WIDTH]. Rows of the 3 x 4 map from the view's frame to the shape's; the lamp and
            the world's up in the shape's frame; half sizes (see `shapes.SHAPES`); the shape's number or `NO_SHAPE`;
            whether it moves, 0 or 1. Then what lets a renderer leave objects out: the centre of a ball around the
            object, in the view's frame, and the squared lengths of the tangents to it from the camera and from the
            lamp, -inf from inside it. Lengths in metres. A room's planes may have infinite half sizes: from inside a
            convex room, the nearest of its unbounded planes is what is seen.
        textures: [B, N, TEXTURE_WIDTH], see `textures.Texture.row`.
        flows: [B, V, N, 12], rows of the 3 x 4 map from a point in view 0's frame, at time 0, to its motion until the
            view's time, in view 0's frame.
    """

    clips: Tensor
    views: Tensor
    primitives: Tensor
    textures: Tensor
    flows: Tensor


class RenderedClips(NamedTuple):
    """Pictures of B clips and what is known about them.

    Attributes:
        images: [B, V, 3, H, W], 0 to 1.
        rays: [B, V, H, W, 3] unit vectors in the view's frame.
        depth: [B, V, H, W, 1] metres along the ray; 0 where nothing is hit.
        flow: [B, V, H, W, 3] metres in view 0's frame, on view 0's pixels; exactly 0 on what does not move.
        ids: [B, V, H, W] int8, the slot that is seen; -1 where nothing is hit.
        hit: [B, V, H, W] bool, something is seen.
        flow_mask: [B, V, H, W] bool, something is seen in view 0's pixel.
        dynamic_mask: [B, V, H, W] bool, and it moves.
    """

    images: Tensor
    rays: Tensor
    depth: Tensor
    flow: Tensor
    ids: Tensor
    hit: Tensor
    flow_mask: Tensor
    dynamic_mask: Tensor


class _Rows:
    """The tables with clips and views folded into R = B * V rows, in the layouts that `shapes` works on."""

    def __init__(self, tables: ClipTables) -> None:
        batch, views, slots = tables.primitives.shape[:3]
        self.slots, self.views = slots, views
        per_clip = tables.clips.repeat_interleave(views, 0).T[..., None]  # [CLIP_WIDTH, R, 1]
        self.clip = dict(zip(CLIP_COLUMNS, per_clip.split(list(CLIP_COLUMNS.values())), strict=True))
        self.up = tables.views[..., :3].flatten(0, 1).T[..., None]  # [3, R, 1]
        rows = tables.primitives.flatten(0, 1)  # [R, N, PRIMITIVE_WIDTH]
        self.primitives = rows.flatten(0, 1).T.contiguous()  # [PRIMITIVE_WIDTH, R * N]
        parts = dict(zip(PRIMITIVE_COLUMNS, rows.split(list(PRIMITIVE_COLUMNS.values()), -1), strict=True))
        self.from_view = parts["from_view"].unflatten(-1, (3, 4)).movedim((1, 2, 3), (0, 1, 2))[..., None]
        self.light = parts["light"].movedim((1, 2), (0, 1))[..., None]  # [N, 3, R, 1]
        self.size = parts["size"].movedim((1, 2), (0, 1))[..., None]
        slot = torch.arange(slots, device=rows.device)
        used = (slot >= self.clip["first"][0]) & (slot < self.clip["end"][0])
        self.kind = torch.where(used, parts["kind"][..., 0], NO_SHAPE).long()  # [R, N]
        self.textures = tables.textures.flatten(0, 1).T.contiguous()  # [TEXTURE_WIDTH, B * N]
        self.clip_number = torch.arange(batch, device=rows.device).repeat_interleave(views)[:, None]

    def cast(self, direction: Tensor, first: int, light: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """First hits from the slot `first` on: of rays from the cameras, or with `light` of rays from the lamp.

        Args:
            direction: [3, R, P] in the view's frame; for rays from the lamp, points that they pass at t = 1.
            first: slot.
            light: anything but None for rays from the lamp.

        Returns:
            t [R, P] (inf: no hit) and slot [R, P] int64 (-1: no hit).
        """
        best = torch.full_like(direction[0], torch.inf)
        ids = torch.full(best.shape, -1, dtype=torch.int64, device=best.device)
        for slot, (kind, shape) in itertools.product(range(first, self.slots), enumerate(SHAPES)):
            rows = (self.kind[:, slot] == kind).nonzero()[:, 0]
            if len(rows) == 0:
                continue
            maps, size = self.from_view[slot][:, :, rows], self.size[slot][:, rows]
            if light is None:
                origin, local = maps[:, 3], rotate(maps, direction[:, rows])
            else:
                origin = self.light[slot][:, rows]
                local = apply_affine(maps, direction[:, rows]) - origin
            sizes: Any = size  # one a row, where a single scene has one number
            t = intersect(shape, sizes, origin, local)
            closer = t < best[rows]
            best[rows] = torch.where(closer, t, best[rows])
            ids[rows] = torch.where(closer, slot, ids[rows])
        return best, ids

    def shade(self, rays: Tensor, t: Tensor, ids: Tensor, shadows: bool) -> Tensor:
        """Linear RGB of rays [3, R, P] with hits at t [R, P] on slots ids [R, P] -> [3, R, P]."""
        clip = self.clip
        hit, slot = ids >= 0, ids.clamp(min=0)
        row = torch.arange(len(slot), device=slot.device)[:, None]
        found = self.primitives.index_select(1, (row * self.slots + slot).flatten()).unflatten(1, slot.shape)
        from_view, light, up, size, kind, *_ = found.split(list(PRIMITIVE_COLUMNS.values()))
        from_view = from_view.unflatten(0, (3, 4))
        in_view = rays * torch.where(hit, t, 1.0)
        point = apply_affine(from_view, in_view)
        eye = point - from_view[:, 3]
        normal = normals(kind[0].long(), size, point)
        facing = (normal * eye).sum(0)
        normal = torch.where(facing > 0, -normal, normal)
        distance = in_view.square().sum(0).sqrt()
        footprint = distance / clip["focal"][0] / (facing.abs() / distance).clamp(min=0.15)
        albedo = texture_colours(self.textures, self.clip_number * self.slots + slot, point, footprint)

        to_light = light - point
        squared = to_light.square().sum(0)
        lambert = ((normal * to_light).sum(0) / squared.sqrt()).clamp(min=0)
        if shadows:
            blocked, _ = self.cast(in_view, ROOM_SLOTS, light)
            lambert = lambert * (blocked >= 1 - OCCLUSION_TOLERANCE / squared.sqrt())
        upward = (normal * up).sum(0)
        total = clip["ambient"][0] * (0.8 + 0.2 * upward) + lambert * clip["power"][0] / (squared + clip["softness"][0])
        height = (self.up * rays).sum(0) / rays.square().sum(0).sqrt()
        sky = torch.lerp(clip["horizon"], clip["zenith"], height.clamp(0, 1))
        return torch.where(hit, albedo * total, sky)

    def rays(self, u: Tensor, v: Tensor) -> Tensor:
        """Rays [3, R, P] on the image plane z = 1 through image points [P] or [R, P]."""
        focal, centre = self.clip["focal"], self.clip["centre"]
        x, y = (u - centre[0]) / focal[0], (v - centre[1]) / focal[1]
        x, y = torch.broadcast_tensors(x, y)
        return torch.stack([x, y, torch.ones_like(x)])

    def colours(self, u: Tensor, v: Tensor, samples: int, shadows: bool) -> Tensor:
        """What the sensor records at pixels u, v [P]: [3, R, P], 0 to 1."""
        clip = self.clip
        total = torch.zeros(())
        for i, j in itertools.product(range(samples), repeat=2):
            du, dv = ((k + 0.5) / samples - 0.5 for k in (j, i))
            rays = self.rays(u + du * clip["blur"][0], v + dv * clip["blur"][0])
            t, ids = self.cast(rays, 0)
            total = (self.shade(rays, t, ids, shadows) * clip["gain"]).clamp(0, 1) + total
        colour = (total / samples**2).pow(1 / clip["gamma"])
        if bool((clip["noise"] > 0).any()):
            view = torch.arange(colour.shape[1], device=u.device, dtype=u.dtype)[:, None] % self.views
            grain = torch.stack([self._grain(u, v, view * 3 + channel) for channel in range(3)])
            colour = colour + clip["noise"] * grain
        return colour.clamp(0, 1)

    def _grain(self, u: Tensor, v: Tensor, layer: Tensor) -> Tensor:
        """Noise of unit variance, one number a pixel: two values of the lattice that textures are made of."""
        where = [x.expand(len(layer), -1) for x in (u, v)]
        layers = (self.clip["seed"][0] + 4096 * layer).expand_as(where[0])
        first = value_noise(torch.stack([*where, layers]))
        return _TRIANGLE * (first + value_noise(torch.stack([*where, layers + 2048])) - 1)


def render_clips(
    tables: ClipTables, height: int, width: int, *, samples: int = 2, shadows: bool = True
) -> RenderedClips:
    """Render; see `ops.render_clips`."""
    rows = _Rows(tables)
    batch, views = tables.primitives.shape[:2]
    like = tables.clips
    count = batch * views

    def maps(*channels: int, dtype: torch.dtype | None = None) -> Tensor:
        return like.new_zeros((count, height * width, *channels), dtype=dtype)

    out = RenderedClips(
        images=like.new_zeros(count, 3, height * width),
        rays=maps(3), depth=maps(1), flow=maps(3), ids=maps(dtype=torch.int8),
        hit=maps(dtype=torch.bool), flow_mask=maps(dtype=torch.bool), dynamic_mask=maps(dtype=torch.bool),
    )  # fmt: skip
    most = _MAX_RAYS_CPU if like.device.type == "cpu" else _MAX_RAYS
    step = max(1, most // max(count, 1))
    for start in range(0, height * width if count else 0, step):
        pixel = torch.arange(start, min(start + step, height * width), device=like.device)
        _render_pixels(out, rows, tables, pixel, width, samples, shadows)
    shape = {"images": (3, height, width), "rays": (height, width, 3), "depth": (height, width, 1)}
    shape["flow"] = shape["rays"]
    return RenderedClips(
        *(t.view(batch, views, *shape.get(n, (height, width))) for n, t in zip(out._fields, out, strict=True))
    )


def _render_pixels(
    out: RenderedClips, rows: _Rows, tables: ClipTables, pixel: Tensor, width: int, samples: int, shadows: bool
) -> None:
    """Fill the pixels `pixel` [P] of every view."""
    where, dtype = slice(int(pixel[0]), int(pixel[-1]) + 1), tables.clips.dtype
    u, v = (pixel % width).to(dtype), (pixel // width).to(dtype)
    out.images[:, :, where] = rows.colours(u, v, samples, shadows).movedim(0, 1)
    rays = rows.rays(u, v)
    length = rays.square().sum(0).sqrt()
    t, ids = rows.cast(rays, 0)
    hit = ids >= 0
    t = torch.where(hit, t, 0.0)
    out.rays[:, where] = (rays / length).movedim(0, -1)
    out.depth[:, where, 0] = t * length
    out.ids[:, where], out.hit[:, where] = ids.to(torch.int8), hit

    batch, views, slots = tables.primitives.shape[:3]
    seen, slot = hit[::views], ids[::views].clamp(min=0)  # [B, P] of view 0
    clip = torch.arange(batch, device=pixel.device)[:, None]
    moving = tables.primitives[:, 0, :, slices(PRIMITIVE_COLUMNS)["moving"]][clip, slot][..., 0] > 0
    points = (rays * t)[:, ::views]
    for view in range(views):
        motion = tables.flows[:, view][clip, slot].movedim(-1, 0).unflatten(0, (3, 4))  # [3, 4, B, P]
        flow = torch.where(seen, apply_affine(motion, points), 0.0)
        out.flow[view::views, where] = flow.movedim(0, -1)
        out.flow_mask[view::views, where] = seen
        out.dynamic_mask[view::views, where] = seen & moving
