"""Launchers of modality fusion in CUDA C++ (csrc/fuse_tokens*.cu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _ext
from . import dtype_code, is_aligned, pointer, stream

MAX_CHANNELS = 1024
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

FORWARD_CHUNKS = ((16_384, 16), (0, 4))
BACKWARD_CHUNKS = ((16_384, 48), (4_096, 32), (0, 8))
"""(at least so many tokens, tokens of a view that a block takes, four at a time). Long chunks read what a view's tokens
share less often and write fewer partial sums, short ones fill the device; fixed, so that no result depends on it."""


def _chunk(table: Sequence[tuple[int, int]], tokens: int) -> int:
    return next(chunk for least, chunk in table if tokens >= least)


def _vectors(x: Tensor) -> Tensor:
    """The tensor itself if the kernels can read its rows four elements at a time, else a copy."""
    fits = x.stride(-1) == 1 and all(s % 4 == 0 for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1)
    if fits and is_aligned(x, 4 * x.element_size()):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _rows(x: Tensor) -> Tensor:
    """A contiguous tensor whose rows the kernels can read four elements at a time."""
    return _vectors(x.contiguous())


def _tokens(name: str, x: Tensor) -> tuple[int, int, int, int]:
    return pointer(x), dtype_code(name, x, *_FLOATS), x.stride(0), x.stride(1)


def _table(name: str, x: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else (pointer(x), dtype_code(name, x, *_FLOATS), 0)


def _modalities(name: str, values: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[tuple[int, int, int]]:
    given = zip(values, masks, strict=True)
    return [(pointer(x), dtype_code(f"{name}[{i}]", x, *_FLOATS), pointer(m)) for i, (x, m) in enumerate(given)]


def _bytes(masks: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if m is None else m.contiguous() for m in masks]


def _check_channels(channels: int) -> None:
    if channels % 4 != 0 or channels > MAX_CHANNELS:
        raise ValueError(
            f"image_tokens: expected a multiple of 4 channels, at most {MAX_CHANNELS}, got {channels}; "
            "use another backend"
        )


def fuse_tokens_forward(
    image_tokens: Tensor,
    dense: Sequence[Tensor],
    dense_masks: Sequence[Tensor | None],
    vectors: Sequence[Tensor],
    vector_masks: Sequence[Tensor | None],
    weight: Tensor,
    bias: Tensor,
    scale_token: Tensor | None,
    batch: int,
    eps: float,
    out_dtype: torch.dtype,
    save_sum: bool,
    *,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward pass. Rows that do not begin on multiples of four elements are copied first.

    Args:
        image_tokens: [N, T, C], C a multiple of 4, at most 1,024.
        dense: each [N, T, C].
        dense_masks: each [N] bool, or None.
        vectors: each [N, C].
        vector_masks: each [N] bool, or None.
        weight, bias: [C].
        scale_token: C values, or None.
        batch: samples B; N = V * B.
        eps: LayerNorm's.
        out_dtype: dtype of the rows.
        save_sum: also write the sum before LayerNorm.
        chunk: tokens of a view that a block takes; by the number of tokens, if None.

    Returns:
        Rows [B, V * T (+ 1), C], mean [N, T], reciprocal deviation [N, T], the sum [N, T, C] float32 (or empty).

    Raises:
        TypeError: a dtype is not float32, bfloat16 or float16.
        ValueError: C is not as above.
    """
    n, tokens, channels = image_tokens.shape
    _check_channels(channels)
    device = image_tokens.device
    sample_rows = n // batch * tokens + (scale_token is not None)
    out = torch.empty(batch, sample_rows, channels, device=device, dtype=out_dtype)
    mean = torch.empty(n, tokens, device=device, dtype=torch.float32)
    rstd = torch.empty(n, tokens, device=device, dtype=torch.float32)
    total = torch.empty((n, tokens, channels) if save_sum else (0,), device=device, dtype=torch.float32)
    if out.numel() == 0:
        return out, mean, rstd, total
    # Copies must outlive the launch: the names hold them.
    image = _vectors(image_tokens)
    dense, vectors = [_rows(d) for d in dense], [v.contiguous() for v in vectors]
    dense_masks, vector_masks = _bytes(dense_masks), _bytes(vector_masks)
    weight, bias = weight.contiguous(), bias.contiguous()
    scale_token = None if scale_token is None else scale_token.contiguous()
    _ext.module().fuse_tokens_forward(
        image=_tokens("image_tokens", image),
        dense=_modalities("dense", dense, dense_masks),
        vectors=_modalities("vectors", vectors, vector_masks),
        weight=_table("weight", weight),
        bias=_table("bias", bias),
        scale_token=_table("scale_token", scale_token),
        out=_table("out_dtype", out)[:2],
        sum=pointer(total) if save_sum else 0,
        mean=pointer(mean),
        rstd=pointer(rstd),
        views=n,
        tokens=tokens,
        channels=channels,
        batch=batch,
        sample_rows=sample_rows,
        eps=eps,
        chunk=chunk or _chunk(FORWARD_CHUNKS, n * tokens),
        device=device.index,
        stream=stream(device),
    )
    return out, mean, rstd, total


def fuse_tokens_backward(
    grad: Tensor,
    x: Tensor,
    vectors: Sequence[Tensor],
    vector_masks: Sequence[Tensor | None],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    dense_masks: Sequence[Tensor | None],
    d_image_dtype: torch.dtype | None,
    d_dense_dtypes: Sequence[torch.dtype | None],
    need_rows: bool,
    batch: int,
    *,
    chunk: int | None = None,
) -> tuple[Tensor | None, list[Tensor | None], Tensor, Tensor | None]:
    """Launch the backward pass. Rows that do not begin on multiples of four elements are copied first.

    Args:
        grad: [B, V * T (+ 1), C].
        x: [N, T, C]: the saved sum, or the image tokens.
        vectors: what is still to be added to x, each [N, C].
        vector_masks: each [N] bool, or None.
        mean, rstd: [N, T] float32.
        weight: [C].
        dense_masks: each [N] bool, or None; one for each dense map.
        d_image_dtype: dtype of the image tokens' gradient; None: not wanted.
        d_dense_dtypes: the same for each dense map.
        need_rows: whether the sums over tokens (the vectors' gradient) are wanted.
        batch: samples B.
        chunk: tokens of a view that a block takes; by the number of tokens, if None.

    Returns:
        Gradients of the image tokens, of each dense map, of (weight, bias) [2, C], and sums over tokens [N, C], float32
        but for those with a dtype of their own; None for what is not wanted. Sums are made in an order that depends on
        sizes alone.

    Raises:
        TypeError: a dtype is not float32, bfloat16 or float16.
        ValueError: C is not a multiple of 4, or more than 1,024.
    """
    n, tokens, channels = x.shape
    _check_channels(channels)
    device = x.device
    chunk = chunk or _chunk(BACKWARD_CHUNKS, n * tokens)
    chunks = -(-tokens // chunk)

    def like_x(dtype: torch.dtype | None) -> Tensor | None:
        return None if dtype is None else torch.empty(n, tokens, channels, device=device, dtype=dtype)

    d_image = like_x(d_image_dtype)
    d_dense = [like_x(dtype) for dtype in d_dense_dtypes]
    d_affine = torch.empty(2, channels, device=device, dtype=torch.float32)
    d_rows = torch.empty(n, channels, device=device, dtype=torch.float32) if need_rows else None
    if channels == 0:
        return d_image, d_dense, d_affine, d_rows
    partials = torch.empty(2 + need_rows, n * chunks, channels, device=device, dtype=torch.float32)
    # Copies must outlive the launch: the names hold them.
    grad, x, weight = _vectors(grad), _vectors(x), weight.contiguous()
    vectors = [v.contiguous() for v in vectors]
    vector_masks, masks = _bytes(vector_masks), _bytes(dense_masks)
    _ext.module().fuse_tokens_backward(
        grad=_tokens("grad", grad),
        x=_tokens("x", x),
        vectors=_modalities("vectors", vectors, vector_masks),
        mean=pointer(mean),
        rstd=pointer(rstd),
        weight=_table("weight", weight),
        d_image=_table("d_image", d_image)[:2],
        d_dense=[
            (*_table(f"d_dense[{i}]", d)[:2], pointer(m)) for i, (d, m) in enumerate(zip(d_dense, masks, strict=True))
        ],
        partials=pointer(partials),
        d_affine=pointer(d_affine),
        d_rows=pointer(d_rows),
        views=n,
        tokens=tokens,
        channels=channels,
        batch=batch,
        chunk=chunk,
        chunks=chunks,
        device=device.index,
        stream=stream(device),
    )
    return d_image, d_dense, d_affine, d_rows
