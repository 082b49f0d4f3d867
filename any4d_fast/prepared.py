"""Views ready for the model, with what it takes to give the outputs back in the caller's terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from any4d_fast.views import InputError, denormalise_image, describe, fail, load_image

T = TypeVar("T")


@dataclass(frozen=True)
class ViewSize:
    """Sizes of one view in pixels: as the caller gave it, and as the model sees it. Both (H, W)."""

    given: tuple[int, int]
    model: tuple[int, int]


@dataclass(frozen=True)
class KnownCamera:
    """What the caller supplied about one view's camera; None where nothing was.

    Attributes:
        intrinsics: [B, 3, 3] pixels at model size.
        intrinsics_given: [B, 3, 3] pixels at the given size.
        ray_directions: [B, H, W, 3] unit, camera frame, at model size.
        ray_directions_given: the same at the given size, only where the caller gave rays and not intrinsics.
        cam2world: [B, 4, 4] float32, camera to the reference view's camera.
    """

    intrinsics: Tensor | None = None
    intrinsics_given: Tensor | None = None
    ray_directions: Tensor | None = None
    ray_directions_given: Tensor | None = None
    cam2world: Tensor | None = None


@dataclass(frozen=True)
class PreparedViews:
    """Views as `Any4D.forward` takes them, the reference view first, and what it takes to give the outputs back.

    Attributes:
        views: one dictionary a view with the model's keys: `img` [B, 3, H, W] normalised, `data_norm_type`,
            `is_metric_scale` [B], and where given `ray_directions_cam` [B, H, W, 3] unit, `depth_along_ray`
            [B, H, W, 1] metres, `camera_pose_quats` [B, 4] and `camera_pose_trans` [B, 3] (relative to the reference
            camera), `radial_scene_flow` [B, H, W, 3] metres (then the reference view also has `pts3d_cam` and
            `valid_mask`).
        order: `order[m]` is the caller's index of the model's view m; `order[0]` is the reference.
        known: what the caller supplied about each camera, in the model's order.
        sizes: given and model size of each view, in the model's order.
        geometric_input_config: the model's modality probabilities (each 0 or 1) with which exactly these inputs are
            used, `ignore_depth_scale_inputs` and `ignore_pose_scale_inputs` included.
    """

    views: list[dict[str, Any]]
    order: list[int]
    known: list[KnownCamera]
    sizes: list[ViewSize]
    geometric_input_config: dict[str, float]
    _sources: list[Any] = field(default_factory=list, repr=False)

    @property
    def reference(self) -> int:
        """The caller's index of the reference view."""
        return self.order[0]

    @property
    def inverse(self) -> list[int]:
        """`inverse[c]` is the model's index of the caller's view c."""
        return [self.order.index(index) for index in range(len(self.order))]

    @property
    def batch_size(self) -> int:
        """Images of a view."""
        return int(self.views[0]["img"].shape[0])

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) that the model sees, pixels."""
        return self.sizes[0].model

    def in_given_order(self, items: Sequence[T]) -> list[T]:
        """One item a view in the model's order, put into the caller's order."""
        return [items[index] for index in self.inverse]

    def image(self, index: int, *, given_size: bool = False) -> Tensor:
        """Image of the model's view `index`, [B, H, W, 3] within 0..1, at model size or as it was given.

        Raises:
            InputError: if an image file can no longer be read, or has another size than before.
        """
        view, where = self.views[index], f'views[{self.order[index]}]["img"]'
        norm_type: str = view["data_norm_type"][0]
        size = self.sizes[index]
        if not given_size or size.given == size.model:
            return self.images([index])
        source, normalised = self._sources[index]
        image = load_image(source, where, normalised=normalised, device=view["img"].device)
        if tuple(image.shape[-2:]) != size.given:
            fail(where, f"an image of {size.given}", f"{tuple(image.shape[-2:])}", "do not replace the file meanwhile")
        return denormalise_image(image, norm_type) if normalised else image.permute(0, 2, 3, 1)

    def images(self, indices: Sequence[int]) -> Tensor:
        """Images of several of the model's views at model size, one after the other: [B * views, H, W, 3] in 0..1."""
        views = [self.views[index] for index in indices]
        given = views[0]["img"] if len(views) == 1 else torch.cat([view["img"] for view in views])
        return denormalise_image(given, views[0]["data_norm_type"][0])

    def check_known(self, known: str) -> None:
        """Raise unless outputs can be made with `known`, which is worth asking before running the model.

        Raises:
            InputError: if `known` is neither "hint" nor "keep", or poses that are to be kept are not in metres.
        """
        if known not in ("hint", "keep"):
            fail("known", '"hint" or "keep"', describe(known), '"hint": inputs only guide; "keep": they are returned')
        for index, view in enumerate(self.views):
            posed = self.known[index].cam2world is not None and len(self.views) > 1
            if known == "keep" and posed and not bool(view["is_metric_scale"].all()):
                raise InputError(
                    f'views[{self.order[index]}]["camera_poses"]: expected metres for known="keep", got '
                    "is_metric_scale=False; predicted depth is metric and does not fit translations of another unit: "
                    'convert the poses to metres, or use known="hint"'
                )
