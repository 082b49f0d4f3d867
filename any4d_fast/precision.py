"""`precision="fp8"`: where it runs, and why not elsewhere.

Global attention of the multi-view transformer runs in 8 bits, and so do the linear layers that `modules.packing_fp8`
names; everything else is that of `precision="exact"`. It is for inference on Hopper or newer, under
16-bit autocast. Under `use_backend("eager")` the same roundings are emulated in PyTorch on any device, slowly, for
tests. Where there is no 8-bit attention (the extension is missing, or the GPU is not Hopper) it stays in 16 bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import backends
from .ops.linear_fp8 import hopper_reasons

if TYPE_CHECKING:
    from .model import Any4D

EXACT, FP8 = "exact", "fp8"
PRECISIONS = (EXACT, FP8)
_HALF = (torch.bfloat16, torch.float16)


class PrecisionError(backends.BackendError):
    """A precision was asked for that cannot run this call; the message lists the reasons."""


def check_name(precision: str) -> None:
    """Raise unless it is the name of a precision.

    Raises:
        ValueError: unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {list(PRECISIONS)}, got {precision!r}")


def reasons(model: Any4D, image: Tensor) -> list[str]:
    """Why a call on images like this one cannot run in 8 bits now; empty: it can."""
    kind = image.device.type
    checks = {
        "gradients are enabled, 8-bit layers have none: use torch.no_grad() or model.infer": torch.is_grad_enabled(),
        "the model is in training mode: call model.eval()": model.training,
        "torch.compile is tracing: call the model itself": torch.compiler.is_compiling(),
        "torch.jit is tracing: call the model itself": torch.jit.is_tracing(),  # type: ignore[attr-defined]
        "the encoder's MLPs are gated (size 'giant')": model.config.encoder.size == "giant",
    }
    why_not = [reason for reason, applies in checks.items() if applies]
    if backends.in_force() == backends.EAGER:
        return why_not
    if not image.is_cuda:
        return [*why_not, f"images are on {kind}, and 8-bit layers run on CUDA devices"]
    if missing := backends.triton_missing():
        why_not.append(missing)
    why_not += hopper_reasons(image)
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if dtype not in _HALF:
        why_not.append(
            "what is not in 8 bits runs in 16, and autocast is not on: use torch.autocast('cuda', torch.bfloat16), or "
            'model.infer with amp_dtype="bf16"'
        )
    return why_not


def check(precision: str, model: Any4D, image: Tensor) -> None:
    """Raise unless a call on images like this one can run in this precision now.

    Raises:
        ValueError: unknown precision.
        PrecisionError: it cannot; the message says why.
    """
    check_name(precision)
    if precision == FP8 and (why_not := reasons(model, image)):
        raise PrecisionError(f'precision="fp8" cannot run this call: {"; ".join(why_not)}; use precision="exact"')
