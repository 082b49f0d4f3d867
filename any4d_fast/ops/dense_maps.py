"""What runs between the convolutions of dense heads and tokenizers in 16 bits, range checks included.

Biases, residuals, resizes, ReLU and GELU; and the conversions of tokens and patches to the maps' dtype.

A float16 map holds nothing beyond 65,504. Every function here takes a flag, [1] int32 on the maps' device, and sets it
where a value that it has computed in float32 does not fit its result's dtype (or is not a number). Nothing waits for
the flag: whoever runs a head or a tokenizer reads it once, at the end.

`finish` and `upsample` are differentiable, which dense heads train with; the others are for inference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..reference import dense_maps as reference
from . import _dense_maps_operators as operators
from ._dense_maps_operators import padded as padded

Size = tuple[int, int]


def _triton_reasons(*tensors: Tensor | None) -> list[str]:
    given = [t for t in tensors if t is not None]
    reasons = backends.triton_reasons(*given)
    for dtype in sorted({t.dtype for t in given if t.dtype == torch.float64}, key=str):
        reasons.append(f"{dtype} runs in eager mode only")
    # Pixels are counted in 32 bits.
    if any(t.numel() // max(t.shape[-1], 1) >= 2**31 for t in given):
        reasons.append("a map has 2^31 or more pixels; pass fewer maps at once")
    return reasons


backends.register("dense_maps", triton=_triton_reasons)


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def new_flag(device: torch.device) -> Tensor:
    """[1] int32, not set."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def _check_map(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != dtype):
        raise ValueError(
            f"{name}: expected {list(shape)} {dtype} like the map, got {list(tensor.shape)} {tensor.dtype}; "
            "give both the same rows, channels and dtype"
        )


def _check_flag(flag: Tensor, like: Tensor) -> None:
    if tuple(flag.shape) != (1,) or flag.dtype != torch.int32 or flag.device != like.device:
        raise ValueError(
            f"flag: expected [1] int32 on {like.device}, got {list(flag.shape)} {flag.dtype} on {flag.device}; "
            "make it with new_flag(device)"
        )


def narrow(x: Tensor, dtype: torch.dtype, flag: Tensor, *, backend: str | None = None) -> Tensor:
    """Rows of tokens in the dtype of the maps, view-major, with their range checked.

    Args:
        x: [views, B, T, C] floating point, any strides (a slice of a token buffer is read in place where its channels
            are contiguous).
        dtype: of the result.
        flag: [1] int32, set where a value does not fit.
        backend: "triton", "eager" or None.

    Returns:
        [views * B, T, C] contiguous, row v*B + b.

    Raises:
        ValueError: `x` or `flag` is not as above.
        BackendError: `backend` cannot run this call.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x: expected [views, B, T, C] floating point, got {list(x.shape)} {x.dtype}")
    _check_flag(flag, x)
    if backends.select("dense_maps", backend, x) == backends.EAGER:
        return reference.narrow(x, dtype, flag)
    result: Tensor = operators.narrow(x if x.stride(3) == 1 else x.contiguous(), dtype, flag)
    return result


def finish(
    value: Tensor,
    bias: Tensor | None,
    flag: Tensor,
    *,
    residual: Tensor | None = None,
    coarse: Tensor | None = None,
    out: bool = True,
    relu: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """What follows a convolution: value + bias + residual + coarse, where `coarse` is doubled in size; and its ReLU.

    The sum is taken in float32 and rounded once. The coarser map is resized bilinearly with aligned corners to twice
    its size, then cut to the map's (an odd grid has one row or column fewer). Differentiable in all four; with Triton
    gradients are bitwise equal from run to run.

    Args:
        value: [N, H, W, C], the convolution's result without its bias.
        bias: [C] or None.
        flag: [1] int32, set where a sum does not fit the map's dtype.
        residual: [N, H, W, C] or None.
        coarse: [N, h, w, C] with 2h >= H and 2w >= W, or None.
        out: return the sum.
        relu: return its ReLU.
        backend: "triton", "eager" or None.

    Returns:
        The sum and its ReLU, [N, H, W, C] contiguous in the map's dtype; an empty tensor for one not asked for.

    Raises:
        ValueError: shapes or dtypes do not fit, or nothing is asked for.
        BackendError: `backend` cannot run this call.
    """
    if value.ndim != 4 or not value.is_floating_point():
        raise ValueError(f"value: expected [N, H, W, C] floating point, got {list(value.shape)} {value.dtype}")
    if not (out or relu):
        raise ValueError("out, relu: expected one of them to be True, got neither; ask for a result")
    n, height, width, channels = value.shape
    _check_map("residual", residual, tuple(value.shape), value.dtype)
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"bias: expected [{channels}], got {list(bias.shape)}; pass the convolution's bias")
    double = (height, width)
    if coarse is not None:
        double = (2 * coarse.shape[1], 2 * coarse.shape[2])
        _check_map("coarse", coarse, (n, *coarse.shape[1:3], channels), value.dtype)
        if double[0] < height or double[1] < width:
            raise ValueError(
                f"coarse: expected at least half of {height} x {width}, got {coarse.shape[1]} x {coarse.shape[2]}"
            )
    _check_flag(flag, value)
    if backends.select("dense_maps", backend, value, bias, residual, coarse) == backends.EAGER:
        total = reference.finish(value, bias, residual, coarse, double, (height, width), flag)
        empty = value.new_empty(0)
        return total.to(value.dtype) if out else empty, total.relu().to(value.dtype) if relu else empty
    maps = [None if t is None else t.contiguous() for t in (value, bias, residual, coarse)]
    run = operators.Finish.apply if _wants_gradient(*maps) else operators.finish
    found: tuple[Tensor, Tensor] = run(*maps, list(double), flag, out, relu)
    return found


def upsample(coarse: Tensor, flag: Tensor, *, backend: str | None = None) -> Tensor:
    """[N, h, w, C] resized bilinearly with aligned corners to [N, 2h, 2w, C], its range checked.

    Args:
        coarse: [N, h, w, C].
        flag: [1] int32, set where a value does not fit.
        backend: "triton", "eager" or None.

    Raises:
        ValueError: `coarse` or `flag` is not as above.
        BackendError: `backend` cannot run this call.
    """
    if coarse.ndim != 4 or not coarse.is_floating_point():
        raise ValueError(f"coarse: expected [N, h, w, C] floating point, got {list(coarse.shape)} {coarse.dtype}")
    _check_flag(flag, coarse)
    size: Size = (2 * coarse.shape[1], 2 * coarse.shape[2])
    if backends.select("dense_maps", backend, coarse) == backends.EAGER:
        return reference.finish(None, None, None, coarse, size, size, flag).to(coarse.dtype).contiguous()
    run = operators.Upsample.apply if _wants_gradient(coarse) else operators.upsample
    result: Tensor = run(coarse.contiguous(), list(size), list(size), flag)
    return result


def gelu(
    value: Tensor, bias: Tensor, flag: Tensor, *, residual: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """gelu(value + bias + residual), the erf one, with the sum's range checked.

    Args:
        value: [N, H, W, C], the convolution's result without its bias.
        bias: [C].
        flag: [1] int32, set where the sum does not fit the map's dtype.
        residual: [N, H, W, C] or None.
        backend: "triton" (in 16 bits GELU is a polynomial that errs by at most 4.6e-5), "eager" or None.

    Returns:
        [N, H, W, C] contiguous in the map's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit.
        BackendError: `backend` cannot run this call.
    """
    if value.ndim != 4 or not value.is_floating_point():
        raise ValueError(f"value: expected [N, H, W, C] floating point, got {list(value.shape)} {value.dtype}")
    _check_map("residual", residual, tuple(value.shape), value.dtype)
    if tuple(bias.shape) != (value.shape[3],):
        raise ValueError(f"bias: expected [{value.shape[3]}], got {list(bias.shape)}; pass the convolution's bias")
    _check_flag(flag, value)
    if backends.select("dense_maps", backend, value, bias, residual) == backends.EAGER:
        return reference.gelu(value, bias, residual, flag).to(value.dtype)
    maps = [None if t is None else t.contiguous() for t in (value, bias, residual)]
    result: Tensor = operators.gelu(*maps, flag)
    return result


def patches(x: Tensor, patch: int, dtype: torch.dtype, flag: Tensor, *, backend: str | None = None) -> Tensor:
    """Patches of a dense map as pixels of a map with many channels, in its dtype, with their range checked.

    Args:
        x: [N, H, W, Cin] floating point, H and W multiples of the patch size P.
        patch: P.
        dtype: of the result.
        flag: [1] int32, set where a value does not fit.
        backend: "triton", "eager" or None.

    Returns:
        [N, H / P, W / P, padded(P * P * Cin)] contiguous; channel (i * P + j) * Cin + c is pixel (i, j) of the patch in
        channel c, and what is behind these is zero.

    Raises:
        ValueError: `x`, `patch` or `flag` is not as above.
        BackendError: `backend` cannot run this call.
    """
    if x.ndim != 4 or not x.is_floating_point() or x.shape[1] % patch or x.shape[2] % patch:
        raise ValueError(
            f"x: expected [N, H, W, Cin] floating point, H and W multiples of the patch size {patch}, "
            f"got {list(x.shape)} {x.dtype}; resize or crop the map"
        )
    _check_flag(flag, x)
    if backends.select("dense_maps", backend, x) == backends.EAGER:
        return reference.patches(x, patch, padded(patch * patch * x.shape[3]), dtype, flag)
    cin = x.shape[3]
    dense = x.stride(2) == cin and (cin == 1 or x.stride(3) == 1)
    result: Tensor = operators.patches(x if dense else x.contiguous(), patch, dtype, flag)
    return result
