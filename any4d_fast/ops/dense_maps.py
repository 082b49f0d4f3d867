"""What runs between the convolutions of dense heads and tokenizers in inference, range checks included.

Biases, residuals, resizes, ReLU and GELU; and the conversions of tokens and patches to the maps' dtype.

A float16 map holds nothing beyond 65,504. Every function here takes a flag, [1] int32 on the maps' device, and sets it
where a value that it has computed in float32 does not fit its result's dtype (or is not a number). Nothing waits for
the flag: whoever runs a head or a tokenizer reads it once, at the end.

No function here is differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..reference import dense_maps as reference
from ._library import define

Size = tuple[int, int]

ALIGNMENT = 8
"""Channels of a 16-bit map come in 16 bytes at a time on tensor cores; `patches` pads to as many."""


def _finish_impl(
    value: Tensor, bias: Tensor | None, residual: Tensor | None, coarse: Tensor | None, double: list[int],
    flag: Tensor, out: bool, relu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from ..kernels import dense_maps as kernels

    total = torch.empty(value.shape if out else (0,), dtype=value.dtype, device=value.device)
    positive = torch.empty(value.shape if relu else (0,), dtype=value.dtype, device=value.device)
    kernels.finish(
        value, bias, residual, coarse, (double[0], double[1]), total if out else None, positive if relu else None, flag
    )
    return total, positive


def _finish_fake(
    value: Tensor, bias: Tensor | None, residual: Tensor | None, coarse: Tensor | None, double: list[int],
    flag: Tensor, out: bool, relu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return value.new_empty(value.shape if out else (0,)), value.new_empty(value.shape if relu else (0,))


def _upsample_impl(coarse: Tensor, double: list[int], size: list[int], flag: Tensor) -> Tensor:
    from ..kernels import dense_maps as kernels

    shape = (coarse.shape[0], size[0], size[1], coarse.shape[3])
    out = torch.empty(shape, dtype=coarse.dtype, device=coarse.device)
    kernels.finish(None, None, None, coarse, (double[0], double[1]), out, None, flag)
    return out


def _upsample_fake(coarse: Tensor, double: list[int], size: list[int], flag: Tensor) -> Tensor:
    return coarse.new_empty(coarse.shape[0], size[0], size[1], coarse.shape[3])


def _narrow_impl(x: Tensor, dtype: torch.dtype, flag: Tensor) -> Tensor:
    from ..kernels import dense_maps as kernels

    views, batch, length, channels = x.shape
    out = torch.empty(views * batch, length, channels, dtype=dtype, device=x.device)
    kernels.narrow(x, out, flag)
    return out


def _narrow_fake(x: Tensor, dtype: torch.dtype, flag: Tensor) -> Tensor:
    views, batch, length, channels = x.shape
    return x.new_empty(views * batch, length, channels, dtype=dtype)


def _gelu_impl(value: Tensor, bias: Tensor, residual: Tensor | None, flag: Tensor) -> Tensor:
    from ..kernels import dense_maps as kernels

    out = torch.empty_like(value)
    kernels.gelu(value, bias, residual, out, flag)
    return out


def _gelu_fake(value: Tensor, bias: Tensor, residual: Tensor | None, flag: Tensor) -> Tensor:
    return torch.empty_like(value)


def _patches_impl(x: Tensor, patch: int, dtype: torch.dtype, flag: Tensor) -> Tensor:
    from ..kernels import dense_maps as kernels

    n, height, width, cin = x.shape
    shape = (n, height // patch, width // patch, padded(patch * patch * cin))
    out = torch.empty(shape, dtype=dtype, device=x.device)
    kernels.patches(x, patch, out, flag)
    return out


def _patches_fake(x: Tensor, patch: int, dtype: torch.dtype, flag: Tensor) -> Tensor:
    n, height, width, cin = x.shape
    return x.new_empty(n, height // patch, width // patch, padded(patch * patch * cin), dtype=dtype)


_finish = define(
    "dense_maps_finish",
    "(Tensor value, Tensor? bias, Tensor? residual, Tensor? coarse, SymInt[] double, Tensor(a!) flag, bool out, "
    "bool relu) -> (Tensor, Tensor)",
    _finish_impl,
    _finish_fake,
)
_upsample = define(
    "dense_maps_upsample",
    "(Tensor coarse, SymInt[] double, SymInt[] size, Tensor(a!) flag) -> Tensor",
    _upsample_impl,
    _upsample_fake,
)
_narrow = define(
    "dense_maps_narrow", "(Tensor x, ScalarType dtype, Tensor(a!) flag) -> Tensor", _narrow_impl, _narrow_fake
)
_gelu = define(
    "dense_maps_gelu",
    "(Tensor value, Tensor bias, Tensor? residual, Tensor(a!) flag) -> Tensor",
    _gelu_impl,
    _gelu_fake,
)
_patches = define(
    "dense_maps_patches",
    "(Tensor x, int patch, ScalarType dtype, Tensor(a!) flag) -> Tensor",
    _patches_impl,
    _patches_fake,
)


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


def padded(channels: int) -> int:
    """Channels with the zeros behind them that `ALIGNMENT` asks for."""
    return -(-channels // ALIGNMENT) * ALIGNMENT


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
    result: Tensor = _narrow(x if x.stride(3) == 1 else x.contiguous(), dtype, flag)
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
    its size, then cut to the map's (an odd grid has one row or column fewer).

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
    found: tuple[Tensor, Tensor] = _finish(*maps, list(double), flag, out, relu)
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
    result: Tensor = _upsample(coarse.contiguous(), list(size), list(size), flag)
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
    result: Tensor = _gelu(*maps, flag)
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
    result: Tensor = _patches(x if dense else x.contiguous(), patch, dtype, flag)
    return result
