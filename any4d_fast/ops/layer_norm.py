"""`layer_norm`: LayerNorm over the last dimension, statistics in float32, any floating dtype in and out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..reference.layer_norm import layer_norm as reference_layer_norm
from ._library import define

MAX_CHANNELS = 4096
"""Widest row of the Triton kernels (a row stays in registers)."""


def _forward_impl(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.layer_norm import layer_norm_forward

    return layer_norm_forward(x, weight, bias, eps, out_dtype)


def _forward_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    mean = x.new_empty(rows, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=out_dtype), mean, torch.empty_like(mean)


_forward = define(
    "layer_norm_forward",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
)


def _backward_impl(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need_x: bool,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.layer_norm import layer_norm_backward

    return layer_norm_backward(grad, x, weight, mean, rstd, need_x, weight_dtype, bias_dtype)


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need_x: bool,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    channels = x.shape[-1]
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(channels if weight_dtype else 0, dtype=weight_dtype or torch.float32),
        x.new_empty(channels if bias_dtype else 0, dtype=bias_dtype or torch.float32),
    )


_backward = define(
    "layer_norm_backward",
    "(Tensor grad, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool need_x, ScalarType? weight_dtype, "
    "ScalarType? bias_dtype) -> (Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
    ) -> Tensor:
        out, mean, rstd = _forward(x, weight, bias, eps, out_dtype)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        x, weight, mean, rstd = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        weight_dtype = weight.dtype if need_weight else None
        bias_dtype = ctx.bias_dtype if need_bias else None
        grad_x, grad_weight, grad_bias = _backward(grad, x, weight, mean, rstd, need_x, weight_dtype, bias_dtype)
        return (
            grad_x if need_x else None,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            None,
            None,
        )


def check_vector(op: str, name: str, vector: Tensor | None, channels: int) -> None:
    """Raise unless `vector` is None or a floating [channels] tensor."""
    if vector is None:
        return
    if vector.shape != (channels,) or not vector.is_floating_point():
        raise ValueError(
            f"{op}: {name}: expected [{channels}] floating point (one value a channel), "
            f"got {list(vector.shape)} {vector.dtype}; pass a vector as long as the last dimension"
        )


def check_rows(op: str, name: str, x: Tensor) -> None:
    """Raise unless `x` is floating point with at least one dimension and one channel."""
    if x.ndim < 1 or x.shape[-1] < 1 or not x.is_floating_point():
        raise ValueError(
            f"{op}: {name}: expected [..., C] floating point with C >= 1, got {list(x.shape)} {x.dtype}; "
            "put the channels last and convert integers first"
        )


def check_out_dtype(op: str, out_dtype: torch.dtype | None) -> None:
    """Raise unless `out_dtype` is None or a floating dtype."""
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ValueError(f"{op}: out_dtype: expected a floating dtype, got {out_dtype}; use for example torch.bfloat16")


NARROW = (torch.float32, torch.float16, torch.bfloat16)
"""What Triton kernels take."""


def row_reasons(channels: int, *tensors: Tensor | None, out_dtype: torch.dtype | None = None) -> list[str]:
    """Why the Triton kernels over rows cannot run on these tensors."""
    why_not = backends.triton_reasons(*tensors)
    dtypes = {t.dtype for t in tensors if t is not None} | ({out_dtype} if out_dtype else set())
    for dtype in sorted(dtypes - set(NARROW), key=str):
        why_not.append(f"dtype {dtype} is not float32, float16 or bfloat16")
    if channels > MAX_CHANNELS:
        why_not.append(f"{channels} channels are more than {MAX_CHANNELS}")
    return why_not


def _triton_reasons(x: Tensor, weight: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype | None) -> list[str]:
    return row_reasons(x.shape[-1], x, weight, bias, out_dtype=out_dtype)


backends.register("layer_norm", triton=_triton_reasons)


def layer_norm(
    x: Tensor,  # [..., C]
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    eps: float = 1e-6,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm over the last dimension: (x - mean) / sqrt(var + eps) * weight + bias.

    Statistics and arithmetic are float32 (float64 for float64 inputs). Backward keeps `x` and two float32 numbers a
    row; its gradients of `weight` and `bias` are deterministic.

    Args:
        x: [..., C], float32, float16, bfloat16 or float64, any strides; zero rows are fine.
        weight: [C] gain, any floating dtype, or None for one.
        bias: [C] shift, any floating dtype, or None for zero.
        eps: added to the variance (1e-6 throughout the model).
        out_dtype: dtype of the result; `x`'s by default.
        backend: `"triton"`, `"eager"`, or None for automatic choice.

    Returns:
        [..., C], contiguous.

    Raises:
        ValueError: a shape or dtype that does not fit.
        BackendError: the backend asked for cannot run this call.
    """
    check_rows("layer_norm", "x", x)
    check_vector("layer_norm", "weight", weight, x.shape[-1])
    check_vector("layer_norm", "bias", bias, x.shape[-1])
    check_out_dtype("layer_norm", out_dtype)
    if backends.select("layer_norm", backend, x, weight, bias, out_dtype) == backends.EAGER:
        return reference_layer_norm(x, weight, bias, eps, out_dtype=out_dtype)
    result: Tensor = _LayerNorm.apply(x, weight, bias, eps, out_dtype or x.dtype)
    return result
