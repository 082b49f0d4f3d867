"""Resizing of images, ray maps, sparse maps and dense outputs, all in one pixel convention.

Pixel centres are at integer coordinates, so resizing an axis by s moves u to (u + 0.5) * s - 0.5. Nothing is cropped:
each axis is scaled on its own, intrinsics and rays carry the difference, and going back to the given size is exact.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# (rows, columns) in patches of the sizes that the released model was trained at (37 are 518 pixels): the aspect ratios
# 1:1, 4:3, 3:2, 16:9, 2:1 and 3.2:1, and the upright ones but the last.
_TRAINED_SIZES = (
    (37, 37), (28, 37), (24, 37), (21, 37), (18, 37), (12, 37), (37, 28), (37, 24), (37, 21), (37, 18),
)  # fmt: skip


def target_size(given: tuple[int, int], size: int | tuple[int, int] | None, patch_size: int) -> tuple[int, int]:
    """Model size (H, W) for an image of the given size (H, W), both in pixels.

    Args:
        given: size of the image.
        size: None keeps a size that is already a multiple of `patch_size` and otherwise takes the trained size of the
            nearest aspect ratio; an int is the long side; a pair is taken as it is.
        patch_size: pixels of a patch side.

    Returns:
        (H, W), multiples of `patch_size`.
    """
    height, width = given
    if isinstance(size, tuple):
        return size
    if size is not None:
        # The short side follows the rounded long side, so that one rounding and not two bends the aspect ratio.
        scale = _to_multiple(size, patch_size) / max(height, width)
        return _to_multiple(height * scale, patch_size), _to_multiple(width * scale, patch_size)
    if height % patch_size == 0 and width % patch_size == 0:
        return given
    aspect = width / height
    rows, columns = min(_TRAINED_SIZES, key=lambda hw: abs(hw[1] / hw[0] - aspect))
    return rows * patch_size, columns * patch_size


def _to_multiple(length: float, patch_size: int) -> int:
    return max(1, int(length / patch_size + 0.5)) * patch_size


def resize_image(image: Tensor, hw: tuple[int, int]) -> Tensor:
    """Antialiased bicubic resize of images [B, C, H, W] to (H, W) = `hw`; the same tensor when nothing changes."""
    if tuple(image.shape[-2:]) == hw:
        return image
    return F.interpolate(image, size=hw, mode="bicubic", antialias=True, align_corners=False)


def resize_dense(maps: Tensor, hw: tuple[int, int], *, extrapolate: bool = False) -> Tensor:
    """Bilinear resize of maps [B, H, W, C] to [B, *hw, C], sampled at the new pixel centres.

    Args:
        maps: [B, H, W, C] float.
        hw: new (H, W).
        extrapolate: continue linearly past the outermost pixel centres instead of repeating the border. Exact for
            anything that is linear in the pixel coordinates, such as pinhole rays on the plane z = 1.
    """
    for dim, new in ((1, hw[0]), (2, hw[1])):
        old = maps.shape[dim]
        if old == new:
            continue
        position = (torch.arange(new, device=maps.device, dtype=torch.float64) + 0.5) * (old / new) - 0.5
        low = position.floor().long().clamp(0, max(old - 2, 0))
        high = (low + 1).clamp(max=old - 1)
        weight = position - low
        if not extrapolate:
            weight = weight.clamp(0, 1)
        weight = weight.to(maps.dtype).reshape([-1 if d == dim else 1 for d in range(maps.ndim)])
        first = maps.index_select(dim, low)
        maps = first + weight * (maps.index_select(dim, high) - first)
    return maps


def nearest_index(old: int, new: int, device: torch.device) -> Tensor:
    """For each of `new` pixels, the one of `old` pixels that holds its centre, [new] int64."""
    centre = (torch.arange(new, device=device, dtype=torch.float64) + 0.5) * (old / new)
    return centre.floor().long().clamp(0, old - 1)


def resize_nearest(maps: Tensor, hw: tuple[int, int]) -> Tensor:
    """Nearest resize of maps [B, H, W, ...] of any dtype to [B, *hw, ...]."""
    rows = nearest_index(maps.shape[1], hw[0], maps.device)
    columns = nearest_index(maps.shape[2], hw[1], maps.device)
    return maps.index_select(1, rows).index_select(2, columns)


def resize_sparse(values: Tensor, hw: tuple[int, int]) -> Tensor:
    """Nearest resize of maps with unknown pixels, which neither mixes values nor loses isolated ones.

    A new pixel takes the old pixel that holds its centre; where that one is unknown, the known old pixel nearest to
    the centre among those that fall into the new pixel (of equally near ones, the smallest value). So a radar's few
    returns survive shrinking.

    Args:
        values: [B, H, W, 1] float, NaN where unknown.
        hw: new (H, W).

    Returns:
        [B, *hw, 1], NaN where unknown.
    """
    batch, height, width, _ = values.shape
    if (height, width) == hw:
        return values
    out = resize_nearest(values, hw)
    if hw[0] >= height and hw[1] >= width:
        return out
    b, y, x, _ = (~values.isnan()).nonzero(as_tuple=True)
    target_y = (y.double() + 0.5) * (hw[0] / height)
    target_x = (x.double() + 0.5) * (hw[1] / width)
    row = target_y.floor().long().clamp(max=hw[0] - 1)
    column = target_x.floor().long().clamp(max=hw[1] - 1)
    distance = (target_y - row - 0.5).square() + (target_x - column - 0.5).square()
    flat = (b * hw[0] + row) * hw[1] + column
    cells = batch * hw[0] * hw[1]
    nearest = distance.new_full((cells,), torch.inf).scatter_reduce(0, flat, distance, "amin")
    wins = distance == nearest[flat]
    fill = values.new_full((cells,), torch.inf).scatter_reduce(0, flat[wins], values[b, y, x, 0][wins], "amin")
    fill = torch.where(fill.isinf(), torch.nan, fill).reshape(out.shape)
    return torch.where(out.isnan(), fill, out)


def resize_rays(rays: Tensor, hw: tuple[int, int], *, camera_frame: bool = True) -> Tensor:
    """Unit ray directions of the resized image.

    Args:
        rays: [B, H, W, 3] unit.
        hw: new (H, W).
        camera_frame: rays in the camera's own frame. Then, if all of them point forward, they are interpolated on the
            plane z = 1, where a pinhole's rays are linear in the pixel, so that the result is exact up to rounding.

    Returns:
        [B, *hw, 3] unit.
    """
    if tuple(rays.shape[1:3]) == hw:
        return rays
    # Rays nearly at right angles to the axis would explode on the plane; they are interpolated on the sphere.
    planar = camera_frame and bool((rays[..., 2] > 0.05).all())
    out = resize_dense(rays / rays[..., 2:3] if planar else rays, hw, extrapolate=planar)
    return out / out.norm(dim=-1, keepdim=True).clamp(min=1e-8)
