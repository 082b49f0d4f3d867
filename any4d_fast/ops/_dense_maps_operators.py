"""The registered operators of `dense_maps`, and the gradients of two of them; Triton alone, arguments unchecked."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._library import define
from .resize_bilinear import resize_bilinear_transpose

ALIGNMENT = 8
"""Channels of a 16-bit map come in 16 bytes at a time on tensor cores; `patches` pads to as many."""


def padded(channels: int) -> int:
    """Channels with the zeros behind them that `ALIGNMENT` asks for."""
    return -(-channels // ALIGNMENT) * ALIGNMENT


def _finish_impl(
    value: Tensor, bias: Tensor | None, residual: Tensor | None, coarse: Tensor | None, double: list[int],
    flag: Tensor, out: bool, relu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from ..kernels import dense_maps as kernels

    total = torch.empty(value.shape if out else (0,), dtype=value.dtype, device=value.device)
    positive = torch.empty(value.shape if relu else (0,), dtype=value.dtype, device=value.device)
    kernels.finish(
        value, bias, residual, coarse, (double[0], double[1]), total if out else None, positive if relu else None, flag
    )
    return total, positive


def _finish_fake(
    value: Tensor, bias: Tensor | None, residual: Tensor | None, coarse: Tensor | None, double: list[int],
    flag: Tensor, out: bool, relu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return value.new_empty(value.shape if out else (0,)), value.new_empty(value.shape if relu else (0,))


def _finish_backward_impl(
    grad_out: Tensor | None, grad_relu: Tensor | None, relu: Tensor | None, total: bool, sums: bool
) -> tuple[Tensor, Tensor]:
    from ..kernels.dense_maps_backward import finish_backward

    like = grad_relu if grad_out is None else grad_out
    assert like is not None
    found = torch.empty(like.shape if total else (0,), dtype=like.dtype, device=like.device)
    added = finish_backward(grad_out, grad_relu, relu, found if total else None, sums)
    return found, like.new_empty(0, dtype=torch.float32) if added is None else added


def _finish_backward_fake(
    grad_out: Tensor | None, grad_relu: Tensor | None, relu: Tensor | None, total: bool, sums: bool
) -> tuple[Tensor, Tensor]:
    like = grad_relu if grad_out is None else grad_out
    assert like is not None
    return like.new_empty(like.shape if total else (0,)), like.new_empty(
        like.shape[3] if sums else 0, dtype=torch.float32
    )


def _upsample_impl(coarse: Tensor, double: list[int], size: list[int], flag: Tensor) -> Tensor:
    from ..kernels import dense_maps as kernels

    shape = (coarse.shape[0], size[0], size[1], coarse.shape[3])
    out = torch.empty(shape, dtype=coarse.dtype, device=coarse.device)
    kernels.finish(None, None, None, coarse, (double[0], double[1]), out, None, flag)
    return out


def _upsample_fake(coarse: Tensor, double: list[int], size: list[int], flag: Tensor) -> Tensor:
    return coarse.new_empty(coarse.shape[0], size[0], size[1], coarse.shape[3])


def _narrow_impl(x: Tensor, dtype: torch.dtype, flag: Tensor) -> Tensor:
    from ..kernels import dense_maps as kernels

    views, batch, length, channels = x.shape
    out = torch.empty(views * batch, length, channels, dtype=dtype, device=x.device)
    kernels.narrow(x, out, flag)
    return out


def _narrow_fake(x: Tensor, dtype: torch.dtype, flag: Tensor) -> Tensor:
    views, batch, length, channels = x.shape
    return x.new_empty(views * batch, length, channels, dtype=dtype)


def _gelu_impl(value: Tensor, bias: Tensor, residual: Tensor | None, flag: Tensor) -> Tensor:
    from ..kernels import dense_maps as kernels

    out = torch.empty_like(value)
    kernels.gelu(value, bias, residual, out, flag)
    return out


def _gelu_fake(value: Tensor, bias: Tensor, residual: Tensor | None, flag: Tensor) -> Tensor:
    return torch.empty_like(value)


def _patches_impl(x: Tensor, patch: int, dtype: torch.dtype, flag: Tensor) -> Tensor:
    from ..kernels import dense_maps as kernels

    n, height, width, cin = x.shape
    shape = (n, height // patch, width // patch, padded(patch * patch * cin))
    out = torch.empty(shape, dtype=dtype, device=x.device)
    kernels.patches(x, patch, out, flag)
    return out


def _patches_fake(x: Tensor, patch: int, dtype: torch.dtype, flag: Tensor) -> Tensor:
    n, height, width, cin = x.shape
    return x.new_empty(n, height // patch, width // patch, padded(patch * patch * cin), dtype=dtype)


finish = define(
    "dense_maps_finish",
    "(Tensor value, Tensor? bias, Tensor? residual, Tensor? coarse, SymInt[] double, Tensor(a!) flag, bool out, "
    "bool relu) -> (Tensor, Tensor)",
    _finish_impl,
    _finish_fake,
)
finish_backward = define(
    "dense_maps_finish_backward",
    "(Tensor? grad_out, Tensor? grad_relu, Tensor? relu, bool total, bool sums) -> (Tensor, Tensor)",
    _finish_backward_impl,
    _finish_backward_fake,
)
upsample = define(
    "dense_maps_upsample",
    "(Tensor coarse, SymInt[] double, SymInt[] size, Tensor(a!) flag) -> Tensor",
    _upsample_impl,
    _upsample_fake,
)
narrow = define(
    "dense_maps_narrow", "(Tensor x, ScalarType dtype, Tensor(a!) flag) -> Tensor", _narrow_impl, _narrow_fake
)
gelu = define(
    "dense_maps_gelu",
    "(Tensor value, Tensor bias, Tensor? residual, Tensor(a!) flag) -> Tensor",
    _gelu_impl,
    _gelu_fake,
)
patches = define(
    "dense_maps_patches",
    "(Tensor x, int patch, ScalarType dtype, Tensor(a!) flag) -> Tensor",
    _patches_impl,
    _patches_fake,
)


class Finish(torch.autograd.Function):
    """Keeps the ReLU's result where there is one: it is positive where the sum is."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        coarse: Tensor | None,
        double: list[int],
        flag: Tensor,
        out: bool,
        relu: bool,
    ) -> tuple[Tensor, Tensor]:
        total, positive = finish(value, bias, residual, coarse, double, flag, out, relu)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(positive if relu else None)
        ctx.double, ctx.half = double, None if coarse is None else coarse.shape[1:3]
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(*(t for t, wanted in ((total, out), (positive, relu)) if not wanted))
        return total, positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_relu: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        need_value, need_bias, need_residual, need_coarse = ctx.needs_input_grad[:4]
        if grad_out is None and grad_relu is None:
            return (None,) * 8
        (positive,) = ctx.saved_tensors
        grads = [None if g is None else g.contiguous() for g in (grad_out, grad_relu)]
        added = grad_relu is not None and (need_value or need_residual or need_coarse)
        total, sums = grads[0], None
        if added or need_bias:
            found = finish_backward(*grads, None if grads[1] is None else positive, added, need_bias)
            total, sums = found[0] if added else total, found[1]
        d_coarse = None
        if need_coarse and total is not None:
            more = (0, 0, 0, ctx.double[1] - total.shape[2], 0, ctx.double[0] - total.shape[1])
            d_coarse = resize_bilinear_transpose(F.pad(total, more) if any(more) else total, ctx.half)
        return (
            total if need_value else None,
            sums.to(ctx.bias_dtype) if need_bias and sums is not None else None,
            total if need_residual else None,
            d_coarse,
            None,
            None,
            None,
            None,
        )


class Upsample(torch.autograd.Function):
    """Keeps nothing but the map's size."""

    @staticmethod
    def forward(ctx: Any, coarse: Tensor, double: list[int], size: list[int], flag: Tensor) -> Tensor:
        ctx.half = coarse.shape[1:3]
        return upsample(coarse, double, size, flag)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return resize_bilinear_transpose(grad, ctx.half), None, None, None
