"""Bilinear resize with aligned corners of channels-last maps, with a deterministic backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..reference.resize_bilinear import resize_bilinear as reference_resize_bilinear
from ._library import define

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _forward_impl(x: Tensor, size: list[int]) -> Tensor:
    from ..kernels.resize_bilinear import resize_bilinear_forward

    return resize_bilinear_forward(x, (size[0], size[1]))


def _backward_impl(grad: Tensor, size: list[int]) -> Tensor:
    from ..kernels.resize_bilinear import resize_bilinear_backward

    return resize_bilinear_backward(grad, (size[0], size[1]))


def _fake(x: Tensor, size: list[int]) -> Tensor:
    return x.new_empty(x.shape[0], size[0], size[1], x.shape[3])


_forward = define("resize_bilinear_forward", "(Tensor x, SymInt[] size) -> Tensor", _forward_impl, _fake)
_backward = define("resize_bilinear_backward", "(Tensor grad, SymInt[] size) -> Tensor", _backward_impl, _fake)


class _ResizeBilinear(torch.autograd.Function):
    """Keeps nothing but the map's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: list[int]) -> Tensor:
        ctx.size = (x.shape[1], x.shape[2])
        return _forward(x, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return resize_bilinear_transpose(grad, ctx.size), None


def resize_bilinear_transpose(grad: Tensor, size: tuple[int, int]) -> Tensor:
    """Gradient of a map [N, h, w, C] of that size from that of its resized map [N, H, W, C], by Triton."""
    result: Tensor = _backward(grad, list(size))
    return result


def _triton_reasons(x: Tensor) -> list[str]:
    reasons = backends.triton_reasons(x)
    if x.dtype not in _FLOATS:
        reasons.append(f"x is {x.dtype}; the kernel reads float32, float16 or bfloat16")
    return reasons


backends.register("resize_bilinear", triton=_triton_reasons)


def resize_bilinear(
    x: Tensor,  # [N, h, w, C]
    size: tuple[int, int],
    *,
    backend: str | None = None,
) -> Tensor:
    """Bilinear resize with aligned corners, channels-last in and out.

    Arithmetic is float32, results are rounded once. With Triton the gradient of a pixel is gathered from the pixels
    that read it, in a fixed order: bitwise equal from run to run (PyTorch's adds atomically on CUDA). Nothing is kept
    for the backward pass.

    Args:
        x: [N, h, w, C] features, any floating dtype, any strides; a map whose channels are not contiguous is copied.
        size: (H, W) pixels of the result.
        backend: "triton", "eager", or None for automatic choice.

    Returns:
        [N, H, W, C] in x's dtype; contiguous from Triton, in the memory layout of x from PyTorch.

    Raises:
        ValueError: a shape or dtype is not as above.
        BackendError: `backend` cannot run this call.
    """
    if x.ndim != 4 or not x.is_floating_point() or 0 in x.shape[1:]:
        raise ValueError(f"x: expected [N, h, w, C] float, got {list(x.shape)} {x.dtype}; move channels last")
    if len(size) != 2 or size[0] < 1 or size[1] < 1:
        raise ValueError(f"size: expected (H, W), both at least 1, got {tuple(size)}; pass pixels of the result")
    if backends.select("resize_bilinear", backend, x) == backends.EAGER:
        return reference_resize_bilinear(x, size)
    result: Tensor = _ResizeBilinear.apply(x, list(size))
    return result
