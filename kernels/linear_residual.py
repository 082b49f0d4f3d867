"""residual + gamma (x weight^T + bias) in the matmul's epilogue, and its backward pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._linear import LinearTile, launch, linear_cases
from ._rows import RowTile, as_rows, column_sums, strips
from .aot import AotCase
from .linear_gelu import BACKWARD_TILE


@triton.jit(do_not_specialize=["M", "rows_per_scale"])
def branch_gradient_kernel(
    grad,  # [M, N]
    row_scale,  # [M / rows_per_scale] or unused
    out,  # [M, N], contiguous
    partials,  # [strips, N] float32
    M,
    N,
    grad_stride,
    rows_per_scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):
    """row_scale grad in the matmul's dtype, and its sum over this program's rows before rounding."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < N
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in tl.range(tl.program_id(1), tl.cdiv(M, ROWS), tl.num_programs(1), num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < M)[:, None] & inside[None, :]
        g = tl.load(grad + row[:, None] * grad_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_SCALE:
            g = g * tl.load(row_scale + row // rows_per_scale, mask=row < M, other=0.0).to(tl.float32)[:, None]
        tl.store(out + row[:, None] * N + column[None, :], g.to(out.dtype.element_ty), mask=mask)
        total += g
    tl.store(partials + tl.program_id(1).to(tl.int64) * N + column, tl.sum(total, axis=0), mask=inside)


def linear_residual_forward(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    residual: Tensor,  # [..., N]
    gamma: Tensor | None,  # [N]
    row_scale: Tensor | None,  # [rows / rows_per_scale]
    rows_per_scale: int,
    tile: LinearTile | None = None,
) -> Tensor:
    """residual + row_scale gamma (x weight^T + bias), [..., N] in the residual's dtype."""
    out = torch.empty(residual.shape, device=x.device, dtype=residual.dtype)
    if out.numel():
        launch(
            as_rows(x),
            as_rows(weight),
            bias,
            out.view(-1, weight.shape[0]),
            residual=as_rows(residual),
            gamma=gamma,
            row_scale=row_scale,
            rows_per_scale=rows_per_scale,
            tile=tile,
        )
    return out


def branch_gradient(
    grad: Tensor,  # [rows, N], unit stride in N
    row_scale: Tensor | None,  # [rows / rows_per_scale]
    rows_per_scale: int,
    dtype: torch.dtype,
    tile: RowTile = BACKWARD_TILE,
) -> tuple[Tensor, Tensor]:
    """row_scale grad in `dtype`, and its column sums in float32."""
    (rows, n), device = grad.shape, grad.device
    scaled = torch.empty(rows, n, device=device, dtype=dtype)
    if rows == 0:
        return scaled, torch.zeros(n, device=device, dtype=torch.float32)
    grid = strips(rows, n, tile, device)
    partials = torch.empty(1, grid[1], n, device=device, dtype=torch.float32)
    with torch.cuda.device_of(grad):
        branch_gradient_kernel[grid](
            grad,
            partials if row_scale is None else row_scale.contiguous(),
            scaled,
            partials,
            rows,
            n,
            grad.stride(0),
            rows_per_scale,
            ROWS=tile.rows,
            COLUMNS=tile.chunk,
            STAGES=tile.stages,
            HAS_SCALE=row_scale is not None,
            num_warps=tile.warps,
        )
        sums = column_sums(partials, [torch.float32])[0]
    return scaled, sums


def linear_residual_backward(
    grad: Tensor,  # [..., N]
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    gamma: Tensor | None,  # [N]
    row_scale: Tensor | None,  # [rows / rows_per_scale]
    rows_per_scale: int,
    need_x: bool,
    need_weight: bool,
    bias_dtype: torch.dtype | None,
    gamma_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and gamma; empty tensors where not wanted (the residual's is `grad`).

    With y = x W^T + b, g = row_scale grad and G = g^T x, gamma's gradient sum_rows(g y) is rowsum(W G) + b sum_rows(g):
    the branch's output is neither kept nor computed again.
    """
    n, flat = weight.shape[0], as_rows(x)
    scaled, sums = branch_gradient(as_rows(grad), row_scale, rows_per_scale, x.dtype)
    grads = [torch.empty(0, device=x.device, dtype=x.dtype) for _ in range(4)]
    factor = torch.ones(n, device=x.device) if gamma is None else gamma.float()
    if need_x:
        grads[0] = (scaled @ (weight.float() * factor[:, None]).to(x.dtype)).view(x.shape)
    if need_weight or gamma_dtype:
        product = (scaled.T @ flat).float()
        if need_weight:
            grads[1] = (product * factor[:, None]).to(weight.dtype)
        if gamma_dtype:
            along_bias = 0.0 if bias is None else bias.float() * sums
            grads[3] = ((weight.float() * product).sum(1) + along_bias).to(gamma_dtype)
    if bias_dtype:
        grads[2] = (sums * factor).to(bias_dtype)
    return grads[0], grads[1], grads[2], grads[3]


def aot_cases() -> list[AotCase]:
    """Every production configuration: LayerScale with and without stochastic depth, and the backward pass."""
    variants = {"": {"HAS_GAMMA": True}, "_scaled": {"HAS_GAMMA": True, "HAS_SCALE": True}}
    cases = linear_cases("linear_residual", variants)
    tile = BACKWARD_TILE
    for dtype in ("bf16", "fp16", "fp32"):
        pointers = {**dict.fromkeys(("grad", "row_scale", "partials"), "*fp32"), "out": f"*{dtype}"}
        cases.append(
            AotCase(
                name=f"branch_gradient_{dtype}",
                kernel=branch_gradient_kernel,
                types={**pointers, **dict.fromkeys(("M", "N", "grad_stride", "rows_per_scale"), "i32")},
                constants={"ROWS": tile.rows, "COLUMNS": tile.chunk, "STAGES": tile.stages, "HAS_SCALE": True},
                aligned=(*pointers, "N", "grad_stride"),
                options={"num_warps": tile.warps},
            )
        )
    return cases
