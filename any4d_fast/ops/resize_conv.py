"""Last stage of a dense head: bilinear resize, 3x3 convolution, ReLU, 1x1 convolution, without a map at full size."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..reference.resize_conv import resize_conv as reference_resize_conv
from ..switches import matmul_allows_tf32
from ._library import define, own_dtypes

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MAX_CHANNELS = 256
"""Most input and hidden channels of the Triton kernels: a tile's accumulator holds all hidden channels."""
MAX_OUTPUTS = 16
"""Most output channels of the Triton kernels: one tile of the last matmul."""


def _forward_impl(x: Tensor, size: list[int], *layers_and_dtype: Any) -> Tensor:
    from ..kernels.resize_conv import resize_conv_forward

    return resize_conv_forward(x, (size[0], size[1]), *layers_and_dtype)


def _forward_fake(
    x: Tensor,
    size: list[int],
    weight3: Tensor,
    bias3: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(x.shape[0], size[0], size[1], weight1.shape[0], dtype=out_dtype)


def _backward_impl(
    grad: Tensor,
    x: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    weight1: Tensor,
    need_x: bool,
    need_weight3: bool,
    need_bias3: bool,
    need_weight1: bool,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..kernels.resize_conv_backward import resize_conv_backward

    needed = (need_x, need_weight3, need_bias3, need_weight1)
    with own_dtypes(grad):
        return resize_conv_backward(grad, x, weight3, bias3, weight1, needed, tf32=tf32)


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    weight1: Tensor,
    need_x: bool,
    need_weight3: bool,
    need_bias3: bool,
    need_weight1: bool,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float32
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(weight3.shape if need_weight3 else (0,), dtype=wide),
        x.new_empty(bias3.shape if need_bias3 else (0,), dtype=wide),
        x.new_empty(weight1.shape if need_weight1 else (0,), dtype=wide),
    )


_forward = define(
    "resize_conv_forward",
    "(Tensor x, SymInt[] size, Tensor weight3, Tensor bias3, Tensor weight1, Tensor bias1, ScalarType out_dtype) "
    "-> Tensor",
    _forward_impl,
    _forward_fake,
)
_backward = define(
    "resize_conv_backward",
    "(Tensor grad, Tensor x, Tensor weight3, Tensor bias3, Tensor weight1, bool need_x, bool need_weight3, "
    "bool need_bias3, bool need_weight1, bool tf32) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


def _checked_impl(x: Tensor, size: list[int], packed: list[Tensor], flag: Tensor) -> Tensor:
    from ..kernels.resize_conv import Layers, run_layers

    layers = Layers(*packed)
    shape = (x.shape[0], size[0], size[1], layers.bias1.shape[0])
    out = torch.empty(shape, dtype=torch.float32, device=x.device)
    if out.numel():
        run_layers(x, layers, out, flag)
    return out


def _checked_fake(x: Tensor, size: list[int], packed: list[Tensor], flag: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], size[0], size[1], packed[3].shape[0]), dtype=torch.float32)


_checked = define(
    "resize_conv_checked",
    "(Tensor x, SymInt[] size, Tensor[] packed, Tensor(a!) flag) -> Tensor",
    _checked_impl,
    _checked_fake,
)


class _ResizeConv(torch.autograd.Function):
    """Keeps its inputs only: the backward pass computes the hidden map again, a few views at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        size: list[int],
        weight3: Tensor,
        bias3: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        tf32: bool,
        out_dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, weight3, bias3, weight1)
        ctx.tf32 = tf32
        ctx.bias1_dtype = bias1.dtype
        return _forward(x, size, weight3, bias3, weight1, bias1, out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight3, bias3, weight1 = ctx.saved_tensors
        need_x, _, need_weight3, need_bias3, need_weight1, need_bias1 = ctx.needs_input_grad[:6]
        d_x = d_weight3 = d_bias3 = d_weight1 = d_bias1 = None
        if need_x or need_weight3 or need_bias3 or need_weight1:
            d_x, d_weight3, d_bias3, d_weight1 = _backward(
                grad, x, weight3, bias3, weight1, need_x, need_weight3, need_bias3, need_weight1, ctx.tf32
            )
        if need_bias1:
            d_bias1 = grad.sum((0, 1, 2), dtype=torch.float32).to(ctx.bias1_dtype)
        return (
            d_x if need_x else None,
            None,
            d_weight3.to(weight3.dtype) if need_weight3 and d_weight3 is not None else None,
            d_bias3.to(bias3.dtype) if need_bias3 and d_bias3 is not None else None,
            d_weight1.to(weight1.dtype) if need_weight1 and d_weight1 is not None else None,
            d_bias1,
            None,
            None,
        )


def _triton_reasons(
    x: Tensor, size: tuple[int, int], weight3: Tensor, bias3: Tensor, weight1: Tensor, bias1: Tensor
) -> list[str]:
    reasons = backends.triton_reasons(x, weight3, bias3, weight1, bias1)
    if x.dtype not in _FLOATS:
        reasons.append(f"x is {x.dtype}; the kernel reads float32, float16 or bfloat16")
    for name, channels in (("C", x.shape[3]), ("M", weight3.shape[0])):
        if channels % 16 or not 16 <= channels <= MAX_CHANNELS:
            reasons.append(f"{name} = {channels} is no multiple of 16 from 16 to {MAX_CHANNELS}")
    if not 1 <= weight1.shape[0] <= MAX_OUTPUTS:
        reasons.append(f"{weight1.shape[0]} output channels are not 1 to {MAX_OUTPUTS}")
    # Places of padded pixels are counted in 32 bits, with room for the last tile.
    if x.shape[0] * (size[0] + 1) * (size[1] + 1) >= 2**31 - 2**20:
        reasons.append(f"{x.shape[0]} maps of {size[0]} x {size[1]} pixels are more than 2^31; pass fewer at once")
    return reasons


def _cudnn_reasons(
    x: Tensor, size: tuple[int, int], weight3: Tensor, bias3: Tensor, weight1: Tensor, bias1: Tensor
) -> list[str]:
    return backends.not_on_cuda("cuDNN runs", x, weight3, bias3, weight1, bias1)


backends.register("resize_conv", triton=_triton_reasons, cudnn=_cudnn_reasons)


def _exact(x: Tensor) -> bool:
    """Whether the Triton kernels would multiply without tensor cores."""
    return x.dtype == torch.float32 and not matmul_allows_tf32()


def _check(x: Tensor, size: tuple[int, int], weight3: Tensor, bias3: Tensor, weight1: Tensor, bias1: Tensor) -> None:
    if x.ndim != 4 or not x.is_floating_point() or 0 in x.shape[1:]:
        raise ValueError(f"x: expected [N, h, w, C] float, got {list(x.shape)} {x.dtype}; move channels last")
    if len(size) != 2 or size[0] < 1 or size[1] < 1:
        raise ValueError(
            f"size: expected (H, W), both at least 1, got {tuple(size)}; pass the image's height and width"
        )
    if weight3.ndim != 4 or tuple(weight3.shape[1:]) != (x.shape[3], 3, 3):
        raise ValueError(
            f"weight3: expected [M, {x.shape[3]}, 3, 3] for {x.shape[3]} input channels, got {list(weight3.shape)}; "
            "pass the 3x3 convolution's weight"
        )
    hidden = weight3.shape[0]
    if tuple(weight1.shape[1:]) not in ((hidden,), (hidden, 1, 1)):
        raise ValueError(
            f"weight1: expected [Cout, {hidden}] or [Cout, {hidden}, 1, 1], got {list(weight1.shape)}; "
            "pass the 1x1 convolution's weight"
        )
    for name, bias, channels in (("bias3", bias3, hidden), ("bias1", bias1, weight1.shape[0])):
        if tuple(bias.shape) != (channels,):
            raise ValueError(f"{name}: expected [{channels}], got {list(bias.shape)}; pass the same convolution's bias")
    for name, tensor in (("weight3", weight3), ("bias3", bias3), ("weight1", weight1), ("bias1", bias1)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected floating point, got {tensor.dtype}; convert it first")


def resize_conv(
    x: Tensor,
    size: tuple[int, int],
    weight3: Tensor,
    bias3: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """conv1x1(relu(conv3x3(resize(x, size)))), channels-last in and out.

    The resize is bilinear with aligned corners, the 3x3 convolution pads with zeros (as in DPT, arXiv 2103.13413, and
    Any4D's dense heads). Arithmetic is x's: weights are rounded to its dtype, sums are float32. A float32 x is
    multiplied in TF32 where PyTorch's setting for the arithmetic that runs allows it:
    `torch.backends.cuda.matmul.allow_tf32` for Triton, `torch.backends.cudnn.allow_tf32` for the others. The resized
    map and the hidden map are rounded to x's dtype, so that float16 needs both below 65,504.

    TF32's setting at the time of the call holds for its backward pass too, where Triton multiplies in float16 times
    powers of two: the same mantissa, and values below 2^-29 of a tensor's largest lose bits.

    With Triton no map with C or M channels of the full size exists: it works through a scratch of a few dozen megabytes
    whatever the number of maps. Its backward pass keeps the inputs only and computes the hidden map again, a few maps
    at a time (at most 256 MiB of scratch, or one map's, whichever is more); gradients are bitwise equal from run to
    run. The others hold three maps of the full size, which autograd keeps in training, and their gradient of x is not
    deterministic on CUDA (PyTorch's transposed resize adds atomically).

    Args:
        x: [N, h, w, C] features, any strides; a map whose channels are not contiguous is copied first.
        size: (H, W) pixels of the result.
        weight3: [M, C, 3, 3].
        bias3: [M].
        weight1: [Cout, M] or [Cout, M, 1, 1].
        bias1: [Cout].
        out_dtype: of the result; torch.float32 leaves the last sums of a map of 16 bits unrounded, and its gradient is
            rounded to x's dtype. x's by default.
        backend: "triton" (C and M multiples of 16 up to 256, Cout up to 16), "cudnn" (PyTorch's layers on CUDA),
            "eager", or None for the fastest: Triton, but cuDNN for float32 where
            `torch.backends.cuda.matmul.allow_tf32` is not set, and for float32 in training unless
            `torch.use_deterministic_algorithms` is on.

    Returns:
        [N, H, W, Cout] in `out_dtype`; contiguous from Triton, in the convolution's memory layout from the others.

    Raises:
        ValueError: a shape or dtype is not as above.
        BackendError: `backend` cannot run this call.
    """
    _check(x, size, weight3, bias3, weight1, bias1)
    if out_dtype not in (None, x.dtype, torch.float32):
        raise ValueError(f"out_dtype: expected {x.dtype} like x, or torch.float32, got {out_dtype}; convert the result")
    wanted = out_dtype or x.dtype
    # Measured on an H200 (kernels/notes/resize_conv.md): without tensor cores cuDNN is faster by five.
    first = ("cudnn",) if _exact(x) else ()
    if backends.select("resize_conv", backend, x, size, weight3, bias3, weight1, bias1, first=first) != "triton":
        with own_dtypes(x):
            return reference_resize_conv(x, size, weight3, bias3, weight1, bias1, wanted)
    result: Tensor = _ResizeConv.apply(
        x, list(size), weight3, bias3, weight1.flatten(1), bias1, matmul_allows_tf32(), wanted
    )
    return result


class Layers(NamedTuple):
    """Both convolutions of an inference pass, in the dtype of the maps that they will see.

    Attributes:
        weight3, bias3, weight1, bias1: as `resize_conv` takes them.
        packed: the same as the Triton kernel takes them; empty where it cannot run.
    """

    weight3: Tensor
    bias3: Tensor
    weight1: Tensor
    bias1: Tensor
    packed: list[Tensor]


def pack_layers(weight3: Tensor, bias3: Tensor, weight1: Tensor, bias1: Tensor, dtype: torch.dtype) -> Layers:
    """Convert and pack weights once, for `resize_conv_checked`; shapes as in `resize_conv`."""
    like = weight3.new_empty((0, 1, 1, weight3.shape[1]), dtype=dtype)
    _check(like, (1, 1), weight3, bias3, weight1, bias1)
    flat = weight1.flatten(1)
    packed: list[Tensor] = []
    if not _triton_reasons(like, (1, 1), weight3, bias3, flat, bias1):
        from ..kernels.resize_conv import pack_layers as pack

        packed = list(pack(weight3, bias3, flat, bias1, dtype))
    return Layers(weight3.to(dtype), bias3.to(dtype), weight1.to(dtype), bias1.to(dtype), packed)


def resize_conv_checked(
    x: Tensor, size: tuple[int, int], layers: Layers, flag: Tensor, *, backend: str | None = None
) -> Tensor:
    """`resize_conv` for inference: float32 results from maps of 16 bits, and a flag where one is not finite.

    Not differentiable. The sums of the last convolution are not rounded to x's dtype: what is exponentiated after them
    should not be. Infinities that the hidden map's dtype makes of large values arrive in the result, so that the flag
    covers the whole op.

    Args:
        x: [N, h, w, C].
        size: (H, W) pixels of the result.
        layers: from `pack_layers`, for x's dtype.
        flag: [1] int32 on x's device; set, never cleared.
        backend: as in `resize_conv`.

    Returns:
        [N, H, W, Cout] float32 (float64 from float64).

    Raises:
        ValueError: a shape or dtype is not as above.
        BackendError: `backend` cannot run this call.
    """
    weights = layers[:4]
    _check(x, size, *weights)
    if layers.weight3.dtype != x.dtype:
        raise ValueError(f"layers: expected {x.dtype} like x, got {layers.weight3.dtype}; pack them for this dtype")
    name = backends.select("resize_conv", backend, x, size, *weights, first=("cudnn",) if _exact(x) else ())
    if name == "triton" and layers.packed:
        found: Tensor = _checked(x, list(size), layers.packed, flag)
        return found
    with own_dtypes(x):
        result = reference_resize_conv(x, size, *weights)
    result = result.to(torch.promote_types(x.dtype, torch.float32))
    flag.logical_or_(~result.isfinite().all())
    return result
