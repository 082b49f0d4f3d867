"""`linear_gelu` and `linear_residual`: a linear layer with what follows it, finished in the matmul's epilogue."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..reference.linear_gelu import linear_gelu as reference_linear_gelu
from ..reference.linear_gelu import linear_residual as reference_linear_residual
from ._library import define, distinct, own_dtypes
from .layer_norm import check_vector
from .linear import check_linear, linear, triton_reasons
from .residual_norm import check_row_scale, residual_norm


def _gelu_forward_impl(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    from ..kernels.linear_gelu import linear_gelu_forward

    return linear_gelu_forward(x, weight, bias, keep)


def _gelu_forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if keep else (0,))


_gelu_forward = define(
    "linear_gelu_forward",
    "(Tensor x, Tensor weight, Tensor? bias, bool keep) -> (Tensor, Tensor)",
    _gelu_forward_impl,
    _gelu_forward_fake,
)


def _gelu_backward_impl(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    pre: Tensor,
    need_x: bool,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.linear_gelu import linear_gelu_backward

    with own_dtypes(grad, uniform=True):
        return linear_gelu_backward(grad, x, weight, pre, need_x, weight_dtype, bias_dtype)


def _gelu_backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    pre: Tensor,
    need_x: bool,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(weight.shape if weight_dtype else (0,), dtype=weight_dtype or x.dtype),
        x.new_empty(weight.shape[0] if bias_dtype else 0, dtype=bias_dtype or torch.float32),
    )


_gelu_backward = define(
    "linear_gelu_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor pre, bool need_x, ScalarType? weight_dtype, "
    "ScalarType? bias_dtype) -> (Tensor, Tensor, Tensor)",
    _gelu_backward_impl,
    _gelu_backward_fake,
)


class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        narrow = weight.to(x.dtype)
        out, pre = _gelu_forward(x, narrow, bias, True)
        ctx.save_for_backward(x, narrow, pre)
        ctx.weight_dtype = weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight, pre = ctx.saved_tensors
        needs = ctx.needs_input_grad
        weight_dtype = ctx.weight_dtype if needs[1] else None
        bias_dtype = ctx.bias_dtype if needs[2] else None
        grads = _gelu_backward(grad, x, weight, pre, needs[0], weight_dtype, bias_dtype)
        return grads[0] if needs[0] else None, grads[1] if needs[1] else None, grads[2] if needs[2] else None


def _residual_forward_impl(x: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    from ..kernels.linear_residual import linear_residual_forward

    return linear_residual_forward(x, weight, *arguments)


def _residual_forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, *_: Any) -> Tensor:
    return residual.new_empty(residual.shape)


_residual_forward = define(
    "linear_residual_forward",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor? gamma, Tensor? row_scale, int rows_per_scale) "
    "-> Tensor",
    _residual_forward_impl,
    _residual_forward_fake,
)


def _residual_backward_impl(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..kernels.linear_residual import linear_residual_backward

    with own_dtypes(grad):
        return linear_residual_backward(grad, *arguments)


def _residual_backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    rows_per_scale: int,
    need_x: bool,
    need_weight: bool,
    bias_dtype: torch.dtype | None,
    gamma_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = weight.shape[0]
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(weight.shape if need_weight else (0,)),
        x.new_empty(channels if bias_dtype else 0, dtype=bias_dtype or torch.float32),
        x.new_empty(channels if gamma_dtype else 0, dtype=gamma_dtype or torch.float32),
    )


_residual_backward = define(
    "linear_residual_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? row_scale, int rows_per_scale, "
    "bool need_x, bool need_weight, ScalarType? bias_dtype, ScalarType? gamma_dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _residual_backward_impl,
    _residual_backward_fake,
)


class _LinearResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        gamma: Tensor | None,
        row_scale: Tensor | None,
        rows_per_scale: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, gamma, row_scale)
        ctx.rows_per_scale = rows_per_scale
        ctx.residual_dtype = residual.dtype
        return _residual_forward(x, weight, bias, residual, gamma, row_scale, rows_per_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, gamma, row_scale = ctx.saved_tensors
        need_x, need_weight, need_bias, need_residual, need_gamma = ctx.needs_input_grad[:5]
        grads: list[Tensor | None] = [None] * 4
        if need_x or need_weight or need_bias or need_gamma:
            bias_dtype = bias.dtype if need_bias else None
            gamma_dtype = gamma.dtype if need_gamma else None
            fixed = (x, weight, bias, gamma, row_scale, ctx.rows_per_scale)
            computed = _residual_backward(grad, *fixed, need_x, need_weight, bias_dtype, gamma_dtype)
            needs = (need_x, need_weight, need_bias, need_gamma)
            grads = [g if need else None for g, need in zip(computed, needs, strict=True)]
        return grads[0], grads[1], grads[2], grad if need_residual else None, grads[3], None, None


def _cublas_reasons(x: Tensor, *others: Tensor | None) -> list[str]:
    return backends.not_on_cuda("cuBLAS runs", x)


backends.register("linear_gelu", triton=triton_reasons, cublas=_cublas_reasons)
backends.register("linear_residual", triton=triton_reasons, cublas=_cublas_reasons)


def _wants_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def linear_gelu(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None = None,  # [N]
    *,
    backend: str | None = None,
) -> Tensor:
    """gelu(x weight^T + bias) with the exact (erf) GELU, in one kernel.

    Sums are float32. Where gradients are wanted the pre-activation is kept in `x`'s dtype; backward takes GELU's
    derivative and the bias gradient in one deterministic pass and leaves the two matmuls to the vendor library; a
    float32 weight under 16-bit rows gets its gradient as in `linear`.

    Args:
        x: [..., K], float32, float16, bfloat16 or float64, any strides; zero rows are fine.
        weight: [N, K], any floating dtype, as in torch.nn.Linear; rounded to `x`'s dtype for the products.
        bias: [N], any floating dtype, or None.
        backend: `"triton"`, `"cublas"` (the vendor's matmul, then GELU), `"eager"`, or None for automatic choice.

    Returns:
        [..., N] in `x`'s dtype, contiguous.

    Raises:
        ValueError: a shape or dtype that does not fit.
        BackendError: the backend asked for cannot run this call.
    """
    check_linear("linear_gelu", x, weight, bias)
    name = backends.select("linear_gelu", backend, x, weight, bias)
    if name == "cublas":
        return F.gelu(linear(x, weight, bias))
    if name == backends.EAGER:
        with own_dtypes(x, uniform=True):
            return reference_linear_gelu(x, weight, bias)
    result: Tensor
    if _wants_gradients(x, weight, bias):
        result = _LinearGelu.apply(x, weight, bias)
    else:
        result = _gelu_forward(x, weight.to(x.dtype), bias, False)[0]
    return result


def linear_residual(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    residual: Tensor,  # [..., N]
    gamma: Tensor | None = None,  # [N]
    *,
    row_scale: Tensor | None = None,  # [rows / rows_per_scale]
    rows_per_scale: int = 1,
    backend: str | None = None,
) -> Tensor:
    """residual + row_scale * gamma * (x weight^T + bias), in one kernel.

    Sums and the addition are float32. Backward keeps neither the branch's output nor computes it again: with
    G = grad^T x, gamma's gradient is rowsum(weight G) + bias colsum(grad). All gradients are deterministic as far as
    the vendor's matmuls are.

    Args:
        x: [..., K], float32, float16, bfloat16 or float64, any strides.
        weight: [N, K] in `x`'s dtype.
        bias: [N], any floating dtype, or None.
        residual: [..., N] stream, float32 as a rule; the result has its dtype.
        gamma: [N] LayerScale, or None for one.
        row_scale: [rows / rows_per_scale] factors of the branch, without gradient (stochastic depth). Where it is 0 the
            residual passes unchanged; `x` must be finite there all the same when gradients are wanted.
        rows_per_scale: consecutive rows that share a factor.
        backend: `"triton"`, `"cublas"` (the vendor's matmul, then `residual_norm`), `"eager"`, or None.

    Returns:
        [..., N] in the residual's dtype, contiguous.

    Raises:
        ValueError: a shape or dtype that does not fit.
        BackendError: the backend asked for cannot run this call.
    """
    op = "linear_residual"
    check_linear(op, x, weight, bias)
    if weight.dtype != x.dtype:
        raise ValueError(
            f"{op}: weight: expected {x.dtype} like x, got {weight.dtype}; convert one: weight.to(x.dtype)"
        )
    channels = weight.shape[0]
    if residual.shape != (*x.shape[:-1], channels) or not residual.is_floating_point():
        raise ValueError(
            f"{op}: residual: expected {[*x.shape[:-1], channels]} floating point, got {list(residual.shape)} "
            f"{residual.dtype}; it has a row for every row of x and a channel for every output"
        )
    check_vector(op, "gamma", gamma, channels)
    check_row_scale(op, row_scale, rows_per_scale, residual.numel() // channels)
    name = backends.select(op, backend, x, weight, bias, residual, gamma, row_scale)
    scale: dict[str, Any] = {"row_scale": row_scale, "rows_per_scale": rows_per_scale}
    if name == "cublas":
        with own_dtypes(x, uniform=True):
            branch = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        return residual_norm(residual, branch, gamma, normalize=False, **scale)[0]
    if name == backends.EAGER:
        with own_dtypes(x, uniform=True):
            return reference_linear_residual(x, weight, bias, residual, gamma, **scale)
    result: Tensor = _LinearResidual.apply(*distinct(x, weight, bias, residual, gamma, row_scale), rows_per_scale)
    return result
