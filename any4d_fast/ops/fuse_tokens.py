"""Sum of the given modalities and LayerNorm, in the multi-view transformer's row order with its scale token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..reference.fuse_tokens import fuse_tokens as reference_fuse_tokens
from ._library import define, distinct, launchers

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_MAX_DENSE = 3
_MAX_VECTORS = 4


def _forward_impl(
    image_tokens: Tensor,
    dense: list[Tensor],
    dense_masks: list[Tensor | None],
    vectors: list[Tensor],
    vector_masks: list[Tensor | None],
    weight: Tensor,
    bias: Tensor,
    scale_token: Tensor | None,
    batch: int,
    eps: float,
    out_dtype: torch.dtype,
    save_sum: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = launchers("fuse_tokens", backend).fuse_tokens_forward(
        image_tokens, dense, dense_masks, vectors, vector_masks, weight, bias, scale_token, batch, eps, out_dtype,
        save_sum,
    )  # fmt: skip
    return outputs


def _forward_fake(
    image_tokens: Tensor,
    dense: list[Tensor],
    dense_masks: list[Tensor | None],
    vectors: list[Tensor],
    vector_masks: list[Tensor | None],
    weight: Tensor,
    bias: Tensor,
    scale_token: Tensor | None,
    batch: int,
    eps: float,
    out_dtype: torch.dtype,
    save_sum: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, tokens, channels = image_tokens.shape
    rows = n // batch * tokens + (0 if scale_token is None else 1)
    return (
        image_tokens.new_empty(batch, rows, channels, dtype=out_dtype),
        image_tokens.new_empty(n, tokens, dtype=torch.float32),
        image_tokens.new_empty(n, tokens, dtype=torch.float32),
        image_tokens.new_empty((n, tokens, channels) if save_sum else (0,), dtype=torch.float32),
    )


def _backward_impl(
    grad: Tensor,
    x: Tensor,
    vectors: list[Tensor],
    vector_masks: list[Tensor | None],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    dense_masks: list[Tensor | None],
    image_dtype: torch.dtype | None,
    dense_dtype_0: torch.dtype | None,
    dense_dtype_1: torch.dtype | None,
    dense_dtype_2: torch.dtype | None,
    need_rows: bool,
    backend: str,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    wanted = [dense_dtype_0, dense_dtype_1, dense_dtype_2][: len(dense_masks)]
    d_image, d_dense, d_affine, d_rows = launchers("fuse_tokens", backend).fuse_tokens_backward(
        grad, x, vectors, vector_masks, mean, rstd, weight, dense_masks, image_dtype, wanted, need_rows, grad.shape[0]
    )
    return (
        x.new_empty(0) if d_image is None else d_image,
        [x.new_empty(0) if d is None else d for d in d_dense],
        d_affine,
        x.new_empty(0) if d_rows is None else d_rows,
    )


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    vectors: list[Tensor],
    vector_masks: list[Tensor | None],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    dense_masks: list[Tensor | None],
    image_dtype: torch.dtype | None,
    dense_dtype_0: torch.dtype | None,
    dense_dtype_1: torch.dtype | None,
    dense_dtype_2: torch.dtype | None,
    need_rows: bool,
    backend: str,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    n, _, channels = x.shape
    wanted = [dense_dtype_0, dense_dtype_1, dense_dtype_2][: len(dense_masks)]
    return (
        x.new_empty(0) if image_dtype is None else x.new_empty(x.shape, dtype=image_dtype),
        [x.new_empty(0) if dtype is None else x.new_empty(x.shape, dtype=dtype) for dtype in wanted],
        x.new_empty(2, channels, dtype=torch.float32),
        x.new_empty(n, channels, dtype=torch.float32) if need_rows else x.new_empty(0),
    )


_forward = define(
    "fuse_tokens_forward",
    "(Tensor image_tokens, Tensor[] dense, Tensor?[] dense_masks, Tensor[] vectors, Tensor?[] vector_masks,"
    " Tensor weight, Tensor bias, Tensor? scale_token, SymInt batch, float eps, ScalarType out_dtype, bool save_sum,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
)
_backward = define(
    "fuse_tokens_backward",
    "(Tensor grad, Tensor x, Tensor[] vectors, Tensor?[] vector_masks, Tensor mean, Tensor rstd, Tensor weight,"
    " Tensor?[] dense_masks, ScalarType? image_dtype, ScalarType? dense_dtype_0, ScalarType? dense_dtype_1,"
    " ScalarType? dense_dtype_2, bool need_rows, str backend) -> (Tensor, Tensor[], Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


class _FuseTokens(torch.autograd.Function):
    """`values` holds image tokens, weight, bias, scale token, then dense maps, vectors, and the masks of both.

    With dense maps the float32 sum is written once and saved, so that none of the maps is kept alive; without, the sum
    is cheaper to take again from the image tokens and the vectors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        maps: int,
        batch: int,
        eps: float,
        out_dtype: torch.dtype,
        backend: str,
        *values: Tensor | None,
    ) -> Tensor:
        image_tokens, weight, bias, scale_token = values[:4]
        assert image_tokens is not None and weight is not None and bias is not None
        count = (len(values) - 4) // 2
        given = [t for t in values[4 : 4 + count] if t is not None]
        masks = list(values[4 + count :])
        dense, vectors = given[:maps], given[maps:]
        save_sum = maps > 0 and any(ctx.needs_input_grad)
        out, mean, rstd, total = _forward(
            image_tokens, dense, masks[:maps], vectors, masks[maps:], weight, bias, scale_token, batch, eps, out_dtype,
            save_sum, backend,
        )  # fmt: skip
        kept = [total, *[None] * len(vectors)] if save_sum else [image_tokens, *vectors]
        ctx.save_for_backward(mean, rstd, weight, *kept, *masks)
        ctx.maps, ctx.count, ctx.save_sum, ctx.backend = maps, count, save_sum, backend
        ctx.dtypes = [None if t is None else t.dtype for t in values[: 4 + count]]
        ctx.scale_shape = None if scale_token is None else scale_token.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        maps, count = ctx.maps, ctx.count
        mean, rstd, weight, x, *rest = ctx.saved_tensors
        vectors, masks = rest[: count - maps], rest[count - maps :]
        needed = ctx.needs_input_grad[5:]
        need_vectors = needed[4 + maps : 4 + count]
        wanted = [dtype if need else None for dtype, need in zip(ctx.dtypes, needed[: 4 + count], strict=True)]
        same = _equal_gradients(wanted[0], wanted[4 : 4 + maps], masks[:maps])
        dense_dtypes = [None if i in same else dtype for i, dtype in enumerate(wanted[4 : 4 + maps])]
        dense_dtypes += [None] * (_MAX_DENSE - maps)
        d_image, d_dense, d_affine, d_rows = _backward(
            grad, x, [] if ctx.save_sum else vectors, [] if ctx.save_sum else masks[maps:], mean, rstd, weight,
            masks[:maps], wanted[0], *dense_dtypes, any(need_vectors), ctx.backend,
        )  # fmt: skip
        found: list[Tensor | None] = [d_image if needed[0] else None]
        found += [d_affine[i].to(ctx.dtypes[1 + i]) if needed[1 + i] else None for i in range(2)]
        d_scale = grad[:, -1].sum(dim=0, dtype=torch.float32) if needed[3] else None
        found.append(None if d_scale is None else d_scale.to(ctx.dtypes[3]).reshape(ctx.scale_shape))
        written = [d_image, *d_dense]
        found += [written[same.get(i, 1 + i)] if need else None for i, need in enumerate(needed[4 : 4 + maps])]
        for i, need in enumerate(need_vectors):
            mask = masks[maps + i]
            kept = d_rows if mask is None else torch.where(mask[:, None], d_rows, torch.zeros_like(d_rows))
            found.append(kept.to(ctx.dtypes[4 + maps + i]) if need else None)
        return (None, None, None, None, None, *found, *[None] * count)


def _equal_gradients(
    image: torch.dtype | None, dense: Sequence[torch.dtype | None], masks: Sequence[Tensor | None]
) -> dict[int, int]:
    """Maps that everybody gives have the image tokens' gradient, or each other's: it is written once.

    Args:
        image, dense: dtypes of the gradients that are wanted.
        masks: of the maps.

    Returns:
        Number of a map -> whose gradient is its own too: 0 the image tokens', 1 + i map i's.
    """
    owners = {} if image is None else {image: 0}
    found = {}
    for i, (dtype, mask) in enumerate(zip(dense, masks, strict=True)):
        if dtype is not None and mask is None:
            owner = owners.setdefault(dtype, 1 + i)
            if owner != 1 + i:
                found[i] = owner
    return found


def _triton_reasons(image_tokens: Tensor, *others: Tensor | None) -> list[str]:
    reasons = backends.triton_reasons(image_tokens, *others)
    wrong = {t.dtype for t in (image_tokens, *others) if t is not None} - {*_FLOATS, torch.bool}
    if wrong:
        reasons.append(f"an argument is {wrong.pop()}; the kernel adds float32, float16 or bfloat16")
    return reasons


def _cuda_reasons(image_tokens: Tensor, *others: Tensor | None) -> list[str]:
    reasons = []
    channels = image_tokens.shape[-1]
    wrong = {t.dtype for t in (image_tokens, *others) if t is not None} - {*_FLOATS, torch.bool}
    if wrong:
        reasons.append(f"an argument is {wrong.pop()}; the kernel adds float32, float16 or bfloat16")
    if channels % 4 != 0 or channels > 1024:
        reasons.append(f"tokens have {channels} channels; the kernel takes multiples of 4 up to 1024")
    return reasons or backends.cuda_reasons(image_tokens, *others)


backends.register("fuse_tokens", triton=_triton_reasons, cuda=_cuda_reasons)


def _complain(name: str, tensor: Tensor, expected: str, advice: str) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {list(tensor.shape)} {tensor.dtype}; {advice}")


def _checked_masks(
    name: str, masks: Sequence[Tensor | None] | None, values: Sequence[Tensor], rows: int
) -> list[Tensor | None]:
    if masks is None:
        return [None] * len(values)
    if len(masks) != len(values):
        raise ValueError(f"{name}: expected {len(values)} masks (None where all is given), got {len(masks)}")
    for i, mask in enumerate(masks):
        if mask is not None and (tuple(mask.shape) != (rows,) or mask.dtype != torch.bool):
            raise _complain(f"{name}[{i}]", mask, f"[{rows}] bool", "one flag per view and sample, view-major")
    return list(masks)


def _checked_dense(dense: Sequence[Tensor], shape: torch.Size) -> list[Tensor]:
    rows, tokens, channels = shape
    if len(dense) > _MAX_DENSE:
        raise ValueError(f"dense: expected at most {_MAX_DENSE} maps, got {len(dense)}; add some of them up first")
    flat = []
    for i, features in enumerate(dense):
        grid = features.ndim == 4 and features.shape[1] * features.shape[2] == tokens
        same = features.ndim in (3, 4) and features.shape[0] == rows and features.shape[-1] == channels
        if not (same and (grid or tuple(features.shape) == (rows, tokens, channels))):
            expected = f"[{rows}, {tokens}, {channels}] or [{rows}, h, w, {channels}]"
            raise _complain(f"dense[{i}]", features, expected, "pass channels-last features on the image's grid")
        flat.append(features.reshape(rows, tokens, channels))
    return flat


def fuse_tokens(
    image_tokens: Tensor,
    dense: Sequence[Tensor],
    vectors: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    dense_masks: Sequence[Tensor | None] | None = None,
    vector_masks: Sequence[Tensor | None] | None = None,
    scale_token: Tensor | None = None,
    batch: int = 1,
    out_dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm of the sum of a view's modalities, written sample by sample with room for the scale token.

    N = V * B rows of views come view-major (row v * B + b, upstream's order). Row `v * T + t` of sample b in the result
    is token t of view v, LayerNormed; with a scale token, row V * T is that token as it is. So `out[:, :V * T]`
    reshaped to [B, V, T, C] is the fused map of every view, without a copy. A modality whose mask is false adds exactly
    zero, whatever its features hold (NaN included). Sums and LayerNorm are in float32; the backward pass adds
    in a fixed order and is bitwise reproducible.

    Args:
        image_tokens: [N, T, C] float; may be a strided view (the class token's row skipped), channels contiguous.
        dense: up to three maps of per-patch features, [N, T, C] or [N, h, w, C] with h * w = T.
        vectors: up to four vectors of per-view features, [N, C], added to every token of the view.
        weight, bias: [C], LayerNorm's.
        eps: LayerNorm's.
        dense_masks, vector_masks: one [N] bool (True: given) or None (all given) for each modality; None: all given.
        scale_token: C values in any shape, appended to each sample as they are; or None.
        batch: B, a divisor of N.
        out_dtype: dtype of the rows.
        backend: "triton", "cuda", "eager" or None for the fastest that can run.

    Returns:
        [B, V * T (+ 1), C], contiguous.

    Raises:
        ValueError: a shape or dtype is not as above, or there are too many modalities.
        BackendError: `backend` cannot run this call.
    """
    if image_tokens.ndim != 3 or not image_tokens.is_floating_point():
        raise _complain("image_tokens", image_tokens, "[N, T, C] float", "flatten the patch grid")
    rows, _, channels = image_tokens.shape
    if batch < 1 or rows % batch != 0:
        raise ValueError(f"batch: expected a divisor of the {rows} rows of image_tokens, got {batch}")
    flat = _checked_dense(dense, image_tokens.shape)
    if len(vectors) > _MAX_VECTORS:
        raise ValueError(f"vectors: expected at most {_MAX_VECTORS}, got {len(vectors)}; add some of them up first")
    for i, vector in enumerate(vectors):
        if tuple(vector.shape) != (rows, channels):
            raise _complain(f"vectors[{i}]", vector, f"[{rows}, {channels}]", "one vector per view and sample")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tuple(tensor.shape) != (channels,):
            raise _complain(name, tensor, f"[{channels}]", "pass the fusion LayerNorm's parameters")
    if scale_token is not None and scale_token.numel() != channels:
        raise _complain("scale_token", scale_token, f"{channels} values", "pass one row of the fused width")
    masks = _checked_masks("dense_masks", dense_masks, flat, rows)
    masks += _checked_masks("vector_masks", vector_masks, vectors, rows)
    values = (image_tokens, weight, bias, scale_token, *flat, *vectors, *masks)
    name = backends.select("fuse_tokens", backend, *values)
    if name == backends.EAGER:
        return reference_fuse_tokens(
            image_tokens, flat, list(vectors), weight, bias, eps, dense_masks=masks[: len(flat)],
            vector_masks=masks[len(flat) :], scale_token=scale_token, batch=batch, out_dtype=out_dtype,
        )  # fmt: skip
    fused: Tensor = _FuseTokens.apply(len(flat), batch, eps, out_dtype, name, *distinct(*values))
    return fused
