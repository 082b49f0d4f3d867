"""Predictions beside the truth, as one picture a clip."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..head_loop import Outputs
from ..io.colors import direction_colors
from .batch import Batch

Picture = npt.NDArray[np.uint8]

_DARK_TO_BRIGHT = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_UNKNOWN = 70


def draw(outputs: list[Outputs], batch: Batch, clip: int) -> Picture:
    """Rows: images, true and predicted depth, true and predicted flow; a column for each view. [rows * H, V * W, 3].

    Depth is drawn as its inverse (near is bright) on the scale of the truth, the prediction scaled by the ratio of
    medians. Flow is drawn as in `io.sheet`: hue is its direction in the image plane, saturation its length.
    """
    images = (batch.images[clip].movedim(1, -1).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    rows: list[Picture] = [images]
    known = batch.depth_mask[clip].cpu()
    truth = batch.depth_along_ray[clip, ..., 0].float().cpu()
    if "depth_along_ray" in outputs[0] and bool(known.any()):
        predicted = torch.stack([view["depth_along_ray"][clip, ..., 0] for view in outputs]).float().cpu()
        ratio = truth[known].median() / predicted[known].median().clamp(min=1e-6)
        low, high = float(1 / truth[known].quantile(0.98)), float(1 / truth[known].quantile(0.02))
        rows.append(_grey(_inverse(truth, low, high), known))
        rows.append(_inverse(predicted * ratio, low, high))
    if "scene_flow" in outputs[0] and bool(batch.flow_mask[clip].any()):
        flow = batch.scene_flow[clip].float().cpu()
        mask = batch.flow_mask[clip].cpu()
        moved = torch.stack([view["scene_flow"][clip] for view in outputs]).float().cpu()
        high = float(flow.norm(dim=-1)[mask].quantile(0.995).clamp(min=1e-3))
        rows.append(_grey(direction_colors(flow.numpy(), high), mask))
        rows.append(direction_colors(moved.numpy(), high))
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)


def _inverse(depth: Tensor, low: float, high: float) -> Picture:
    """[V, H, W] -> [V, H, W, 3]; near is bright."""
    share = ((1 / depth.clamp(min=1e-6) - low) / max(high - low, 1e-9)).clamp(0, 1).numpy()
    places = np.linspace(0, 1, len(_DARK_TO_BRIGHT))
    channels = [np.interp(share, places, column) for column in np.array(_DARK_TO_BRIGHT).T]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def _grey(picture: Picture, known: Tensor) -> Picture:
    return np.where(known.numpy()[..., None], picture, np.uint8(_UNKNOWN))
