"""Translation between upstream's nested configuration dictionaries and the typed ones.

Upstream's constructor takes five dictionaries (github.com/Any-4D/Any4D, configs/model); every option that changes
the model is read here, and an option that is not known is an error rather than silently dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .config import (
    AdaptorConfig,
    Any4DConfig,
    ConfigError,
    DenseHeadConfig,
    EncoderConfig,
    ModalityConfig,
    SceneConfig,
    TokenizerConfig,
    TransformerConfig,
    ValueBounds,
    unsupported,
)

Config = Mapping[str, Any]

DENSE_TOKENIZERS = {
    "ray_dirs_encoder_config": 3,
    "depth_encoder_config": 1,
    "scene_flow_encoder_config": 3,
}
GLOBAL_TOKENIZERS = {"cam_rot_encoder_config": 4, "cam_trans_encoder_config": 3, "scale_encoder_config": 1}


def _build(cls: type[Any], values: Config, where: str, ignored: tuple[str, ...] = (), /, **fixed: Any) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known - set(ignored))
    if unknown:
        raise ConfigError(f"{where}: unknown option {unknown[0]!r}; known options: {sorted(known | set(ignored))}")
    chosen = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
    return cls(**{**chosen, **fixed})


def _check_known(values: Config, known: set[str], where: str) -> None:
    """Refuse options that nobody reads, and weights that a part should load by itself."""
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{where}: unknown option {key!r}; known options: {sorted(known)}")
        if key == "pretrained_checkpoint_path" and value is not None:
            raise unsupported(f"{where}.{key}", value, "None; load weights with Any4D.from_pretrained")


def _require(values: Config, key: str, where: str) -> Any:
    if key not in values:
        raise ConfigError(f"{where}: missing option {key!r}")
    return values[key]


def _encoder(config: Config) -> EncoderConfig:
    kind = config.get("encoder_str", "dinov2")
    if kind != "dinov2":
        raise unsupported("encoder_config.encoder_str", kind, ["dinov2"])
    ignored = ("encoder_str", "name", "uses_torch_hub", "torch_hub_force_reload", "torch_hub_pretrained",
               "use_pytorch_sdpa", "disable_torch_compile_for_pe")  # fmt: skip
    result: EncoderConfig = _build(EncoderConfig, config, "encoder_config", ignored)
    return result


def _transformer(config: Config) -> TransformerConfig:
    where = "info_sharing_config"
    kind = _require(config, "model_type", where)
    if kind not in ("alternating_attention", "global_attention"):
        raise unsupported(f"{where}.model_type", kind, ["alternating_attention", "global_attention"])
    positional = config.get("custom_positional_encoding")
    if positional is not None:
        raise unsupported(f"{where}.custom_positional_encoding", positional, [None])
    _check_known(config, {"model_type", "model_return_type", "custom_positional_encoding", "module_args"}, where)
    returns = _require(config, "model_return_type", where)
    if returns not in ("intermediate_features", "no_intermediate_features"):
        raise unsupported(f"{where}.model_return_type", returns, ["intermediate_features", "no_intermediate_features"])
    args = dict(_require(config, "module_args", where))
    if args.get("custom_positional_encoding") is not None:
        raise unsupported(f"{where}.module_args.custom_positional_encoding", "a callable", [None])
    if args.pop("intermediates_only", False):
        raise unsupported(f"{where}.module_args.intermediates_only", True, [False])
    indices = args.pop("indices", None)
    depth = args.get("depth", 12)
    if returns == "no_intermediate_features":
        indices = None
    elif indices is None or isinstance(indices, int):
        count = depth if indices is None else indices
        indices = range(depth - count, depth)
    if indices is not None:
        indices = tuple(depth + i if i < 0 else i for i in indices)
    args.setdefault("depth", 12)
    if "max_num_views" in args:  # upstream's configuration files still have this older name
        args.setdefault("max_num_views_for_pe", args.pop("max_num_views"))
    if kind == "global_attention":  # upstream's default differs between the two transformers
        args.setdefault("use_pe_for_non_reference_views", True)
    ignored = ("name", "size", "input_embed_dim", "custom_positional_encoding")
    result: TransformerConfig = _build(
        TransformerConfig, args, f"{where}.module_args", ignored, kind=kind, indices=indices
    )
    return result


def _bounds(values: Config, name: str, default: ValueBounds, bare: bool = False) -> ValueBounds:
    """Bounds of one factor; upstream writes `NAME_mode` in compound adaptors and `mode` in single ones."""
    found = {}
    for part in ("mode", "vmin", "vmax"):
        for key in (f"{name}_{part}", part) if bare else (f"{name}_{part}",):
            if values.get(key) is not None:
                found[part] = values[key]
                break
    return dataclasses.replace(default, **found)


def _bound_names(*names: str) -> set[str]:
    return {f"{name}_{part}".lstrip("_") for name in names for part in ("mode", "vmin", "vmax")} | {"name"}


def _adaptors(dense: Config, flow: Config, pose: Config, scale: Config) -> AdaptorConfig:
    base = AdaptorConfig()
    rays = ("normalize_to_unit_sphere", "normalize_to_unit_image_plane", "clamp_min_of_z_dir", "z_dir_min")
    known = _bound_names("", "pointmap", "ray_origins", "ray_directions", "depth")
    known |= {f"ray_directions_{r}" for r in rays} | {"confidence_type", "confidence_vmin", "confidence_vmax"}
    _check_known(dense, known, "pred_head_config.dpt_adaptor")
    _check_known(flow, _bound_names("", "scene_flow"), "scene_flow_pred_head_config.dpt_adaptor")
    pose_known = _bound_names("cam_trans", "quaternions") | {"quaternions_normalize"}
    _check_known(pose, pose_known, "pred_head_config.pose_adaptor")
    _check_known(scale, _bound_names("", "scale"), "pred_head_config.scale_adaptor")
    direct = {
        "rays_on_unit_sphere": dense.get("ray_directions_normalize_to_unit_sphere"),
        "rays_on_image_plane": dense.get("ray_directions_normalize_to_unit_image_plane"),
        "clamp_min_of_z_dir": dense.get("ray_directions_clamp_min_of_z_dir"),
        "z_dir_min": dense.get("ray_directions_z_dir_min"),
        "confidence_type": dense.get("confidence_type"),
        "confidence_vmin": dense.get("confidence_vmin"),
        "confidence_vmax": dense.get("confidence_vmax"),
        "quaternions_normalize": pose.get("quaternions_normalize"),
    }
    return AdaptorConfig(
        points=_bounds(dense, "pointmap", base.points, bare=True),
        ray_origins=_bounds(dense, "ray_origins", base.ray_origins),
        ray_directions=_bounds(dense, "ray_directions", base.ray_directions),
        depth=_bounds(dense, "depth", base.depth),
        scene_flow=_bounds(flow, "scene_flow", base.scene_flow, bare=True),
        cam_trans=_bounds(pose, "cam_trans", base.cam_trans),
        quaternions=_bounds(pose, "quaternions", base.quaternions),
        # Upstream's own default bound is 0; its configuration files give 1e-8.
        scale=_bounds(scale, "scale", dataclasses.replace(base.scale, vmin=0.0) if scale else base.scale, bare=True),
        **{k: v for k, v in direct.items() if v is not None},
    )


def _dense_head(config: Config, where: str) -> DenseHeadConfig:
    feature = dict(_require(config, "feature_head", where))
    regressor = dict(_require(config, "regressor_head", where))
    fixed = {"nonlinearity": "relu", "use_bn": False, "output_width_ratio": 1, "pretrained_checkpoint_path": None}
    for part, options in (("feature_head", feature), ("regressor_head", regressor)):
        for key, only in fixed.items():
            if options.get(key, only) != only:
                raise unsupported(f"{where}.{part}.{key}", options[key], [only])
    known = {"output_dim", "hidden_dims", "checkpoint_gradient", "input_feature_dim", *fixed}
    _check_known(regressor, known, f"{where}.regressor_head")
    if len(feature.get("main_tasks", ("rgb",))) != 1:
        raise unsupported(f"{where}.feature_head.main_tasks", feature["main_tasks"], "one task")
    hidden = regressor.get("hidden_dims")
    ignored = ("patch_size", "input_feature_dims", "main_tasks", *fixed)
    result: DenseHeadConfig = _build(
        DenseHeadConfig,
        feature,
        f"{where}.feature_head",
        ignored,
        output_dim=_require(regressor, "output_dim", f"{where}.regressor_head"),
        hidden_dims=tuple(hidden) if hidden else None,
        checkpoint_gradient=bool(feature.get("checkpoint_gradient") or regressor.get("checkpoint_gradient")),
    )
    if sorted(result.hooks) != [0, 1, 2, 3]:
        raise unsupported(f"{where}.feature_head.hooks", list(result.hooks), "a permutation of [0, 1, 2, 3]")
    return result


def _scene(heads: Config, flow: Config) -> SceneConfig:
    kind = _require(heads, "type", "pred_head_config")
    if kind not in ("dpt", "dpt+pose"):
        raise unsupported("pred_head_config.type", kind, ["dpt", "dpt+pose"])
    adaptor_type = _require(heads, "adaptor_type", "pred_head_config")
    representation, confidence, mask = adaptor_type, False, False
    if representation.endswith("+mask"):
        representation, mask = representation.removesuffix("+mask"), True
    if representation.endswith("+confidence"):
        representation, confidence = representation.removesuffix("+confidence"), True
    if flow.get("type", "dpt") != "dpt":
        raise unsupported("scene_flow_pred_head_config.type", flow["type"], ["dpt"])
    parts = {f"{part}_head" for part in ("feature", "regressor", "pose", "scale")}
    known = parts | {"type", "adaptor_type", "adaptor", "dpt_adaptor", "pose_adaptor", "scale_adaptor"}
    for where, options in (("pred_head_config", heads), ("scene_flow_pred_head_config", flow)):
        _check_known(options, known | {"adaptor_config", "gradient_checkpointing"}, where)
    dense = {**heads.get("adaptor", {}), **heads.get("dpt_adaptor", {})}
    pose, scale = heads.get("pose_head", {}), heads.get("scale_head", {})
    common = {"input_feature_dim", "patch_size", "pretrained_checkpoint_path"}
    _check_known(pose, {"num_resconv_block", "rot_representation_dim", *common}, "pred_head_config.pose_head")
    _check_known(scale, {"output_dim", "num_mlp_layers", "hidden_dim", *common}, "pred_head_config.scale_head")
    if scale.get("output_dim", 1) != 1:
        raise unsupported("pred_head_config.scale_head.output_dim", scale["output_dim"], 1)
    return SceneConfig(
        representation=representation,
        confidence=confidence,
        mask=mask,
        pose_head=kind == "dpt+pose",
        factored_points=heads.get("adaptor_config", {}).get("use_factored_predictions_for_global_pointmaps", True),
        geometry_head=_dense_head(heads, "pred_head_config"),
        flow_head=_dense_head(flow, "scene_flow_pred_head_config"),
        num_resconv_block=pose.get("num_resconv_block", 2),
        rot_representation_dim=pose.get("rot_representation_dim", 4),
        scale_mlp_layers=scale.get("num_mlp_layers", 2),
        scale_hidden_dim=scale.get("hidden_dim", 196),
        adaptors=_adaptors(
            dense, flow.get("dpt_adaptor", {}), heads.get("pose_adaptor", {}), heads.get("scale_adaptor", {})
        ),
    )


def _tokenizer(config: Config, key: str, channels: int, kind: str, extra: set[str]) -> Config:
    """One tokenizer's options, checked; empty when the configuration has none."""
    where, options = f"geometric_input_config.{key}", config.get(key, {})
    common = {"name", "in_chans", "encoder_str", "intermediate_dims", "enc_embed_dim", "pretrained_checkpoint_path"}
    _check_known(options, common | extra, where)
    if options.get("encoder_str", kind) != kind:
        raise unsupported(f"{where}.encoder_str", options["encoder_str"], [kind])
    if options.get("in_chans", channels) != channels:
        raise unsupported(f"{where}.in_chans", options["in_chans"], channels)
    return options


def _tokenizers(config: Config) -> TokenizerConfig:
    base = TokenizerConfig()
    encoders = {key for key in config if key.endswith("_config")}
    unknown = sorted(encoders - set(DENSE_TOKENIZERS) - set(GLOBAL_TOKENIZERS))
    if unknown:
        raise ConfigError(f"geometric_input_config: unknown option {unknown[0]!r}; no such modality is supported")
    dense: set[tuple[int, ...]] = set()
    positions = {"apply_pe", "patch_size", "data_norm_type", "input_size_for_pe", "interpolate_antialias",
                 "interpolate_offset"}  # fmt: skip
    for key, channels in DENSE_TOKENIZERS.items():
        options = _tokenizer(config, key, channels, "dense_rep_encoder", positions)
        if options and options.get("apply_pe", True):  # on unless switched off, as upstream has it
            raise unsupported(f"geometric_input_config.{key}.apply_pe", True, [False])
        dense.add(tuple(options.get("intermediate_dims", base.dense_dims)))
    vectors: set[tuple[int, ...]] = set()
    for key, channels in GLOBAL_TOKENIZERS.items():
        options = _tokenizer(config, key, channels, "global_rep_encoder", set())
        vectors.add(tuple(options.get("intermediate_dims", base.global_dims)))
    if len(dense) > 1 or len(vectors) > 1:
        raise ConfigError(
            "geometric_input_config: intermediate_dims must be equal in all dense and in all global tokenizers, "
            f"got {sorted(dense)} and {sorted(vectors)}"
        )
    return TokenizerConfig(dense.pop(), vectors.pop())


def from_upstream(
    name: str,
    encoder_config: Config,
    info_sharing_config: Config,
    pred_head_config: Config,
    scene_flow_pred_head_config: Config,
    geometric_input_config: Config,
) -> Any4DConfig:
    """The typed configuration of upstream's constructor arguments; the dictionaries are not changed.

    Raises:
        ConfigError: for an option that is unknown, missing, contradictory or not supported.
    """
    modalities = {k: v for k, v in geometric_input_config.items() if not k.endswith("_config")}
    events = modalities.pop("event_imgs_prob", 0)
    if events:
        raise unsupported("geometric_input_config.event_imgs_prob", events, 0)
    return Any4DConfig(
        name=name,
        encoder=_encoder(encoder_config),
        transformer=_transformer(info_sharing_config),
        scene=_scene(pred_head_config, scene_flow_pred_head_config),
        tokenizers=_tokenizers(geometric_input_config),
        modalities=_build(ModalityConfig, modalities, "geometric_input_config"),
    )


def to_upstream(config: Any4DConfig) -> dict[str, Any]:
    """Upstream's constructor arguments for a typed configuration; `from_upstream(**it)` gives the same one back."""
    scene, adaptors = config.scene, config.scene.adaptors
    transformer = dataclasses.asdict(config.transformer)
    kind, indices = transformer.pop("kind"), transformer.pop("indices")
    dense_dims, global_dims = list(config.tokenizers.dense_dims), list(config.tokenizers.global_dims)
    adaptor_type = scene.representation + "+confidence" * scene.confidence + "+mask" * scene.mask
    tokenizers: dict[str, Any] = {
        key: {"in_chans": n, "encoder_str": "dense_rep_encoder", "apply_pe": False, "intermediate_dims": dense_dims}
        for key, n in DENSE_TOKENIZERS.items()
    } | {
        key: {"in_chans": n, "encoder_str": "global_rep_encoder", "intermediate_dims": global_dims}
        for key, n in GLOBAL_TOKENIZERS.items()
    }
    return {
        "name": config.name,
        "encoder_config": {"encoder_str": "dinov2", **dataclasses.asdict(config.encoder)},
        "info_sharing_config": {
            "model_type": kind,
            "model_return_type": "no_intermediate_features" if indices is None else "intermediate_features",
            "custom_positional_encoding": None,
            "module_args": {**transformer, **({} if indices is None else {"indices": list(indices)})},
        },
        "pred_head_config": {
            "type": "dpt+pose" if scene.pose_head else "dpt",
            **_head_dictionaries(scene.geometry_head),
            "pose_head": {
                "num_resconv_block": scene.num_resconv_block,
                "rot_representation_dim": scene.rot_representation_dim,
            },
            "scale_head": {
                "output_dim": 1,
                "num_mlp_layers": scene.scale_mlp_layers,
                "hidden_dim": scene.scale_hidden_dim,
            },
            "adaptor_type": adaptor_type,
            "dpt_adaptor": _dense_adaptor_dictionary(adaptors),
            "pose_adaptor": {
                **_prefixed("cam_trans", adaptors.cam_trans),
                **_prefixed("quaternions", adaptors.quaternions),
                "quaternions_normalize": adaptors.quaternions_normalize,
            },
            "scale_adaptor": dataclasses.asdict(adaptors.scale),
            "adaptor_config": {"use_factored_predictions_for_global_pointmaps": scene.factored_points},
        },
        "scene_flow_pred_head_config": {
            "type": "dpt",
            **_head_dictionaries(scene.flow_head),
            "adaptor_type": "scene_flow",
            "dpt_adaptor": dataclasses.asdict(adaptors.scene_flow),
        },
        "geometric_input_config": {**tokenizers, **dataclasses.asdict(config.modalities)},
    }


def _prefixed(name: str, bounds: ValueBounds) -> dict[str, Any]:
    return {f"{name}_{k}": v for k, v in dataclasses.asdict(bounds).items()}


def _dense_adaptor_dictionary(adaptors: AdaptorConfig) -> dict[str, Any]:
    return {
        **_prefixed("pointmap", adaptors.points),
        **_prefixed("ray_origins", adaptors.ray_origins),
        **_prefixed("ray_directions", adaptors.ray_directions),
        **_prefixed("depth", adaptors.depth),
        "ray_directions_normalize_to_unit_sphere": adaptors.rays_on_unit_sphere,
        "ray_directions_normalize_to_unit_image_plane": adaptors.rays_on_image_plane,
        "ray_directions_clamp_min_of_z_dir": adaptors.clamp_min_of_z_dir,
        "ray_directions_z_dir_min": adaptors.z_dir_min,
        "confidence_type": adaptors.confidence_type,
        "confidence_vmin": adaptors.confidence_vmin,
        "confidence_vmax": adaptors.confidence_vmax,
    }


def _head_dictionaries(head: DenseHeadConfig) -> dict[str, Any]:
    return {
        "feature_head": {
            "feature_dim": head.feature_dim,
            "hooks": list(head.hooks),
            "layer_dims": list(head.layer_dims),
            "checkpoint_gradient": head.checkpoint_gradient,
        },
        "regressor_head": {
            "output_dim": head.output_dim,
            "hidden_dims": list(head.hidden_dims) if head.hidden_dims else None,
        },
    }
