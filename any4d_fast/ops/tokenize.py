"""Images to patch tokens: normalisation, patch embedding, position embedding, class and register rows in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..reference.tokenize import channels_first
from ..reference.tokenize import tokenize as reference_tokenize
from ._library import define, launchers, own_dtypes

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_CUDA_PATCH = 14


def _forward_impl(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor,
    cls_token: Tensor | None,
    register_tokens: Tensor | None,
    scale: list[float],
    shift: list[float],
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    rows: Tensor = launchers("tokenize", backend).tokenize_forward(
        image, weight, bias, pos_embed, cls_token, register_tokens, scale, shift, out_dtype
    )
    return rows


def _forward_fake(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor,
    cls_token: Tensor | None,
    register_tokens: Tensor | None,
    scale: list[float],
    shift: list[float],
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    patch = weight.shape[-1]
    rows = (image.shape[2] // patch) * (image.shape[3] // patch) + int(cls_token is not None)
    if register_tokens is not None:
        rows = rows + register_tokens.shape[0]
    return image.new_empty(image.shape[0], rows, weight.shape[0], dtype=out_dtype)


def _unfolded(image: Tensor, patch: int, scale: list[float], shift: list[float], dtype: torch.dtype) -> Tensor:
    """Pixels of every patch, [N * T, 3 * P * P] in (channel, row, column) order."""
    if scale:
        image = torch.stack([image[:, c].float() * scale[c] + shift[c] for c in range(3)], dim=1)
    n, _, height, width = image.shape
    grid = image.to(dtype).reshape(n, 3, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3 * patch * patch)


def _backward_impl(
    grad: Tensor,
    image: Tensor,
    weight: Tensor,
    extra: int,
    scale: list[float],
    shift: list[float],
    need_image: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    patch = weight.shape[-1]
    n, _, height, width = image.shape
    d_rows = grad.sum(dim=0, dtype=torch.float32)
    d_image, d_weight = image.new_empty(0), weight.new_empty(0)
    if not (need_image or need_weight):
        return d_image, d_weight, d_rows
    patches = grad[:, extra:].to(weight.dtype).reshape(-1, weight.shape[0])
    with own_dtypes(weight, uniform=True):
        if need_weight:
            d_weight = (patches.T @ _unfolded(image, patch, scale, shift, weight.dtype)).reshape(weight.shape)
        if need_image:
            pixels = (patches @ weight.flatten(1)).reshape(n, height // patch, width // patch, 3, patch, patch)
            d_image = pixels.permute(0, 3, 1, 4, 2, 5).reshape(image.shape)
            if scale:
                d_image = torch.stack([d_image[:, c] * scale[c] for c in range(3)], dim=1)
            d_image = d_image.to(image.dtype)
    return d_image, d_weight, d_rows


def _backward_fake(
    grad: Tensor,
    image: Tensor,
    weight: Tensor,
    extra: int,
    scale: list[float],
    shift: list[float],
    need_image: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    d_image = image.new_empty(image.shape if need_image else (0,))
    d_weight = weight.new_empty(weight.shape if need_weight else (0,))
    return d_image, d_weight, grad.new_empty(grad.shape[1:], dtype=torch.float32)


_forward = define(
    "tokenize_forward",
    "(Tensor image, Tensor weight, Tensor? bias, Tensor pos_embed, Tensor? cls_token, Tensor? register_tokens,"
    " float[] scale, float[] shift, ScalarType out_dtype, str backend) -> Tensor",
    _forward_impl,
    _forward_fake,
)
_backward = define(
    "tokenize_backward",
    "(Tensor grad, Tensor image, Tensor weight, int extra, float[] scale, float[] shift, bool need_image,"
    " bool need_weight) -> (Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


class _Tokenize(torch.autograd.Function):
    """The matmuls of the backward pass are cuBLAS's, on patches unfolded there (588 values a token, freed at once)."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pos_embed: Tensor,
        cls_token: Tensor | None,
        register_tokens: Tensor | None,
        scale: list[float],
        shift: list[float],
        out_dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(image, weight)
        ctx.normalization = scale, shift
        ctx.dtypes = [None if t is None else t.dtype for t in (bias, pos_embed, cls_token, register_tokens)]
        ctx.has_cls = cls_token is not None
        ctx.extra = int(ctx.has_cls) + (0 if register_tokens is None else register_tokens.shape[0])
        ctx.positions = pos_embed.shape[0]
        return _forward(image, weight, bias, pos_embed, cls_token, register_tokens, scale, shift, out_dtype, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image, weight = ctx.saved_tensors
        need_image, need_weight, need_bias, need_pos, need_cls, need_registers = ctx.needs_input_grad[:6]
        d_image, d_weight, d_rows = _backward(
            grad, image, weight, ctx.extra, *ctx.normalization, need_image, need_weight
        )
        bias_dtype, pos_dtype, cls_dtype, register_dtype = ctx.dtypes
        d_patches = d_rows[ctx.extra :]
        d_pos = d_patches if ctx.positions == d_patches.shape[0] else torch.cat([d_rows[:1], d_patches])
        return (
            d_image if need_image else None,
            d_weight if need_weight else None,
            d_patches.sum(dim=0).to(bias_dtype) if need_bias else None,
            d_pos.to(pos_dtype) if need_pos else None,
            d_rows[:1].to(cls_dtype) if need_cls else None,
            d_rows[int(ctx.has_cls) : ctx.extra].to(register_dtype) if need_registers else None,
            None,
            None,
            None,
            None,
        )


def _triton_reasons(image: Tensor, weight: Tensor, *others: Tensor | None) -> list[str]:
    reasons = backends.triton_reasons(image, weight, *others)
    if weight.dtype not in _FLOATS:
        reasons.append(f"weight is {weight.dtype}; the kernel multiplies float32, float16 or bfloat16")
    if image.dtype not in (torch.uint8, *_FLOATS):
        reasons.append(f"image is {image.dtype}; the kernel reads uint8, float32, float16 or bfloat16")
    return reasons


def _cuda_reasons(image: Tensor, weight: Tensor, *others: Tensor | None) -> list[str]:
    reasons = []
    channels, patch = weight.shape[0], weight.shape[-1]
    if weight.dtype not in _FLOATS[1:]:
        reasons.append(f"weight is {weight.dtype}; the kernel multiplies float16 or bfloat16")
    if image.dtype not in (torch.uint8, *_FLOATS):
        reasons.append(f"image is {image.dtype}; the kernel reads uint8, float32, float16 or bfloat16")
    wrong = {t.dtype for t in others if t is not None} - {*_FLOATS}
    if wrong:
        reasons.append(f"an argument is {wrong.pop()}; the kernel adds float32, float16 or bfloat16")
    if patch != _CUDA_PATCH:
        reasons.append(f"the patch size is {patch}; the kernel is laid out for {_CUDA_PATCH}")
    if channels % 8 != 0:
        reasons.append(f"weight has {channels} channels; the kernel writes vectors of 8")
    return reasons or backends.cuda_reasons(image, weight, *others)


backends.register("tokenize", cuda=_cuda_reasons, triton=_triton_reasons)


def _described(name: str, tensor: Tensor, expected: str, advice: str) -> str:
    return f"{name}: expected {expected}, got {list(tensor.shape)} {tensor.dtype}; {advice}"


def _check_image(image: Tensor, weight: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    layout = "[N, 3, H, W] or [N, H, W, 3], float or uint8"
    if image.ndim != 4 or (image.shape[1] != 3 and image.shape[3] != 3):
        raise ValueError(_described("image", image, layout, "stack views along the first dimension"))
    if not (image.is_floating_point() or image.dtype == torch.uint8):
        raise ValueError(_described("image", image, layout, "convert it"))
    square = weight.ndim == 4 and weight.shape[1] == 3 and weight.shape[2] == weight.shape[3]
    if not (square and weight.is_floating_point()):
        raise ValueError(
            _described("weight", weight, "[C, 3, patch, patch] float", "pass the patch convolution's weight")
        )
    if (mean is None) != (std is None):
        raise ValueError("mean, std: expected both or neither; pass both in 0..1 units, or normalise the image first")
    if mean is not None and std is not None and (len(mean) != 3 or len(std) != 3):
        raise ValueError(f"mean, std: expected three numbers each, got {len(mean)} and {len(std)}")
    if image.dtype == torch.uint8 and mean is None:
        raise ValueError(_described("image", image, "float when mean and std are not given", "pass mean= and std="))


def _check_rows(
    channels: int,
    tokens: int,
    bias: Tensor | None,
    pos_embed: Tensor,
    cls_token: Tensor | None,
    register_tokens: Tensor | None,
) -> None:
    fits = pos_embed.ndim == 2 and pos_embed.shape[1] == channels
    rows = pos_embed.shape[0]
    if not (fits and (rows == tokens or (cls_token is not None and rows == tokens + 1))):
        expected = f"[{tokens}, {channels}]" + ("" if cls_token is None else f" or [{tokens + 1}, {channels}]")
        raise ValueError(_described("pos_embed", pos_embed, expected, "resize it to this grid of patches"))
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(_described("bias", bias, f"[{channels}]", "pass the patch convolution's bias"))
    if cls_token is not None and cls_token.numel() != channels:
        raise ValueError(_described("cls_token", cls_token, f"{channels} values", "pass the encoder's class token"))
    if register_tokens is not None and (register_tokens.ndim < 2 or register_tokens.shape[-1] != channels):
        raise ValueError(_described("register_tokens", register_tokens, f"[..., R, {channels}]", "pass R rows"))


def tokenize(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor,
    cls_token: Tensor | None = None,
    register_tokens: Tensor | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Patch tokens of images, with position embedding, class token and registers, in DINOv2's row order.

    Row order: class token (plus the first row of `pos_embed`), registers (no position), then the T = (H / P)(W / P)
    patches from left to right and top to bottom (DINOv2, `prepare_tokens_with_masks`). Pixels are rounded to the
    weight's dtype after normalisation and products are summed in float32, or in TF32 for a float32 weight where
    `torch.backends.cuda.matmul.allow_tf32` is set.

    Args:
        image: [N, 3, H, W] or [N, H, W, 3], any strides; float, or uint8 with `mean` and `std`. H and W are multiples
            of the patch size P.
        weight: [C, 3, P, P] patch convolution; its dtype is the matmul's.
        bias: [C] or None.
        pos_embed: [T, C], or [1 + T, C] with a class token, already resized to this grid.
        cls_token: C values in any shape, or None.
        register_tokens: [..., R, C], or None.
        mean, std: three numbers each in 0..1 units: x = (pixel - mean) / std, uint8 pixels divided by 255 first.
            None: the image is normalised already.
        out_dtype: dtype of the rows; the weight's by default (float32 for a float32 residual stream).
        backend: "triton", "cuda" (16-bit weights, patches of 14), "eager" or None for the fastest that can run. The
            backward pass is cuBLAS's in all.

    Returns:
        [N, extra + T, C] rows, contiguous; extra counts the class token and the registers.

    Raises:
        ValueError: a shape or dtype is not as above, or a uint8 image comes without `mean` and `std`.
        BackendError: `backend` cannot run this call.
    """
    _check_image(image, weight, mean, std)
    pixels = channels_first(image)
    channels, patch = weight.shape[0], weight.shape[-1]
    height, width = pixels.shape[2:]
    if height % patch != 0 or width % patch != 0:
        raise ValueError(
            _described("image", image, f"H and W divisible by the patch size {patch}", "resize or crop it")
        )
    tokens = (height // patch) * (width // patch)
    _check_rows(channels, tokens, bias, pos_embed, cls_token, register_tokens)
    cls_row = None if cls_token is None else cls_token.reshape(1, channels)
    registers = None if register_tokens is None else register_tokens.reshape(-1, channels)
    dtype = out_dtype or weight.dtype
    name = backends.select("tokenize", backend, pixels, weight, bias, pos_embed, cls_row, registers)
    if name == backends.EAGER:
        with own_dtypes(pixels):
            return reference_tokenize(
                pixels, weight, bias, pos_embed, cls_row, registers, mean=mean, std=std, out_dtype=dtype
            )
    scale: list[float] = []
    shift: list[float] = []
    if mean is not None and std is not None:
        unit = 255.0 if pixels.dtype == torch.uint8 else 1.0
        scale = [1.0 / (unit * s) for s in std]
        shift = [-m / s for m, s in zip(mean, std, strict=True)]
    rows: Tensor = _Tokenize.apply(pixels, weight, bias, pos_embed, cls_row, registers, scale, shift, dtype, name)
    return rows
