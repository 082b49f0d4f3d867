"""Launcher of patch embedding in CUDA C++ (csrc/tokenize*.cu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _ext
from . import dtype_code, is_aligned, pointer, stream

PATCH = 14
_COLUMNS = 128
"""Channels of a block of the packed weight (csrc/tokenize.h, kColumns)."""
_BLOCK_VALUES = 592 * _COLUMNS
"""16-bit values of such a block: 588 of a patch, padded to whole products (kBlockValues)."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_HALVES = (torch.bfloat16, torch.float16)


def _table(name: str, tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (pointer(tensor), dtype_code(name, tensor, *_FLOATS))


def _rows(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def tokenize_forward(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor,
    cls_token: Tensor | None,
    register_tokens: Tensor | None,
    scale: Sequence[float],
    shift: Sequence[float],
    out_dtype: torch.dtype,
    *,
    warpgroups: bool = True,
) -> Tensor:
    """Launch the forward pass.

    Pixels are read in words where every run of a patch's 14 (channels first) or 42 (channels last, uint8) neighbouring
    values starts on an even element; other images are read one value at a time, several times slower.

    Args:
        image: [N, 3, H, W] any strides, uint8 or float.
        weight: [C, 3, 14, 14] bfloat16 or float16; C is a multiple of 8.
        bias: [C] or None.
        pos_embed: [T, C], or [1 + T, C] with a class token.
        cls_token: [1, C] or None.
        register_tokens: [R, C] or None.
        scale, shift: pixels become `pixel * scale + shift`, channel by channel; empty: they stay as they are.
        out_dtype: float32, bfloat16 or float16.
        warpgroups: False multiplies by `mma.sync` on Hopper too; for tests and measurements.

    Returns:
        [N, extra + T, C] rows.

    Raises:
        TypeError: a dtype is not as above.
        ValueError: the patch size is not 14, or C is not a multiple of 8.
    """
    images, _, height, width = image.shape
    channels, patch = weight.shape[0], weight.shape[-1]
    if patch != PATCH or channels % 8 != 0:
        raise ValueError(f"weight: expected [8 n, 3, {PATCH}, {PATCH}], got {list(weight.shape)}; use another backend")
    grid = height // patch, width // patch
    tokens = grid[0] * grid[1]
    registers = 0 if register_tokens is None else register_tokens.shape[0]
    device = image.device
    out = torch.empty(images, registers + (cls_token is not None) + tokens, channels, device=device, dtype=out_dtype)
    if out.numel() == 0:
        return out
    # Copies must outlive the launch: the names hold them.
    weight, pos_embed = weight.contiguous(), pos_embed.contiguous()
    bias, cls_token, register_tokens = _rows(bias), _rows(cls_token), _rows(register_tokens)
    blocks = -(-channels // _COLUMNS)
    packed = torch.empty(blocks * _BLOCK_VALUES, device=device, dtype=weight.dtype)
    bias_row = torch.empty(blocks * _COLUMNS, device=device, dtype=torch.float32)
    # Sums start from float32 positions in rows of whole blocks; others are converted first (4 MB at 518 x 336).
    direct = pos_embed.dtype == torch.float32 and is_aligned(pos_embed) and channels % _COLUMNS == 0
    pos_rows = None if direct else torch.empty(tokens * blocks * _COLUMNS, device=device, dtype=torch.float32)
    _ext.module().tokenize_forward(
        image=pointer(image),
        image_dtype=dtype_code("image", image),
        strides=image.stride(),
        scale=tuple(scale) or (1.0, 1.0, 1.0),
        shift=tuple(shift) or (0.0, 0.0, 0.0),
        weight=pointer(weight),
        weight_dtype=dtype_code("weight", weight, *_HALVES),
        bias=_table("bias", bias),
        pos=_table("pos_embed", pos_embed),
        cls=_table("cls_token", cls_token),
        registers=_table("register_tokens", register_tokens),
        out=pointer(out),
        out_dtype=dtype_code("out_dtype", out, *_FLOATS),
        packed=pointer(packed),
        bias_row=pointer(bias_row),
        pos_rows=pointer(pos_rows),
        images=images,
        grid=grid,
        channels=channels,
        pos_cls=pos_embed.shape[0] - tokens,
        register_count=registers,
        warpgroups=warpgroups,
        device=device.index,
        stream=stream(device),
    )
    return out
