"""Per-pixel training losses: two passes over the maps forward (mean distances, then losses), one pass back.

Predictions are [V, B, ...] and targets [B, V, ...], both contiguous: row v * B + b of the ones is row b * V + v of the
others. One program walks a chunk of one row. Passes that reduce write partial sums, column k of sample b at
[b, k, v * chunks + chunk], and a program a sample adds each column in float64, in a fixed order; no atomics.

World points of the target are composed at the pixel from rays, depth and pose, which are read for their own losses
anyway. Loads are masked: what is not known costs no traffic and cannot leak, whatever it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from any4d_fast.reference.map_losses import PredictedMaps, TargetMaps

from ._map_loss_passes import (
    DISTANCE_SUMS,
    LOSS_SUMS,
    TERMS,
    backward_kernel,
    distances_kernel,
    finish_distances_kernel,
    finish_losses_kernel,
    losses_kernel,
)
from .aot import AotCase


class Config(NamedTuple):
    """Launch configuration of a pass.

    Pixels a step, warps, steps a program; steps whose loads are under way at once (2 and more: through shared memory);
    registers a thread at most.
    """

    block: int
    warps: int
    iterations: int
    stages: int = 1
    registers: int | None = None

    def chunks(self, pixels: int) -> int:
        """Programs a row."""
        return triton.cdiv(pixels, self.block * self.iterations)

    def shape(self) -> dict[str, Any]:
        """Compile-time arguments of the pass."""
        return {"BLOCK": self.block, "ITERATIONS": self.iterations, "STAGES": self.stages}

    def options(self) -> dict[str, Any]:
        """Options of its compilation."""
        return {"num_warps": self.warps, "maxnreg": self.registers}


# Swept on an H200 at 41 views of 518 x 336 (`kernels/notes/map_losses.md`). The losses' registers leave few blocks, so
# the next step's pixels are copied to shared memory meanwhile: 184 us for 251 without. Short programs let a launch end
# evenly, and reduce less than they read. Robust losses need about 90 registers: left alone, ptxas keeps to 80
# for sm_80 and spills.
DISTANCES = Config(block=256, warps=4, iterations=8, registers=80)
LOSSES = Config(block=64, warps=2, iterations=16, stages=2)
ROBUST_LOSSES = LOSSES._replace(registers=96)
BACKWARD = Config(block=128, warps=4, iterations=4)
_FINISH_BLOCK, _FINISH_WARPS = 1024, 8  # seven thousand partial sums a column: seven steps


def _contiguous(maps: PredictedMaps, targets: TargetMaps) -> tuple[PredictedMaps, TargetMaps]:
    """Every tensor packed, masks and flags as bytes."""
    packed = PredictedMaps(*(None if m is None else m.contiguous() for m in maps))  # type: ignore[arg-type]
    bytes_ = (t.contiguous().view(torch.uint8) if t.dtype == torch.bool else t.contiguous() for t in targets)
    return packed, TargetMaps(*bytes_)


def _common(maps: PredictedMaps, targets: TargetMaps) -> tuple[list[Any], list[Any]]:
    """Maps and targets in the order in which the loss and gradient kernels take them."""
    predicted = [maps.pts3d, maps.scene_flow, maps.depth_along_ray, maps.ray_directions, maps.mask_logits, maps.conf]
    return predicted, [
        targets.ray_directions, targets.depth_along_ray, targets.camera_poses, targets.scene_flow, targets.depth_mask,
        targets.flow_mask, targets.dynamic_mask, targets.surface_mask, targets.has_rays, targets.has_poses,
        targets.has_surface,
    ]  # fmt: skip


def forward(
    maps: PredictedMaps,
    targets: TargetMaps,
    dynamic_weight: float,
    conf_alpha: float,
    robust_alpha: float,
    robust_scale: float,
    distances: Config | None = None,
    losses: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward passes.

    Args:
        maps, targets: as `any4d_fast.ops.map_losses` takes them, maps stacked.
        dynamic_weight: of moving pixels in the flow's loss.
        conf_alpha: of the confidence's logarithm.
        robust_alpha, robust_scale: of the robust loss; 0 for norms.
        distances, losses: launch configurations of the two passes; the module's own by default.

    Returns:
        Terms [B, 5], the prediction's and the target's mean distance [B], counts [B, 5], and the slopes of the depth's,
        points' and flow's loss with respect to the prediction's mean distance [B, 3].
    """
    distances, losses = distances or DISTANCES, losses or (ROBUST_LOSSES if robust_scale > 0 else LOSSES)
    views, batch, height, width = maps.pts3d.shape[:4]
    pixels, device = height * width, maps.pts3d.device
    if views * pixels == 0 or batch == 0:
        zeros = [torch.zeros(shape, device=device) for shape in ((batch, TERMS.value), (batch,), (batch,))]
        counts = torch.zeros((batch, TERMS.value), dtype=torch.int64, device=device)
        return zeros[0], zeros[1], zeros[2], counts, torch.zeros((batch, 3), device=device)
    maps, targets = _contiguous(maps, targets)
    terms, slopes = torch.empty((batch, TERMS.value), device=device), torch.empty((batch, 3), device=device)
    pred_distance, distance = torch.empty(batch, device=device), torch.empty(batch, device=device)
    counts = torch.empty((batch, TERMS.value), dtype=torch.int64, device=device)

    chunks = distances.chunks(pixels)
    partials = torch.empty((batch, DISTANCE_SUMS.value, views * chunks), device=device)
    flags = targets.has_rays, targets.has_poses
    distances_kernel[(views * batch * chunks,)](
        maps.pts3d, maps.depth_along_ray, targets.ray_directions, targets.depth_along_ray, targets.camera_poses,
        targets.depth_mask, *flags, partials, views, batch, pixels, chunks,
        **distances.shape(), **distances.options(),
    )  # fmt: skip
    finish_distances_kernel[(batch, 2)](
        partials, *flags, pred_distance, distance, counts, views, chunks,
        HAS_DEPTH=maps.depth_along_ray is not None, BLOCK=_FINISH_BLOCK, num_warps=_FINISH_WARPS,
    )  # fmt: skip

    chunks = losses.chunks(pixels)
    partials = torch.empty((batch, LOSS_SUMS.value, views * chunks), device=device)
    predicted, true = _common(maps, targets)
    losses_kernel[(views * batch * chunks,)](
        *predicted, *true, pred_distance, distance, counts, partials, views, batch, pixels, chunks,
        dynamic_weight, conf_alpha, robust_alpha, robust_scale,
        ROBUST=robust_scale > 0, **losses.shape(), **losses.options(),
    )  # fmt: skip
    finish_losses_kernel[(batch, TERMS.value + 3)](
        partials, targets.has_rays, targets.has_surface, counts, terms, slopes, views, pixels, chunks,
        HAS_RAYS=maps.ray_directions is not None, HAS_LOGITS=maps.mask_logits is not None,
        BLOCK=_FINISH_BLOCK, num_warps=_FINISH_WARPS,
    )  # fmt: skip
    return terms, pred_distance, distance, counts, slopes


def backward(
    maps: PredictedMaps,
    targets: TargetMaps,
    pred_distance: Tensor,
    distance: Tensor,
    counts: Tensor,
    slopes: Tensor,
    grad_terms: Tensor,
    grad_pred_distance: Tensor,
    needed: tuple[bool, ...],
    dynamic_weight: float,
    conf_alpha: float,
    robust_alpha: float,
    robust_scale: float,
    config: Config | None = None,
) -> tuple[Tensor, ...]:
    """Launch the backward pass.

    Args:
        maps, targets: the forward's inputs.
        pred_distance, distance, counts, slopes: its outputs.
        grad_terms: [B, 5] cotangents.
        grad_pred_distance: [B] cotangents.
        needed: which maps want a gradient, in the order of `PredictedMaps`.
        dynamic_weight, conf_alpha, robust_alpha, robust_scale: as in the forward pass.
        config: launch configuration; the module's own by default.

    Returns:
        A gradient for every map, contiguous in its dtype; an empty tensor for each that is not needed.
    """
    config = config or BACKWARD
    views, batch, height, width = maps.pts3d.shape[:4]
    pixels, device = height * width, maps.pts3d.device
    grads = [
        torch.empty(m.shape, dtype=m.dtype, device=device)
        if m is not None and need
        else torch.empty(0, dtype=maps.pts3d.dtype, device=device)
        for m, need in zip(maps, needed, strict=True)
    ]
    outputs = [g if m is not None and need else None for g, m, need in zip(grads, maps, needed, strict=True)]
    if maps.pts3d.numel() == 0 or all(out is None for out in outputs):
        return tuple(grads)
    maps, targets = _contiguous(maps, targets)
    chunks = config.chunks(pixels)
    predicted, true = _common(maps, targets)
    backward_kernel[(views * batch * chunks,)](
        *predicted, *true, pred_distance, distance, counts, slopes, grad_terms.contiguous(),
        grad_pred_distance.contiguous(), *outputs, views, batch, pixels, chunks,
        dynamic_weight, conf_alpha, robust_alpha, robust_scale,
        ROBUST=robust_scale > 0, **config.shape(), **config.options(),
    )  # fmt: skip
    return tuple(grads)


_INTEGERS = ("views", "batch", "pixels", "chunks")
_SCALARS = ("dynamic_weight", "conf_alpha", "alpha", "scale")
_PREDICTIONS = ("points", "flow", "depth", "rays", "logits", "conf")


def _type(name: str, kind: str) -> str:
    if name in _INTEGERS:
        return "i32"
    if name in _SCALARS:
        return "fp32"
    if name == "counts":
        return "*i64"
    if name.startswith("has_") or name.endswith("_mask"):
        return "*u8"
    return f"*{kind}" if name in _PREDICTIONS or name.startswith("out_") else "*fp32"


def aot_cases() -> list[AotCase]:
    """Every production configuration: predictions in 16 or 32 bit, with and without confidence, norms and robust."""
    cases = []

    def add(name: str, kernel: Any, kind: str, constants: dict[str, Any], options: dict[str, Any]) -> None:
        names = [arg for arg in kernel.arg_names if not arg.isupper() and arg not in constants]
        types = {arg: _type(arg, kind) for arg in names}
        aligned = tuple(arg for arg, kind_of in types.items() if kind_of.startswith("*"))
        cases.append(AotCase(f"map_losses {name} {kind}", kernel, types, constants, aligned, options))

    passes: tuple[tuple[str, Any, tuple[Config, Config]], ...] = (
        ("losses", losses_kernel, (LOSSES, ROBUST_LOSSES)),
        ("backward", backward_kernel, (BACKWARD, BACKWARD)),
    )
    for kind in ("fp16", "bf16", "fp32"):
        add("distances", distances_kernel, kind, DISTANCES.shape(), DISTANCES.options())
        for name, robust, absent in (
            ("plain", False, ("conf", "out_conf")),
            ("confidence", False, ()),
            ("confidence robust", True, ()),
        ):
            for step, kernel, configs in passes:
                config = configs[robust]
                nothing = {arg: None for arg in absent if arg in kernel.arg_names}
                constants = {**nothing, "ROBUST": robust, **config.shape()}
                add(f"{step} {name}", kernel, kind, constants, config.options())
    finish, warps = {"BLOCK": _FINISH_BLOCK}, {"num_warps": _FINISH_WARPS}
    add("finish distances", finish_distances_kernel, "fp32", {"HAS_DEPTH": True, **finish}, warps)
    add("finish losses", finish_losses_kernel, "fp32", {"HAS_RAYS": True, "HAS_LOGITS": True, **finish}, warps)
    return cases
