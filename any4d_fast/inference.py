"""From what a person has to the full set of outputs: validate, convert, reconstruct, derive."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .config import ModalityConfig
from .head_loop import Outputs, check_minibatch
from .host_copy import HostCopies
from .inputs import prepare_views
from .outputs import ViewFinisher
from .precision import EXACT, check_name
from .prepared import PreparedViews

if TYPE_CHECKING:
    from .model import Any4D

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


def infer(
    model: Any4D,
    views: Sequence[Mapping[str, Any]],
    *,
    size: int | tuple[int, int] | None = None,
    reference: int = 0,
    minibatch_size: int | None = None,
    memory_budget: float | None = None,
    outputs_to: str = "device",
    cuda_graphs: bool | None = None,
    precision: str = EXACT,
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
        model: the model; it runs in evaluation mode, and each of its modules is left in the mode it was in.
        views: one mapping a view; see `any4d_fast.inputs.prepare_views` and docs/inputs.md.
        size: model size: None for the nearest trained one, an int for the long side, or (H, W), multiples of 14.
        reference: whose camera is the world, and on whose pixels scene flow lives.
        minibatch_size: views that the dense heads take at once; by default what fits into memory. Where memory runs
            out all the same, they go on with half as many.
        memory_budget: GiB that this process may hold on the GPU during the call, weights and everything else that is
            there already included; the dense heads take as many views at once as it leaves room for, one at least.
            None: half of what is free. On a CPU it is what the heads alone may take, 1 GiB by default.
            `any4d_fast.memory` counts what a call takes: 25 GB for 1,000 views of 518 x 336, and 8 GB of derived maps.
        outputs_to: "device", or "cpu" to move the finished outputs of every few views to pinned host memory while the
            GPU computes the next ones; outputs of neighbouring views, 256 MiB of them, share one block of memory.
        cuda_graphs: replay a captured CUDA graph: where it pays (None), at any size (True), never (False); see
            `any4d_fast.graphs`. With `outputs_to="cpu"` never.
        precision: "exact", or "fp8" for 8-bit attention and linear layers in encoder and multi-view transformer, faster
            and less exact: Hopper or newer, with `use_amp` in 16 bits; see `any4d_fast.precision`.
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
        PrecisionError: `precision` cannot run here; the message says why.
    """
    check_name(precision)
    if amp_dtype not in AMP_DTYPES:
        raise ValueError(f"amp_dtype: expected one of {sorted(AMP_DTYPES)}, got {amp_dtype!r}")
    check_minibatch(minibatch_size)
    if memory_budget is not None and not memory_budget > 0:
        raise ValueError(f"memory_budget: expected a positive number of GiB, or None, got {memory_budget}")
    if outputs_to not in ("device", "cpu"):
        raise ValueError(f'outputs_to: expected "device" or "cpu", got {outputs_to!r}')
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
    # Options are checked before the model runs rather than after.
    finisher = ViewFinisher(
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
    modalities = ModalityConfig(**prepared.geometric_input_config)
    dtype = AMP_DTYPES[amp_dtype] if use_amp and device.type == "cuda" else None
    with torch.no_grad(), _evaluating(model), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        if outputs_to == "cpu":
            outputs = _run_to_host(model, prepared, modalities, minibatch_size, memory_budget, finisher, precision)
        else:
            raw = model.run(prepared.views, modalities, minibatch_size, None, memory_budget, cuda_graphs, precision)
            with torch.autocast(device.type, enabled=False):
                outputs = finisher(0, raw)
    return prepared.in_given_order(outputs)


def _run_to_host(
    model: Any4D,
    prepared: PreparedViews,
    modalities: ModalityConfig,
    minibatch_size: int | None,
    memory_budget: float | None,
    finisher: ViewFinisher,
    precision: str,
) -> list[Outputs]:
    """Outputs are finished and copied to the host chunk by chunk, so that the device holds those of a few views."""
    device = prepared.views[0]["img"].device
    with HostCopies(device, len(prepared.views)) as copies:

        def finish(first: int, chunk: list[Outputs]) -> list[Outputs]:
            with torch.autocast(device.type, enabled=False):
                return copies.add(finisher(first, chunk))

        found = model.run(prepared.views, modalities, minibatch_size, finish, memory_budget, precision=precision)
        copies.wait()
    return found


_MODES_LOCK = threading.Lock()
_EVALUATING: dict[int, tuple[int, list[nn.Module]]] = {}
"""Models in evaluation mode for `infer`, by identity: how many calls are under way, and the modules to put back."""


@contextlib.contextmanager
def _evaluating(model: Any4D) -> Iterator[None]:
    """Evaluation mode inside; when the last of several threads leaves, every module trains again that did before."""
    with _MODES_LOCK:
        calls, trained = _EVALUATING.get(id(model), (0, []))
        if not calls:
            trained = [module for module in model.modules() if module.training]
            model.eval()
        _EVALUATING[id(model)] = calls + 1, trained
    try:
        yield
    finally:
        with _MODES_LOCK:
            calls, trained = _EVALUATING.pop(id(model))
            if calls > 1:
                _EVALUATING[id(model)] = calls - 1, trained
            elif trained:
                for module in trained:
                    module.training = True
                model.refresh()
