"""Images and geometric inputs to tokens, in the order that keeps a GPU busy.

Reading poses, depths and flow is a hundred small kernels. Launched first they would leave the GPU waiting for Python at
the beginning of a call, so the encoder goes first; and with few views, whose encoder does not fill the GPU, everything
about geometry runs beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import head_precision
from .head_loop import pays_side_by_side, side_by_side
from .modules.host_weights import resident
from .modules.modalities import DenseInput, Modalities, ModalityReader, VectorInput
from .modules.plain import plain_parts
from .modules.tokenizers import TOKENIZER_PARTS, DenseTokenizer, VectorTokenizer
from .switches import float32_sums

if TYPE_CHECKING:
    from .model import Any4D

GEOMETRY_KEYS = ("ray_directions_cam", "depth_along_ray", "camera_pose_quats", "radial_scene_flow")


@dataclass
class GeometryTokens:
    """Features of every modality that somebody gave, with who uses them: what `ops.fuse_tokens` adds to the image's."""

    dense: list[Tensor] = field(default_factory=list)  # each [V * B, T, C]
    dense_masks: list[Tensor | None] = field(default_factory=list)  # each [V * B] bool
    vectors: list[Tensor] = field(default_factory=list)  # each [V * B, C]
    vector_masks: list[Tensor | None] = field(default_factory=list)  # each [V * B] bool

    def tensors(self) -> list[Tensor]:
        given = (*self.dense, *self.dense_masks, *self.vectors, *self.vector_masks)
        return [t for t in given if t is not None]


def encoded(
    model: Any4D,
    reader: ModalityReader,
    images: Tensor,
    encode: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    flags: head_precision.Flags | None,
) -> tuple[Tensor, GeometryTokens]:
    """Image tokens and those of the geometric inputs.

    Args:
        model: whose tokenizers run.
        reader: of the views; what it draws is drawn before the encoder runs.
        images: [V * B, 3, H, W].
        encode: the encoder, [V * B, 3, H, W] -> [V * B, T, C].
        dtype: of the dense tokenizers, with flags.
        flags: where they tell what left its range; None: the tokenizers run in float32.
    """
    kind = images.device.type

    def read() -> Modalities:
        with torch.autocast(kind, enabled=False):
            return reader.read()

    def tokenize(given: Modalities) -> GeometryTokens:
        # Tokenizers stay in full precision: their LayerNorms see a high variance (upstream does the same).
        with torch.autocast(kind, enabled=False):
            return tokenize_geometry(model, given, images.shape[0], dtype, flags)

    if reader.training or reader.config.images_prob != 1:
        given = read()
        if given.image_mask is not None:
            images = images.masked_fill(~given.image_mask[:, None, None, None], 0.0)
        return encode(images), tokenize(given)
    patches = images.shape[0] * images.shape[2] * images.shape[3] // model.encoder.patch_size**2
    given_any = any(key in view for view in reader.views for key in GEOMETRY_KEYS)
    if flags is None or not given_any or not pays_side_by_side(patches, images):
        tokens = encode(images)
        return tokens, tokenize(read())
    found: list[GeometryTokens] = []

    def geometry() -> list[Tensor]:
        found.append(tokenize(read()))
        return found[0].tensors()

    (tokens,), _ = side_by_side((lambda: [encode(images)], geometry), images.device)
    return tokens, found[0]


def tokenize_geometry(
    model: Any4D, given: Modalities, rows: int, dtype: torch.dtype, flags: head_precision.Flags | None
) -> GeometryTokens:
    """Run the tokenizers of the modalities that somebody gave; `rows` is V * B."""
    out = GeometryTokens()
    maps: list[tuple[DenseTokenizer, DenseInput | None]] = [
        (model.ray_dirs_encoder, given.rays),
        (model.depth_encoder, given.depth),
        (model.scene_flow_encoder, given.flow),
    ]
    for tokenizer, item in maps:
        if item is None:
            continue
        if flags is None or not plain_parts(tokenizer, *TOKENIZER_PARTS):
            with resident(tokenizer.parameters(), item.maps.device):
                features = tokenizer(item.maps)
        else:
            with float32_sums():
                features = tokenizer(item.maps, dtype, flags.inputs)
        out.dense.append(item.spread(features, rows))
        out.dense_masks.append(item.mask)
    singles: list[tuple[VectorTokenizer, VectorInput | None]] = [
        (model.depth_scale_encoder, given.depth_scale),
        (model.cam_rot_encoder, given.rotation),
        (model.cam_trans_encoder, given.translation),
        (model.cam_trans_scale_encoder, given.pose_scale),
    ]
    for vector_tokenizer, vector in singles:
        if vector is not None:
            out.vectors.append(vector_tokenizer(vector.values))
            out.vector_masks.append(vector.mask)
    return out
