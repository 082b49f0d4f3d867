"""Numbers and small geometry for drawing many scenes at once, in numpy's float64 on the host."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

_DRAWS = 896  # uniform numbers set aside for a clip; a multiple of 4, Philox's block


class Draws:
    """Uniform numbers of clips first, first + 1, ...: a clip's depend on the key and its number alone.

    Args:
        key: 128 bits that name the stream.
        first: number of the first clip.
        count: B.
    """

    def __init__(self, key: int, first: int, count: int) -> None:
        # The counter counts blocks of four numbers: clips next to each other have numbers next to each other.
        bits = np.random.Philox(key=key, counter=first * (_DRAWS // 4)).random_raw(count * _DRAWS)
        self._table = ((bits >> np.uint64(11)) * 2.0**-53).reshape(count, _DRAWS)
        self._used = 0

    def unit(self, *shape: int) -> Array:
        """[B, *shape] in [0, 1)."""
        start = self._used
        self._used += math.prod(shape)
        if self._used > _DRAWS:
            raise AssertionError(f"a clip takes more than {_DRAWS} numbers")
        return self._table[:, start : self._used].reshape(-1, *shape)

    def uniform(self, low: Any, high: Any, *shape: int) -> Array:
        """[B, *shape] between two numbers or arrays."""
        return low + (high - low) * self.unit(*shape)

    def logarithmic(self, low: Any, high: Any, *shape: int) -> Array:
        """[B, *shape] between two positive numbers or arrays, every octave alike."""
        return low * (high / low) ** self.unit(*shape)

    def integer(self, low: int, high: int, *shape: int) -> Array:
        """[B, *shape] of low, ..., high."""
        return low + (self.unit(*shape) * (high - low + 1)).astype(np.int64)

    def sign(self, *shape: int) -> Array:
        """[B, *shape] of -1 and 1."""
        return np.where(self.unit(*shape) < 0.5, -1.0, 1.0)

    def chance(self, probability: float, *shape: int) -> Array:
        """[B, *shape] bool."""
        return self.unit(*shape) < probability

    def choose(self, values: tuple[int, ...], *shape: int) -> Array:
        """[B, *shape] of some values, one as likely as the other."""
        return np.array(values)[self.integer(0, len(values) - 1, *shape)]


def level(angle: Array) -> Array:
    """Unit vectors [..., 3] at an angle in the floor's plane."""
    return np.stack([np.cos(angle), np.sin(angle), np.zeros_like(angle)], -1)


def norm(vectors: Array) -> Array:
    """Lengths of [..., 3]."""
    return np.sqrt((vectors * vectors).sum(-1))


def unit(vectors: Array) -> Array:
    """Vectors [..., 3] of length 1; zero stays zero."""
    return vectors / np.maximum(norm(vectors), 1e-9)[..., None]


def cross(a: Array, b: Array) -> Array:
    """Cross products of [..., 3]."""
    x, y, z = a[..., 0], a[..., 1], a[..., 2]
    u, v, w = b[..., 0], b[..., 1], b[..., 2]
    return np.stack([y * w - z * v, z * u - x * w, x * v - y * u], -1)


def columns(*axes: Array) -> Array:
    """Matrices [..., 3, 3] from their columns [..., 3]."""
    return np.stack(np.broadcast_arrays(*axes), -1)


def swing(times: Array, speed: Array, amplitude: Array, phase: Array) -> Array:
    """Of 0 at time 0 and of a peak speed: amplitude * (sin(w t + phase) - sin(phase))."""
    return amplitude * (np.sin(times * (speed / amplitude) + phase) - np.sin(phase))


def fit(start: Array, path: Array, low: Array, high: Array) -> Array:
    """Largest factor up to 1 that keeps start + factor * path within bounds on every axis and in every view.

    `start`, `low` and `high` are [..., 3], `path` is [..., V, 3]; the result is [...]. What is
    outside already and does not come closer stays where it is: 0.
    """
    allowed = np.where(path > 0, (high - start)[..., None, :], (start - low)[..., None, :])
    length = np.abs(path)
    factor = np.where(length > 1e-9, np.maximum(allowed, 0) / np.maximum(length, 1e-9), 1.0)
    return np.minimum(factor.min((-2, -1)), 1.0)


def linear_rgb(hue: Array, saturation: Array, value: Array) -> Array:
    """Linear RGB [..., 3] of hue (in turns), saturation and value."""
    k = (np.array([5.0, 3.0, 1.0]) + 6 * hue[..., None]) % 6
    rgb = value[..., None] * (1 - saturation[..., None] * np.clip(np.minimum(k, 4 - k), 0, 1))
    return rgb**2.2
