"""Configuration: upstream's dictionaries in, typed configurations out, and every refusal."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from any4d_fast import Any4D
from any4d_fast.config import (
    PRESETS,
    AdaptorConfig,
    Any4DConfig,
    ConfigError,
    DenseHeadConfig,
    EncoderConfig,
    ModalityConfig,
    SceneConfig,
    TransformerConfig,
    ValueBounds,
    preset,
)
from any4d_fast.config_upstream import from_upstream, to_upstream
from tests.golden_cases import CASES, load_case
from tests.small_models import REPRESENTATIONS, small_config, small_scene

INF = float("inf")


def arguments() -> dict[str, Any]:
    """Upstream's constructor arguments, as its configuration files give them."""
    config: dict[str, Any] = copy.deepcopy(load_case("all_inputs")["config"])
    return config


def with_option(path: str, value: Any) -> dict[str, Any]:
    """Those arguments with one option changed; `path` is dotted."""
    config = arguments()
    *parents, last = path.split(".")
    inner = config
    for key in parents:
        inner = inner.setdefault(key, {})
    inner[last] = value
    return config


@pytest.mark.parametrize("name", CASES)
def test_upstreams_dictionaries_are_taken_as_they_are_and_left_as_they_were(name: str) -> None:
    given = load_case(name)["config"]
    before = copy.deepcopy(given)
    with torch.device("meta"):
        model = Any4D(**given)
    assert given == before
    assert model.class_init_args == before
    model.class_init_args["geometric_input_config"]["images_prob"] = 0
    assert given == before


def test_the_released_architecture_is_upstreams() -> None:
    config = load_case("all_inputs")["config"]
    config["encoder_config"]["size"] = "large"
    config["info_sharing_config"]["module_args"] = {
        "name": "aat_24_layers_ifr", "indices": [11, 17], "norm_intermediate": True, "size": "24_layers", "depth": 24,
        "distinguish_ref_and_non_ref_views": True, "gradient_checkpointing": False,
    }  # fmt: skip
    assert from_upstream(**config) == preset("any4d")
    assert preset("any4d").scene.adaptors.is_released()


def test_a_configuration_that_upstream_has_already_worked_on_is_taken_too() -> None:
    # Upstream's constructor writes derived values into the dictionaries that it is given.
    config = arguments()
    del config["encoder_config"]["uses_torch_hub"]
    config["info_sharing_config"]["module_args"] |= {"input_embed_dim": 384, "custom_positional_encoding": None}
    for heads in ("pred_head_config", "scene_flow_pred_head_config"):
        config[heads]["feature_head"] |= {"patch_size": 14, "input_feature_dims": [384, 192, 192, 192]}
        config[heads]["regressor_head"]["input_feature_dim"] = 256
    config["pred_head_config"]["pose_head"] |= {"patch_size": 14, "input_feature_dim": 192}
    config["pred_head_config"]["scale_head"]["input_feature_dim"] = 192
    for key, options in config["geometric_input_config"].items():
        if key.endswith("_encoder_config"):
            options |= {"enc_embed_dim": 384, "patch_size": 14} if "apply_pe" in options else {"enc_embed_dim": 384}
    assert from_upstream(**config) == from_upstream(**arguments())


SCENES = [small_scene(r, c, m) for r in REPRESENTATIONS for c in (False, True) for m in (False, True)]
CONFIGS: list[Any4DConfig] = [
    *PRESETS.values(),
    *[small_config(scene) for scene in SCENES],
    small_config(small_scene("pointmap", pose_head=False)),
    small_config(kind="global_attention", use_pe_for_non_reference_views=True, indices=(0, 1, 2)),
    small_config(indices=None, init_values=0.1, qk_norm=True, drop_path=0.1, use_entropy_scaling=True),
    small_config(modalities={"images_prob": 0.5, "doppler_prob": 0.25, "dropout_prob": 0.05}),
    small_config(small_scene(factored_points=False, adaptors=AdaptorConfig(
        points=ValueBounds("z_exp", -1, 1), depth=ValueBounds("square", 0.1, 9.0), rays_on_unit_sphere=False,
        rays_on_image_plane=True, clamp_min_of_z_dir=True, z_dir_min=0.1, confidence_type="sigmoid",
        confidence_vmin=0.0, confidence_vmax=1.0, scene_flow=ValueBounds("square", -2, 2),
        cam_trans=ValueBounds("exp", -3, 3), quaternions=ValueBounds("linear", -1, 1), quaternions_normalize=False,
        scale=ValueBounds("linear", 0.5, 2),
    ))),
    dataclasses.replace(small_config(), encoder=EncoderConfig(size="giant", with_registers=True,
                                                              norm_returned_features=False)),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_typed_to_upstream_and_back(number: int) -> None:
    config = CONFIGS[number]
    assert from_upstream(**to_upstream(config)) == config


def test_presets_by_name() -> None:
    assert preset("any4d") == Any4DConfig()
    with pytest.raises(
        ConfigError, match=r"preset: unknown name 'huge'; known presets: \['any4d', 'any4d-base', 'tiny'\]"
    ):
        Any4D.from_preset("huge")


PARAMETERS = {"any4d": (613_651_829, 613_651_829), "any4d-base": (250e6, 350e6), "tiny": (10e6, 20e6)}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_size_they_are_for(name: str) -> None:
    with torch.device("meta"):
        model = Any4D.from_preset(name)
    count = sum(p.numel() for p in model.parameters())
    low, high = PARAMETERS[name]
    print(f"{name}: {count / 1e6:.1f} million parameters")
    assert low <= count <= high


def test_global_attention_marks_the_other_views_unless_told_otherwise() -> None:
    # uniception's two transformers differ in this default.
    args = {"name": "t", "indices": [1, 2], "depth": 4}
    for kind, marked in (("alternating_attention", False), ("global_attention", True)):
        config = with_option("info_sharing_config.module_args", args)
        config["info_sharing_config"]["model_type"] = kind
        assert from_upstream(**config).transformer.use_pe_for_non_reference_views is marked


INDICES: list[tuple[Any, tuple[int, ...]]] = [([1, 2], (1, 2)), ([-2, -1], (2, 3)), (2, (2, 3)), (3, (1, 2, 3))]


@pytest.mark.parametrize(("given", "expected"), INDICES)
def test_indices_may_count_from_the_end(given: Any, expected: tuple[int, ...]) -> None:
    config = from_upstream(**with_option("info_sharing_config.module_args.indices", given))
    assert config.transformer.indices == expected


def test_upstreams_older_name_of_the_position_table() -> None:
    config = from_upstream(**with_option("info_sharing_config.module_args.max_num_views", 50))
    assert config.transformer.max_num_views_for_pe == 50


def test_a_scale_without_bounds_is_bounded_at_zero_as_upstreams_is() -> None:
    config = from_upstream(**with_option("pred_head_config.scale_adaptor", {"name": "scale", "mode": "linear"}))
    assert config.scene.adaptors.scale == ValueBounds("linear", 0.0, INF)


ENCODER, ARGS = "encoder_config", "info_sharing_config.module_args"
HEAD, FLOW, GEOMETRY = "pred_head_config", "scene_flow_pred_head_config", "geometric_input_config"
REFUSED: dict[str, tuple[str, Any, str]] = {
    # What upstream has and this does not: the message names the option and what is supported.
    "croco": (f"{ENCODER}.encoder_str", "croco", r"encoder_config.encoder_str: 'croco' is not supported; .*'dinov2'"),
    "radio": (f"{ENCODER}.encoder_str", "radio", r"encoder_config.encoder_str: 'radio' is not supported; .*'dinov2'"),
    "cross attention": ("info_sharing_config.model_type", "cross_attention",
                        "info_sharing_config.model_type: 'cross_attention' is not.*alternating_attention.*global"),
    "linear heads": (f"{HEAD}.type", "linear", r"pred_head_config.type: 'linear' is not .*'dpt', 'dpt\+pose'"),
    "linear flow head": (f"{FLOW}.type", "linear", "scene_flow_pred_head_config.type: 'linear'.*'dpt'"),
    "RoPE": ("info_sharing_config.custom_positional_encoding", "RoPE100", "custom_positional_encoding: 'RoPE100'"),
    "a callable": (f"{ARGS}.custom_positional_encoding", len, "module_args.custom_positional_encoding"),
    "intermediates only": (f"{ARGS}.intermediates_only", True, "intermediates_only: True is not supported"),
    "return type": ("info_sharing_config.model_return_type", "all", "model_return_type: 'all'.*intermediate_features"),
    "attention dropout": (f"{ARGS}.attn_drop", 0.1, "attn_drop: 0.1 is not supported; supported: 0"),
    "apply_pe": (f"{GEOMETRY}.depth_encoder_config.apply_pe", True, "depth_encoder_config.apply_pe: True"),
    "events": (f"{GEOMETRY}.event_imgs_prob", 0.5, "event_imgs_prob: 0.5 is not supported; supported: 0"),
    "events encoder": (f"{GEOMETRY}.event_encoder_config", {}, "unknown option 'event_encoder_config'"),
    "other tokenizer": (f"{GEOMETRY}.depth_encoder_config.encoder_str", "patch_embedder", "'patch_embedder' is not"),
    "other channels": (f"{GEOMETRY}.depth_encoder_config.in_chans", 2, "depth_encoder_config.in_chans: 2"),
    "tokenizer weights": (f"{GEOMETRY}.depth_encoder_config.pretrained_checkpoint_path", "a.pth", "'a.pth'.*None"),
    "unequal widths": (f"{GEOMETRY}.depth_encoder_config.intermediate_dims", [8, 16], "must be equal in all dense"),
    "batch norm": (f"{HEAD}.feature_head.use_bn", True, "feature_head.use_bn: True is not supported"),
    "nonlinearity": (f"{HEAD}.regressor_head.nonlinearity", "gelu", "regressor_head.nonlinearity: 'gelu'.*'relu'"),
    "width ratio": (f"{FLOW}.feature_head.output_width_ratio", 2, "feature_head.output_width_ratio: 2"),
    "two tasks": (f"{HEAD}.feature_head.main_tasks", ["rgb", "depth"], "feature_head.main_tasks"),
    "hooks": (f"{HEAD}.feature_head.hooks", [2, 5, 8, 11], "hooks: .*a permutation of"),
    "head weights": (f"{HEAD}.feature_head.pretrained_checkpoint_path", "a.pth", "feature_head.pretrained_check"),
    "pose weights": (f"{HEAD}.pose_head.pretrained_checkpoint_path", "a.pth", "pose_head.pretrained_checkpoint_path"),
    "6D rotations": (f"{HEAD}.pose_head.rot_representation_dim", 6, "rot_representation_dim: 6.*4"),
    "two scales": (f"{HEAD}.scale_head.output_dim", 2, "scale_head.output_dim: 2 is not supported"),
    "patch size": (f"{ENCODER}.patch_size", 16, "encoder_config.patch_size: 16 is not supported; supported: 14"),
    "encoder size": (f"{ENCODER}.size", "huge", "encoder_config.size: 'huge'.*'base', 'giant', 'large', 'small'"),
    "representation": (f"{HEAD}.adaptor_type", "voxels", "adaptor_type: 'voxels' is not supported.*campointmap"),
    "depth mode": (f"{HEAD}.dpt_adaptor.depth_mode", "log", "depth mode: 'log' is not supported; .*'exp'"),
    "ray mode": (f"{HEAD}.dpt_adaptor.ray_directions_mode", "exp", "ray_directions mode: 'exp' is not"),
    "confidence type": (f"{HEAD}.dpt_adaptor.confidence_type", "log", "confidence_type: 'log'.*'softmax'"),
    # Contradictions and values out of range.
    "dpt without poses": (f"{HEAD}.type", "dpt", "'raydirs.depth.pose' needs the head 'dpt.pose', got 'dpt'"),
    "channels": (f"{HEAD}.regressor_head.output_dim", 7, "output_dim: 7 does not fit adaptor_type, .* are 6"),
    "flow channels": (f"{FLOW}.regressor_head.output_dim", 4, "scene_flow_pred.*regressor_head.output_dim: 4"),
    "no blocks": (f"{ENCODER}.keep_first_n_layers", 0, "keep_first_n_layers: expected at least 1"),
    "one tap": (f"{ARGS}.indices", [1], r"indices: expected 2 or 3 block indices, got \(1,\)"),
    "equal taps": (f"{ARGS}.indices", [1, 1], "indices: expected different blocks"),
    "tap out of range": (f"{ARGS}.indices", [1, 4], r"indices: \(1, 4\) must lie in 0..3"),
    "heads": (f"{ARGS}.num_heads", 5, "dim 192 is not divisible by num_heads 5"),
    "drop path": (f"{ARGS}.drop_path", 1.0, r"drop_path: expected a probability in \[0, 1\), got 1.0"),
    "probability": (f"{GEOMETRY}.depth_prob", 1.5, r"depth_prob: expected a probability in \[0, 1\], got 1.5"),
    "confidence bounds": (f"{HEAD}.dpt_adaptor.confidence_vmax", 0.5, "confidence_vmin 1 must be less than.* 0.5"),
    # Typing errors must not pass unseen.
    "unknown encoder option": (f"{ENCODER}.sizes", "small", "encoder_config: unknown option 'sizes'; known.*'size'"),
    "unknown transformer option": (f"{ARGS}.layers", 4, "module_args: unknown option 'layers'; known options.*'depth'"),
    "unknown sharing option": ("info_sharing_config.depth", 4, "info_sharing_config: unknown option 'depth'"),
    "unknown head option": (f"{HEAD}.feature_head.dim", 4, "feature_head: unknown option 'dim'.*'feature_dim'"),
    "unknown regressor option": (f"{HEAD}.regressor_head.dim", 4, "regressor_head: unknown option 'dim'"),
    "unknown heads option": (f"{HEAD}.adaptors", {}, "pred_head_config: unknown option 'adaptors'.*'dpt_adaptor'"),
    "unknown adaptor option": (f"{HEAD}.dpt_adaptor.depth_min", 1, "unknown option 'depth_min'.*depth_vmin"),
    "unknown pose option": (f"{HEAD}.pose_head.blocks", 1, "pose_head: unknown option 'blocks'"),
    "unknown pose adaptor": (f"{HEAD}.pose_adaptor.trans_mode", "exp", "pose_adaptor: unknown option 'trans_mode'"),
    "unknown scale option": (f"{HEAD}.scale_head.layers", 1, "scale_head: unknown option 'layers'"),
    "unknown scale adaptor": (f"{HEAD}.scale_adaptor.min", 1, "scale_adaptor: unknown option 'min'"),
    "unknown flow option": (f"{FLOW}.dpt_adaptor.scale", 1, "scene_flow_pred_head_config.dpt_adaptor: unknown option"),
    "unknown probability": (f"{GEOMETRY}.pose_prob", 1, "geometric_input_config: unknown option 'pose_prob'.*cam_prob"),
    "unknown tokenizer option": (f"{GEOMETRY}.depth_encoder_config.dims", [1], "unknown option 'dims'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_by_name(name: str) -> None:
    path, value, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        Any4D(**with_option(path, value))


MISSING = ["info_sharing_config.model_type", "info_sharing_config.model_return_type", "info_sharing_config.module_args",
           "pred_head_config.type", "pred_head_config.adaptor_type", "pred_head_config.feature_head",
           "pred_head_config.regressor_head.output_dim", "scene_flow_pred_head_config.feature_head"]  # fmt: skip


@pytest.mark.parametrize("path", MISSING)
def test_what_is_missing_is_named(path: str) -> None:
    config = arguments()
    *parents, last = path.split(".")
    inner = config
    for key in parents:
        inner = inner[key]
    del inner[last]
    with pytest.raises(ConfigError, match=rf"{re.escape('.'.join(parents))}: missing option '{last}'"):
        from_upstream(**config)


TYPED: dict[str, tuple[Callable[[], Any], str]] = {
    "sigmoid": (lambda: AdaptorConfig(confidence_type="sigmoid"), "a sigmoid confidence needs finite"),
    "mode": (lambda: AdaptorConfig(quaternions=ValueBounds("exp")), "quaternions mode: 'exp' is not supported"),
    "kind": (lambda: TransformerConfig(kind="cross_attention"), "'cross_attention' is not supported"),
    "channels": (lambda: SceneConfig(geometry_head=DenseHeadConfig(output_dim=4)), "whose channels are 6"),
    "probability": (lambda: ModalityConfig(cam_prob=-0.1), "cam_prob: expected a probability"),
}


@pytest.mark.parametrize("name", TYPED)
def test_typed_configurations_check_themselves(name: str) -> None:
    build, message = TYPED[name]
    with pytest.raises(ConfigError, match=message):
        build()


def test_a_fusion_norm_that_is_no_layer_norm_is_refused() -> None:
    with pytest.raises(TypeError, match="fusion_norm_layer: expected a function that makes an nn.LayerNorm"):
        Any4D(**to_upstream(small_config()), fusion_norm_layer=torch.nn.BatchNorm1d)
    norm = Any4D(**to_upstream(small_config()), fusion_norm_layer=lambda dim: torch.nn.LayerNorm(dim, eps=1e-3))
    assert norm.fusion_norm_layer.eps == 1e-3


def test_more_layers_than_the_encoder_has_are_all_of_them() -> None:
    assert EncoderConfig(size="small", keep_first_n_layers=99).depth == EncoderConfig(size="small").depth == 12
