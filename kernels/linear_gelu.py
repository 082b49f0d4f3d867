"""gelu(x weight^T + bias) with bias and erf GELU in the matmul's epilogue, and its backward pass."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._linear import LinearTile, launch, linear_cases
from ._rows import RowTile, as_rows, column_sums, strips
from .aot import AotCase
from .linear import weight_gradient

# 256 channels a program are 16 bytes a lane in 16 bits; 8 rows a step give every lane 16 elements of two inputs in
# flight, twice with the second stage; four programs a multiprocessor hide what latency is left.
BACKWARD_TILE = RowTile(rows=8, chunk=256, warps=4, stages=2, programs=4)


@triton.jit
def gelu_derivative(x, EXACT: tl.constexpr):
    """Phi(x) + x phi(x). Without EXACT, erf is Abramowitz and Stegun's 7.1.26 (error 1.5e-7), sharing phi's exp."""
    density = tl.exp(-0.5 * x * x)
    if EXACT:
        cumulative = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        t = 1.0 / (1.0 + 0.23164189 * tl.abs(x))
        p = t * 1.061405429 - 1.453152027
        p = p * t + 1.421413741
        p = p * t - 0.284496736
        p = p * t + 0.254829592
        upper = 0.5 * p * t * density
        cumulative = tl.where(x < 0.0, upper, 1.0 - upper)
    return cumulative + x * density * 0.3989422804014327


@triton.jit(do_not_specialize=["M"])
def gelu_backward_kernel(
    grad,  # [M, N]
    pre,  # [M, N], contiguous
    grad_pre,  # [M, N], contiguous
    partials,  # [strips, N] float32 or unused
    M,
    N,
    grad_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    EXACT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
):
    """grad_pre = grad gelu'(pre), and its sum over this program's rows."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < N
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in tl.range(tl.program_id(1), tl.cdiv(M, ROWS), tl.num_programs(1), num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < M)[:, None] & inside[None, :]
        g = tl.load(grad + row[:, None] * grad_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.load(pre + row[:, None] * N + column[None, :], mask=mask, other=0.0).to(tl.float32)
        g = g * gelu_derivative(value, EXACT)
        tl.store(grad_pre + row[:, None] * N + column[None, :], g.to(grad_pre.dtype.element_ty), mask=mask)
        if NEED_BIAS:
            total += g
    if NEED_BIAS:
        tl.store(partials + tl.program_id(1).to(tl.int64) * N + column, tl.sum(total, axis=0), mask=inside)


def gelu_backward(
    grad: Tensor,  # [rows, N], unit stride in N
    pre: Tensor,  # [rows, N], contiguous
    bias_dtype: torch.dtype | None,
    tile: RowTile = BACKWARD_TILE,
) -> tuple[Tensor, Tensor]:
    """grad gelu'(pre) in pre's dtype, and its column sums in `bias_dtype` (empty if that is None)."""
    (rows, n), device = grad.shape, grad.device
    grad_pre = torch.empty(rows, n, device=device, dtype=pre.dtype)
    if rows == 0:
        return grad_pre, torch.zeros(n if bias_dtype else 0, device=device, dtype=bias_dtype or torch.float32)
    grid = strips(rows, n, tile, device)
    partials = torch.empty(1, grid[1] if bias_dtype else 0, n, device=device, dtype=torch.float32)
    with torch.cuda.device_of(grad):
        gelu_backward_kernel[grid](
            grad,
            pre,
            grad_pre,
            partials if bias_dtype else grad_pre,
            rows,
            n,
            grad.stride(0),
            ROWS=tile.rows,
            COLUMNS=tile.chunk,
            STAGES=tile.stages,
            EXACT=pre.dtype == torch.float32,
            NEED_BIAS=bias_dtype is not None,
            num_warps=tile.warps,
        )
        grad_bias = column_sums(partials, [bias_dtype])[0] if bias_dtype else partials.new_empty(0)
    return grad_pre, grad_bias


def linear_gelu_forward(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    keep: bool,
    tile: LinearTile | None = None,
    exact: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """gelu(x weight^T + bias), [..., N], and the pre-activation in the same dtype (empty without `keep`)."""
    shape = (*x.shape[:-1], weight.shape[0])
    out = torch.empty(shape, device=x.device, dtype=x.dtype)
    pre = torch.empty(shape if keep else (0,), device=x.device, dtype=x.dtype)
    if out.numel():
        flat_pre = pre.view(-1, shape[-1]) if keep else None
        launch(as_rows(x), as_rows(weight), bias, out.view(-1, shape[-1]), pre=flat_pre, tile=tile, exact=exact)
    return out, pre


def linear_gelu_backward(
    grad: Tensor,  # [..., N]
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K] in x's dtype
    pre: Tensor,  # [..., N], contiguous
    need_x: bool,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; empty tensors where not wanted. The matmuls are the vendor library's."""
    grad_pre, grad_bias = gelu_backward(as_rows(grad), pre, bias_dtype)
    grad_x = (grad_pre @ weight).view(x.shape) if need_x else x.new_empty(0)
    grad_weight = x.new_empty(0) if weight_dtype is None else weight_gradient(grad_pre, as_rows(x), weight_dtype)
    return grad_x, grad_weight, grad_bias


def aot_cases() -> list[AotCase]:
    """Every production configuration: inference and training epilogues, and the backward pass."""
    variants: dict[str, dict[str, Any]] = {"": {"GELU": True}, "_training": {"GELU": True, "STORE_PRE": True}}
    cases = linear_cases("linear_gelu", variants)
    for dtype in ("bf16", "fp16", "fp32"):
        pointers = {**dict.fromkeys(("grad", "pre", "grad_pre"), f"*{dtype}"), "partials": "*fp32"}
        tile = BACKWARD_TILE
        constants = {"ROWS": tile.rows, "COLUMNS": tile.chunk, "STAGES": tile.stages}
        cases.append(
            AotCase(
                name=f"gelu_backward_{dtype}",
                kernel=gelu_backward_kernel,
                types={**pointers, **dict.fromkeys(("M", "N", "grad_stride"), "i32")},
                constants={**constants, "EXACT": dtype == "fp32", "NEED_BIAS": True},
                aligned=(*pointers, "N", "grad_stride"),
                options={"num_warps": tile.warps},
            )
        )
    return cases
