"""The backward pass of a linear layer: the vendor library's two products, and the bias gradient in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import RowTile, as_rows, column_sums, strips
from .aot import AotCase

# The pass reads one tensor and writes next to nothing: bytes in flight are all that counts. 16 rows of 256 channels are
# 64 bytes a lane in 16 bits, and eight programs have 64 KB of them under way on a multiprocessor, where an H200 needs
# 23 KB (4.3 TB/s at a latency of 700 ns). Sums take 32 registers a lane of the 64 that eight programs leave it. The
# second stage asks for the next rows before these are added up.
BIAS_TILE = RowTile(rows=16, chunk=256, warps=4, stages=2, programs=8)


@triton.jit(do_not_specialize=["M"])
def bias_gradient_kernel(
    grad,  # [M, N]
    partials,  # [strips, N] float32
    M,
    N,
    grad_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient's sum over this program's rows."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < N
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in tl.range(tl.program_id(1), tl.cdiv(M, ROWS), tl.num_programs(1), num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < M)[:, None] & inside[None, :]
        total += tl.load(grad + row[:, None] * grad_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(partials + tl.program_id(1).to(tl.int64) * N + column, tl.sum(total, axis=0), mask=inside)


def bias_gradient(
    grad: Tensor,  # [rows, N], unit stride in N
    dtype: torch.dtype,
    tile: RowTile = BIAS_TILE,
) -> Tensor:
    """Column sums of `grad`, [N] in `dtype`, added up in float32 and always in the same order."""
    (rows, n), device = grad.shape, grad.device
    if rows == 0:
        return torch.zeros(n, device=device, dtype=dtype)
    grid = strips(rows, n, tile, device)
    partials = torch.empty(1, grid[1], n, device=device, dtype=torch.float32)
    with torch.cuda.device_of(grad):
        bias_gradient_kernel[grid](
            grad,
            partials,
            rows,
            n,
            grad.stride(0),
            ROWS=tile.rows,
            COLUMNS=tile.chunk,
            STAGES=tile.stages,
            num_warps=tile.warps,
        )
        return column_sums(partials, [dtype])[0]


def weight_gradient(
    grad: Tensor,  # [rows, N]
    x: Tensor,  # [rows, K], in grad's dtype
    dtype: torch.dtype,
) -> Tensor:
    """grad^T x, [N, K] in `dtype`; on a GPU 16-bit rows give a float32 result that was not rounded to 16 bits."""
    if grad.is_cuda and dtype == torch.float32 and grad.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(grad.T, x, out_dtype=dtype)  # PyTorch has this product on CUDA alone
    return torch.mm(grad.T, x).to(dtype)


def linear_backward(
    grad: Tensor,  # [..., N]
    x: Tensor | None,  # [..., K], None where weight's gradient is not wanted
    weight: Tensor | None,  # [N, K] in x's dtype, None where x's gradient is not wanted
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; empty tensors where not wanted. The matmuls are the vendor library's."""
    rows = as_rows(grad)
    grad_x = grad.new_empty(0) if weight is None else (rows @ weight).view(*grad.shape[:-1], weight.shape[1])
    grad_weight = grad.new_empty(0, dtype=weight_dtype)
    if x is not None:
        grad_weight = weight_gradient(rows, as_rows(x), weight_dtype)
    grad_bias = grad.new_empty(0, dtype=torch.float32) if bias_dtype is None else bias_gradient(rows, bias_dtype)
    return grad_x, grad_weight, grad_bias


def aot_cases() -> list[AotCase]:
    """Every production configuration."""
    tile = BIAS_TILE
    return [
        AotCase(
            name=f"bias_gradient_{dtype}",
            kernel=bias_gradient_kernel,
            types={"grad": f"*{dtype}", "partials": "*fp32", **dict.fromkeys(("M", "N", "grad_stride"), "i32")},
            constants={"ROWS": tile.rows, "COLUMNS": tile.chunk, "STAGES": tile.stages},
            aligned=("grad", "partials", "N", "grad_stride"),
            options={"num_warps": tile.warps},
        )
        for dtype in ("bf16", "fp16", "fp32")
    ]
