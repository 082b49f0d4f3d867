"""`layer_norm` and `residual_norm` that return e4m3 rows: who normalises a row holds all of it, and so its scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..reference.attention_fp8 import E4M3
from ..reference.layer_norm import layer_norm as reference_layer_norm
from ..reference.linear_fp8 import Rows8
from ..reference.linear_fp8 import quantize_rows as reference_quantize_rows
from ..reference.residual_norm import residual_norm as reference_residual_norm
from ._library import define, launchers
from .layer_norm import check_rows, check_vector, row_reasons
from .linear_fp8 import hopper_reasons, refuse_gradients
from .residual_norm import check_branch, check_row_scale

__all__ = ["layer_norm_fp8", "residual_norm_fp8"]


def _layer_norm_impl(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    values, _, scale = launchers("layer_norm", backend).layer_norm_forward(x, weight, bias, eps, E4M3)
    return values, scale.view(x.shape[:-1])


def _rows_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty(x.shape[:-1], dtype=torch.float32)


_layer_norm = define(
    "layer_norm_fp8",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, str backend) -> (Tensor, Tensor)",
    _layer_norm_impl,
    _rows_fake,
)


def _residual_norm_impl(
    residual: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    row_scale: Tensor | None,
    rows_per_scale: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    run = launchers("residual_norm", backend).residual_norm_forward
    _, values, _, scale = run(
        residual, branch, gamma, weight, bias, eps, row_scale, rows_per_scale, True, E4M3, inplace=True
    )
    return values, scale.view(residual.shape[:-1])


_residual_norm = define(
    "residual_norm_fp8",
    "(Tensor(a!) residual, Tensor branch, Tensor? gamma, Tensor? weight, Tensor? bias, float eps, Tensor? row_scale, "
    "int rows_per_scale, str backend) -> (Tensor, Tensor)",
    _residual_norm_impl,
    _rows_fake,
)


def _reasons(x: Tensor, *others: Tensor | None) -> list[str]:
    return [*row_reasons(x.shape[-1], x, *others), *hopper_reasons(x)]


backends.register("layer_norm_fp8", triton=_reasons)
backends.register("residual_norm_fp8", triton=_reasons)


def layer_norm_fp8(
    x: Tensor,  # [..., C]
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> Rows8:
    """`layer_norm`, each row rounded to e4m3 with a scale as `quantize_rows` takes it of the float32 result.

    Args:
        x, weight, bias, eps: see `layer_norm`.
        backend: `"triton"` (Hopper or newer), `"eager"`, or None for automatic choice.

    Returns:
        values [..., C] float8_e4m3fn, contiguous, and scale [...] float32.

    Raises:
        RuntimeError: gradients are wanted.
        ValueError: a shape or dtype that does not fit.
        BackendError: the backend asked for cannot run this call.
    """
    op = "layer_norm_fp8"
    check_rows(op, "x", x)
    check_vector(op, "weight", weight, x.shape[-1])
    check_vector(op, "bias", bias, x.shape[-1])
    refuse_gradients(op, x, weight, bias)
    name = backends.select(op, backend, x, weight, bias)
    if name == backends.EAGER:
        return reference_quantize_rows(reference_layer_norm(x, weight, bias, eps, out_dtype=torch.float32))
    return Rows8(*_layer_norm(x, weight, bias, eps, name))


def residual_norm_fp8(
    residual: Tensor,  # [..., C]
    branch: Tensor,  # [..., C]
    gamma: Tensor | None = None,  # [C]
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    eps: float = 1e-6,
    *,
    row_scale: Tensor | None = None,  # [rows / rows_per_scale]
    rows_per_scale: int = 1,
    backend: str | None = None,
) -> tuple[Tensor, Rows8]:
    """`residual_norm` in place, with the normed rows rounded to e4m3.

    Args:
        residual: [..., C] contiguous, overwritten with the sum.
        branch, gamma, weight, bias, eps, row_scale, rows_per_scale: see `residual_norm`.
        backend: `"triton"` (Hopper or newer), `"eager"`, or None for automatic choice.

    Returns:
        `residual`, and its LayerNorm as `layer_norm_fp8` returns it.

    Raises:
        RuntimeError: gradients are wanted.
        ValueError: a shape, dtype or stride that does not fit.
        BackendError: the backend asked for cannot run this call.
    """
    op = "residual_norm_fp8"
    check_rows(op, "residual", residual)
    check_branch(op, branch, residual)
    if not residual.is_contiguous():
        raise ValueError(
            f"{op}: residual: expected a contiguous tensor, which is overwritten, got strides "
            f"{list(residual.stride())}; use residual.contiguous()"
        )
    channels = residual.shape[-1]
    for label, vector in (("gamma", gamma), ("weight", weight), ("bias", bias)):
        check_vector(op, label, vector, channels)
    check_row_scale(op, row_scale, rows_per_scale, residual.numel() // channels)
    refuse_gradients(op, residual, branch, gamma, weight, bias)
    name = backends.select(op, backend, residual, branch, gamma, weight, bias, row_scale)
    if name == backends.EAGER:
        new, normed = reference_residual_norm(
            residual, branch, gamma, weight, bias, eps,
            row_scale=row_scale, rows_per_scale=rows_per_scale, out_dtype=torch.float32,
        )  # fmt: skip
        assert normed is not None
        return residual.copy_(new), reference_quantize_rows(normed)
    found = _residual_norm(residual, branch, gamma, weight, bias, eps, row_scale, rows_per_scale, name)
    return residual, Rows8(*found)
