"""First layer of the dense tokenizers: PixelUnshuffle and a 3x3 convolution (Triton: without the unshuffled copy)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..reference.unshuffle_conv import unshuffle
from ..reference.unshuffle_conv import unshuffle_conv as reference_unshuffle_conv
from ._library import define, own_dtypes

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _forward_impl(x: Tensor, weight: Tensor, bias: Tensor | None, patch_size: int, out_dtype: torch.dtype) -> Tensor:
    from ..kernels.unshuffle_conv import unshuffle_conv_forward

    return unshuffle_conv_forward(x, weight, bias, patch_size, out_dtype)


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, patch_size: int, out_dtype: torch.dtype) -> Tensor:
    n, height, width, _ = x.shape
    return x.new_empty(n, height // patch_size, width // patch_size, weight.shape[0], dtype=out_dtype)


def _backward_impl(
    grad: Tensor, x: Tensor, weight: Tensor, patch_size: int, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    unshuffled = unshuffle(x.to(weight.dtype), patch_size)
    d_map, d_weight, d_bias = torch.ops.aten.convolution_backward(
        grad.to(weight.dtype).permute(0, 3, 1, 2), unshuffled, weight, [weight.shape[0]],
        [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [need_x, need_weight, need_bias],
    )  # fmt: skip
    d_x = x.new_empty(0)
    if need_x:
        n, h, w, _ = grad.shape
        pixels = d_map.reshape(n, x.shape[3], patch_size, patch_size, h, w).permute(0, 4, 2, 5, 3, 1)
        d_x = pixels.reshape(x.shape).to(x.dtype)
    return (
        d_x,
        d_weight.contiguous() if need_weight else weight.new_empty(0),
        d_bias if need_bias else weight.new_empty(0),
    )


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, patch_size: int, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(weight.shape[0] if need_bias else 0),
    )


_forward = define(
    "unshuffle_conv_forward",
    "(Tensor x, Tensor weight, Tensor? bias, int patch_size, ScalarType out_dtype) -> Tensor",
    _forward_impl,
    _forward_fake,
)
_backward = define(
    "unshuffle_conv_backward",
    "(Tensor grad, Tensor x, Tensor weight, int patch_size, bool need_x, bool need_weight, bool need_bias)"
    " -> (Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


class _UnshuffleConv(torch.autograd.Function):
    """The backward pass is cuDNN's on a map unshuffled there: one map's size, freed when the call returns."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, patch_size: int, out_dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.patch_size = patch_size
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _forward(x, weight, bias, patch_size, out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        d_x, d_weight, d_bias = _backward(grad, x, weight, ctx.patch_size, *needed)
        return (
            d_x if needed[0] else None,
            d_weight if needed[1] else None,
            d_bias.to(ctx.bias_dtype) if needed[2] else None,
            None,
            None,
        )


def _triton_reasons(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[str]:
    reasons = backends.triton_reasons(x, weight, bias)
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype not in _FLOATS:
            reasons.append(f"{name} is {tensor.dtype}; the kernel reads float32, float16 or bfloat16")
    return reasons


def _cudnn_reasons(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[str]:
    return backends.not_on_cuda("cuDNN runs", x, weight, bias)


# Measured on an H200 (kernels/notes/tokenize.md): cuDNN on an unshuffled copy is faster.
backends.register("unshuffle_conv", cudnn=_cudnn_reasons, triton=_triton_reasons)


def unshuffle_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    patch_size: int,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """PixelUnshuffle(patch_size), then a 3x3 convolution with zero padding of one patch, channels-last in and out.

    Channel `c * P * P + i * P + j` of the unshuffled map is pixel (i, j) of the patch in channel c, as in
    `torch.nn.PixelUnshuffle`. Values are rounded to the weight's dtype and products are summed in float32. For a
    float32 weight, products are TF32 where PyTorch's setting for the arithmetic that runs allows it:
    `torch.backends.cuda.matmul.allow_tf32` for Triton, `torch.backends.cudnn.allow_tf32` for the others.

    Args:
        x: [N, H, W, Cin] float dense map: ray directions (unit vectors, camera frame), log depth, normalised flow.
            H and W are multiples of the patch size P. Maps that are not contiguous in (W, Cin) are copied first.
        weight: [Cout, Cin * P * P, 3, 3].
        bias: [Cout] or None.
        patch_size: P.
        out_dtype: the weight's dtype by default.
        backend: "cudnn" (PyTorch's convolution of an unshuffled copy, on CUDA), "triton" (no copy; the backward pass
            makes one), "eager" or None for the fastest that can run. The backward pass is PyTorch's in all.

    Returns:
        [N, H / P, W / P, Cout], contiguous.

    Raises:
        ValueError: a shape or dtype is not as above.
        BackendError: `backend` cannot run this call.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x: expected [N, H, W, Cin] float, got {list(x.shape)} {x.dtype}; move channels last")
    if x.shape[1] % patch_size != 0 or x.shape[2] % patch_size != 0:
        raise ValueError(
            f"x: expected H and W divisible by the patch size {patch_size}, got {list(x.shape)}; resize or crop the map"
        )
    depth = x.shape[3] * patch_size * patch_size
    if weight.ndim != 4 or tuple(weight.shape[1:]) != (depth, 3, 3) or not weight.is_floating_point():
        raise ValueError(
            f"weight: expected [Cout, {depth}, 3, 3] float for {x.shape[3]} input channels, "
            f"got {list(weight.shape)} {weight.dtype}; pass the tokenizer's first convolution"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(
            f"bias: expected [{weight.shape[0]}], got {list(bias.shape)}; pass the same convolution's bias"
        )
    dtype = out_dtype or weight.dtype
    if backends.select("unshuffle_conv", backend, x, weight, bias) != "triton":
        with own_dtypes(x):
            return reference_unshuffle_conv(x, weight, bias, patch_size, out_dtype=dtype)
    out: Tensor = _UnshuffleConv.apply(x, weight, bias, patch_size, dtype)
    return out
