"""Pinhole intrinsics from ray directions. Eager only: it reads at most 10,000 rays a view."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..reference.recover_intrinsics import recover_intrinsics as reference_recover_intrinsics

__all__ = ["recover_intrinsics"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

backends.register("recover_intrinsics")


def recover_intrinsics(rays: Tensor, *, backend: str | None = None) -> Tensor:
    """Least-squares pinhole intrinsics of ray maps.

    Fits the lines u = cx + fx * x/z and v = cy + fy * y/z to a grid of at most 100 x 100 pixels, every (H // 50)-th row
    and every (W // 50)-th column, as Any4D's repository does; here the equations are centred, so that float32 keeps
    1e-5 relative, and images above one million pixels are fitted in the same way. Rays that do not point forward
    (z <= 1e-6 of their length) are left out. Rays may have any length. Skew is taken to be zero.

    Where an axis is not determined, because no two different ratios point forward, its focal length is 0 and its
    principal point the middle of the image, with zero gradients: test `K[..., 0, 0] > 0`. Differentiable.

    Args:
        rays: [..., H, W, 3] camera frame (right, down, forward), H and W at least 2.
        backend: "eager" or None; there is no other.

    Returns:
        [..., 3, 3] pixels, pixel centres at integer coordinates; float32 (float64 for float64 rays).

    Raises:
        ValueError: rank, channels or dtype do not fit, or the image is one pixel wide or high (no focal length).
        BackendError: a backend other than eager was asked for.
    """
    is_map = isinstance(rays, Tensor) and rays.ndim >= 3 and rays.shape[-1] == 3
    if not is_map or rays.dtype not in _FLOATS:
        got = f"{list(rays.shape)} {rays.dtype}" if isinstance(rays, Tensor) else f"a {type(rays).__name__}"
        raise ValueError(f"rays: expected [..., H, W, 3] floating point, got {got}; pass one direction a pixel")
    if rays.shape[-3] < 2 or rays.shape[-2] < 2:
        raise ValueError(
            f"rays: expected H and W of at least 2, got {list(rays.shape)}; one row or column of pixels determines no "
            "focal length along the other axis"
        )
    backends.select("recover_intrinsics", backend, rays)
    return reference_recover_intrinsics(rays)
