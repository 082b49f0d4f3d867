"""Weights of convolutions from the layout and dtype of parameters to those of channels-last maps; gradients back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase

# 2,048 values a program, 16 a lane: rows of 128 channels are whole lines in 16 bits, and 256 x 256 channels make 512
# programs. All nine taps of a channel lie in 36 bytes, so that a program reads one piece of memory.
_CHANNELS, _VALUES, _WARPS = 128, 2048, 4


@triton.jit
def transpose_kernel(
    source_ptr,  # [outputs, A, B]
    target_ptr,  # [outputs, B, A]
    A,
    B,
    BA: tl.constexpr,
    BB: tl.constexpr,
):
    """Each output channel's block of A x B the other way round."""
    base = tl.program_id(0).to(tl.int64) * A * B
    a = tl.program_id(1) * BA + tl.arange(0, BA)
    b = tl.program_id(2) * BB + tl.arange(0, BB)
    mask = (a < A)[:, None] & (b < B)[None, :]
    value = tl.load(source_ptr + base + a[:, None] * B + b[None, :], mask=mask)
    tl.store(target_ptr + base + b[None, :] * A + a[:, None], value.to(target_ptr.dtype.element_ty), mask=mask)


def _blocks(channels: int, taps: int) -> tuple[int, int]:
    """Channels and taps a program."""
    across = triton.next_power_of_2(taps)
    return min(triton.next_power_of_2(channels), max(1, min(_CHANNELS, _VALUES // across))), across


def lay_out(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[Cout, Cin, kh, kw] contiguous -> the same in `dtype`, channels last."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device, memory_format=torch.channels_last)
    outputs, channels, taps = *weight.shape[:2], weight.shape[2] * weight.shape[3]
    if weight.numel():
        wide, across = _blocks(channels, taps)
        with torch.cuda.device_of(weight):
            transpose_kernel[(outputs, triton.cdiv(channels, wide), 1)](
                weight, out, channels, taps, BA=wide, BB=across, num_warps=_WARPS
            )
    return out


def lay_out_backward(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """[Cout, Cin, kh, kw] channels last -> the same in `dtype`, contiguous."""
    out = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    outputs, channels, taps = *grad.shape[:2], grad.shape[2] * grad.shape[3]
    if grad.numel():
        wide, across = _blocks(channels, taps)
        with torch.cuda.device_of(grad):
            transpose_kernel[(outputs, 1, triton.cdiv(channels, wide))](
                grad, out, taps, channels, BA=across, BB=wide, num_warps=_WARPS
            )
    return out


def aot_cases() -> list[AotCase]:
    """3x3 convolutions of a dense head under float32 parameters, both ways."""
    wide, across = _blocks(256, 9)
    cases = []
    for kind in ("fp16", "bf16"):
        for name, types, blocks, aligned in (
            ("", ("*fp32", f"*{kind}"), (wide, across), "A"),
            ("_backward", (f"*{kind}", "*fp32"), (across, wide), "B"),
        ):
            cases.append(
                AotCase(
                    name=f"dense_maps_lay_out{name}_{kind}",
                    kernel=transpose_kernel,
                    types={"source_ptr": types[0], "target_ptr": types[1], "A": "i32", "B": "i32"},
                    constants={"BA": blocks[0], "BB": blocks[1]},
                    aligned=("source_ptr", "target_ptr", aligned),
                    options={"num_warps": _WARPS},
                )
            )
    return cases
