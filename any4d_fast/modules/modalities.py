"""Which geometric inputs are given, for whom, and their normalisation (paper, section 3.2).

Batches are view-major: row v*B + b is sample b of view v. Outside training no random number is drawn for a
probability of 0 or 1, and then the host neither waits for the device nor sends it anything, so that a CUDA graph can
capture the whole reader; in training they are drawn in upstream's order, so that equal seeds drop equal inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import roma
import torch
from torch import Tensor

from .. import ops
from ..config import ModalityConfig

EPS = 1e-8  # upstream's guard in every division and logarithm

View = dict[str, Any]


@dataclass
class DenseInput:
    """A dense modality: the views that give it, its maps for those views, and who among all views uses it."""

    views: list[int]
    maps: Tensor  # [len(views) * B, H, W, channels]
    mask: Tensor  # [V * B] bool

    def spread(self, features: Tensor, rows: int) -> Tensor:
        """Features of the views that gave a map among all `rows` = V * B; the others' rows are masked out later."""
        per_view = features.shape[0] // len(self.views)
        if features.shape[0] == rows:
            return features
        # No index tensor: its way to the device would stop the host, and a CUDA graph cannot capture it.
        given = dict(zip(self.views, features.split(per_view), strict=True))
        none = features.new_zeros(1).expand(per_view, *features.shape[1:])
        return torch.cat([given.get(view, none) for view in range(rows // per_view)])


@dataclass
class VectorInput:
    """A vector per view and who uses it."""

    values: Tensor  # [V * B, channels]
    mask: Tensor  # [V * B] bool


@dataclass
class Modalities:
    """Everything that is added to the image tokens; None: nobody gave it."""

    image_mask: Tensor | None = None  # [V * B] bool, None: all images are used
    rays: DenseInput | None = None
    depth: DenseInput | None = None
    flow: DenseInput | None = None
    depth_scale: VectorInput | None = None
    rotation: VectorInput | None = None
    translation: VectorInput | None = None
    pose_scale: VectorInput | None = None


class _Draw:
    """Bernoulli draws with probabilities from the configuration."""

    def __init__(self, training: bool, batch: int, views: int, device: torch.device) -> None:
        self.training, self.batch, self.views, self.device = training, batch, views, device

    def decided(self, probability: float) -> bool:
        """Whether nothing is random about it."""
        return not self.training and probability in (0, 1)

    def __call__(self, probability: float, count: int, device: torch.device | None = None) -> Tensor | bool:
        """[count] bool, or one bool for all of them when nothing is random."""
        if self.decided(probability):
            return bool(probability)
        return torch.rand(count, device=device or self.device) < probability

    def per_sample(self, probability: float) -> Tensor | bool:
        """One draw per sample, the same in all its views: [V * B]."""
        drawn = self(probability, self.batch)
        return drawn if isinstance(drawn, bool) else drawn.repeat(self.views)


def _both(a: Tensor | bool, b: Tensor | bool) -> Tensor | bool:
    if isinstance(a, bool):
        return b if a else False
    if isinstance(b, bool):
        return a if b else False
    return a & b


class ModalityReader:
    """Reads the modalities out of upstream's view dictionaries."""

    def __init__(self, config: ModalityConfig, views: list[View], training: bool) -> None:
        self.config = config
        self.views = views
        self.training = training
        self.batch = views[0]["img"].shape[0]
        self.device = views[0]["img"].device
        self.draw = _Draw(training, self.batch, len(views), self.device)

    def read(self) -> Modalities:
        config, draw = self.config, self.draw
        images = draw.per_sample(config.images_prob)
        overall = draw.per_sample(config.overall_prob)
        kept = draw(1 - config.dropout_prob, self.batch * len(self.views))
        given = _both(kept, overall)
        rays = _both(draw.per_sample(config.ray_dirs_prob), given)
        depth = _both(draw.per_sample(config.depth_prob), given)
        pose = _both(draw.per_sample(config.cam_prob), given)
        flow = _both(draw.per_sample(config.doppler_prob), given)
        out = Modalities(image_mask=None if images is True else self._filled(images))
        self._read_rays(out, rays)
        self._read_depth(out, depth)
        self._read_pose(out, pose)
        self._read_flow(out, flow)
        return out

    def _filled(self, mask: Tensor | bool) -> Tensor:
        if isinstance(mask, Tensor):
            return mask
        return torch.full((self.batch * len(self.views),), mask, device=self.device)

    def _provided(self, use: Tensor | bool, *keys: str) -> list[int]:
        """Views that give all the keys, unless nobody may use them."""
        if use is False:
            return []
        return [i for i, view in enumerate(self.views) if all(k in view for k in keys)]

    def _mask(self, views: list[int], use: Tensor | bool) -> Tensor:
        """[V * B]: used, and given by the view."""
        given = torch.ones(len(self.views), self.batch, dtype=torch.bool, device=self.device)
        if len(views) < len(self.views):
            given = self._placed(views, given[: len(views)], torch.zeros_like(given[0]))
        return given.flatten() if isinstance(use, bool) else given.flatten() & use

    def _placed(self, views: list[int], values: Tensor, otherwise: Tensor) -> Tensor:
        """[V, ...]: row i of `values` for view `views[i]`, `otherwise` for the rest.

        No index tensor: its way to the device would stop the host, and a CUDA graph cannot capture it.
        """
        if len(views) == len(self.views):
            return values
        given = dict(zip(views, values.unbind(), strict=True))
        return torch.stack([given.get(view, otherwise) for view in range(len(self.views))])

    def _given(self, view: int, key: str, *size: int) -> Tensor:
        """A view's tensor, which must have this size."""
        value = self.views[view][key]
        if not isinstance(value, Tensor) or tuple(value.shape) != size:
            got = list(value.shape) if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"views[{view}][{key!r}]: expected a tensor {list(size)} as the images are, got {got}")
        return value

    def _maps(self, views: list[int], key: str, channels: int) -> Tensor:
        """[len(views) * B, H, W, channels] float."""
        size = (self.batch, *self.views[0]["img"].shape[-2:], channels)
        return torch.cat([self._given(i, key, *size) for i in views]).to(self.views[0]["img"].dtype)

    def _dense(self, views: list[int], maps: Tensor, mask: Tensor, use: Tensor | bool) -> DenseInput:
        """Maps with zeros where a draw left them out: whatever they hold must not reach a weight's gradient."""
        if isinstance(use, Tensor):
            rows = mask.split(self.batch)
            used = mask if len(views) == len(self.views) else torch.cat([rows[view] for view in views])
            maps = maps.masked_fill(~used[:, None, None, None], 0.0)
        return DenseInput(views, maps, mask)

    def _read_rays(self, out: Modalities, use: Tensor | bool) -> None:
        views = self._provided(use, "ray_directions_cam")
        if views:
            out.rays = self._dense(views, self._maps(views, "ray_directions_cam", 3), self._mask(views, use), use)

    def _metric(self) -> Tensor:
        """[V * B] bool: the sample's inputs of this view are in metres."""
        none = torch.zeros(self.batch, dtype=torch.bool, device=self.device)
        flags = []
        for i, view in enumerate(self.views):
            flag = view.get("is_metric_scale")
            if flag is not None and (not isinstance(flag, Tensor) or flag.numel() != self.batch):
                raise ValueError(f"views[{i}]['is_metric_scale']: expected a tensor [{self.batch}], got {flag!r}")
            flags.append(none if flag is None else flag.to(self.device).reshape(self.batch).bool())
        return torch.cat(flags)

    def _read_depth(self, out: Modalities, use: Tensor | bool) -> None:
        sparse = self.draw(self.config.sparse_depth_prob, 1, torch.device("cpu"))
        views = self._provided(use, "depth_along_ray")
        if not views:
            return
        mask = self._mask(views, use)
        maps = self._dense(views, self._maps(views, "depth_along_ray", 1), mask, use).maps
        metric = self._metric()
        if self.draw.decided(self.config.depth_scale_norm_all_prob) and not bool(sparse):
            if self.config.depth_scale_norm_all_prob:
                metric = metric & ~mask
        else:
            maps, metric = self._drawn_depth(views, maps, mask, metric, bool(sparse))
        depth, log_scale = ops.normalize_depth(maps)
        out.depth = DenseInput(views, depth, mask)
        known = log_scale.reshape(len(views), self.batch).to(maps.dtype)
        scales = self._placed(views, known, torch.zeros_like(known[0]))
        out.depth_scale = VectorInput(scales.reshape(-1, 1), mask & metric)

    def _drawn_depth(
        self, views: list[int], maps: Tensor, mask: Tensor, metric: Tensor, sparse: bool
    ) -> tuple[Tensor, Tensor]:
        """Maps and metric flags after what is drawn view by view, as upstream draws it."""
        metric = metric.clone()
        for row, view in enumerate(views):
            own = slice(view * self.batch, (view + 1) * self.batch)
            used = mask[own]
            hidden = self._hidden_scale(used)
            if hidden is not None:
                metric[own] &= ~hidden
            if sparse:
                chunk = slice(row * self.batch, (row + 1) * self.batch)
                maps[chunk] = self._sparsified(maps[chunk], used)
        return maps, metric

    def _hidden_scale(self, used: Tensor) -> Tensor | None:
        """[B] bool: samples among the used ones whose depth is given without its metric scale; None: no sample."""
        probability = self.config.depth_scale_norm_all_prob
        if self.draw.decided(probability):
            return used if probability else None
        rows = used.nonzero()[:, 0]  # one draw for each used sample, as upstream draws
        drawn = self.draw(probability, len(rows), torch.device("cpu"))
        assert isinstance(drawn, Tensor)
        hidden = torch.zeros_like(used)
        hidden[rows] = drawn.to(rows.device)
        return hidden

    def _sparsified(self, depth: Tensor, used: Tensor) -> Tensor:
        """Remove a random share of this view's valid pixels, counted over the samples that use depth."""
        valid = (depth > 0) & used[:, None, None, None]
        index = valid.nonzero(as_tuple=True)
        count = len(index[0])
        number = int(count * self.config.sparsification_removal_percent)
        if number == 0:  # upstream draws no permutation then, and later draws follow this one
            return depth
        removed = torch.randperm(count)[:number].to(depth.device)
        out = depth.clone()
        out[tuple(i[removed] for i in index)] = 0
        return out

    def _read_pose(self, out: Modalities, use: Tensor | bool) -> None:
        views = self._provided(use, "camera_pose_quats", "camera_pose_trans")
        hidden = self.draw(self.config.pose_scale_norm_all_prob, self.batch * len(self.views), torch.device("cpu"))
        if not views:
            return
        if views[0] != 0:
            raise ValueError(
                f"views: views {views} give camera poses but the reference view 0 does not; poses are relative to "
                "view 0, so give its pose too"
            )
        mask = self._mask(views, use)
        quats, trans = self._relative_poses(views, mask)
        distance = trans.view(len(self.views), self.batch, 3).norm(dim=-1)  # [V, B]
        scale = (distance.sum(0) / ((distance > 0).sum(0) + EPS)).clip(min=EPS)  # [B]
        per_row = scale.repeat(len(self.views))[:, None]  # [V * B, 1]
        metric = self._metric()
        if isinstance(hidden, Tensor):
            metric = metric & ~hidden.to(self.device)
        elif hidden:
            metric = torch.zeros_like(metric)
        out.rotation = VectorInput(quats, mask)
        out.translation = VectorInput(trans / per_row, mask)
        out.pose_scale = VectorInput(torch.log(per_row + EPS), mask & metric)

    def _stacked(self, views: list[int], key: str, channels: int) -> Tensor:
        """[len(views), B, channels] in the images' dtype."""
        vectors = [self._given(view, key, self.batch, channels) for view in views]
        return torch.stack([vector.to(self.device, self.views[0]["img"].dtype) for vector in vectors])

    def _relative_poses(self, views: list[int], mask: Tensor) -> tuple[Tensor, Tensor]:
        """Poses in the reference view's camera, [V * B, 4] and [V * B, 3]; identity where they are not used."""
        absolute = self._stacked(views, "camera_pose_quats", 4)  # [n, B, 4]
        places = self._stacked(views, "camera_pose_trans", 3)  # [n, B, 3]
        inverse = roma.quat_inverse(absolute[0])
        rotation = roma.unitquat_to_rotmat(inverse / inverse.norm(dim=-1, keepdim=True))  # [B, 3, 3]
        relative = roma.quat_product(inverse.expand_as(absolute), absolute)
        # Elementwise: a matmul might run in TF32.
        moved = (rotation * (places - places[0])[..., None, :]).sum(dim=-1)  # [n, B, 3]
        none = torch.zeros_like(absolute[0])
        identity = torch.nn.functional.pad(none[:, :3], (0, 1), value=1.0)
        quats = self._placed(views, relative, identity).flatten(0, 1)
        trans = self._placed(views, moved, none[:, :3]).flatten(0, 1)
        identity = identity.repeat(len(self.views), 1)
        return torch.where(mask[:, None], quats, identity), trans.masked_fill(~mask[:, None], 0.0)

    def _read_flow(self, out: Modalities, use: Tensor | bool) -> None:
        views = self._provided(use, "radial_scene_flow")
        if not views:
            return
        for key in ("pts3d_cam", "valid_mask"):
            if key not in self.views[0]:
                raise ValueError(f"views[0]: radial_scene_flow needs {key!r} of view 0, whose mean distance scales it")
        size = (self.batch, *self.views[0]["img"].shape[-2:])
        points, valid = self._given(0, "pts3d_cam", *size, 3), self._given(0, "valid_mask", *size)
        if valid.dtype != torch.bool:
            raise ValueError(f"views[0]['valid_mask']: expected bool, got {valid.dtype}")
        distance = points.norm(dim=-1).masked_fill(~valid, 0.0).flatten(1).sum(1)  # [B]
        factor = (distance / (valid.flatten(1).sum(1) + EPS)).clip(min=EPS)
        maps = self._maps(views, "radial_scene_flow", 3)
        maps = maps / (factor.repeat(len(views))[:, None, None, None] + EPS)
        out.flow = self._dense(views, maps, self._mask(views, use), use)
