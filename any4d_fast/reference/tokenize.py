"""Image to patch tokens in plain PyTorch: normalisation, patch and position embedding, class and register rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def channels_first(image: Tensor) -> Tensor:
    """[N, 3, H, W] view of an image given as [N, 3, H, W] or [N, H, W, 3]."""
    return image if image.shape[1] == 3 else image.permute(0, 3, 1, 2)


def normalize_pixels(image: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """(pixel - mean) / std channel by channel, uint8 scaled to 0..1 first.

    Channels are taken one at a time with Python numbers, so that nothing is copied from host to device.

    Args:
        image: [N, 3, H, W] uint8, or float in 0..1.
        mean, std: three numbers each, in 0..1 units.
        dtype: the floating dtype to compute in.
    """
    unit = 255.0 if image.dtype == torch.uint8 else 1.0
    planes = [(image[:, c].to(dtype) / unit - mean[c]) / std[c] for c in range(3)]
    return torch.stack(planes, dim=1)


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
) -> Tensor:
    """Rows [N, extra + T, C]: class token, registers, then patches; see `any4d_fast.ops.tokenize`."""
    pixels = channels_first(image)
    channels, patch = weight.shape[0], weight.shape[-1]
    out_dtype = out_dtype or weight.dtype
    if mean is not None and std is not None:
        pixels = normalize_pixels(pixels, mean, std, torch.promote_types(weight.dtype, torch.float32))
    offset = None if bias is None else bias.to(weight.dtype)
    patches = F.conv2d(pixels.to(weight.dtype), weight, offset, stride=patch)
    tokens = patches.flatten(2).transpose(1, 2).to(out_dtype)
    batch, count = tokens.shape[:2]
    tokens = tokens + pos_embed[pos_embed.shape[0] - count :].to(out_dtype)
    rows = []
    if cls_token is not None:
        first = cls_token.reshape(1, channels).to(out_dtype)
        rows.append(first + pos_embed[:1].to(out_dtype) if pos_embed.shape[0] > count else first)
    if register_tokens is not None:
        rows.append(register_tokens.reshape(-1, channels).to(out_dtype))
    if not rows:
        return tokens
    return torch.cat([torch.cat(rows).expand(batch, -1, -1), tokens], dim=1)
