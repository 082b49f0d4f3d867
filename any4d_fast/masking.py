"""Which pixels of the outputs to trust: ambiguity, confidence, and edges of depth and normals."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

MASK_KEYS = ("pts3d", "non_ambiguous_mask", "conf", "depth_z", "depth_along_ray")
"""Outputs that `output_mask` reads."""


def output_mask(
    out: Mapping[str, Tensor],
    *,
    normal_threshold: float | None = 5.0,
    depth_threshold: float = 0.03,
    confidence_percentile: float | None = None,
) -> Tensor | None:
    """Pixels of one view whose geometry is to be trusted, computed where the outputs are.

    A pixel is left out if the model calls it ambiguous, if its confidence is not above its image's percentile, or if it
    lies on an edge of the depth and, at the same time, on an edge of the normals. Where the model has no ambiguity
    mask, all pixels start as trusted.

    Args:
        out: outputs of one view; `pts3d` [B, H, W, 3], and what there is of `non_ambiguous_mask` [B, H, W] bool, `conf`
            [B, H, W], `depth_z` or `depth_along_ray` [B, H, W, 1].
        normal_threshold: degrees; None: edges are kept.
        depth_threshold: relative difference of depth.
        confidence_percentile: 0 to 100; None: confidence does not matter.

    Returns:
        [B, H, W, 1] bool, or None where there are no points.
    """
    points = out.get("pts3d")
    if points is None:
        return None
    mask = out.get("non_ambiguous_mask")
    mask = torch.ones_like(points[..., 0], dtype=torch.bool) if mask is None else mask.bool()
    if confidence_percentile is not None and "conf" in out:
        mask = mask & confident(out["conf"], confidence_percentile)
    depth = out.get("depth_z", out.get("depth_along_ray"))
    if normal_threshold is not None and depth is not None:
        normals, has_normal = point_normals(points, mask)
        edges = normal_edges(normals, has_normal, normal_threshold)
        mask = mask & ~(edges & depth_edges(depth[..., 0], mask, depth_threshold))
    return mask[..., None]


def confident(confidence: Tensor, percentile: float) -> Tensor:
    """Pixels above the percentile (0 to 100) of their image, [B, H, W] bool from [B, H, W]."""
    flat = confidence.float().flatten(1)
    # torch.quantile refuses more than 2^24 values; interpolating between two order statistics is the same number.
    position = percentile / 100 * (flat.shape[1] - 1)
    low = min(int(position), flat.shape[1] - 1)
    ordered = flat.sort(dim=1).values[:, low : low + 2]
    threshold = ordered[:, 0] + (position - low) * (ordered[:, -1] - ordered[:, 0])
    return confidence.float() > threshold[:, None, None]


def point_normals(points: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Normals of point maps: the mean over the four triangles that a pixel spans with its neighbours.

    Args:
        points: [B, H, W, 3] any one frame and unit.
        mask: [B, H, W] bool; a triangle counts if its three pixels are in it.

    Returns:
        Unit normals [B, H, W, 3], 0 where no triangle counts, and where one does, [B, H, W] bool.
    """
    padded = F.pad(points, (0, 0, 1, 1, 1, 1))
    inside = F.pad(mask, (1, 1, 1, 1))
    up, down = (slice(None), slice(0, -2), slice(1, -1)), (slice(None), slice(2, None), slice(1, -1))
    left, right = (slice(None), slice(1, -1), slice(0, -2)), (slice(None), slice(1, -1), slice(2, None))
    normal = torch.zeros_like(points)
    has_normal = torch.zeros_like(mask)
    for first, second in ((up, left), (left, down), (down, right), (right, up)):
        valid = inside[first] & inside[second] & mask
        face = torch.linalg.cross(padded[first] - points, padded[second] - points, dim=-1)
        face = face / (face.norm(dim=-1, keepdim=True) + 1e-12)
        normal += torch.where(valid[..., None], face, 0)
        has_normal |= valid
    return normal / (normal.norm(dim=-1, keepdim=True) + 1e-12), has_normal


def normal_edges(normals: Tensor, has_normal: Tensor, degrees: float) -> Tensor:
    """Pixels within one pixel of where a normal turns by more than `degrees` against one of its eight neighbours.

    Compares cosines, and so does not depend on rounding as an arc cosine of 1 + 1e-7 does.

    Args:
        normals: [B, H, W, 3] unit, 0 where there is none; a pixel without one differs by 90 degrees from one with.
        has_normal: [B, H, W] bool; whether the neighbour at (dy, dx) is compared with is read at (dx, dy). That is how
            the original does it, so a pixel next to one without a normal mostly counts as an edge; masks must agree.
        degrees: angle.

    Returns:
        [B, H, W] bool.
    """
    height, width = normals.shape[1:3]
    padded = F.pad(normals.permute(0, 3, 1, 2), (1, 1, 1, 1), mode="replicate")
    counts = F.pad(has_normal[:, None].float(), (1, 1, 1, 1), mode="replicate") > 0
    centre = normals.permute(0, 3, 1, 2)
    smallest = torch.ones_like(normals[..., 0])
    for dy in range(3):
        for dx in range(3):
            cosine = (centre * padded[..., dy : dy + height, dx : dx + width]).sum(1)
            counted = counts[:, 0, dx : dx + height, dy : dy + width]
            smallest = torch.minimum(smallest, torch.where(counted, cosine, 1))
    turns = (smallest < math.cos(math.radians(degrees))).to(normals.dtype)
    return F.max_pool2d(turns[:, None], 3, stride=1, padding=1)[:, 0] > 0


def depth_edges(depth: Tensor, mask: Tensor, relative: float) -> Tensor:
    """Pixels whose 3x3 neighbourhood spans more than `relative` times their own depth.

    Args:
        depth: [B, H, W] any unit.
        mask: [B, H, W] bool; only its pixels count as neighbours.
        relative: share of the depth.

    Returns:
        [B, H, W] bool.
    """
    # max - min as max(d) + max(-d), with -inf where nothing counts: a neighbourhood without pixels is no edge.
    highest = F.max_pool2d(torch.where(mask, depth, -torch.inf)[:, None], 3, stride=1, padding=1)[:, 0]
    lowest = F.max_pool2d(torch.where(mask, -depth, -torch.inf)[:, None], 3, stride=1, padding=1)[:, 0]
    return (highest + lowest) / depth > relative
