"""Bilinear resize of channels-last maps and its transpose: the kernels of `_resize` on maps without padding."""

from __future__ import annotations

import torch
from torch import Tensor

from ._resize import Canvas, resize, resize_case, resize_transpose, transpose_case
from .aot import AotCase


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def resize_bilinear_forward(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[N, h, w, C] to [N, H, W, C]."""
    views, channels = x.shape[0], x.shape[3]
    out = torch.empty(views, *size, channels, device=x.device, dtype=x.dtype)
    if out.numel():
        with torch.cuda.device_of(x):
            # "ieee": values that no matmul reads keep all of their bits.
            resize(_readable(x), Canvas(views, *size, gap=0), out.view(-1, channels), 0, views * size[0], "ieee")
    return out


def resize_bilinear_backward(grad: Tensor, size: tuple[int, int]) -> Tensor:
    """[N, H, W, C] to [N, h, w, C]: the transpose of the resize from (h, w)."""
    views, height, width, channels = grad.shape
    out = torch.empty(views, *size, channels, device=grad.device, dtype=grad.dtype)
    if out.numel():
        with torch.cuda.device_of(grad):
            rows = grad.contiguous().view(-1, channels)
            resize_transpose(rows, Canvas(views, height, width, gap=0), 0, out)
    return out


def aot_cases() -> list[AotCase]:
    """The dense heads' maps (256 channels) in every dtype, forward and backward."""
    cases = []
    for kind in ("bf16", "fp16", "fp32"):
        cases.append(resize_case(f"resize_bilinear_{kind}", kind, kind, "ieee", 256, gap=0))
        cases.append(transpose_case(f"resize_bilinear_backward_{kind}", kind, 256, gap=0))
    return cases
