"""Per-pixel training losses of Any4D, normalised and in log space, in one pass over the maps each way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..reference.map_losses import TERMS, MapLosses, PredictedMaps, TargetMaps
from ..reference.map_losses import map_losses as reference_map_losses
from ._library import define, launchers
from ._stacking import stack_views

__all__ = ["TERMS", "MapLosses", "PredictedMaps", "TargetMaps", "map_losses"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAPS, _TARGETS = len(PredictedMaps._fields), len(TargetMaps._fields)
_OPTIONAL = set(PredictedMaps._field_defaults)
_SLOPES = 3

_INPUTS = ", ".join(
    [f"Tensor{'?' * (name in _OPTIONAL)} {name}" for name in PredictedMaps._fields]
    + [f"Tensor target_{name}" for name in TargetMaps._fields]
)
_OPTIONS = "float dynamic_weight, float conf_alpha, float robust_alpha, float robust_scale, str backend"


def _forward_impl(*args: Any) -> tuple[Tensor, ...]:
    maps, targets = PredictedMaps(*args[:_MAPS]), TargetMaps(*args[_MAPS : _MAPS + _TARGETS])
    *options, backend = args[_MAPS + _TARGETS :]
    outputs: tuple[Tensor, ...] = launchers("map_losses", backend).forward(maps, targets, *options)
    return outputs


def _forward_fake(pts3d: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    batch = pts3d.shape[1]

    def numbers(*shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return pts3d.new_empty(shape, dtype=dtype)

    kinds = len(TERMS)
    counts = numbers(batch, kinds, dtype=torch.int64)
    return numbers(batch, kinds), numbers(batch), numbers(batch), counts, numbers(batch, _SLOPES)


def _backward_impl(*args: Any) -> tuple[Tensor, ...]:
    maps, targets = PredictedMaps(*args[:_MAPS]), TargetMaps(*args[_MAPS : _MAPS + _TARGETS])
    rest = args[_MAPS + _TARGETS :]
    *options, backend = rest[6 + _MAPS :]
    module = launchers("map_losses", backend)
    grads: tuple[Tensor, ...] = module.backward(maps, targets, *rest[:6], rest[6 : 6 + _MAPS], *options)
    return grads


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    maps, needed = args[:_MAPS], args[_MAPS + _TARGETS + 6 :][:_MAPS]
    return tuple(
        m.new_empty(m.shape) if m is not None and need else args[0].new_empty(0)
        for m, need in zip(maps, needed, strict=True)
    )


_forward = define(
    "map_losses_forward",
    f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
)
_backward = define(
    "map_losses_backward",
    f"({_INPUTS}, Tensor pred_distance, Tensor distance, Tensor counts, Tensor slopes, Tensor grad_terms, "
    f"Tensor grad_pred_distance, {', '.join(f'bool need_{name}' for name in PredictedMaps._fields)}, {_OPTIONS}) "
    f"-> ({', '.join(['Tensor'] * _MAPS)})",
    _backward_impl,
    _backward_fake,
)


class _MapLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        dynamic_weight: float,
        conf_alpha: float,
        robust_alpha: float,
        robust_scale: float,
        backend: str,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        options = (dynamic_weight, conf_alpha, robust_alpha, robust_scale, backend)
        terms, pred_distance, distance, counts, slopes = _forward(*tensors, *options)
        ctx.options = options
        ctx.mark_non_differentiable(distance, counts)
        ctx.save_for_backward(*tensors, pred_distance, distance, counts, slopes)
        return terms, pred_distance, distance, counts

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_terms: Tensor, grad_pred_distance: Tensor, *unused: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        first = len(ctx.options)
        need = ctx.needs_input_grad[first : first + _MAPS]
        grads = _backward(*ctx.saved_tensors, grad_terms, grad_pred_distance, *need, *ctx.options)
        found = (g if needed else None for g, needed in zip(grads, need, strict=True))
        return (*(None for _ in range(first)), *found, *(None for _ in range(_TARGETS)))


def _triton_reasons(*tensors: Tensor | None) -> list[str]:
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        return ["float64 runs in eager mode only"]
    return backends.triton_reasons(*tensors)


backends.register("map_losses", triton=_triton_reasons)

_CHANNELS = {"pts3d": (3,), "scene_flow": (3,), "depth_along_ray": (1,), "ray_directions": (3,)}


def _check(name: str, tensor: Any, shape: tuple[int, ...], text: str, like: Tensor, *, boolean: bool = False) -> None:
    kind = "bool" if boolean else "floating point"
    fits = isinstance(tensor, Tensor) and tuple(tensor.shape) == shape
    if not fits or not (tensor.dtype == torch.bool if boolean else tensor.dtype in _FLOATS):
        got = f"{list(tensor.shape)} {tensor.dtype}" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
        raise ValueError(
            f"{name}: expected {text} = {list(shape)} {kind}, got {got}; every map needs pts3d's V, B, H, W"
        )
    if tensor.device != like.device:
        raise ValueError(
            f"{name}: expected device {like.device} (pts3d's), got {tensor.device}; move all to one device"
        )


def _validate(maps: PredictedMaps, targets: TargetMaps) -> None:
    points = maps.pts3d
    if not isinstance(points, Tensor) or points.ndim != 5:
        got = list(points.shape) if isinstance(points, Tensor) else f"a {type(points).__name__}"
        raise ValueError(
            f"pts3d: expected [V, B, H, W, 3], got {got}; pass a list of V maps [B, H, W, 3] or their stack"
        )
    views, batch, *size = points.shape[:4]
    for name, tensor in maps._asdict().items():
        if tensor is not None or name not in _OPTIONAL:
            channels = _CHANNELS.get(name, ())
            _check(name, tensor, (views, batch, *size, *channels), f"[V, B, H, W{', C' * bool(channels)}]", points)
    for name, tensor in targets._asdict().items():
        if name.startswith("has_"):
            _check(f"targets.{name}", tensor, (batch,), "[B]", points, boolean=True)
        elif name.endswith("_mask"):
            _check(f"targets.{name}", tensor, (batch, views, *size), "[B, V, H, W]", points, boolean=True)
        elif name == "camera_poses":
            _check(f"targets.{name}", tensor, (batch, views, 4, 4), "[B, V, 4, 4]", points)
        else:
            _check(f"targets.{name}", tensor, (batch, views, *size, *_CHANNELS[name]), "[B, V, H, W, C]", points)


def map_losses(
    maps: PredictedMaps | Sequence[Any],
    targets: TargetMaps,
    *,
    dynamic_weight: float = 10.0,
    conf_alpha: float = 0.2,
    robust: tuple[float, float] | None = None,
    backend: str | None = None,
) -> MapLosses:
    """Losses of every sample on the maps that Any4D predicts (arXiv 2512.10935, training losses).

    Per sample, z is the mean distance of the target's world points from the origin over all views' pixels with known
    depth, z' the prediction's over the same pixels. A sample without rays or poses has no world points: distances from
    each view's own camera, which is depth along the ray, take their place. f(x) = x / |x| log(1 + |x|). Means run over
    a sample's supervised pixels of all views:

    - rays: mean |r' - r|_1, where `has_rays`;
    - depth: mean |f(d' / z') - f(d / z)|, where `depth_mask`;
    - points: mean |f(x' / z') - f(x / z)|, x = R d r + t, where `depth_mask`, `has_rays` and `has_poses`; given `conf`,
      mean (conf |..| - conf_alpha log conf);
    - flow: mean w |f(s' / z') - f(s / z)|, w = `dynamic_weight` where `dynamic_mask`, else 1; where `flow_mask`, in
      samples with any known depth (else nothing says what unit the flow is in);
    - mask: binary cross-entropy of `mask_logits` with `surface_mask`, where `has_surface`.

    With `robust` every norm is replaced by Barron's general loss of the residual's length, as in MapAnything.

    All but the mask's and the rays' losses are the same whatever the prediction is multiplied by: a metric scale that
    is part of the maps gets no gradient from them, up to rounding. Gradients flow through z' as well. They are exactly
    zero at pixels without supervision, and zero where a length or residual is zero. Differentiable once in every map;
    the kernels sum in a fixed order: results and gradients are bitwise equal from run to run.

    Args:
        maps: predictions, 16 or 32 bit; each [V, B, H, W, ...], or a list of V maps [B, H, W, ...], which is stacked,
            without a copy if they are slices of one tensor as the model's are. Maps that are not contiguous
            are copied.
        targets: ground truth; needs no gradient.
        dynamic_weight: of moving pixels in the flow's loss.
        conf_alpha: of the logarithm of the confidence.
        robust: (alpha, c), 0 < alpha < 2, c > 0; MapAnything trains with (0.5, 0.05).
        backend: "triton", "eager" or None (automatic).

    Returns:
        MapLosses, float32 (float64 if an input is).

    Raises:
        ValueError: shape, dtype or device of an argument do not fit, or `robust` is out of range.
        BackendError: the backend asked for cannot run the call.
    """
    given: list[Any] = [m if m is None or isinstance(m, Tensor) else stack_views(m) for m in maps]
    maps = PredictedMaps(*given)
    _validate(maps, targets)
    if robust is not None and not (0 < robust[0] < 2 and robust[1] > 0):
        raise ValueError(f"robust: expected (alpha, c) with 0 < alpha < 2 and c > 0, got {robust}; try (0.5, 0.05)")
    name = backends.select("map_losses", backend, *maps, *targets)
    if name == backends.EAGER:
        return reference_map_losses(maps, targets, dynamic_weight=dynamic_weight, conf_alpha=conf_alpha, robust=robust)
    alpha, c = robust or (0.0, 0.0)
    return MapLosses(*_MapLosses.apply(dynamic_weight, conf_alpha, alpha, c, name, *maps, *targets))
