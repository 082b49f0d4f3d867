"""What runs between the convolutions of dense heads and tokenizers in inference, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def raise_flag(value: Tensor, dtype: torch.dtype, flag: Tensor) -> None:
    """Set the flag where a value is NaN or beyond the range of `dtype`; without a synchronisation."""
    inside = (value.abs() <= torch.finfo(dtype).max).all()
    flag.logical_or_(~inside)


def narrow(x: Tensor, dtype: torch.dtype, flag: Tensor) -> Tensor:
    """See `any4d_fast.ops.dense_maps.narrow`."""
    raise_flag(x, dtype, flag)
    return x.to(dtype).reshape(-1, *x.shape[2:])


def resized(coarse: Tensor, double: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """[N, h, w, C] resized bilinearly to `double` (corners aligned), then cut to `size`, in float32 or float64."""
    wide = coarse.to(torch.promote_types(coarse.dtype, torch.float32)).permute(0, 3, 1, 2)
    large = F.interpolate(wide, size=double, mode="bilinear", align_corners=True)
    return large[:, :, : size[0], : size[1]].permute(0, 2, 3, 1)


def finish(
    value: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    coarse: Tensor | None,
    double: tuple[int, int],
    size: tuple[int, int],
    flag: Tensor,
) -> Tensor:
    """The sum of what is given, unrounded; see `any4d_fast.ops.dense_maps`."""
    given = value if value is not None else coarse
    assert given is not None
    wide = torch.promote_types(given.dtype, torch.float32)
    terms = [] if value is None else [value.to(wide)]
    terms += [t.to(wide) for t in (bias, residual) if t is not None]
    if coarse is not None:
        terms.append(resized(coarse, double, size))
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    raise_flag(total, given.dtype, flag)
    return total


def gelu(value: Tensor, bias: Tensor, residual: Tensor | None, flag: Tensor) -> Tensor:
    """See `any4d_fast.ops.dense_maps.gelu`; unrounded."""
    wide = torch.promote_types(value.dtype, torch.float32)
    total = value.to(wide) + bias.to(wide)
    if residual is not None:
        total = total + residual.to(wide)
    raise_flag(total, value.dtype, flag)
    return F.gelu(total)


def patches(x: Tensor, patch: int, channels: int, dtype: torch.dtype, flag: Tensor) -> Tensor:
    """See `any4d_fast.ops.dense_maps.patches`; `channels` with the padding."""
    raise_flag(x, dtype, flag)
    n, height, width, cin = x.shape
    rows, columns = height // patch, width // patch
    grid = x.to(dtype).reshape(n, rows, patch, columns, patch * cin).transpose(2, 3)
    found = grid.reshape(n, rows, columns, patch * patch * cin)
    return F.pad(found, (0, channels - found.shape[3]))
