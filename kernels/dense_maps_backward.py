"""Gradient of `dense_maps.finish`: what its sum and its ReLU want, added, and the sum of that over pixels for the bias.

One pass reads both gradients and the ReLU's result (positive where the sum was) and writes the total. Programs walk
over pixels and keep a sum for each channel; partial sums are added in a fixed order, so that results are bitwise equal
from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import column_sums, processors
from .aot import AotCase
from .dense_maps import _WARPS, _block

_PROGRAMS = 8  # a multiprocessor: 32 warps, each with 16 values of every operand in flight


@triton.jit(do_not_specialize=["pixels", "steps"])
def finish_backward_kernel(
    grad_out_ptr,  # [pixels, channels] or unused
    grad_relu_ptr,  # [pixels, channels] or unused
    relu_ptr,  # [pixels, channels], with a gradient of it
    total_ptr,  # [pixels, channels] or unused
    sums_ptr,  # [programs, channels] float32 or unused
    pixels,
    channels,
    steps,
    HAS_OUT: tl.constexpr,
    HAS_RELU: tl.constexpr,
    STORE: tl.constexpr,
    SUMS: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    """total = grad_out + grad_relu where relu > 0; `steps` blocks of pixels a program."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    first = tl.program_id(0) * steps * BP
    sums = tl.zeros([BP, BC], tl.float32)
    for step in range(steps):
        pixel = first + step * BP + tl.arange(0, BP)
        mask = (pixel < pixels)[:, None] & (c < channels)[None, :]
        offset = pixel.to(tl.int64)[:, None] * channels + c[None, :]
        value = tl.zeros([BP, BC], tl.float32)
        if HAS_OUT:
            value = tl.load(grad_out_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if HAS_RELU:
            grad = tl.load(grad_relu_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            relu = tl.load(relu_ptr + offset, mask=mask, other=0.0)
            value += tl.where(relu > 0.0, grad, 0.0)
        if STORE:
            tl.store(total_ptr + offset, value.to(total_ptr.dtype.element_ty), mask=mask)
        if SUMS:
            sums += value
    if SUMS:
        row = tl.program_id(0).to(tl.int64) * channels
        tl.store(sums_ptr + row + c, tl.sum(sums, axis=0), mask=c < channels)


def finish_backward(
    grad_out: Tensor | None,  # [N, H, W, C] contiguous
    grad_relu: Tensor | None,  # [N, H, W, C] contiguous
    relu: Tensor | None,  # [N, H, W, C] contiguous, with `grad_relu`
    total: Tensor | None,  # [N, H, W, C]
    sums: bool,
) -> Tensor | None:
    """Write the sum's gradient to `total`, and return its sum over pixels, [C] float32, if it is wanted."""
    like = grad_out if grad_out is not None else grad_relu
    assert like is not None
    channels = like.shape[3]
    pixels = like.numel() // channels
    if pixels == 0:
        return like.new_zeros(channels, dtype=torch.float32) if sums else None
    bp, bc = _block(channels)
    blocks = triton.cdiv(pixels, bp)
    steps = triton.cdiv(blocks, min(blocks, _PROGRAMS * processors(like.device)))
    programs = triton.cdiv(blocks, steps)
    partials = like.new_empty((1, programs, channels) if sums else 0, dtype=torch.float32)
    with torch.cuda.device_of(like):
        finish_backward_kernel[(programs, triton.cdiv(channels, bc))](
            like if grad_out is None else grad_out,
            like if grad_relu is None else grad_relu,
            like if relu is None else relu,
            like if total is None else total,
            partials, pixels, channels, steps,
            HAS_OUT=grad_out is not None, HAS_RELU=grad_relu is not None, STORE=total is not None, SUMS=sums,
            BP=bp, BC=bc, num_warps=_WARPS,
        )  # fmt: skip
        return column_sums(partials, [torch.float32])[0] if sums else None


def aot_cases() -> list[AotCase]:
    """The gradients of every kind of pass in a dense head."""
    kinds = {
        "bias": {"HAS_OUT": True, "SUMS": True},
        "relu": {"HAS_RELU": True, "STORE": True, "SUMS": True},
        "fusion": {"HAS_OUT": True, "HAS_RELU": True, "STORE": True, "SUMS": True},
        "check": {"HAS_OUT": True, "HAS_RELU": True, "STORE": True},
    }
    cases = []
    for name, chosen in kinds.items():
        for kind in ("fp16", "bf16", "fp32"):
            bp, bc = _block(256)
            maps = ("grad_out_ptr", "grad_relu_ptr", "relu_ptr", "total_ptr")
            types = dict.fromkeys(maps, f"*{kind}") | {"sums_ptr": "*fp32"}
            types |= dict.fromkeys(("pixels", "channels", "steps"), "i32")
            flags = dict.fromkeys(("HAS_OUT", "HAS_RELU", "STORE", "SUMS"), False) | chosen
            cases.append(
                AotCase(f"dense_maps_backward_{name}_{kind}", finish_backward_kernel, types,
                        {**flags, "BP": bp, "BC": bc}, (*maps, "sums_ptr", "channels"), {"num_warps": _WARPS})
            )  # fmt: skip
    return cases
