"""`linear`: a linear layer of 16-bit rows under float32 parameters, without the copies between the two."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..reference.linear import linear as reference_linear
from ._library import define, own_dtypes
from .layer_norm import NARROW, check_rows, check_vector


def _forward_impl(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with own_dtypes(x, uniform=True):
        out = F.linear(x.reshape(-1, x.shape[-1]), weight, None if bias is None else bias.to(x.dtype))
    return out.view(*x.shape[:-1], weight.shape[0])


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_forward = define(
    "linear_forward",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _forward_impl,
    _forward_fake,
)


def _backward_impl(
    grad: Tensor, x: Tensor | None, weight: Tensor | None, weight_dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.linear import linear_backward

    with own_dtypes(grad, uniform=True):
        return linear_backward(grad, x, weight, weight_dtype, bias_dtype)


def _backward_fake(
    grad: Tensor, x: Tensor | None, weight: Tensor | None, weight_dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    n = grad.shape[-1]
    return (
        grad.new_empty((0,) if weight is None else (*grad.shape[:-1], weight.shape[1])),
        grad.new_empty((0,) if x is None else (n, x.shape[-1]), dtype=weight_dtype),
        grad.new_empty(n if bias_dtype else 0, dtype=bias_dtype or torch.float32),
    )


_backward = define(
    "linear_backward",
    "(Tensor grad, Tensor? x, Tensor? weight, ScalarType weight_dtype, ScalarType? bias_dtype) "
    "-> (Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        narrow = weight.to(x.dtype)
        need_x, need_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if need_weight else None, narrow if need_x else None)
        ctx.weight_dtype = weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _forward(x, narrow, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad_x, grad_weight, grad_bias = _backward(
            grad,
            x if need_weight else None,
            weight if need_x else None,
            ctx.weight_dtype,
            ctx.bias_dtype if need_bias else None,
        )
        return grad_x if need_x else None, grad_weight if need_weight else None, grad_bias if need_bias else None


def triton_reasons(x: Tensor, *others: Tensor | None) -> list[str]:
    """Why the Triton kernels around a linear layer cannot run on these tensors."""
    why_not = backends.triton_reasons(x, *others)
    dtypes = {t.dtype for t in (x, *others) if t is not None}
    for dtype in sorted(dtypes - set(NARROW), key=str):
        why_not.append(f"dtype {dtype} is not float32, float16 or bfloat16")
    return why_not


backends.register("linear", triton=triton_reasons)


def check_linear(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless rows, weight and bias belong to one layer."""
    check_rows(op, "x", x)
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1] or not weight.shape[0]:
        raise ValueError(
            f"{op}: weight: expected [N, {x.shape[-1]}] (outputs, inputs) for x {list(x.shape)}, "
            f"got {list(weight.shape)}; the weight of torch.nn.Linear has this layout"
        )
    if not weight.is_floating_point():
        raise ValueError(f"{op}: weight: expected a floating dtype, got {weight.dtype}; dequantize it first")
    check_vector(op, "bias", bias, weight.shape[0])


def linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None = None,  # [N]
    *,
    backend: str | None = None,
) -> Tensor:
    """x weight^T + bias in `x`'s dtype, with gradients in the parameters' own dtypes.

    The three matmuls are the vendor library's. Under 16-bit rows a float32 weight gets its gradient from the matmul's
    float32 sums, not rounded between, and the bias gradient is one deterministic pass with float32 sums. Autocast
    changes nothing: rows, products and result have `x`'s dtype.

    Args:
        x: [..., K], float32, float16, bfloat16 or float64, any strides; zero rows are fine.
        weight: [N, K], any floating dtype, as in torch.nn.Linear; rounded to `x`'s dtype for the products.
        bias: [N], any floating dtype, or None; rounded to `x`'s dtype.
        backend: `"triton"` (the vendor's matmuls, and Triton's bias gradient), `"eager"`, or None for automatic choice.

    Returns:
        [..., N] in `x`'s dtype, contiguous.

    Raises:
        ValueError: a shape or dtype that does not fit.
        BackendError: the backend asked for cannot run this call.
    """
    check_linear("linear", x, weight, bias)
    if backends.select("linear", backend, x, weight, bias) == backends.EAGER:
        with own_dtypes(x, uniform=True):
            return reference_linear(x, weight, bias)
    result: Tensor = _Linear.apply(x, weight, bias)
    return result
