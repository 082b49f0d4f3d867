"""Typed configuration of the model, presets, and translation from upstream's nested dictionaries."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

INF = float("inf")

ENCODER_SIZES = {
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "giant": (1536, 40, 24),
}
"""DINOv2 ViT/14: embedding dimension, blocks, heads (github.com/facebookresearch/dinov2, vision_transformer.py)."""

DENSE_PARTS = {
    "pointmap": ("points",),
    "raymap+depth": ("ray_origins", "ray_directions", "depth"),
    "raydirs+depth+pose": ("ray_directions", "depth"),
    "campointmap+pose": ("points",),
    "pointmap+raydirs+depth+pose": ("points", "ray_directions", "depth"),
}
"""What the channels of the geometry head mean, in order, by scene representation."""

PART_CHANNELS = {"points": 3, "ray_origins": 3, "ray_directions": 3, "depth": 1}


class ConfigError(ValueError):
    """An option of the model's configuration is unknown, contradictory or not supported; the message names it."""


def unsupported(option: str, value: Any, supported: Any) -> ConfigError:
    """The error for an option whose value exists upstream, or might, but does not work here."""
    return ConfigError(f"{option}: {value!r} is not supported; supported: {supported}")


@dataclass(frozen=True)
class EncoderConfig:
    """DINOv2 image encoder."""

    size: str = "large"
    with_registers: bool = False
    data_norm_type: str = "dinov2"
    norm_returned_features: bool = True
    gradient_checkpointing: bool = False
    keep_first_n_layers: int | None = None
    pretrained_checkpoint_path: str | None = None
    patch_size: int = 14

    def __post_init__(self) -> None:
        if self.size not in ENCODER_SIZES:
            raise unsupported("encoder_config.size", self.size, sorted(ENCODER_SIZES))
        if self.patch_size != 14:
            raise unsupported("encoder_config.patch_size", self.patch_size, 14)
        if self.keep_first_n_layers is not None and self.keep_first_n_layers < 1:
            raise ConfigError(
                "encoder_config.keep_first_n_layers: expected at least 1, or None for all blocks, got "
                f"{self.keep_first_n_layers}"
            )

    @property
    def dim(self) -> int:
        return ENCODER_SIZES[self.size][0]

    @property
    def depth(self) -> int:
        blocks = ENCODER_SIZES[self.size][1]
        return blocks if self.keep_first_n_layers is None else min(self.keep_first_n_layers, blocks)

    @property
    def num_heads(self) -> int:
        return ENCODER_SIZES[self.size][2]


@dataclass(frozen=True)
class TransformerConfig:
    """Multi-view transformer."""

    kind: str = "alternating_attention"
    indices: tuple[int, ...] | None = (11, 17)
    norm_intermediate: bool = True
    depth: int = 24
    dim: int = 768
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_norm: bool = False
    proj_drop: float = 0.0
    attn_drop: float = 0.0
    init_values: float | None = None
    drop_path: float = 0.0
    distinguish_ref_and_non_ref_views: bool = True
    use_pe_for_non_reference_views: bool = False
    max_num_views_for_pe: int = 1000
    use_rand_idx_pe_for_non_reference_views: bool = True
    use_scalable_softmax: bool = False
    use_entropy_scaling: bool = False
    base_token_count_for_entropy_scaling: int = 444
    entropy_scaling_growth_factor: float = 1.4
    gradient_checkpointing: bool = False
    pretrained_checkpoint_path: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("alternating_attention", "global_attention"):
            raise unsupported(
                "info_sharing_config.model_type", self.kind, ["alternating_attention", "global_attention"]
            )
        if self.dim % self.num_heads:
            raise ConfigError(f"info_sharing_config: dim {self.dim} is not divisible by num_heads {self.num_heads}")
        if self.attn_drop:
            raise unsupported("info_sharing_config.module_args.attn_drop", self.attn_drop, 0)
        for name in ("proj_drop", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"info_sharing_config.module_args.{name}: expected a probability in [0, 1), "
                    f"got {getattr(self, name)}"
                )
        if self.indices is not None:
            if len(self.indices) not in (2, 3):
                raise ConfigError(f"info_sharing_config.indices: expected 2 or 3 block indices, got {self.indices}")
            if len(set(self.indices)) != len(self.indices):
                raise ConfigError(f"info_sharing_config.indices: expected different blocks, got {self.indices}")
            if not all(0 <= i < self.depth for i in self.indices):
                raise ConfigError(
                    f"info_sharing_config.indices: {self.indices} must lie in 0..{self.depth - 1} (depth {self.depth})"
                )

    @property
    def feeds_encoder_map(self) -> bool:
        """Whether the first of the dense heads' four maps is the fused encoder map (not with three taps)."""
        return self.indices is None or len(self.indices) == 2


@dataclass(frozen=True)
class DenseHeadConfig:
    """One DPT head: features, then a regressor to full resolution."""

    output_dim: int = 6
    feature_dim: int = 256
    hooks: tuple[int, ...] = (0, 1, 2, 3)
    layer_dims: tuple[int, ...] = (96, 192, 384, 768)
    hidden_dims: tuple[int, int] | None = None
    checkpoint_gradient: bool = False


@dataclass(frozen=True)
class ValueBounds:
    """How one head output becomes a value: "linear", "square" or "exp" ("z_exp" for points), then clipping."""

    mode: str = "linear"
    vmin: float = -INF
    vmax: float = INF


@dataclass(frozen=True)
class AdaptorConfig:
    """How the raw channels of the heads become factors."""

    points: ValueBounds = ValueBounds()
    ray_origins: ValueBounds = ValueBounds()
    ray_directions: ValueBounds = ValueBounds()
    rays_on_unit_sphere: bool = True
    rays_on_image_plane: bool = False
    clamp_min_of_z_dir: bool = False
    z_dir_min: float = -INF
    depth: ValueBounds = ValueBounds("exp", 0.0, INF)
    confidence_type: str = "exp"
    confidence_vmin: float = 1.0
    confidence_vmax: float = INF
    scene_flow: ValueBounds = ValueBounds()
    cam_trans: ValueBounds = ValueBounds()
    quaternions: ValueBounds = ValueBounds()
    quaternions_normalize: bool = True
    scale: ValueBounds = ValueBounds("exp", 1e-8, INF)

    def __post_init__(self) -> None:
        modes = {
            "points": ("linear", "square", "exp", "z_exp"),
            "ray_origins": ("linear", "square", "exp"),
            "ray_directions": ("linear",),
            "depth": ("linear", "square", "exp"),
            "scene_flow": ("linear", "square", "exp"),
            "cam_trans": ("linear", "square", "exp"),
            "quaternions": ("linear",),
            "scale": ("linear", "square", "exp"),
        }
        for name, allowed in modes.items():
            mode = getattr(self, name).mode
            if mode not in allowed:
                raise unsupported(f"adaptor {name} mode", mode, list(allowed))
        if self.confidence_type not in ("exp", "sigmoid", "softmax"):
            raise unsupported("adaptor confidence_type", self.confidence_type, ["exp", "sigmoid", "softmax"])
        if not self.confidence_vmin < self.confidence_vmax:
            raise ConfigError(
                f"adaptor: confidence_vmin {self.confidence_vmin} must be less than confidence_vmax "
                f"{self.confidence_vmax}"
            )
        if self.confidence_type == "sigmoid" and not (0 <= self.confidence_vmin and self.confidence_vmax < INF):
            raise ConfigError("adaptor: a sigmoid confidence needs finite confidence_vmin >= 0 and confidence_vmax")

    def is_released(self) -> bool:
        """Whether these are the released checkpoint's adaptors, which `ops.compose_factors` computes in one pass."""
        return self == _RELEASED_ADAPTORS


_RELEASED_ADAPTORS = AdaptorConfig()


@dataclass(frozen=True)
class SceneConfig:
    """What the heads predict: representation, confidence, mask, pose and scale."""

    representation: str = "raydirs+depth+pose"
    confidence: bool = True
    mask: bool = True
    pose_head: bool = True
    factored_points: bool = True
    geometry_head: DenseHeadConfig = DenseHeadConfig()
    flow_head: DenseHeadConfig = DenseHeadConfig(output_dim=3)
    num_resconv_block: int = 2
    rot_representation_dim: int = 4
    scale_mlp_layers: int = 2
    scale_hidden_dim: int = 196
    adaptors: AdaptorConfig = AdaptorConfig()

    @property
    def channels(self) -> int:
        parts = sum(PART_CHANNELS[p] for p in DENSE_PARTS[self.representation])
        return parts + int(self.confidence) + int(self.mask)

    def __post_init__(self) -> None:
        if self.representation not in DENSE_PARTS:
            raise unsupported("pred_head_config.adaptor_type", self.representation, sorted(DENSE_PARTS))
        if self.representation.endswith("+pose") and not self.pose_head:
            raise ConfigError(f"pred_head_config.type: {self.representation!r} needs the head 'dpt+pose', got 'dpt'")
        if self.geometry_head.output_dim != self.channels:
            raise ConfigError(
                f"pred_head_config.regressor_head.output_dim: {self.geometry_head.output_dim} does not fit "
                f"adaptor_type, whose channels are {self.channels}"
            )
        if self.flow_head.output_dim != 3:
            raise unsupported("scene_flow_pred_head_config.regressor_head.output_dim", self.flow_head.output_dim, 3)
        if self.pose_head and self.rot_representation_dim != 4:
            raise unsupported("pred_head_config.pose_head.rot_representation_dim", self.rot_representation_dim, 4)


@dataclass(frozen=True)
class ModalityConfig:
    """Probabilities with which inputs are given; 0 or 1 outside training (paper, section 3.3)."""

    images_prob: float = 1.0
    overall_prob: float = 1.0
    dropout_prob: float = 0.0
    ray_dirs_prob: float = 1.0
    depth_prob: float = 1.0
    cam_prob: float = 1.0
    doppler_prob: float = 1.0
    sparse_depth_prob: float = 0.0
    sparsification_removal_percent: float = 0.0
    depth_scale_norm_all_prob: float = 0.0
    pose_scale_norm_all_prob: float = 0.0

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if not 0 <= value <= 1:
                raise ConfigError(f"geometric_input_config.{f.name}: expected a probability in [0, 1], got {value}")


@dataclass(frozen=True)
class TokenizerConfig:
    """Widths inside the tokenizers of the geometric inputs."""

    dense_dims: tuple[int, ...] = (588, 768, 1024)
    global_dims: tuple[int, ...] = (128, 256, 512)


@dataclass(frozen=True)
class Any4DConfig:
    """The whole model."""

    name: str = "any4d"
    encoder: EncoderConfig = EncoderConfig()
    transformer: TransformerConfig = TransformerConfig()
    scene: SceneConfig = SceneConfig()
    tokenizers: TokenizerConfig = TokenizerConfig()
    modalities: ModalityConfig = field(default_factory=ModalityConfig)


PRESETS: dict[str, Any4DConfig] = {
    "any4d": Any4DConfig(),
    "any4d-base": Any4DConfig(
        name="any4d-base",
        encoder=EncoderConfig(size="base"),
        transformer=TransformerConfig(depth=12, indices=(5, 8)),
    ),
    "tiny": Any4DConfig(
        name="tiny",
        # Under 15 million parameters, so that the packaged weights stay under 30 MB; depth goes where views meet.
        encoder=EncoderConfig(size="small", keep_first_n_layers=1),
        transformer=TransformerConfig(depth=8, dim=256, num_heads=4, indices=(3, 5)),
        tokenizers=TokenizerConfig(dense_dims=(32, 48, 64), global_dims=(32, 64, 128)),
        scene=SceneConfig(
            num_resconv_block=1,
            # Half of 32 features is the least that the heads' kernels take.
            geometry_head=DenseHeadConfig(output_dim=6, feature_dim=32, layer_dims=(32, 48, 64, 96)),
            flow_head=DenseHeadConfig(output_dim=3, feature_dim=32, layer_dims=(32, 48, 64, 96)),
        ),
    ),
}


def preset(name: str) -> Any4DConfig:
    """A named configuration.

    Raises:
        ConfigError: for an unknown name; the message lists the known ones.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset: unknown name {name!r}; known presets: {sorted(PRESETS)}")
    return PRESETS[name]
