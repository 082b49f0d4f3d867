"""Colours for time, direction and scalar maps."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import require_viz

UInt8Array = npt.NDArray[np.uint8]


def time_colors(count: int) -> UInt8Array:
    """[count, 3] uint8 sRGB, from blue (first) through green to red (last)."""
    hues = np.linspace(0.66, 0.0, count) if count > 1 else np.array([0.66])
    return np.array([[round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.85, 0.95)] for hue in hues], np.uint8)


def srgb_to_linear(colors: UInt8Array) -> UInt8Array:
    """8-bit sRGB to 8-bit linear light, the space of glTF's vertex colours."""
    encoded = np.arange(256) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    return np.rint(linear * 255).astype(np.uint8)[colors]


def apply_colormap(values: npt.NDArray[Any], low: float, high: float, name: str) -> UInt8Array:
    """A [...] map of numbers as [..., 3] uint8 sRGB with one of matplotlib's colour maps; NaN counts as `low`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    colormap = require_viz("matplotlib").colormaps[name]
    span = high - low
    scaled = (values.astype(np.float64) - low) / span if span > 0 else np.zeros(values.shape)
    table = np.rint(colormap(np.linspace(0, 1, 256))[:, :3] * 255).astype(np.uint8)
    return np.asarray(table[np.rint(np.nan_to_num(scaled).clip(0, 1) * 255).astype(np.uint8)])


def direction_colors(vectors: npt.NDArray[Any], high: float) -> UInt8Array:
    """Planar vectors [..., 2 or 3] as [..., 3] uint8 sRGB: direction in (x, y) is the hue, length the saturation.

    White does not move; red moves right (+x), and hue turns towards yellow-green for down (+y). Components past y
    count for the length only. Lengths of `high` and more are fully saturated.
    """
    finite = np.nan_to_num(vectors.astype(np.float64), posinf=0, neginf=0)
    length = np.linalg.norm(finite, axis=-1)
    hue = np.arctan2(finite[..., 1], finite[..., 0]) / (2 * np.pi) % 1
    saturation = (length / high).clip(0, 1) if high > 0 else np.zeros_like(length)
    offsets = np.array([5.0, 3.0, 1.0])
    ramp = (hue[..., None] * 6 + offsets) % 6
    rgb = 1 - saturation[..., None] * np.minimum(ramp, 4 - ramp).clip(0, 1)
    return np.rint(rgb * 255).astype(np.uint8)
