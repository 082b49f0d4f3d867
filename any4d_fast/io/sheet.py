"""A contact sheet: images, depth, confidence and motion of a clip on one page."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..reconstruction import Reconstruction, UInt8Array
from .atomic import atomic_path
from .colors import apply_colormap, direction_colors

if TYPE_CHECKING:
    from PIL import Image

_MARGIN = 12
_GAP = 4
_HEADER = 26
_CAPTION = 24
_BACKGROUND = (228, 228, 228)
_TEXT = (30, 30, 30)
_MASKED = (70, 70, 70)


def contact_sheet(reconstruction: Reconstruction, *, max_views: int = 8, thumb_width: int = 224) -> UInt8Array:
    """Draw the sheet, [height, width, 3] uint8 RGB.

    A column for each of up to `max_views` views, evenly spread from the first to the last; a row each for images,
    z-depth (near is warm), confidence and scene flow, as far as the reconstruction has them. A row has one colour
    scale, written above it. Masked pixels are dark grey. Flow is drawn on the pixels of the reference view: hue is
    the direction in its image plane, saturation the length.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `max_views` or `thumb_width` too small.
    """
    from PIL import Image, ImageDraw, ImageFont

    if max_views < 1 or thumb_width < 16:
        raise ValueError(f"max_views: expected 1 or more, thumb_width: 16 or more, got {max_views} and {thumb_width}")
    count = min(max_views, reconstruction.num_views)
    views = np.unique(np.linspace(0, reconstruction.num_views - 1, count).round().astype(int)).tolist()
    thumb_height = max(1, round(thumb_width * reconstruction.height / reconstruction.width))
    rows = _rows(reconstruction, views)
    # A clip of one or two views still leaves room for the captions.
    width = max(2 * _MARGIN + len(views) * (thumb_width + _GAP) - _GAP, 520)
    height = 2 * _MARGIN + _HEADER + len(rows) * (_CAPTION + thumb_height + _GAP)
    page = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(size=14)
    for column, view in enumerate(views):
        label = reconstruction.names[view]
        if reconstruction.timestamps is not None:
            label += f"  {reconstruction.timestamps[view]:.2f} s"
        if view == reconstruction.reference:
            label += " (ref)"
        left = _MARGIN + column * (thumb_width + _GAP)
        draw.text((left, _MARGIN), _fit(draw, label, font, thumb_width), fill=_TEXT, font=font)
    top = _MARGIN + _HEADER
    for caption, pictures, resample in rows:
        draw.text((_MARGIN, top + 3), caption, fill=_TEXT, font=font)
        top += _CAPTION
        for column, picture in enumerate(pictures):
            thumb = Image.fromarray(picture).resize((thumb_width, thumb_height), resample)
            page.paste(thumb, (_MARGIN + column * (thumb_width + _GAP), top))
        top += thumb_height + _GAP
    return np.array(page)


def save_sheet(
    reconstruction: Reconstruction, path: str | os.PathLike[str], *, max_views: int = 8, thumb_width: int = 224
) -> None:
    """Write `contact_sheet` as a PNG; an existing file is replaced only by a complete one.

    Raises:
        ImportError: matplotlib is not installed.
        MediaError: the file cannot be written.
    """
    from PIL import Image

    sheet = Image.fromarray(contact_sheet(reconstruction, max_views=max_views, thumb_width=thumb_width))
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


_Row = tuple[str, list[UInt8Array], "Image.Resampling"]


def _rows(reconstruction: Reconstruction, views: list[int]) -> list[_Row]:
    from PIL.Image import Resampling

    rows: list[_Row] = [("image", [reconstruction.images[view] for view in views], Resampling.LANCZOS)]
    masks = [reconstruction.valid(view) for view in views]
    if reconstruction.depth_z is not None:
        maps = [reconstruction.depth_z[view] for view in views]
        low, high = _range(maps, masks)
        # Inverse depth spreads the colours where most of a scene is, near the camera.
        floor = max(low, 1e-6)
        pictures = [
            _grey_out(apply_colormap(1 / item.clip(min=floor), 1 / max(high, floor), 1 / floor, "turbo"), mask)
            for item, mask in zip(maps, masks, strict=True)
        ]
        rows.append((f"depth: {low:.3g} m (red) to {high:.3g} m (blue)", pictures, Resampling.BILINEAR))
    if reconstruction.conf is not None:
        maps = [reconstruction.conf[view] for view in views]
        low, high = _range(maps, [np.isfinite(item) for item in maps])
        pictures = [apply_colormap(item, low, high, "viridis") for item in maps]
        rows.append((f"confidence: {low:.3g} (dark) to {high:.3g} (yellow)", pictures, Resampling.BILINEAR))
    if reconstruction.scene_flow is not None:
        rows.append(_flow_row(reconstruction, views))
    return rows


def _flow_row(reconstruction: Reconstruction, views: list[int]) -> _Row:
    from PIL.Image import Resampling

    assert reconstruction.scene_flow is not None
    reference = reconstruction.reference
    usable = reconstruction.valid(reference)
    flows = [reconstruction.scene_flow[view] for view in views]
    # Often only a small part of the picture moves, and that part is what the row is for.
    high = _range([np.linalg.norm(flow, axis=-1) for flow in flows], [usable] * len(flows), trim=0.5)[1]
    pictures = [_grey_out(direction_colors(flow, high), usable) for flow in flows]
    caption = (
        f"scene flow of {reconstruction.names[reference]}: 0 (white) to {high:.3g} m; "
        "red right, lime down, cyan left, violet up"
    )
    return caption, pictures, Resampling.BILINEAR


def _range(maps: list[Any], masks: list[npt.NDArray[np.bool_]], trim: float = 2) -> tuple[float, float]:
    """Limits that leave out `trim` percent on either side, so that stray values do not flatten the colours."""
    usable = [item[mask & np.isfinite(item)] for item, mask in zip(maps, masks, strict=True)]
    values = np.concatenate(usable)
    if values.size == 0:
        return 0.0, 0.0
    low, high = np.percentile(values, [trim, 100 - trim])
    return float(low), float(high)


def _grey_out(picture: UInt8Array, mask: npt.NDArray[np.bool_]) -> UInt8Array:
    return np.where(mask[..., None], picture, np.array(_MASKED, np.uint8))


def _fit(draw: Any, text: str, font: Any, width: int) -> str:
    """Cut the front of a text that is too long; the end of a file name tells frames apart."""
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength("..." + text, font=font) > width:
        text = text[1:]
    return "..." + text
