"""Which calls of the model take a CUDA graph, what tells their kinds apart, and their inputs in a graph's memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import backends
from .switches import cudnn_allows_tf32, matmul_allows_tf32

if TYPE_CHECKING:
    from .config import ModalityConfig
    from .model import Any4D

MAX_TOKENS = 24_576  # 27 views of 518 x 336: below, launching from Python takes longer than computing on an H200

Views = list[dict[str, Any]]
Outputs = list[dict[str, Tensor]]
Body = Callable[[Views], Outputs]

INPUT_KEYS = (
    "img", "ray_directions_cam", "depth_along_ray", "camera_pose_quats", "camera_pose_trans", "is_metric_scale",
    "radial_scene_flow", "pts3d_cam", "valid_mask",
)  # fmt: skip
"""What the model reads of a view; the rest passes by."""

_OVERRIDE: list[list[bool | None]] = []  # a list of its own for every block, to be found again by identity


@contextlib.contextmanager
def cuda_graphs(enabled: bool | None) -> Iterator[None]:
    """Use CUDA graphs for every size inside (True), for none (False), or where they pay (None)."""
    own = [enabled]
    _OVERRIDE.append(own)
    try:
        yield
    finally:  # not the last one: other threads' blocks need not be inside of this one
        _OVERRIDE[:] = [block for block in _OVERRIDE if block is not own]


def wanted(argument: bool | None) -> bool | None:
    """The choice for a call: its argument, else the innermost `cuda_graphs`, else ANY4D_FAST_CUDA_GRAPHS.

    Raises:
        ValueError: the environment variable is neither 0 nor 1.
    """
    if argument is not None:
        return argument
    if _OVERRIDE:
        return _OVERRIDE[-1][0]
    text = os.environ.get("ANY4D_FAST_CUDA_GRAPHS", "")
    if text not in ("", "0", "1"):
        raise ValueError(f"ANY4D_FAST_CUDA_GRAPHS: expected 0, 1 or nothing, got {text!r}")
    return None if not text else text == "1"


def reasons(model: Any4D, views: Views, modalities: ModalityConfig, choice: bool | None) -> list[str]:
    """Why a call does not use a graph; empty: it does."""
    image = views[0]["img"]
    rows, columns = (size // model.encoder.patch_size for size in image.shape[2:])
    config = model.config.transformer
    tensors = tensors_of(views)
    checks = {
        "cuda_graphs=False": choice is False,
        "images are not on a CUDA device": not image.is_cuda,
        "the model is a replica of DataParallel": getattr(model, "_is_replica", False),
        "gradients are enabled": torch.is_grad_enabled(),
        "the model is in training mode": model.training,
        "the reference backend runs": backends.in_force() == backends.EAGER,
        "torch.compile is tracing": torch.compiler.is_compiling(),
        "PyTorch is tracing or intercepts operators": intercepted(),
        f"more than {MAX_TOKENS} tokens": choice is None and len(views) * image.shape[0] * rows * columns > MAX_TOKENS,
        "inputs are tensor subclasses": any(type(t) not in (Tensor, nn.Parameter) for t in tensors),
        "modalities are drawn at random": not decided(modalities),
        "view positions are drawn at random": config.use_pe_for_non_reference_views,
    }
    why_not = [reason for reason, applies in checks.items() if applies]
    if not why_not and torch.cuda.is_current_stream_capturing():
        why_not.append("a graph is being captured already")
    return why_not


def intercepted() -> bool:
    """Whether PyTorch traces, or somebody looks at every operator."""
    return torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0  # type: ignore[attr-defined]


def decided(modalities: ModalityConfig) -> bool:
    """Whether nothing is drawn, and nothing is removed at random."""
    probabilities = [value for name, value in vars(modalities).items() if name.endswith("_prob")]
    return modalities.sparse_depth_prob == 0 and all(p in (0, 1) for p in probabilities)


def call_key(views: Views, *settings: Hashable) -> Hashable:
    """The kind of a call: shapes and dtypes of its inputs, the caller's settings, and PyTorch's that choose kernels."""
    device = views[0]["img"].device
    shapes = tuple(
        tuple((name, tuple(view[name].shape), view[name].dtype) for name in INPUT_KEYS if _is_tensor(view, name))
        for view in views
    )
    kind = device.type
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    precision = (
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        matmul_allows_tf32(),
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
        cudnn_allows_tf32(),
        cudnn.benchmark,
        cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_inference_mode_enabled(),
        backends.in_force(),
    )
    return device, shapes, precision, settings


def _is_tensor(view: dict[str, Any], name: str) -> bool:
    return isinstance(view.get(name), Tensor)


def tensors_of(views: Views) -> list[Tensor]:
    return [view[name] for view in views for name in INPUT_KEYS if _is_tensor(view, name)]


def static_copies(views: Views, device: torch.device) -> tuple[Views, list[Tensor]]:
    """Views whose tensors are new memory on the device, and these tensors in the order of `_tensors`."""
    copies: Views = []
    for view in views:
        new = {
            name: torch.empty(view[name].shape, dtype=view[name].dtype, device=device)
            for name in INPUT_KEYS
            if _is_tensor(view, name)
        }
        copies.append({**view, **new})
    return copies, tensors_of(copies)


def fill(targets: list[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy inputs into the graph's memory, on the current stream."""
    for dtype in dict.fromkeys(t.dtype for t in targets):
        which = [i for i, t in enumerate(targets) if t.dtype == dtype]
        torch._foreach_copy_([targets[i] for i in which], [sources[i] for i in which])
