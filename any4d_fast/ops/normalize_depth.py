"""Masked normalisation and logarithmic scaling of depth maps, without host synchronisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..reference.normalize_depth import FLOOR
from ..reference.normalize_depth import normalize_depth as reference_normalize_depth
from ._library import define


def _forward_impl(depth: Tensor) -> tuple[Tensor, Tensor]:
    from ..kernels.normalize_depth import normalize_depth_forward

    return normalize_depth_forward(depth)


def _forward_fake(depth: Tensor) -> tuple[Tensor, Tensor]:
    return depth.new_empty(depth.shape), depth.new_empty(depth.shape[0], dtype=torch.float32)


def _backward_impl(grad: Tensor, grad_factor: Tensor, depth: Tensor) -> Tensor:
    exact = depth.float()
    positive = exact > 0
    count = positive.sum(dim=(1, 2, 3), keepdim=True) + FLOOR
    mean = torch.where(positive, exact, torch.zeros_like(exact)).sum(dim=(1, 2, 3), keepdim=True) / count
    factor = mean.clip(min=FLOOR)
    scaled = exact / factor
    magnitude = scaled.abs()
    # d/dx of x / max(|x|, floor) * log1p(|x|); the denominator is constant below the floor.
    below = (torch.log1p(magnitude) + magnitude / (1 + magnitude)) / FLOOR
    d_scaled = grad.float() * torch.where(magnitude < FLOOR, below, 1 / (1 + magnitude))
    d_factor = grad_factor.float()[:, None, None, None] / (factor + FLOOR)
    d_factor = d_factor - (d_scaled * scaled).sum(dim=(1, 2, 3), keepdim=True) / factor
    d_mean = torch.where(mean >= FLOOR, d_factor, torch.zeros_like(d_factor)) / count
    d_depth = d_scaled / factor + torch.where(positive, d_mean, torch.zeros_like(d_mean))
    return d_depth.to(depth.dtype).contiguous()


def _backward_fake(grad: Tensor, grad_factor: Tensor, depth: Tensor) -> Tensor:
    return depth.new_empty(depth.shape)


_forward = define("normalize_depth_forward", "(Tensor depth) -> (Tensor, Tensor)", _forward_impl, _forward_fake)
_backward = define(
    "normalize_depth_backward",
    "(Tensor grad, Tensor grad_factor, Tensor depth) -> Tensor",
    _backward_impl,
    _backward_fake,
)


class _NormalizeDepth(torch.autograd.Function):
    """Depth is an input and rarely needs a gradient: the backward pass is plain PyTorch in float32."""

    @staticmethod
    def forward(ctx: Any, depth: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(depth)
        scaled, log_factor = _forward(depth)
        return scaled, log_factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_factor: Tensor) -> Tensor:
        d_depth: Tensor = _backward(grad, grad_factor, *ctx.saved_tensors)
        return d_depth


def _triton_reasons(depth: Tensor) -> list[str]:
    reasons = backends.triton_reasons(depth)
    if depth.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        reasons.append(f"depth is {depth.dtype}; the kernel reads float32, float16 or bfloat16")
    return reasons


backends.register("normalize_depth", triton=_triton_reasons)


def normalize_depth(depth: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Depth divided by its mean over positive pixels, then scaled logarithmically; and the log of that mean.

    With factor = max(sum of positive depths / (their count + 1e-8), 1e-8) and x = depth / factor, the results are
    x / max(|x|, 1e-8) * log1p(|x|) and log(factor + 1e-8): what the depth tokenizer and the depth scale tokenizer read
    (Any4D, `_encode_and_fuse_depths`). Nothing is read back to the host, and sums are taken in a fixed order.

    Args:
        depth: [N, H, W, 1] float, metres along the ray (any unit); zero where unknown.
        backend: "triton", "eager" or None for the fastest that can run.

    Returns:
        log-scaled normalised depth [N, H, W, 1] in depth's dtype (a NaN pixel stays NaN, the others do not see it), and
        the log factor [N] in float32 (float64 for float64 depth).

    Raises:
        ValueError: depth is not [N, H, W, 1] float.
        BackendError: `backend` cannot run this call.
    """
    if depth.ndim != 4 or depth.shape[3] != 1 or not depth.is_floating_point():
        raise ValueError(
            f"depth: expected [N, H, W, 1] float, got {list(depth.shape)} {depth.dtype}; "
            "fold batch and views together and keep the channel last"
        )
    if backends.select("normalize_depth", backend, depth) == backends.EAGER:
        return reference_normalize_depth(depth)
    scaled, log_factor = _NormalizeDepth.apply(depth)
    return scaled, log_factor
