"""`residual_norm`: residual stream + LayerScale x branch, and the next LayerNorm of the sum, in one pass."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..reference.residual_norm import residual_norm as reference_residual_norm
from ._library import define, distinct
from .layer_norm import check_out_dtype, check_rows, check_vector, row_reasons

_ARGUMENTS = (
    "Tensor branch, Tensor? gamma, Tensor? weight, Tensor? bias, float eps, Tensor? row_scale, int rows_per_scale, "
    "bool normalize, ScalarType out_dtype"
)


def _forward_impl(residual: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..kernels.residual_norm import residual_norm_forward

    return residual_norm_forward(residual, *arguments)


def _forward_fake(
    residual: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    row_scale: Tensor | None,
    rows_per_scale: int,
    normalize: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = residual.numel() // residual.shape[-1]
    normed = residual.new_empty(residual.shape if normalize else (0,), dtype=out_dtype)
    mean = residual.new_empty(rows if normalize else 0, dtype=torch.float32)
    return residual.new_empty(residual.shape), normed, mean, torch.empty_like(mean)


_forward = define(
    "residual_norm_forward",
    f"(Tensor residual, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
)


def _inplace_impl(residual: Tensor, *arguments: Any) -> Tensor:
    from ..kernels.residual_norm import residual_norm_forward

    return residual_norm_forward(residual, *arguments, inplace=True)[1]


def _inplace_fake(residual: Tensor, *arguments: Any) -> Tensor:
    return _forward_fake(residual, *arguments)[1]


_inplace = define(
    "residual_norm_inplace", f"(Tensor(a!) residual, {_ARGUMENTS}) -> Tensor", _inplace_impl, _inplace_fake
)


def _backward_impl(
    grad_new: Tensor | None,
    grad_normed: Tensor | None,
    new: Tensor | None,
    branch: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor | None,
    row_scale: Tensor | None,
    rows_per_scale: int,
    mean: Tensor,
    rstd: Tensor,
    residual_dtype: torch.dtype | None,
    branch_dtype: torch.dtype | None,
    gamma_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from ..kernels.residual_norm import residual_norm_backward

    dtypes = [residual_dtype, branch_dtype, gamma_dtype, weight_dtype, bias_dtype]
    grads = residual_norm_backward(
        grad_new, grad_normed, new, branch, gamma, weight, row_scale, rows_per_scale, mean, rstd, dtypes
    )
    return grads[0], grads[1], grads[2], grads[3], grads[4]


def _backward_fake(
    grad_new: Tensor | None,
    grad_normed: Tensor | None,
    new: Tensor | None,
    branch: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor | None,
    row_scale: Tensor | None,
    rows_per_scale: int,
    mean: Tensor,
    rstd: Tensor,
    residual_dtype: torch.dtype | None,
    branch_dtype: torch.dtype | None,
    gamma_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    some = grad_new if grad_new is not None else grad_normed
    assert some is not None
    empty = [torch.float32 if d is None else d for d in (gamma_dtype, weight_dtype, bias_dtype)]
    channels = some.shape[-1]
    return (
        some.new_empty(some.shape if residual_dtype else (0,), dtype=residual_dtype or torch.float32),
        some.new_empty(some.shape if branch_dtype else (0,), dtype=branch_dtype or torch.float32),
        some.new_empty(channels if gamma_dtype else 0, dtype=empty[0]),
        some.new_empty(channels if weight_dtype else 0, dtype=empty[1]),
        some.new_empty(channels if bias_dtype else 0, dtype=empty[2]),
    )


_backward = define(
    "residual_norm_backward",
    "(Tensor? grad_new, Tensor? grad_normed, Tensor? new, Tensor? branch, Tensor? gamma, Tensor? weight, "
    "Tensor? row_scale, int rows_per_scale, Tensor mean, Tensor rstd, ScalarType? residual_dtype, "
    "ScalarType? branch_dtype, ScalarType? gamma_dtype, ScalarType? weight_dtype, ScalarType? bias_dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        branch: Tensor,
        gamma: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        row_scale: Tensor | None,
        rows_per_scale: int,
        normalize: bool,
        out_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        new, normed, mean, rstd = _forward(
            residual, branch, gamma, weight, bias, eps, row_scale, rows_per_scale, normalize, out_dtype
        )
        ctx.set_materialize_grads(False)
        # Only gamma's gradient reads the branch, and only LayerNorm's the new stream.
        kept_branch = branch if gamma is not None and ctx.needs_input_grad[2] else None
        ctx.save_for_backward(new if normalize else None, kept_branch, gamma, weight, row_scale, mean, rstd)
        ctx.rows_per_scale = rows_per_scale
        vectors = [None if t is None else t.dtype for t in (gamma, weight, bias)]
        ctx.dtypes = [residual.dtype, branch.dtype, *vectors]
        return new, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_new: Tensor | None, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        new, branch, gamma, weight, row_scale, mean, rstd = ctx.saved_tensors
        if new is None:
            grad_normed = None
        needs = list(ctx.needs_input_grad[:5])
        if grad_normed is None:
            needs[3] = needs[4] = False
        # Without a norm the residual's gradient is the stream's as it is: nothing to compute or to write.
        passed_on = grad_new if needs[0] and grad_normed is None else None
        if passed_on is not None:
            needs[0] = False
        grads: list[Tensor | None] = [None] * 5
        if (grad_new is not None or grad_normed is not None) and any(needs):
            dtypes = [d if need else None for d, need in zip(ctx.dtypes, needs, strict=True)]
            computed = _backward(
                grad_new, grad_normed, new, branch, gamma, weight, row_scale, ctx.rows_per_scale, mean, rstd, *dtypes
            )
            grads = [g if need else None for g, need in zip(computed, needs, strict=True)]
        if passed_on is not None:
            grads[0] = passed_on
        return (*grads, None, None, None, None, None)


def _triton_reasons(
    residual: Tensor,
    branch: Tensor,
    vectors: tuple[Tensor | None, ...],
    row_scale: Tensor | None,
    out_dtype: torch.dtype | None,
) -> list[str]:
    return row_reasons(residual.shape[-1], residual, branch, *vectors, row_scale, out_dtype=out_dtype)


backends.register("residual_norm", triton=_triton_reasons)


def check_branch(op: str, branch: Tensor, residual: Tensor) -> None:
    """Raise unless `branch` is floating point and has a row for every row of `residual`."""
    if branch.shape != residual.shape or not branch.is_floating_point():
        raise ValueError(
            f"{op}: branch: expected {list(residual.shape)} floating point like the residual, "
            f"got {list(branch.shape)} {branch.dtype}; both have a row for every token"
        )


def check_row_scale(op: str, row_scale: Tensor | None, rows_per_scale: int, rows: int) -> None:
    """Raise unless `row_scale` is None or one gradient-free factor for every group of rows."""
    if row_scale is None:
        return
    fits = row_scale.ndim == 1 and rows_per_scale >= 1 and row_scale.shape[0] * rows_per_scale == rows
    if not fits or not row_scale.is_floating_point():
        raise ValueError(
            f"{op}: row_scale: expected [rows / rows_per_scale] floating point with {rows} rows and "
            f"rows_per_scale={rows_per_scale}, got {list(row_scale.shape)} {row_scale.dtype}; "
            "give one factor for every group of rows_per_scale consecutive rows"
        )
    if row_scale.requires_grad:
        raise ValueError(
            f"{op}: row_scale: expected a tensor without requires_grad (it is stochastic depth's factor), "
            "got one that requires a gradient; detach it, or multiply the branch by it beforehand"
        )


def _check_inplace(residual: Tensor, *others: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (residual, *others)):
        raise ValueError(
            "residual_norm: inplace: expected no gradients, got inputs that require them; "
            "use torch.no_grad() or inplace=False"
        )
    try:
        rows = residual.view(-1, residual.shape[-1]) if residual.numel() else residual
    except RuntimeError as error:
        raise ValueError(
            f"residual_norm: residual: expected strides that allow a [rows, C] view with inplace=True, got shape "
            f"{list(residual.shape)} with strides {list(residual.stride())}; use inplace=False"
        ) from error
    if rows.numel() and rows.shape[-1] > 1 and rows.stride(-1) != 1:
        raise ValueError(
            f"residual_norm: residual: expected unit stride in the channels with inplace=True, got strides "
            f"{list(residual.stride())}; use inplace=False"
        )


@overload
def residual_norm(
    residual: Tensor,
    branch: Tensor,
    gamma: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    row_scale: Tensor | None = None,
    rows_per_scale: int = 1,
    normalize: Literal[True] = True,
    inplace: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def residual_norm(
    residual: Tensor,
    branch: Tensor,
    gamma: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    row_scale: Tensor | None = None,
    rows_per_scale: int = 1,
    normalize: bool,
    inplace: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]: ...


def residual_norm(
    residual: Tensor,  # [..., C]
    branch: Tensor,  # [..., C]
    gamma: Tensor | None = None,  # [C]
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    eps: float = 1e-6,
    *,
    row_scale: Tensor | None = None,  # [rows / rows_per_scale]
    rows_per_scale: int = 1,
    normalize: bool = True,
    inplace: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Add a branch to the residual stream and normalise the sum: what ends one layer and begins the next.

    new = residual + row_scale * gamma * branch, normed = LayerNorm(new) * weight + bias; arithmetic in float32 and
    statistics of `new` as it is stored. Backward is one pass over both gradients; gradients of `gamma`, `weight` and
    `bias` are deterministic.

    Args:
        residual: [..., C] stream, float32 as a rule, any floating dtype; it keeps its dtype.
        branch: [..., C], the layer's output, any floating dtype.
        gamma: [C] LayerScale, or None for one.
        weight: [C] gain of the next LayerNorm, or None for one.
        bias: [C] shift of the next LayerNorm, or None for zero.
        eps: added to the variance.
        row_scale: [rows / rows_per_scale] factors of the branch, without gradient: stochastic depth's keep / (1 - p)
            per sample, or a 0/1 mask of rows. Where it is 0 the row of `branch` is not read and may hold anything.
        rows_per_scale: consecutive rows that share a factor (tokens a sample).
        normalize: False returns the sum alone (the last block).
        inplace: overwrite `residual` with the sum (inference; its strides must allow a [rows, C] view).
        out_dtype: dtype of `normed`; `branch`'s by default.
        backend: `"triton"`, `"eager"`, or None for automatic choice.

    Returns:
        new [..., C] in the residual's dtype (`residual` itself with `inplace`), and normed [..., C] or None.

    Raises:
        ValueError: a shape or dtype that does not fit, or `inplace` where gradients are wanted.
        BackendError: the backend asked for cannot run this call.
    """
    check_rows("residual_norm", "residual", residual)
    check_branch("residual_norm", branch, residual)
    channels = residual.shape[-1]
    for name, vector in (("gamma", gamma), ("weight", weight), ("bias", bias)):
        check_vector("residual_norm", name, vector, channels)
    check_out_dtype("residual_norm", out_dtype)
    check_row_scale("residual_norm", row_scale, rows_per_scale, residual.numel() // channels)
    vectors = (gamma, weight, bias)
    if inplace:
        _check_inplace(residual, branch, *vectors)
    name = backends.select("residual_norm", backend, residual, branch, vectors, row_scale, out_dtype)
    if name == backends.EAGER:
        new, normed = reference_residual_norm(
            residual,
            branch,
            *vectors,
            eps,
            row_scale=row_scale,
            rows_per_scale=rows_per_scale,
            normalize=normalize,
            out_dtype=out_dtype,
        )
        return (residual.copy_(new) if inplace else new), normed
    dtype = out_dtype or branch.dtype
    settings = (rows_per_scale, normalize, dtype)
    if inplace:
        normed = _inplace(residual, branch, *vectors, eps, row_scale, *settings)
        return residual, normed if normalize else None
    *given, scale = distinct(residual, branch, *vectors, row_scale)
    new, normed = _ResidualNorm.apply(*given, eps, scale, *settings)
    return new, normed if normalize else None
