"""What a reconstruction holds, as NumPy arrays on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
UInt8Array = npt.NDArray[np.uint8]

# Field -> (shape with V, H, W as letters, dtype).
_FIELDS: dict[str, tuple[tuple[str | int, ...], type[np.generic]]] = {
    "images": (("V", "H", "W", 3), np.uint8),
    "pts3d": (("V", "H", "W", 3), np.float32),
    "depth_z": (("V", "H", "W"), np.float32),
    "depth_along_ray": (("V", "H", "W"), np.float32),
    "ray_directions": (("V", "H", "W", 3), np.float32),
    "scene_flow": (("V", "H", "W", 3), np.float32),
    "conf": (("V", "H", "W"), np.float32),
    "mask": (("V", "H", "W"), np.bool_),
    "intrinsics": (("V", 3, 3), np.float32),
    "camera_poses": (("V", 4, 4), np.float32),
}


@dataclass
class Reconstruction:
    """A metric 4D reconstruction of V views of H x W pixels.

    The world frame is the camera of view `reference`, OpenCV axes (x right, y down, z forward), in metres; pixel
    centres are at integer coordinates. Fields that the model does not predict are None.

    Attributes:
        images: [V, H, W, 3] uint8 RGB, as the model saw them.
        pts3d: [V, H, W, 3] metres, world frame.
        depth_z: [V, H, W] metres along each camera's optical axis.
        depth_along_ray: [V, H, W] metres from each camera's centre.
        ray_directions: [V, H, W, 3] unit vectors, each camera's frame.
        scene_flow: [V, H, W, 3] metres, world frame. Row i lives on the pixels of view `reference` and moves its
            points to the time of view i.
        conf: [V, H, W], 1 or more with the released configuration; larger is surer.
        mask: [V, H, W] bool, True where the geometry is to be used.
        intrinsics: [V, 3, 3] pixels.
        camera_poses: [V, 4, 4] camera-to-world.
        metric_scale: metres for one unit of the network's own; 1 where the model predicts none.
        reference: index of the view whose camera is the world and whose pixels carry the flow.
        timestamps: [V] seconds, or None.
        names: V names of the frames.
    """

    images: UInt8Array
    pts3d: FloatArray
    depth_z: FloatArray | None = None
    depth_along_ray: FloatArray | None = None
    ray_directions: FloatArray | None = None
    scene_flow: FloatArray | None = None
    conf: FloatArray | None = None
    mask: BoolArray | None = None
    intrinsics: FloatArray | None = None
    camera_poses: FloatArray | None = None
    metric_scale: float = 1.0
    reference: int = 0
    timestamps: npt.NDArray[np.float64] | None = None
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if np.ndim(self.images) != 4:
            raise ValueError(f"images: expected [V, H, W, 3] uint8, got {_describe(self.images)}")
        views, height, width = self.images.shape[:3]
        sizes = {"V": views, "H": height, "W": width}
        for name, (letters, dtype) in _FIELDS.items():
            value = getattr(self, name)
            if value is None and name not in ("images", "pts3d"):
                continue
            shape = tuple(sizes[item] if isinstance(item, str) else item for item in letters)
            if not isinstance(value, np.ndarray) or value.shape != shape or value.dtype != dtype:
                layout = ", ".join(map(str, letters))
                raise ValueError(
                    f"{name}: expected [{layout}] = {list(shape)} {dtype.__name__}, got {_describe(value)}"
                )
        if views == 0:
            raise ValueError("images: expected at least one view, got none")
        if not 0 <= self.reference < views:
            raise ValueError(f"reference: expected a view from 0 to {views - 1}, got {self.reference}")
        if self.timestamps is not None:
            self.timestamps = np.asarray(self.timestamps, dtype=np.float64)
            if self.timestamps.shape != (views,):
                raise ValueError(f"timestamps: expected {views} seconds, got shape {list(self.timestamps.shape)}")
        self.names = list(self.names) or [f"frame {i}" for i in range(views)]
        if len(self.names) != views:
            raise ValueError(f"names: expected {views} names, got {len(self.names)}")

    @property
    def num_views(self) -> int:
        """V, the number of views."""
        return int(self.images.shape[0])

    @property
    def height(self) -> int:
        """H, in pixels."""
        return int(self.images.shape[1])

    @property
    def width(self) -> int:
        """W, in pixels."""
        return int(self.images.shape[2])

    @classmethod
    def from_outputs(
        cls,
        outputs: Sequence[Mapping[str, Any]],
        *,
        batch_index: int = 0,
        reference: int = 0,
        images: UInt8Array | None = None,
        timestamps: Sequence[float] | npt.NDArray[np.float64] | None = None,
        names: Sequence[str] | None = None,
    ) -> Reconstruction:
        """Take one sample out of what `model.infer` returned.

        Args:
            outputs: V dictionaries of tensors [B, H, W, C] or [B, ...] with upstream's keys and `depth_z`,
                `intrinsics`, `camera_poses`, `mask`, `img_no_norm`; only `pts3d` is required.
            batch_index: which of the B samples.
            reference: the reference view that `infer` was called with.
            images: [V, H, W, 3] uint8, in place of `img_no_norm` (0 to 1, or uint8).
            timestamps: V seconds.
            names: V frame names.

        Raises:
            ValueError: no views, a missing required key, a batch index out of range, or shapes that do not agree.
        """
        if len(outputs) == 0:
            raise ValueError("outputs: expected at least one view, got none")
        first = outputs[0]
        if "pts3d" not in first:
            raise ValueError(f"outputs: expected a key pts3d in every view, got {sorted(first)}")
        samples = len(first["pts3d"])
        if not 0 <= batch_index < samples:
            raise ValueError(f"batch_index: expected 0 to {samples - 1}, got {batch_index}")
        fields: dict[str, Any] = {}
        for name, (letters, dtype) in _FIELDS.items():
            if name == "images":
                continue
            key = "non_ambiguous_mask" if name == "mask" and "mask" not in first else name
            if key in first:
                fields[name] = _stack(outputs, key, batch_index, len(letters) - 1, dtype)
        if images is None:
            if "img_no_norm" not in first:
                raise ValueError("images: the outputs hold no img_no_norm; pass images=[V, H, W, 3] uint8")
            images = np.stack([_to_uint8(_numpy(view["img_no_norm"][batch_index])) for view in outputs])
        if "metric_scaling_factor" in first:
            fields["metric_scale"] = float(_numpy(first["metric_scaling_factor"]).reshape(samples, -1)[batch_index, 0])
        return cls(
            images=images,
            reference=reference,
            timestamps=None if timestamps is None else np.asarray(timestamps, dtype=np.float64),
            names=list(names or []),
            **fields,
        )

    def tracks(self) -> FloatArray:
        """Where every point of the reference view is at the time of each view, [V, H, W, 3] metres, world frame.

        Raises:
            ValueError: this reconstruction has no scene flow.
        """
        if self.scene_flow is None:
            raise ValueError("scene_flow: this reconstruction has none (its model predicts no motion), so no tracks")
        return self.pts3d[self.reference] + self.scene_flow

    def valid(self, view: int, min_confidence: float | None = None) -> BoolArray:
        """Which points of a view are to be used, [H, W] bool: finite, in the mask, and sure enough if asked."""
        usable: BoolArray = np.isfinite(self.pts3d[view]).all(axis=-1)
        if self.mask is not None:
            usable &= self.mask[view]
        if min_confidence is not None and self.conf is not None:
            usable &= self.conf[view] >= min_confidence
        return usable


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{list(value.shape)} {value.dtype}"
    return type(value).__name__


def _numpy(value: Any) -> npt.NDArray[Any]:
    """A tensor of any device and type, or an array, as NumPy (which has no bfloat16, hence float32)."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        return np.asarray((value.float() if value.is_floating_point() else value).numpy())
    return np.asarray(value)


def _stack(
    outputs: Sequence[Mapping[str, Any]], key: str, batch_index: int, ndim: int, dtype: type[np.generic]
) -> npt.NDArray[Any]:
    rows = []
    for index, view in enumerate(outputs):
        if key not in view:
            raise ValueError(f"outputs: view {index} has no {key}, but view 0 has")
        row = _numpy(view[key][batch_index])
        rows.append(row[..., 0] if row.ndim == ndim + 1 and row.shape[-1] == 1 else row)
    return np.stack(rows).astype(dtype, copy=False)


def _to_uint8(image: npt.NDArray[Any]) -> UInt8Array:
    if image.dtype == np.uint8:
        return image
    return np.rint(np.nan_to_num(image) * 255).clip(0, 255).astype(np.uint8)
