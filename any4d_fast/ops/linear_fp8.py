"""Linear layers on e4m3 rows, for inference: quantisation, the product with its epilogue, and what rounding loses."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import backends
from ..reference import linear_fp8 as reference
from ..reference.attention_fp8 import E4M3
from ..reference.linear_fp8 import Rows8
from ._library import define, launchers
from .layer_norm import NARROW, check_rows, check_vector, row_reasons

__all__ = ["Rows8", "correct_bias", "linear_fp8", "quantize_rows"]

CUBLAS = "cublas"
MAJORS = (9, 10)
"""Compute capabilities (Hopper, and Blackwell with 228 KB of shared memory) that the kernels have layouts for."""


def _quantize_impl(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = launchers("linear_fp8", backend).quantize_rows(x)
    return found


def _quantize_fake(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _correct_impl(
    x: Tensor, x_scale: Tensor | None, lost: Tensor, lost_scale: Tensor, bias: Tensor | None, backend: str
) -> Tensor:
    found: Tensor = launchers("linear_fp8", backend).correct_bias(x, x_scale, lost, lost_scale, bias)
    return found


def _correct_fake(x: Tensor, x_scale: Tensor | None, lost: Tensor, *_: object) -> Tensor:
    return lost.new_empty(lost.shape[0], dtype=torch.float32)


def _linear_impl(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    inverse: Tensor | None,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    if backend == CUBLAS:
        return _scaled_mm(x, x_scale, weight, weight_scale, bias, out_dtype)
    run = launchers("linear_fp8", backend).linear_fp8
    found: Tensor = run(x, x_scale, weight, weight_scale, bias, inverse, out_dtype)
    return found


def _linear_fake(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    inverse: Tensor | None,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype if inverse is None else E4M3)


_quantize = define("quantize_rows", "(Tensor x, str backend) -> (Tensor, Tensor)", _quantize_impl, _quantize_fake)
_correct = define(
    "correct_bias",
    "(Tensor x, Tensor? x_scale, Tensor lost, Tensor lost_scale, Tensor? bias, str backend) -> Tensor",
    _correct_impl,
    _correct_fake,
)
_linear = define(
    "linear_fp8",
    "(Tensor x, Tensor? x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? inverse, "
    "ScalarType out_dtype, str backend) -> Tensor",
    _linear_impl,
    _linear_fake,
)


def _scaled_mm(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    fast: bool = True,
) -> Tensor:
    """The vendor's product; `fast` keeps its sums in the tensor cores, as the Triton kernel does."""
    ones = torch.ones(x.shape[0], device=x.device) if x_scale is None else x_scale
    # The bias has the output's dtype there. In float32, the epilogue of an fp8 product does not take one.
    short = None if bias is None else bias.to(out_dtype)
    if not x.shape[0]:
        return x.new_empty((0, weight.shape[0]), dtype=out_dtype)
    return torch._scaled_mm(
        x,
        weight.t(),
        scale_a=ones[:, None],
        scale_b=weight_scale[None],
        bias=short,
        out_dtype=out_dtype,
        use_fast_accum=fast,
    )


def hopper_reasons(tensor: Tensor) -> list[str]:
    """Why a tensor's device has no tensor cores for e4m3 that the kernels know."""
    if backends.interpreting() or torch.compiler.is_compiling() or not tensor.is_cuda:
        return []
    own = backends.capability(tensor.device.index or 0)
    return [] if own[0] in MAJORS else [f"compute capability {own[0]}.{own[1]} is neither 9.x nor 10.x"]


def _quantize_reasons(x: Tensor) -> list[str]:
    return [*row_reasons(x.shape[-1], x), *hopper_reasons(x)]


def _correct_reasons(x: Rows8, lost: Rows8, bias: Tensor | None) -> list[str]:
    return [*backends.triton_reasons(x.values, lost.values, bias), *hopper_reasons(x.values)]


def _size_reasons(x: Rows8, weight: Rows8) -> list[str]:
    sizes = {"inputs": x.values.shape[1], "outputs": weight.values.shape[0]}
    why_not = [f"{size} {name} are not a multiple of 16" for name, size in sizes.items() if size % 16]
    if not torch.compiler.is_compiling() and (x.values.data_ptr() % 16 or weight.values.data_ptr() % 16):
        why_not.append("rows do not begin at a multiple of 16 bytes")
    return why_not


def _triton_reasons(
    x: Rows8, weight: Rows8, bias: Tensor | None, inverse: Tensor | None, out_dtype: torch.dtype
) -> list[str]:
    why_not = [*backends.triton_reasons(x.values, weight.values, bias, inverse), *hopper_reasons(x.values)]
    if out_dtype not in NARROW:
        why_not.append(f"dtype {out_dtype} is not float32, float16 or bfloat16")
    return [*why_not, *_size_reasons(x, weight)]


def _cublas_reasons(
    x: Rows8, weight: Rows8, bias: Tensor | None, inverse: Tensor | None, out_dtype: torch.dtype
) -> list[str]:
    why_not = [*backends.not_on_cuda("cuBLAS runs", x.values), *hopper_reasons(x.values)]
    if inverse is not None:
        why_not.append("GELU and the rounding to e4m3 would need a kernel of their own")
    if out_dtype != torch.bfloat16:
        why_not.append(f"products of rows with scales come in bfloat16, not {out_dtype}")
    return [*why_not, *_size_reasons(x, weight)]


backends.register("quantize_rows", triton=_quantize_reasons)
backends.register("correct_bias", triton=_correct_reasons)
backends.register("linear_fp8", triton=_triton_reasons, cublas=_cublas_reasons)


def refuse_gradients(op: str, *tensors: Tensor | None) -> None:
    """Raise where autograd would expect a backward, which 8-bit ops do not have."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"{op}: expected a call without gradients, got tensors that require them; this op has no backward: "
            "call it under torch.no_grad()"
        )


def _check_rows8(op: str, name: str, rows: Rows8, scaled: bool) -> None:
    values, scale = rows
    if values.ndim != 2 or values.dtype != E4M3 or not values.is_contiguous() or not values.shape[1]:
        raise ValueError(
            f"{op}: {name}.values: expected contiguous [rows, channels] float8_e4m3fn, got {list(values.shape)} "
            f"{values.dtype}; quantize_rows makes them"
        )
    if scale is None and not scaled:
        return
    if scale is None or scale.shape != values.shape[:1] or scale.dtype != torch.float32 or not scale.is_contiguous():
        found = None if scale is None else f"{list(scale.shape)} {scale.dtype}"
        raise ValueError(
            f"{op}: {name}.scale: expected contiguous [{values.shape[0]}] float32, got {found}; quantize_rows makes it"
        )


def quantize_rows(x: Tensor, *, backend: str | None = None) -> Rows8:
    """Round rows to e4m3, each with a scale of its own.

    A scale is the smallest power of two that keeps the row's largest value within 448. e4m3 is a floating-point format:
    other factors gain nothing, and these multiply exactly. A row with an infinite value has a scale of NaN.

    Args:
        x: [..., C], float32, float16 or bfloat16 (any floating dtype: eager only), any strides.
        backend: `"triton"` (Hopper or newer), `"eager"`, or None for automatic choice.

    Returns:
        values [..., C] float8_e4m3fn, contiguous, and scale [...] float32.

    Raises:
        RuntimeError: gradients are wanted.
        ValueError: a shape or dtype that does not fit.
        BackendError: the backend asked for cannot run this call.
    """
    check_rows("quantize_rows", "x", x)
    refuse_gradients("quantize_rows", x)
    name = backends.select("quantize_rows", backend, x)
    return reference.quantize_rows(x) if name == backends.EAGER else Rows8(*_quantize(x, name))


def correct_bias(x: Rows8, lost: Rows8, bias: Tensor | None, *, backend: str | None = None) -> Tensor:
    """The bias that gives back what a weight lost in rounding, for the mean row.

    A rounded weight errs by the same matrix in every row, so its error of the rows' common part is common to all
    outputs: it adds up from layer to layer where other roundings average out. bias + lost mean(x) takes it away; the
    mean is that of 64 rows, spread evenly.

    Args:
        x: [rows, K], what the layer reads.
        lost: [N, K], the weight less what it was rounded to, itself in e4m3.
        bias: [N], any floating dtype, or None for zero.
        backend: `"triton"` (Hopper or newer), `"eager"`, or None for automatic choice.

    Returns:
        [N] float32.

    Raises:
        ValueError: a shape or dtype that does not fit.
        BackendError: the backend asked for cannot run this call.
    """
    _check_rows8("correct_bias", "x", x, scaled=False)
    _check_rows8("correct_bias", "lost", lost, scaled=True)
    _check_width("correct_bias", "lost", x, lost)
    check_vector("correct_bias", "bias", bias, lost.values.shape[0])
    refuse_gradients("correct_bias", bias)
    name = backends.select("correct_bias", backend, x, lost, bias)
    if name == backends.EAGER:
        return reference.correct_bias(x, lost, bias)
    found: Tensor = _correct(x.values, x.scale, lost.values, lost.scale, bias, name)
    return found


def _check_width(op: str, name: str, x: Rows8, weight: Rows8) -> None:
    if weight.values.shape[1] != x.values.shape[1]:
        raise ValueError(
            f"{op}: {name}.values: expected [N, {x.values.shape[1]}] (outputs, inputs) for x "
            f"{list(x.values.shape)}, got {list(weight.values.shape)}; the weight of torch.nn.Linear has this layout"
        )


def linear_fp8(
    x: Rows8,
    weight: Rows8,
    bias: Tensor | None = None,  # [N]
    *,
    inverse: Tensor | None = None,  # [N]
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str | None = None,
) -> Tensor:
    """x weight^T + bias from e4m3 rows; with `inverse`, GELU of it, rounded to e4m3 for the layer that follows.

    Products are exact, sums are the tensor cores': about 14 bits on Hopper, where the roundings to e4m3 left 5.

    Args:
        x: [rows, K], with a scale for every row or without.
        weight: [N, K] and a scale for every output, as `quantize_rows` makes them of torch.nn.Linear's weight.
        bias: [N], any floating dtype, or None. The backend "cublas" rounds it to `out_dtype`.
        inverse: [N] float32 factors on the activated outputs, such that none passes 448 (those that do saturate). Their
            reciprocals belong into the columns of the next weight.
        out_dtype: of the result without `inverse`: bfloat16, float16 or float32.
        backend: `"triton"` (Hopper or newer), `"cublas"` (without `inverse`), `"eager"` (the same roundings in
            PyTorch), or None for automatic choice.

    Returns:
        [rows, N] in `out_dtype`; with `inverse` float8_e4m3fn.

    Raises:
        RuntimeError: gradients are wanted.
        ValueError: a shape or dtype that does not fit.
        BackendError: the backend asked for cannot run this call.
    """
    op = "linear_fp8"
    _check_rows8(op, "x", x, scaled=False)
    _check_rows8(op, "weight", weight, scaled=True)
    _check_width(op, "weight", x, weight)
    check_vector(op, "bias", bias, weight.values.shape[0])
    check_vector(op, "inverse", inverse, weight.values.shape[0])
    refuse_gradients(op, bias, inverse)
    name = backends.select(op, backend, x, weight, bias, inverse, out_dtype)
    if name == backends.EAGER:
        return reference.linear_fp8(x, weight, bias, inverse=inverse, out_dtype=out_dtype)
    run = functools.partial(_linear, x.values, x.scale, weight.values, weight.scale)
    found: Tensor = run(bias, inverse, out_dtype, name)
    return found
