"""From what a person has to the full set of outputs: validate, convert, reconstruct, derive."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import ModalityConfig
from .inputs import prepare_views
from .outputs import postprocess

if TYPE_CHECKING:
    from .model import Any4D

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
CPU_HEAD_BYTES = 1 << 30  # what the dense heads may take at once on a CPU
GPU_HEAD_SHARE = 0.5  # of the free memory, for the dense heads on a GPU


def infer(
    model: Any4D,
    views: Sequence[Mapping[str, Any]],
    *,
    size: int | tuple[int, int] | None = None,
    reference: int = 0,
    minibatch_size: int | None = None,
    use_amp: bool = True,
    amp_dtype: str = "bf16",
    apply_mask: bool = True,
    mask_edges: bool = True,
    edge_normal_threshold: float = 5.0,
    edge_depth_threshold: float = 0.03,
    apply_confidence_mask: bool = False,
    confidence_percentile: float = 10,
    ignore_calibration_inputs: bool = False,
    ignore_depth_inputs: bool = False,
    ignore_pose_inputs: bool = False,
    ignore_depth_scale_inputs: bool = False,
    ignore_pose_scale_inputs: bool = False,
    ignore_doppler_inputs: bool = False,
    known: str = "hint",
    original_size: bool = False,
) -> list[dict[str, Tensor]]:
    """Reconstruct views given as a person has them; the conventions are those of MapAnything's `infer`.

    Args:
        model: the model; it runs in evaluation mode and is left in the mode it was in.
        views: one mapping a view; see `any4d_fast.inputs.prepare_views` and docs/inputs.md.
        size: model size: None for the nearest trained one, an int for the long side, or (H, W), multiples of 14.
        reference: whose camera is the world, and on whose pixels scene flow lives.
        minibatch_size: views that the dense heads take at once; by default what fits into memory.
        use_amp, amp_dtype: mixed precision on a GPU, "bf16", "fp16" or "fp32" (none); a CPU runs in float32.
        apply_mask, mask_edges, edge_normal_threshold, edge_depth_threshold, apply_confidence_mask,
        confidence_percentile, known, original_size: see `any4d_fast.outputs.postprocess`.
        ignore_calibration_inputs, ignore_depth_inputs, ignore_pose_inputs, ignore_depth_scale_inputs,
        ignore_pose_scale_inputs, ignore_doppler_inputs: see `prepare_views`.

    Returns:
        One dictionary a view in the given order: the model's outputs (see `Any4D.forward`) and `depth_z`,
        `intrinsics`, `camera_poses`, `mask`, `img_no_norm`.

    Raises:
        InputError: a view is wrong; the message says which, and how to fix it.
        ValueError: an option is wrong.
    """
    if amp_dtype not in AMP_DTYPES:
        raise ValueError(f"amp_dtype: expected one of {sorted(AMP_DTYPES)}, got {amp_dtype!r}")
    if minibatch_size is not None and minibatch_size < 1:
        raise ValueError(f"minibatch_size: expected at least 1 view, or None, got {minibatch_size}")
    device = next(model.parameters()).device
    prepared = prepare_views(
        views,
        size=size,
        reference=reference,
        ignore_calibration_inputs=ignore_calibration_inputs,
        ignore_depth_inputs=ignore_depth_inputs,
        ignore_pose_inputs=ignore_pose_inputs,
        ignore_depth_scale_inputs=ignore_depth_scale_inputs,
        ignore_pose_scale_inputs=ignore_pose_scale_inputs,
        ignore_doppler_inputs=ignore_doppler_inputs,
        data_norm_type=model.encoder.data_norm_type,
        patch_size=model.encoder.patch_size,
        device=device,
    )
    prepared.check_known(known)
    prepared.check_known(known)  # before the model runs rather than after
    chunk = minibatch_size or head_chunk(model, prepared.views)
    dtype = AMP_DTYPES[amp_dtype] if use_amp and device.type == "cuda" else None
    with torch.no_grad(), _evaluating(model), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        raw = model.run(prepared.views, ModalityConfig(**prepared.geometric_input_config), chunk)
        with torch.autocast(device.type, enabled=False):
            return postprocess(
                raw,
                prepared,
                apply_mask=apply_mask,
                mask_edges=mask_edges,
                edge_normal_threshold=edge_normal_threshold,
                edge_depth_threshold=edge_depth_threshold,
                apply_confidence_mask=apply_confidence_mask,
                confidence_percentile=confidence_percentile,
                known=known,
                original_size=original_size,
            )


def head_chunk(model: Any4D, views: Sequence[Mapping[str, Tensor]]) -> int:
    """Views that the dense heads can take at once within the memory that they may use."""
    batch, _, height, width = views[0]["img"].shape
    head = model.config.scene.geometry_head
    # Live at the peak: the input, output and resized copies of the half-width map at full size, in float32,
    # or the same of the full-width map at 8/14 of the size on either side.
    pixels = height * width
    full = 3 * pixels * max(head.feature_dim // 2, 1)
    eighth = 4 * pixels * head.feature_dim * 64 // 196
    per_view = 4 * batch * max(full, eighth)
    device = views[0]["img"].device
    budget = GPU_HEAD_SHARE * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else CPU_HEAD_BYTES
    return int(min(max(budget // per_view, 1), len(views)))


@contextlib.contextmanager
def _evaluating(model: Any4D) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
