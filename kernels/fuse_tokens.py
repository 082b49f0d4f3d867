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

WARPS = 4
"""One row of 1,024 float32 is 32 bytes a thread for each map: two full vector loads."""

FORWARD_CHUNKS, FORWARD_STAGES = ((16_384, 12, 3), (2_048, 4, 4), (0, 1, 1)), 2
"""(at least so many tokens, tokens a program with maps, and with images alone), and tokens in flight, of the forward
pass. What all tokens of a chunk share is read once: for every one it was 24 KB from the L2 beside the 20 KB of its
maps. The next token's maps are copied to shared memory meanwhile: 96 % of the copy bandwidth for 91 (three maps, H200).
With images alone nine programs are resident for five, and chunks of 12 tokens make two waves and a half: 85 % for the
91 of chunks of three (of 4 to 8: 87 to 90)."""

BACKWARD_PROGRAMS, BACKWARD_CHUNK = 792, (4, 128)
"""Programs of the backward pass, one wave of an H200 (six on a multiprocessor), and the least and most tokens of each.
In 1,148 programs of 32 tokens, one wave and a rest, 41 views took a tenth longer. Fixed: no result depends on the
device."""

SUM_ROWS, SUM_COLUMNS = 256, 16
"""Partial sums at once in the second stage: few columns a program, so that there are programs enough, and so many rows
that 41 views take five steps."""


@triton.jit
def _plus(total, values_ptr, mask_ptr, offsets, n, inside):
    """total + a map's values, where view row n has the map; they are not loaded elsewhere."""
    if values_ptr is not None:
        keep = inside
        if mask_ptr is not None:
            keep = keep & (tl.load(mask_ptr + n) != 0)
        total += tl.load(values_ptr + offsets, mask=keep, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["batch", "sample_rows", "chunks", "chunk"])
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
    tokens,
    channels,
    batch,
    sample_rows,
    chunks,
    chunk,
    stride_n,
    stride_t,
    eps,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    view_row = pid // chunks
    start = pid % chunks * chunk
    n = view_row.to(tl.int64)
    col = tl.arange(0, BLOCK_C)
    inside = col < channels
    if scale_token_ptr is not None:
        if pid < batch:
            value = tl.load(scale_token_ptr + col, mask=inside, other=0.0)
            last = ((pid + 1).to(tl.int64) * sample_rows - 1) * channels
            tl.store(out_ptr + last + col, value.to(out_ptr.dtype.element_ty), mask=inside)

    weight = tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + col, mask=inside, other=0.0).to(tl.float32)
    vector = tl.zeros([BLOCK_C], tl.float32)
    vector = _plus(vector, vector_0, vector_mask_0, n * channels + col, n, inside)
    vector = _plus(vector, vector_1, vector_mask_1, n * channels + col, n, inside)
    vector = _plus(vector, vector_2, vector_mask_2, n * channels + col, n, inside)
    vector = _plus(vector, vector_3, vector_mask_3, n * channels + col, n, inside)
    # Divided before widening: a 64-bit division is a subroutine.
    first = (view_row % batch).to(tl.int64) * sample_rows + (view_row // batch).to(tl.int64) * tokens
    for index in tl.range(start, tl.minimum(start + chunk, tokens), num_stages=STAGES):
        offset = (n * tokens + index) * channels + col
        x = tl.load(image_ptr + n * stride_n + index * stride_t + col, mask=inside, other=0.0).to(tl.float32)
        x = _plus(x, dense_0, dense_mask_0, offset, n, inside)
        x = _plus(x, dense_1, dense_mask_1, offset, n, inside)
        x = _plus(x, dense_2, dense_mask_2, offset, n, inside)
        x += vector
        if sum_ptr is not None:
            tl.store(sum_ptr + offset, x, mask=inside)
        mean = tl.sum(x, 0) / channels
        centred = tl.where(inside, x - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / channels + eps)
        out = out_ptr + (first + index) * channels + col
        tl.store(out, (centred * rstd * weight + bias).to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(mean_ptr + n * tokens + index, mean)
        tl.store(rstd_ptr + n * tokens + index, rstd)


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
    vector = _plus(vector, vector_0, vector_mask_0, n * channels + col, n, inside)
    vector = _plus(vector, vector_1, vector_mask_1, n * channels + col, n, inside)
    vector = _plus(vector, vector_2, vector_mask_2, n * channels + col, n, inside)
    vector = _plus(vector, vector_3, vector_mask_3, n * channels + col, n, inside)
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


@triton.jit(do_not_specialize=["parts", "chunks"])
def fuse_tokens_sums_kernel(
    partial_ptr,  # [2, parts, C] float32
    d_rows_ptr,  # [N * chunks, C] float32, or None
    affine_ptr,  # [2, C] float32
    rows_ptr,  # [N, C] float32, or None
    parts,
    chunks,
    channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Second stage: programs (., 0 and 1) add the parts of weight and bias, (., 2 + n) the chunks of view row n."""
    col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    which = tl.program_id(1)
    inside = (col < channels)[None, :]
    source = partial_ptr + which.to(tl.int64) * parts * channels
    target = affine_ptr + which * channels
    count = parts
    if d_rows_ptr is not None:
        if which >= 2:
            source = d_rows_ptr + (which - 2).to(tl.int64) * chunks * channels
            target = rows_ptr + (which - 2).to(tl.int64) * channels
            count = chunks
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        total += tl.load(source + row.to(tl.int64) * channels + col[None, :], mask=(row < count) & inside, other=0.0)
    tl.store(target + col, tl.sum(total, 0), mask=col < channels)


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
    chunk: int | None = None,
    warps: int = WARPS,
    stages: int = FORWARD_STAGES,
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
    if rows == 0 or channels == 0:
        if scale_token is not None:
            out[:, -1] = scale_token
        return out, mean, rstd, total
    chunk = chunk or next(maps if dense else alone for least, maps, alone in FORWARD_CHUNKS if rows >= least)
    chunks = triton.cdiv(tokens, chunk)
    image = _rows_contiguous(image_tokens)
    with torch.cuda.device_of(image):
        # At least as many programs as samples: each of these has a view row.
        fuse_tokens_kernel[(n * chunks,)](
            image, *_slots([d.contiguous() for d in dense], MAX_DENSE), *_bytes(dense_masks, MAX_DENSE),
            *_slots([v.contiguous() for v in vectors], MAX_VECTORS), *_bytes(vector_masks, MAX_VECTORS),
            weight.contiguous(), bias.contiguous(), None if scale_token is None else scale_token.contiguous(),
            out, total if save_sum else None, mean, rstd, tokens, channels, batch, sample_rows, chunks, chunk,
            image.stride(0), image.stride(1), eps, BLOCK_C=triton.next_power_of_2(channels), STAGES=stages,
            num_warps=warps,
        )  # fmt: skip
    return out, mean, rstd, total


def backward_chunk(view_rows: int, tokens: int) -> int:
    """Tokens of a backward program."""
    least, most = BACKWARD_CHUNK
    return min(max(triton.cdiv(tokens, max(1, BACKWARD_PROGRAMS // max(1, view_rows))), least), most)


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
    warps: int = WARPS,
) -> tuple[Tensor | None, list[Tensor | None], Tensor, Tensor | None]:
    """Gradients of the image tokens, of each dense map, of (weight, bias) [2, C], and sums over tokens [N, C].

    What is not wanted (dtype None, `need_rows` false) is None. Sums are taken chunk by chunk, and chunks are added by a
    second kernel, in a fixed order: bitwise equal from run to run.
    """
    n, tokens, channels = x.shape
    rows = n * tokens
    chunk = chunk or backward_chunk(n, tokens)
    chunks = triton.cdiv(tokens, chunk)

    def like_x(dtype: torch.dtype | None) -> Tensor | None:
        return None if dtype is None else torch.empty(n, tokens, channels, device=x.device, dtype=dtype)

    d_image = like_x(d_image_dtype)
    d_dense = [like_x(dtype) for dtype in d_dense_dtypes]
    new = torch.empty if rows else torch.zeros
    affine = new(2, channels, device=x.device, dtype=torch.float32)
    row_sums = new(n, channels, device=x.device, dtype=torch.float32) if need_rows else None
    if rows > 0 and channels > 0:
        x, grad = _rows_contiguous(x), _rows_contiguous(grad)
        partial = torch.empty(2, n * chunks, channels, device=x.device, dtype=torch.float32)
        d_rows = torch.empty(n * chunks, channels, device=x.device, dtype=torch.float32) if need_rows else None
        with torch.cuda.device_of(x):
            fuse_tokens_backward_kernel[(n * chunks,)](
                grad, x, *_slots([v.contiguous() for v in vectors], MAX_VECTORS), *_bytes(vector_masks, MAX_VECTORS),
                mean, rstd, weight.contiguous(), d_image, *_slots(d_dense, MAX_DENSE), *_bytes(dense_masks, MAX_DENSE),
                partial, d_rows, tokens, channels, batch, chunks, chunk, grad.stride(0), grad.stride(1),
                x.stride(0), x.stride(1), BLOCK_C=triton.next_power_of_2(channels), num_warps=warps,
            )  # fmt: skip
            fuse_tokens_sums_kernel[(triton.cdiv(channels, SUM_COLUMNS), 2 + n * need_rows)](
                partial, d_rows, affine, row_sums, n * chunks, chunks, channels,
                ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS, num_warps=WARPS,
            )  # fmt: skip
    return d_image, d_dense, affine, row_sums


def aot_cases() -> list[AotCase]:
    """Images alone, with vectors, with every modality; float32 and bfloat16 tokens of 1,024 channels; a scale token."""
    cases = []
    for image in ("fp32", "bf16"):
        for dense, vectors in ((0, 0), (0, 4), (3, 4)):
            name = f"{image}_{dense}dense_{vectors}vectors"
            cases.append(_case(f"fuse_tokens_forward_{name}", fuse_tokens_kernel, image, dense, vectors))
            cases.append(_case(f"fuse_tokens_backward_{name}", fuse_tokens_backward_kernel, image, dense, vectors))
    types = dict.fromkeys(("partial_ptr", "d_rows_ptr", "affine_ptr", "rows_ptr"), "*fp32")
    sums = AotCase(
        name="fuse_tokens_sums",
        kernel=fuse_tokens_sums_kernel,
        types=types | dict.fromkeys(("parts", "chunks", "channels"), "i32"),
        constants={"ROWS": SUM_ROWS, "COLUMNS": SUM_COLUMNS},
        aligned=(*types, "channels"),
        options={"num_warps": WARPS},
    )
    return [*cases, sums]


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
    integers = ("tokens", "channels", "batch", "sample_rows", "stride_n", "stride_t", "chunks", "chunk")
    types = pointers | dict.fromkeys((*integers, "grad_stride_b", "grad_stride_t"), "i32") | {"eps": "fp32"}
    constants: dict[str, int | None] = dict.fromkeys(absent) | {"BLOCK_C": 1024, "STAGES": FORWARD_STAGES}
    aligned = (*pointers, "channels", "stride_n", "stride_t", "grad_stride_b", "grad_stride_t")
    return AotCase(
        name=name,
        kernel=kernel,
        types={k: v for k, v in types.items() if k in kernel.arg_names},
        constants={k: v for k, v in constants.items() if k in kernel.arg_names},
        aligned=tuple(k for k in aligned if k in kernel.arg_names and k not in constants),
        options={"num_warps": WARPS},
        # For sm_100 ptxas stops at 80 registers of its own accord (a sixth block fits) and spills nine words.
        max_spills=0 if forward or not dense else 9,
    )
