"""LayerNorm over the last dimension: forward in one pass, backward in one pass and a small sum over programs."""

# Kernels grow tuples of blocks, which mypy takes for tuples of fixed length.
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import (
    RowTile,
    as_rows,
    column_sum_kernel,
    column_sums,
    load_channels,
    load_rows,
    programs,
    row_statistics,
    store_normed,
)
from .aot import AotCase

MAX_CHANNELS = 4096
"""A row lives in registers: beyond this the backward pass would spill."""


def forward_tile(channels: int) -> RowTile:
    """Layout of the forward pass (measured on an H200, kernels/notes/norms.md).

    One warp a row where it fits (256 channels a piece are 8 channels a lane: one 16-byte access in 16 bits), so the
    sums need shuffles only, and two rows a warp, so that one loads while the other is summed; from 2,048 channels on
    four warps share a row to keep it in registers.
    """
    if channels <= 256:
        return RowTile(rows=8, chunk=triton.next_power_of_2(channels), warps=4)
    if channels <= 1024:
        return RowTile(rows=8, chunk=256, warps=4)
    return RowTile(rows=1, chunk=1024, warps=4)


def backward_tile(channels: int) -> RowTile:
    """Layout of the backward pass: programs stay and walk over rows, sums over rows stay in their registers.

    Measured on an H200: a whole row a program, three in flight, beats pieces of a row. `programs` is within what is
    resident at once on sm_90: one more would wait.
    """
    if channels <= 256:
        return RowTile(rows=8, chunk=triton.next_power_of_2(channels), warps=4, stages=2, programs=4)
    if channels <= 1024:
        return RowTile(rows=1, chunk=1024, warps=4, stages=3, programs=6)
    return RowTile(rows=1, chunk=1024, warps=8, stages=1, programs=2)


@triton.jit(do_not_specialize=["rows"])
def layer_norm_forward_kernel(
    x,  # [rows, C]
    weight,  # [C] or unused
    bias,  # [C] or unused
    out,  # [rows, C], contiguous
    mean,  # [rows] float32 or unused
    rstd,  # [rows] float32
    rows,
    x_stride,
    eps,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    """Normalise rows in float32; the program walks over tiles when there are more tiles than programs.

    With QUANTIZE `out` is e4m3, and `rstd` takes the rows' scales.
    """
    gains = ()
    shifts = ()
    if HAS_WEIGHT:
        gains = load_channels(weight, C, CHUNK, CHUNKS)
    if HAS_BIAS:
        shifts = load_channels(bias, C, CHUNK, CHUNKS)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        valid = row < rows
        blocks = load_rows(x, x_stride, row, valid, C, CHUNK, CHUNKS)
        centre, scale = row_statistics(blocks, eps, C, CHUNK, CHUNKS)
        store_normed(
            blocks, centre, scale, gains, shifts, out, mean, rstd, row, valid, C, ROWS, CHUNK, CHUNKS, HAS_WEIGHT,
            HAS_BIAS, QUANTIZE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def layer_norm_backward_kernel(
    grad,  # [rows, C]
    x,  # [rows, C]
    weight,  # [C] or unused
    mean,  # [rows] float32
    rstd,  # [rows] float32
    grad_x,  # [rows, C], contiguous, or unused
    partial_weight,  # [programs, C] float32 or unused
    partial_bias,  # [programs, C] float32 or unused
    rows,
    grad_stride,
    x_stride,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
):
    """With h = (x - mean) rstd and g = grad weight: grad_x = rstd (g - mean(g) - h mean(g h))."""
    gains = ()
    if HAS_WEIGHT:
        gains = load_channels(weight, C, CHUNK, CHUNKS)
    weight_sums = ()
    bias_sums = ()
    for _ in tl.static_range(CHUNKS):
        weight_sums = weight_sums + (tl.zeros([ROWS, CHUNK], tl.float32),)
        bias_sums = bias_sums + (tl.zeros([ROWS, CHUNK], tl.float32),)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        valid = row < rows
        centre = tl.load(mean + row, mask=valid, other=0.0)
        scale = tl.load(rstd + row, mask=valid, other=0.0)
        hats = ()
        grads = ()
        new_weight_sums = ()
        new_bias_sums = ()
        along_hat = tl.zeros([ROWS, CHUNK], tl.float32)
        along_one = tl.zeros([ROWS, CHUNK], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            column = chunk * CHUNK + tl.arange(0, CHUNK)
            mask = valid[:, None] & (column < C)[None, :]
            # Beyond C the gradient is zero, which keeps every sum below exact whatever the normalised value is.
            g = tl.load(grad + row[:, None] * grad_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
            value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
            hat = (value - centre[:, None]) * scale[:, None]
            if NEED_WEIGHT:
                new_weight_sums = new_weight_sums + (weight_sums[chunk] + g * hat,)
            if NEED_BIAS:
                new_bias_sums = new_bias_sums + (bias_sums[chunk] + g,)
            if HAS_WEIGHT:
                g = g * gains[chunk][None, :]
            along_hat += g * hat
            along_one += g
            hats = hats + (hat,)
            grads = grads + (g,)
        if NEED_WEIGHT:
            weight_sums = new_weight_sums
        if NEED_BIAS:
            bias_sums = new_bias_sums
        if NEED_X:
            hat_mean = tl.sum(along_hat, axis=1) / C
            one_mean = tl.sum(along_one, axis=1) / C
            for chunk in tl.static_range(CHUNKS):
                column = chunk * CHUNK + tl.arange(0, CHUNK)
                mask = valid[:, None] & (column < C)[None, :]
                result = scale[:, None] * (grads[chunk] - one_mean[:, None] - hats[chunk] * hat_mean[:, None])
                tl.store(grad_x + row[:, None] * C + column[None, :], result.to(grad_x.dtype.element_ty), mask=mask)
    slot = tl.program_id(0).to(tl.int64) * C
    for chunk in tl.static_range(CHUNKS):
        column = chunk * CHUNK + tl.arange(0, CHUNK)
        if NEED_WEIGHT:
            tl.store(partial_weight + slot + column, tl.sum(weight_sums[chunk], axis=0), mask=column < C)
        if NEED_BIAS:
            tl.store(partial_bias + slot + column, tl.sum(bias_sums[chunk], axis=0), mask=column < C)


def layer_norm_forward(
    x: Tensor,  # [..., C]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    eps: float,
    out_dtype: torch.dtype,
    tile: RowTile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of every row; returns out [..., C], mean [rows] and rstd [rows] (float32).

    In e4m3, rows have scales: they come in rstd's place, and mean is empty.
    """
    flat = as_rows(x)
    rows, channels = flat.shape
    quantize = out_dtype == torch.float8_e4m3fn
    out = torch.empty(x.shape, device=x.device, dtype=out_dtype)
    mean = torch.empty(0 if quantize else rows, device=x.device, dtype=torch.float32)
    rstd = torch.empty(rows, device=x.device, dtype=torch.float32)
    if rows == 0:
        return out, mean, rstd
    tile = tile or forward_tile(channels)
    with torch.cuda.device_of(x):
        layer_norm_forward_kernel[(programs(rows, tile, x.device),)](
            flat,
            rstd if weight is None else weight.contiguous(),
            rstd if bias is None else bias.contiguous(),
            out,
            rstd if quantize else mean,
            rstd,
            rows,
            flat.stride(0),
            eps,
            **tile.constants(channels),
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            QUANTIZE=quantize,
            num_warps=tile.warps,
        )
    return out, mean, rstd


def layer_norm_backward(
    grad: Tensor,  # [..., C]
    x: Tensor,  # [..., C]
    weight: Tensor | None,  # [C]
    mean: Tensor,  # [rows] float32
    rstd: Tensor,  # [rows] float32
    need_x: bool,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    tile: RowTile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (its dtype), weight and bias (the dtypes given; None: not wanted, an empty tensor comes back).

    Deterministic: every program sums its rows in order, and the programs' sums are added in order.
    """
    flat, flat_grad = as_rows(x), as_rows(grad)
    rows, channels = flat.shape
    wanted = [dtype for dtype in (weight_dtype, bias_dtype) if dtype is not None]
    grad_x = torch.empty(x.shape if need_x else (0,), device=x.device, dtype=x.dtype)
    if rows == 0:
        sums = [torch.zeros(channels, device=x.device, dtype=dtype) for dtype in wanted]
    else:
        tile = tile or backward_tile(channels)
        count = programs(rows, tile, x.device)
        partials = torch.empty(len(wanted), count, channels, device=x.device, dtype=torch.float32)
        with torch.cuda.device_of(x):
            layer_norm_backward_kernel[(count,)](
                flat_grad,
                flat,
                mean if weight is None else weight.contiguous(),
                mean,
                rstd,
                grad_x,
                partials[0] if weight_dtype is not None else mean,
                partials[-1] if bias_dtype is not None else mean,
                rows,
                flat_grad.stride(0),
                flat.stride(0),
                **tile.constants(channels),
                HAS_WEIGHT=weight is not None,
                NEED_X=need_x,
                NEED_WEIGHT=weight_dtype is not None,
                NEED_BIAS=bias_dtype is not None,
                num_warps=tile.warps,
            )
            sums = column_sums(partials, wanted) if wanted else []
    found = iter(sums)
    empty = torch.empty(0, device=x.device, dtype=torch.float32)
    grad_weight = next(found) if weight_dtype is not None else empty
    grad_bias = next(found) if bias_dtype is not None else empty.clone()
    return grad_x, grad_weight, grad_bias


def forward_case(name: str, x: str, out: str, channels: int, tile: RowTile) -> AotCase:
    """Ahead-of-time case of the forward kernel: `x` and `out` are Triton types ('bf16', 'fp32', ...)."""
    pointers = {"x": f"*{x}", "weight": "*fp32", "bias": "*fp32", "out": f"*{out}", "mean": "*fp32", "rstd": "*fp32"}
    return AotCase(
        name=name,
        kernel=layer_norm_forward_kernel,
        types={**pointers, "rows": "i32", "x_stride": "i32", "eps": "fp32"},
        constants={
            **tile.constants(channels),
            "HAS_WEIGHT": True,
            "HAS_BIAS": True,
            "QUANTIZE": out == "fp8e4nv",
        },
        aligned=(*pointers, "x_stride"),
        options={"num_warps": tile.warps},
        targets=(90, 100) if out == "fp8e4nv" else (80, 90, 100),
    )


def backward_case(name: str, x: str, grad: str, channels: int, tile: RowTile) -> AotCase:
    """Ahead-of-time case of the backward kernel."""
    floats = ("weight", "mean", "rstd", "partial_weight", "partial_bias")
    pointers = {"grad": f"*{grad}", "x": f"*{x}", "grad_x": f"*{x}", **dict.fromkeys(floats, "*fp32")}
    return AotCase(
        name=name,
        kernel=layer_norm_backward_kernel,
        types={**pointers, "rows": "i32", "grad_stride": "i32", "x_stride": "i32"},
        constants={
            **tile.constants(channels),
            "HAS_WEIGHT": True,
            "NEED_X": True,
            "NEED_WEIGHT": True,
            "NEED_BIAS": True,
        },
        aligned=(*pointers, "grad_stride", "x_stride"),
        options={"num_warps": tile.warps},
    )


def column_sum_case() -> AotCase:
    """Ahead-of-time case of the sum over programs, shared by every op with parameter gradients."""
    from ._rows import _SUM_BLOCK, _SUM_COLUMNS, _SUM_WARPS

    pointers = dict.fromkeys(("partials", "out_0", "out_1", "out_2"), "*fp32")
    return AotCase(
        name="column_sum",
        kernel=column_sum_kernel,
        types={**pointers, "count": "i32", "C": "i32"},
        constants={"BLOCK": _SUM_BLOCK, "COLUMNS": _SUM_COLUMNS},
        aligned=(*pointers, "C"),
        options={"num_warps": _SUM_WARPS},
    )


def aot_cases() -> list[AotCase]:
    """Every production configuration: the model's widths in the dtypes of its stages, and the widest row."""
    cases = [column_sum_case()]
    for channels in (48, 768, 1024, 4096):
        for x, out in (("bf16", "bf16"), ("fp32", "bf16"), ("fp32", "fp32")):
            label = f"{channels}_{x}_{out}"
            cases.append(forward_case(f"layer_norm_forward_{label}", x, out, channels, forward_tile(channels)))
            cases.append(backward_case(f"layer_norm_backward_{label}", x, out, channels, backward_tile(channels)))
    for channels in (768, 1024):
        tile = forward_tile(channels)
        cases.append(forward_case(f"layer_norm_forward_{channels}_fp32_e4m3", "fp32", "fp8e4nv", channels, tile))
    return cases
