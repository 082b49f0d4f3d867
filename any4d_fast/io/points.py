"""Choosing which points of a reconstruction go into a file."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt

from ..reconstruction import FloatArray, Reconstruction, UInt8Array


def sample_valid_pixels(
    valid: npt.NDArray[np.bool_], count: int | None, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Flat indices of the true pixels of [H, W], in order; `count` of them drawn at random when there are more."""
    indices = np.flatnonzero(valid)
    if count is None or len(indices) <= count:
        return indices
    return np.sort(rng.choice(indices, count, replace=False))


def gather_points(
    reconstruction: Reconstruction,
    *,
    max_points: int | None = None,
    min_confidence: float | None = None,
    seed: int = 0,
) -> tuple[FloatArray, UInt8Array]:
    """The valid points of all views with their colours: [N, 3] float32 metres in the world frame, [N, 3] uint8 RGB.

    Args:
        reconstruction: its `mask` decides; points that are not finite are left out.
        max_points: when there are more, draw so many, every point with the same chance.
        min_confidence: leave out points with a smaller `conf`.
        seed: of the draw.

    Raises:
        ValueError: a negative `max_points`.
    """
    if max_points is not None and max_points < 0:
        raise ValueError(f"max_points: expected 0 or more, or None, got {max_points}")
    rng = np.random.default_rng(seed)
    views = range(reconstruction.num_views)
    counts = np.array([np.count_nonzero(reconstruction.valid(view, min_confidence)) for view in views])
    if counts.sum() == 0:
        warnings.warn("no valid points: every pixel is masked or below min_confidence", RuntimeWarning, stacklevel=3)
    if max_points is not None and counts.sum() > max_points:
        # How many each view gets in a uniform draw over all points, without a permutation of all of them.
        counts = rng.multivariate_hypergeometric(counts, max_points, method="marginals")
    points, colors = [], []
    for view in views:
        chosen = sample_valid_pixels(reconstruction.valid(view, min_confidence), int(counts[view]), rng)
        points.append(reconstruction.pts3d[view].reshape(-1, 3)[chosen])
        colors.append(reconstruction.images[view].reshape(-1, 3)[chosen])
    return np.concatenate(points), np.concatenate(colors)
