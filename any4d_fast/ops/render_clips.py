"""Ray casting of synthetic clips for training: pictures and exact ground truth in one launch. Not differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..reference.render_clips import (
    CLIP_WIDTH,
    PRIMITIVE_WIDTH,
    TEXTURE_WIDTH,
    VIEW_WIDTH,
    ClipTables,
    RenderedClips,
)
from ..reference.render_clips import render_clips as reference_render_clips
from ._library import define


def _impl(
    clips: Tensor, views: Tensor, primitives: Tensor, textures: Tensor, flows: Tensor,
    height: int, width: int, samples: int, shadows: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    from ..kernels.render_clips import render_clips as launch

    out = empty_outputs(clips, views.shape[0], views.shape[1], height, width)
    launch(clips, views, primitives, textures, flows, out, samples, shadows)
    return tuple(out)


def _fake(
    clips: Tensor, views: Tensor, primitives: Tensor, textures: Tensor, flows: Tensor,
    height: int, width: int, samples: int, shadows: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(empty_outputs(clips, views.shape[0], views.shape[1], height, width))


def empty_outputs(like: Tensor, batch: int, views: int, height: int, width: int) -> RenderedClips:
    """Uninitialised outputs on the device of `like`."""

    def maps(*channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((batch, views, height, width, *channels), dtype=dtype, device=like.device)

    images = torch.empty((batch, views, 3, height, width), dtype=torch.float32, device=like.device)
    masks = [maps(dtype=torch.bool) for _ in range(3)]
    return RenderedClips(images, maps(3), maps(1), maps(3), maps(dtype=torch.int8), *masks)


_render = define(
    "render_clips",
    "(Tensor clips, Tensor views, Tensor primitives, Tensor textures, Tensor flows, SymInt height, SymInt width, "
    "int samples, bool shadows) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _impl,
    _fake,
)


def _triton_reasons(tables: ClipTables) -> list[str]:
    reasons = backends.triton_reasons(*tables)
    if tables.clips.dtype != torch.float32:
        reasons.append(f"tables are {tables.clips.dtype}; the kernel reads float32")
    return reasons


backends.register("render_clips", triton=_triton_reasons)


def render_clips(
    tables: ClipTables,
    height: int,
    width: int,
    *,
    samples: int = 2,
    shadows: bool = True,
    backend: str | None = None,
) -> RenderedClips:
    """Pictures of B scenes from V views each, with depth, rays, scene flow and masks.

    Args:
        tables: the scenes, float32 or (in eager mode) float64 on one device.
        height, width: size of the pictures in pixels, at least 1.
        samples: n for n x n colour samples a pixel; geometry is that of the pixel's centre.
        shadows: cast shadows.
        backend: "triton", "eager" or None for the fastest that can run.

    Returns:
        The pictures and maps, in the tables' dtype.

    Raises:
        ValueError: a table's shape or dtype, or a size, is not as above.
        BackendError: `backend` cannot run this call.
    """
    _check(tables)
    for name, value in (("height", height), ("width", width), ("samples", samples)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}; a picture needs pixels and samples")
    if backends.select("render_clips", backend, tables) == backends.EAGER:
        return reference_render_clips(tables, height, width, samples=samples, shadows=shadows)
    return RenderedClips(*_render(*(t.contiguous() for t in tables), height, width, samples, shadows))


def _check(tables: ClipTables) -> None:
    primitives = tables.primitives
    if primitives.ndim != 4 or primitives.shape[3] != PRIMITIVE_WIDTH:
        raise ValueError(
            f"tables.primitives: expected [B, V, N, {PRIMITIVE_WIDTH}], got {list(primitives.shape)}; see ClipTables"
        )
    batch, views, slots = primitives.shape[:3]
    if views < 1 or not 1 <= slots <= 127:
        raise ValueError(f"tables.primitives: expected V >= 1 and 1 <= N <= 127, got {list(primitives.shape)}")
    expected = ((batch, CLIP_WIDTH), (batch, views, VIEW_WIDTH), primitives.shape, (batch, slots, TEXTURE_WIDTH))
    for name, table, shape in zip(tables._fields, tables, (*expected, (batch, views, slots, 12)), strict=True):
        if tuple(table.shape) != tuple(shape) or table.dtype != primitives.dtype or not table.is_floating_point():
            raise ValueError(
                f"tables.{name}: expected {list(shape)} {primitives.dtype} like tables.primitives, "
                f"got {list(table.shape)} {table.dtype}; make all tables for the same clips, views and slots"
            )
