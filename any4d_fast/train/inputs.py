"""What a training step gives to the model: the images, and at random some of the true geometry.

Everything is drawn on the device, so that the host never waits and a CUDA graph can hold the step: the model draws who
gets which input (`modules.modalities`); how much of a depth map is left and whether scales are hidden is drawn here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ..modules.modalities import View
from .batch import Batch
from .config import InputOptions


def training_views(batch: Batch, norm_type: str, given: Sequence[str], options: InputOptions) -> list[View]:
    """Views with the inputs `given`, after the draws of sparse depth and hidden scales."""
    device, size = batch.images.device, len(batch)
    if options.sparse_depth_prob and "depth" in given:
        sparse = torch.rand(size, 1, 1, 1, device=device) < options.sparse_depth_prob
        removed = torch.rand(batch.depth_mask.shape, device=device) < options.sparsification_removal_percent
        batch = dataclasses.replace(batch, depth_mask=batch.depth_mask & ~(sparse & removed))
    if options.metric_scale_hidden_prob:
        hidden = torch.rand(size, device=device) < options.metric_scale_hidden_prob
        batch = dataclasses.replace(batch, is_metric=batch.is_metric & ~hidden)
    return batch.views(norm_type, given)
