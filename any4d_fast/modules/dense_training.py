"""A dense head in float16, for training: one autograd function around what inference runs.

float16 has TF32's mantissa, and takes half the memory and half the time of it. What it lacks is range, so

- gradients are multiplied by a power of two before the head's backward pass and divided by it after, which is exact.
  The power is chosen on the device, from how large the gradient of the head's channels is;
- where a value is too large all the same, a flag says so of the forward pass, and infinities and NaN of the backward
  pass, and the pass is computed again in TF32: where the caller lets the host wait to find out. Otherwise the gradients
  of such a step are not finite.

Images are taken some at a time. With them, sums over pixels stay within the range at any number of images, and
recomputing a head holds the maps of some images alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from ..memory import balanced
from ..ops import dense_maps
from ..switches import float32_sums, matmul_allows_tf32, matmul_tf32
from .dense_inference import features as run_features
from .dense_inference import hidden_map, pack_conv, pack_features
from .dpt import DPTFeatures, DPTRegressor, FusionBlock, ResidualConvUnit, Scratch
from .plain import plain_parts, unhooked

# 48 images of 518 x 336 whose maps are kept (half as many, and a step of `tiny` on 64 images took 8 % longer for its
# small launches); 12 of those whose maps are computed again, and are alive for so long only (with 6 the host was slower
# than an H200).
PIXELS_AT_ONCE, RECOMPUTED_AT_ONCE = 1 << 23, 1 << 21
# A gradient's sum over the pixels of one channel, and its largest value, after scaling. A weight's gradient is at most
# the first times the largest activation. Over 2^23 pixels the mean is 2^-10; float16's normal numbers begin at 2^-14.
LARGEST_SUM, LARGEST = 2.0**13, 2.0**8
MOST = 2.0**120  # of the factor itself, so that one over it is a float32 too: gradients of zeros need none

MAPS = 4  # token maps that a head reads: the first of its function's tensors, before the parameters

HEADS = (DPTFeatures, DPTRegressor)
HEAD_PARTS = (
    nn.Conv2d, nn.ConvTranspose2d, nn.ReLU, nn.Sequential, nn.ModuleList, FusionBlock, ResidualConvUnit, Scratch,
)  # fmt: skip


class Job(NamedTuple):
    """What a head is to compute.

    Attributes:
        head: its modules.
        size: (H, W) of the image.
        dtype: torch.float16, or torch.float32 for TF32.
        keep: whether maps are kept for the backward pass; they are computed again otherwise.
        wait: whether the host may wait to see if a gradient left the range.
        tf32: whether float32 matmuls may run in TF32.
    """

    head: _Head
    size: tuple[int, int]
    dtype: torch.dtype
    keep: bool
    wait: bool
    tf32: bool


class _Head(nn.Module):
    """Both modules of a head as one, whose parameters can be exchanged for a call."""

    def __init__(self, features: DPTFeatures, regressor: DPTRegressor) -> None:
        super().__init__()
        self.features, self.regressor = features, regressor

    def forward(self, maps: list[Tensor], size: tuple[int, int], flag: Tensor) -> Tensor:
        """[N, C_i, h, w] maps in the dtype to compute in -> [N, H, W, output_dim] float32."""
        dtype = maps[0].dtype
        weights = pack_features(self.features, dtype)
        x = run_features(self.features, weights, [m.permute(0, 2, 3, 1) for m in maps], flag, fuse=False)
        hidden = hidden_map(pack_conv(self.regressor.conv1, dtype), x, flag)
        return self.regressor.enlarge(hidden.permute(0, 3, 1, 2), size, torch.float32)


class _Part(NamedTuple):
    """Some images' forward pass: what its gradients are of, its result, and whether a value left the range, [] bool."""

    leaves: list[Tensor]
    out: Tensor
    left_range: Tensor


def plain_head(*modules: nn.Module) -> bool:
    """Whether weights alone say what a head does: no adapter in a layer's place, no parametrization, no hook.

    Nor a weight that two layers share: exchanged by name, only one of them would get it.
    """
    ours = all(type(module) in HEADS for module in modules) and unhooked(*modules)
    return ours and all(plain_parts(module, *HEAD_PARTS) for module in modules) and not _tied(*modules)


def _tied(*modules: nn.Module) -> bool:
    layers = {layer for module in modules for layer in module.modules()}
    held = [p for layer in layers for p in layer.parameters(recurse=False)]
    return len(held) > len(set(held))


def dense_head(
    features: DPTFeatures,
    regressor: DPTRegressor,
    maps: list[Tensor],
    size: tuple[int, int],
    dtype: torch.dtype,
    *,
    wait: bool,
) -> tuple[Tensor, Tensor]:
    """A head's channels in 16 bits inside and float32 outside, differentiable once.

    Args:
        features, regressor: the head's modules, a `plain_head`; with their `checkpoint_gradient` nothing inside is
            kept for the backward pass.
        maps: four [N, C_i, h, w] in channels-last memory, any floating dtype.
        size: (H, W) of the image.
        dtype: torch.float16 or torch.bfloat16.
        wait: whether the backward pass may wait for the device to see if a gradient left the range, and run again in
            TF32 then.

    Returns:
        [N, H, W, output_dim] float32, and whether a value left the range, [] bool: the channels are wrong then, and
        their gradients are not finite.
    """
    head = _Head(features, regressor)
    job = Job(head, size, dtype, not regressor.doubles, wait, matmul_allows_tf32())
    out, left_range = _DenseHead.apply(job, *maps, *head.parameters())
    return out, left_range


class _DenseHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: Job, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*tensors)
        ctx.job, ctx.kept = job, []
        wanted, found = ctx.needs_input_grad[1:], []
        keep = job.keep and any(wanted)
        for images in _chunks(tensors[0], job):
            part = _forward(job, images, tensors, wanted, keep)
            found.append((part.out.detach(), part.left_range))
            if keep:
                ctx.kept.append(part)
        outs, flags = zip(*found, strict=True)
        ctx.left_range = left_range = torch.stack(flags).any()
        ctx.mark_non_differentiable(left_range)
        return torch.cat(outs), left_range

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        job, tensors, wanted = ctx.job, ctx.saved_tensors, ctx.needs_input_grad[1:]
        # Where the channels were wrong, their gradients must say so.
        scaled, inverse = scale(torch.where(ctx.left_range, math.nan, grad), _chunks(grad, job))
        kept, ctx.kept = ctx.kept, []  # what is left of a graph after one pass is of no use
        # A backward pass that is begun under autocast runs under it: here, with every operand in bfloat16.
        with matmul_tf32(job.tf32), float32_sums(), torch.autocast(grad.device.type, enabled=False):
            found = _gradients(job, scaled, tensors, wanted, kept)
            given = [g for g in found if g is not None]
            torch._foreach_mul_(given, inverse)
            if job.wait and not all_finite(given):
                wide = job._replace(dtype=torch.float32, keep=False)
                found = _gradients(wide, grad, tensors, wanted, [])
        return None, *found


def scale(grad: Tensor, chunks: Iterator[slice]) -> tuple[Tensor, Tensor]:
    """A gradient [N, H, W, C] times a power of two that brings it into float16's range, and one over that, []."""
    norm = torch.linalg.vector_norm
    sums = torch.stack([norm(grad[part], 1, dim=(0, 1, 2)).amax() for part in chunks]).amax()
    factor = torch.minimum(LARGEST_SUM / sums, LARGEST / norm(grad, math.inf)).clamp(max=MOST)
    factor = torch.exp2(torch.floor(torch.log2(factor)))
    return grad * factor, 1 / factor


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether every number of these is finite; waits for the device."""
    return bool(torch.stack(torch._foreach_norm(tensors, math.inf)).isfinite().all())


def _chunks(images: Tensor, job: Job) -> Iterator[slice]:
    count, (height, width) = images.shape[0], job.size
    pixels = PIXELS_AT_ONCE if job.keep else RECOMPUTED_AT_ONCE
    step = balanced(count, max(1, pixels // (height * width)))
    return (slice(first, min(first + step, count)) for first in range(0, count, step))


def _forward(job: Job, images: slice, tensors: tuple[Tensor, ...], wanted: tuple[bool, ...], keep: bool) -> _Part:
    """Some images, on leaves of their own."""
    given = [*(t[images] for t in tensors[:MAPS]), *tensors[MAPS:]]
    leaves = [t.detach().requires_grad_(keep and need) for t, need in zip(given, wanted, strict=True)]
    flag = dense_maps.new_flag(leaves[0].device)
    with (
        torch.set_grad_enabled(keep),
        torch.autocast(leaves[0].device.type, enabled=False),
        float32_sums(),
    ):
        parameters = {name: leaf for (name, _), leaf in zip(job.head.named_parameters(), leaves[MAPS:], strict=True)}
        inputs = [leaf.to(job.dtype) for leaf in leaves[:MAPS]]
        # Modules under several names are one: tied by PyTorch, their parameters would not all be put back.
        out = functional_call(job.head, parameters, (inputs, job.size, flag), tie_weights=False)
    outside = ~torch.linalg.vector_norm(out.detach(), math.inf).isfinite()
    return _Part(leaves, out, outside | (flag[0] > 0))


def _gradients(
    job: Job, grad: Tensor, tensors: tuple[Tensor, ...], wanted: tuple[bool, ...], kept: list[_Part]
) -> list[Tensor | None]:
    """Of every tensor that wants one, by parts that were kept or are computed again."""
    maps = sum(wanted[:MAPS])
    of_maps: list[list[Tensor]] = []
    sums: list[Tensor] = []
    for images in _chunks(grad, job):
        part = kept.pop(0) if kept else _forward(job, images, tensors, wanted, True)
        leaves = [leaf for leaf in part.leaves if leaf.requires_grad]
        found = torch.autograd.grad(part.out, leaves, grad[images])
        of_maps.append(list(found[:maps]))
        others = list(found[maps:])
        if sums:
            torch._foreach_add_(sums, others)
        else:
            sums = others
        del part, leaves, found, others
    whole = iter([*(torch.cat(parts) for parts in zip(*of_maps, strict=True)), *sums])
    return [next(whole) if need else None for need in wanted]
