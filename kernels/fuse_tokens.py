"""Sum of the modalities of a token and its LayerNorm, written in the multi-view transformer's row order.

Inputs are view-major (row v * B + b of N = V * B), the output holds each sample's V * T tokens together, with room for
a scale token behind them. A modality that is absent for a row is not read at all, so that nothing in it can leak.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase

MAX_DENSE = 3
MAX_VECTORS = 4

FORWARD = (1, 4)
"""Rows a program, warps. One row of 1,024 float32 is 32 bytes a thread for each map, two full vector loads; more rows
in a program only take registers from the blocks that hide its latency."""

BACKWARD_WARPS = 4

CHUNKS = ((16_384, 32), (2_048, 8), (0, 4))
"""(at least so many tokens, tokens a program) of the backward pass: long chunks write fewer partial sums (two or three
rows a chunk), short ones fill the device when there are few views. Fixed: no result depends on the device."""


@triton.jit
def _plus(total, values_ptr, mask_ptr, offsets, n, valid, live):
    """total + values where the row has them; masked rows are not loaded."""
    if values_ptr is not None:
        keep = live
        if mask_ptr is not None:
            keep = live & (tl.load(mask_ptr + n, mask=valid, other=0) != 0)[:, None]
        total += tl.load(values_ptr + offsets, mask=keep, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["rows", "batch", "sample_rows"])
def fuse_tokens_kernel(
    image_ptr,  # [N, T, C] by strides, channels contiguous
    dense_0, dense_1, dense_2,  # [N, T, C] or None
    dense_mask_0, dense_mask_1, dense_mask_2,  # [N] uint8 or None
    vector_0, vector_1, vector_2, vector_3,  # [N, C] or None
    vector_mask_0, vector_mask_1, vector_mask_2, vector_mask_3,  # [N] uint8 or None
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    scale_token_ptr,  # [C] or None
    out_ptr,  # [B, V * T (+ 1), C]
    sum_ptr,  # [N, T, C] float32 or None
    mean_ptr,  # [N, T]
    rstd_ptr,  # [N, T]
    rows,
    tokens,
    channels,
    batch,
    sample_rows,
    stride_n,
    stride_t,
    eps,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    col = tl.arange(0, BLOCK_C)
    inside = col < channels
    if scale_token_ptr is not None:
        if pid < batch:
            value = tl.load(scale_token_ptr + col, mask=inside, other=0.0)
            last = ((pid + 1).to(tl.int64) * sample_rows - 1) * channels
            tl.store(out_ptr + last + col, value.to(out_ptr.dtype.element_ty), mask=inside)

    row = pid * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    n = row // tokens
    t = row % tokens
    live = valid[:, None] & inside[None, :]
    wide = row.to(tl.int64)[:, None] * channels + col[None, :]
    narrow = n.to(tl.int64)[:, None] * channels + col[None, :]
    source = (n.to(tl.int64) * stride_n + t.to(tl.int64) * stride_t)[:, None] + col[None, :]
    x = tl.load(image_ptr + source, mask=live, other=0.0).to(tl.float32)
    x = _plus(x, dense_0, dense_mask_0, wide, n, valid, live)
    x = _plus(x, dense_1, dense_mask_1, wide, n, valid, live)
    x = _plus(x, dense_2, dense_mask_2, wide, n, valid, live)
    x = _plus(x, vector_0, vector_mask_0, narrow, n, valid, live)
    x = _plus(x, vector_1, vector_mask_1, narrow, n, valid, live)
    x = _plus(x, vector_2, vector_mask_2, narrow, n, valid, live)
    x = _plus(x, vector_3, vector_mask_3, narrow, n, valid, live)
    if sum_ptr is not None:
        tl.store(sum_ptr + wide, x, mask=live)

    mean = tl.sum(x, 1) / channels
    centred = tl.where(live, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / channels + eps)
    weight = tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + col, mask=inside, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    place = (n % batch).to(tl.int64) * sample_rows + n // batch * tokens + t
    out = out_ptr + place[:, None] * channels + col[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=live)
    tl.store(mean_ptr + row, mean, mask=valid)
    tl.store(rstd_ptr + row, rstd, mask=valid)


@triton.jit
def _plus_vector(total, values_ptr, mask_ptr, n, channels, col):
    if values_ptr is not None:
        keep = col < channels
        if mask_ptr is not None:
            keep = keep & (tl.load(mask_ptr + n) != 0)
        total += tl.load(values_ptr + n * channels + col, mask=keep, other=0.0).to(tl.float32)
    return total


@triton.jit
def _store_masked(dx, out_ptr, mask_ptr, offset, n, inside):
    """The gradient of one dense map: dx, or exactly zero where the map was absent."""
    if out_ptr is not None:
        if mask_ptr is not None:
            dx = tl.where(tl.load(mask_ptr + n) != 0, dx, 0.0)
        tl.store(out_ptr + offset, dx.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch", "chunks", "chunk"])
def fuse_tokens_backward_kernel(
    grad_ptr,  # [B, V * T (+ 1), C] by strides, channels contiguous
    x_ptr,  # [N, T, C] by strides: the sum before LayerNorm, but for the vectors
    vector_0, vector_1, vector_2, vector_3,  # [N, C] or None
    vector_mask_0, vector_mask_1, vector_mask_2, vector_mask_3,  # [N] uint8 or None
    mean_ptr,  # [N, T]
    rstd_ptr,  # [N, T]
    weight_ptr,  # [C]
    d_image_ptr,  # [N, T, C] or None
    d_dense_0, d_dense_1, d_dense_2,  # [N, T, C] or None
    dense_mask_0, dense_mask_1, dense_mask_2,  # [N] uint8 or None
    partial_ptr,  # [2, N * chunks, C] float32: sums of grad * x_hat and of grad
    d_rows_ptr,  # [N * chunks, C] float32 sums of d_x, or None
    tokens,
    channels,
    batch,
    chunks,
    chunk,
    grad_stride_b,
    grad_stride_t,
    stride_n,
    stride_t,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    view_row = pid // chunks
    start = pid % chunks * chunk
    n = view_row.to(tl.int64)
    col = tl.arange(0, BLOCK_C)
    inside = col < channels
    weight = tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
    vector = tl.zeros([BLOCK_C], tl.float32)
    vector = _plus_vector(vector, vector_0, vector_mask_0, n, channels, col)
    vector = _plus_vector(vector, vector_1, vector_mask_1, n, channels, col)
    vector = _plus_vector(vector, vector_2, vector_mask_2, n, channels, col)
    vector = _plus_vector(vector, vector_3, vector_mask_3, n, channels, col)
    # Divided before widening: a 64-bit division is a subroutine.
    sample = (view_row % batch).to(tl.int64)
    first = (view_row // batch).to(tl.int64) * tokens
    grads = grad_ptr + sample * grad_stride_b + first * grad_stride_t
    sources = x_ptr + n * stride_n
    d_weight = tl.zeros([BLOCK_C], tl.float32)
    d_bias = tl.zeros([BLOCK_C], tl.float32)
    d_rows = tl.zeros([BLOCK_C], tl.float32)
    for index in range(start, tl.minimum(start + chunk, tokens)):
        x = tl.load(sources + index * stride_t + col, mask=inside, other=0.0).to(tl.float32) + vector
        dy = tl.load(grads + index * grad_stride_t + col, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + n * tokens + index)
        x_hat = tl.where(inside, (x - tl.load(mean_ptr + n * tokens + index)) * rstd, 0.0)
        scaled = dy * weight
        along = tl.sum(scaled * x_hat, 0) / channels
        dx = (scaled - tl.sum(scaled, 0) / channels - x_hat * along) * rstd
        d_weight += dy * x_hat
        d_bias += dy
        d_rows += dx
        offset = (n * tokens + index) * channels + col
        if d_image_ptr is not None:
            tl.store(d_image_ptr + offset, dx.to(d_image_ptr.dtype.element_ty), mask=inside)
        _store_masked(dx, d_dense_0, dense_mask_0, offset, n, inside)
        _store_masked(dx, d_dense_1, dense_mask_1, offset, n, inside)
        _store_masked(dx, d_dense_2, dense_mask_2, offset, n, inside)
    part = pid.to(tl.int64) * channels + col
    tl.store(partial_ptr + part, d_weight, mask=inside)
    tl.store(partial_ptr + tl.num_programs(0).to(tl.int64) * channels + part, d_bias, mask=inside)
    if d_rows_ptr is not None:
        tl.store(d_rows_ptr + part, d_rows, mask=inside)


def _slots(tensors: Sequence[Tensor | None], count: int) -> list[Tensor | None]:
    return [*tensors, *[None] * (count - len(tensors))]


def _bytes(masks: Sequence[Tensor | None], count: int) -> list[Tensor | None]:
    return _slots([None if m is None else m.contiguous().view(torch.uint8) for m in masks], count)


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def fuse_tokens_forward(
    image_tokens: Tensor,  # [N, T, C], channels contiguous or copied
    dense: Sequence[Tensor],  # each [N, T, C]
    dense_masks: Sequence[Tensor | None],  # each [N] bool
    vectors: Sequence[Tensor],  # each [N, C]
    vector_masks: Sequence[Tensor | None],  # each [N] bool
    weight: Tensor,
    bias: Tensor,
    scale_token: Tensor | None,
    batch: int,
    eps: float,
    out_dtype: torch.dtype,
    save_sum: bool,
    config: tuple[int, int] = FORWARD,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rows [B, V * T (+ 1), C], mean [N, T], rstd [N, T], the sum [N, T, C] float32 or an empty tensor)."""
    n, tokens, channels = image_tokens.shape
    device = image_tokens.device
    sample_rows = n // batch * tokens + (scale_token is not None)
    out = torch.empty(batch, sample_rows, channels, device=device, dtype=out_dtype)
    mean = torch.empty(n, tokens, device=device, dtype=torch.float32)
    rstd = torch.empty(n, tokens, device=device, dtype=torch.float32)
    total = torch.empty((n, tokens, channels) if save_sum else (0,), device=device, dtype=torch.float32)
    rows = n * tokens
    per_program, warps = config
    programs = max(triton.cdiv(rows, per_program), batch if scale_token is not None else 0)
    if programs == 0 or channels == 0:
        return out, mean, rstd, total
    image = _rows_contiguous(image_tokens)
    with torch.cuda.device_of(image):
        fuse_tokens_kernel[(programs,)](
            image, *_slots([d.contiguous() for d in dense], MAX_DENSE), *_bytes(dense_masks, MAX_DENSE),
            *_slots([v.contiguous() for v in vectors], MAX_VECTORS), *_bytes(vector_masks, MAX_VECTORS),
            weight.contiguous(), bias.contiguous(), None if scale_token is None else scale_token.contiguous(),
            out, total if save_sum else None, mean, rstd, rows, max(tokens, 1), channels, batch, sample_rows,
            image.stride(0), image.stride(1), eps,
            ROWS=per_program, BLOCK_C=triton.next_power_of_2(channels), num_warps=warps,
        )  # fmt: skip
    return out, mean, rstd, total


def fuse_tokens_backward(
    grad: Tensor,  # [B, V * T (+ 1), C]
    x: Tensor,  # [N, T, C]: the saved sum, or the image tokens
    vectors: Sequence[Tensor],  # what is still to be added to x, each [N, C]
    vector_masks: Sequence[Tensor | None],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    dense_masks: Sequence[Tensor | None],
    d_image_dtype: torch.dtype | None,
    d_dense_dtypes: Sequence[torch.dtype | None],
    need_rows: bool,
    batch: int,
    chunk: int | None = None,
    warps: int = BACKWARD_WARPS,
) -> tuple[Tensor | None, list[Tensor | None], Tensor, Tensor | None]:
    """Gradients of the image tokens, of each dense map, of (weight, bias) [2, C], and sums over tokens [N, C].

    What is not wanted (dtype None, `need_rows` false) is None. Sums are taken chunk by chunk in a fixed order, and
    chunks are added by `torch.sum`: bitwise equal from run to run.
    """
    n, tokens, channels = x.shape
    rows = n * tokens
    chunk = chunk or next(c for least, c in CHUNKS if rows >= least)
    chunks = triton.cdiv(tokens, chunk)

    def like_x(dtype: torch.dtype | None) -> Tensor | None:
        return None if dtype is None else torch.empty(n, tokens, channels, device=x.device, dtype=dtype)

    d_image = like_x(d_image_dtype)
    d_dense = [like_x(dtype) for dtype in d_dense_dtypes]
    partial = torch.empty(2, n * chunks, channels, device=x.device, dtype=torch.float32)
    d_rows = torch.empty(n, chunks, channels, device=x.device, dtype=torch.float32) if need_rows else None
    if rows > 0 and channels > 0:
        x, grad = _rows_contiguous(x), _rows_contiguous(grad)
        with torch.cuda.device_of(x):
            fuse_tokens_backward_kernel[(n * chunks,)](
                grad, x, *_slots([v.contiguous() for v in vectors], MAX_VECTORS), *_bytes(vector_masks, MAX_VECTORS),
                mean, rstd, weight.contiguous(), d_image, *_slots(d_dense, MAX_DENSE), *_bytes(dense_masks, MAX_DENSE),
                partial, d_rows, tokens, channels, batch, chunks, chunk, grad.stride(0), grad.stride(1),
                x.stride(0), x.stride(1), BLOCK_C=triton.next_power_of_2(channels), num_warps=warps,
            )  # fmt: skip
    return d_image, d_dense, partial.sum(dim=1), None if d_rows is None else d_rows.sum(dim=1)


def aot_cases() -> list[AotCase]:
    """Images alone, with vectors, with every modality; float32 and bfloat16 tokens of 1,024 channels; a scale token."""
    cases = []
    for image in ("fp32", "bf16"):
        for dense, vectors in ((0, 0), (0, 4), (3, 4)):
            name = f"{image}_{dense}dense_{vectors}vectors"
            cases.append(_case(f"fuse_tokens_forward_{name}", fuse_tokens_kernel, image, dense, vectors))
            cases.append(_case(f"fuse_tokens_backward_{name}", fuse_tokens_backward_kernel, image, dense, vectors))
    return cases


def _case(name: str, kernel: triton.runtime.JITFunction, image: str, dense: int, vectors: int) -> AotCase:
    forward = kernel is fuse_tokens_kernel
    pointers = dict.fromkeys(("image_ptr", "d_image_ptr"), f"*{image}") | {"x_ptr": "*fp32" if dense else f"*{image}"}
    for k in ("weight_ptr", "bias_ptr", "scale_token_ptr", "out_ptr", "sum_ptr", "mean_ptr", "rstd_ptr", "grad_ptr"):
        pointers[k] = "*fp32"
    pointers |= dict.fromkeys(("partial_ptr", "d_rows_ptr"), "*fp32")
    absent = [] if dense else ["sum_ptr"]
    for i in range(MAX_DENSE):
        pointers |= {f"dense_{i}": "*fp32", f"d_dense_{i}": "*fp32", f"dense_mask_{i}": "*u8"}
        absent += [] if i < dense else [f"dense_{i}", f"d_dense_{i}", f"dense_mask_{i}"]
    for i in range(MAX_VECTORS):
        pointers |= {f"vector_{i}": "*fp32", f"vector_mask_{i}": "*u8"}
        # With dense maps the sum is saved, vectors included, and the backward pass adds nothing to it.
        used = i < vectors and (forward or not dense)
        absent += [] if used else [f"vector_{i}", f"vector_mask_{i}"]
    if not vectors:
        absent.append("d_rows_ptr")
    integers = ("rows", "tokens", "channels", "batch", "sample_rows", "stride_n", "stride_t", "chunks", "chunk")
    types = pointers | dict.fromkeys((*integers, "grad_stride_b", "grad_stride_t"), "i32") | {"eps": "fp32"}
    constants: dict[str, int | None] = dict.fromkeys(absent) | {"ROWS": FORWARD[0], "BLOCK_C": 1024}
    aligned = (*pointers, "channels", "stride_n", "stride_t", "grad_stride_b", "grad_stride_t")
    return AotCase(
        name=name,
        kernel=kernel,
        types={k: v for k, v in types.items() if k in kernel.arg_names},
        constants={k: v for k, v in constants.items() if k in kernel.arg_names},
        aligned=tuple(k for k in aligned if k in kernel.arg_names and k not in constants),
        options={"num_warps": FORWARD[1] if forward else BACKWARD_WARPS},
        # For sm_100 ptxas stops at 80 registers of its own accord (a sixth block fits) and spills nine words.
        max_spills=0 if forward or not dense else 9,
    )
