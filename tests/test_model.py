"""The model against the original's recorded outputs and stages, and what must not change its results."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from any4d_fast import Any4D
from any4d_fast.config import DenseHeadConfig, EncoderConfig, TransformerConfig
from any4d_fast.testing import relative_error
from tests.golden_cases import ALL_INPUTS, CASES, golden_views, golden_weights, load_case, load_outputs
from tests.small_models import REPRESENTATIONS, small_config, small_model, small_scene

BUDGET = 1e-5  # of a float32 output on the CPU against the original's (DESIGN section 4)


def views(num_views: int = 3, batch: int = 2, height: int = 28, width: int = 42, seed: int = 0) -> list[dict[str, Any]]:
    return golden_views(num_views, batch, height, width, seed, [ALL_INPUTS] * num_views)


def in_double(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def widened(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return [{key: widened(value) for key, value in view.items()} for view in given]


def with_matching(outputs: list[dict[str, Tensor]], expected: list[dict[str, Tensor]], budget: float) -> None:
    assert len(outputs) == len(expected)
    for found, other in zip(outputs, expected, strict=True):
        assert set(found) == set(other)
        for key, value in other.items():
            if value.dtype == torch.bool:
                assert torch.equal(found[key], value), key
            else:
                assert relative_error(found[key], value) <= budget, key


# The original's outputs.


@functools.lru_cache(maxsize=1)  # each takes 600 MB
def golden_model(name: str) -> Any4D:
    model = Any4D(**load_case(name)["config"])
    golden_weights(model)
    return model.eval()


@pytest.fixture(scope="module", autouse=True)
def _forget_golden_models() -> Iterator[None]:
    yield
    golden_model.cache_clear()


@pytest.mark.parametrize("name", CASES)
def test_every_output_is_the_originals(name: str) -> None:
    case, recorded = load_case(name), load_outputs(name)
    with torch.no_grad():
        outputs = golden_model(name)(golden_views(**case["views"]))
    expected: list[dict[str, Tensor]] = [{} for _ in range(case["views"]["num_views"])]
    for key, value in recorded.items():
        if key.startswith("view"):
            view, name_of_output = key.removeprefix("view").split(".", 1)
            expected[int(view)][name_of_output] = value
    with_matching(outputs, expected, BUDGET)


TOKENIZERS = ("ray_dirs_encoder", "depth_encoder", "depth_scale_encoder", "cam_rot_encoder", "cam_trans_encoder",
              "cam_trans_scale_encoder", "scene_flow_encoder")  # fmt: skip


def stages(model: Any4D, given: list[dict[str, Any]], grid: tuple[int, int]) -> dict[str, Tensor]:
    """What each stage returns in one forward pass, in the original's layout: channels first, row v*B + b."""
    caught: dict[str, Any] = {}

    def keep(stage: str) -> Callable[..., None]:
        return lambda module, args, output: caught.update({stage: output})

    modules = {"encoder": "encoder", "info": "info_sharing", "dense_head": "dpt_regressor_head",
               "scene_flow_dense_head": "scene_flow_dpt_regressor_head", "pose_head": "pose_head",
               "scale_head": "scale_head"} | {name: name for name in TOKENIZERS}  # fmt: skip
    hooks = [getattr(model, module).register_forward_hook(keep(stage)) for stage, module in modules.items()]
    hooks.append(model.info_sharing.register_forward_pre_hook(lambda module, args: caught.update(fused=args[0])))
    with torch.no_grad():
        model(given)
    for hook in hooks:
        hook.remove()
    count = len(given)

    def maps(tokens: Tensor) -> Tensor:  # [B, V*T + 1, C] -> [V*B, h, w, C]
        return tokens[:, :-1].unflatten(1, (count, *grid)).transpose(0, 1).flatten(0, 1)

    taps, final = caught.pop("info")
    found = {"fused_nhwc": maps(caught.pop("fused"))}
    found |= {"info_final": maps(final).permute(0, 3, 1, 2), "info_scale_token": final[:, -1:].transpose(1, 2)}
    found |= {f"info_inter{i}": maps(tap).permute(0, 3, 1, 2) for i, tap in enumerate(taps)}
    for name, value in caught.items():
        if name in ("dense_head", "scene_flow_dense_head"):
            value = value.permute(0, 3, 1, 2)
        elif name == "scale_head":
            value = value[..., None]
        elif value.ndim == 3:  # tokens
            value = value.transpose(1, 2).unflatten(2, grid)
        found[name] = value
    return found


def nothing_given(rows: int, height: int, width: int) -> dict[str, Tensor]:
    """What the original's tokenizers see where an input is absent; their result is then multiplied by zero."""
    logarithm = torch.tensor(1e-8).log()
    return {
        "ray_dirs_encoder": torch.zeros(rows, height, width, 3),
        "depth_encoder": torch.zeros(rows, height, width, 1),
        "depth_scale_encoder": logarithm.expand(rows, 1),
        "cam_rot_encoder": torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(rows, 4),
        "cam_trans_encoder": torch.zeros(rows, 3),
        "cam_trans_scale_encoder": torch.tensor(2e-8).log().expand(rows, 1),
        "scene_flow_encoder": torch.zeros(rows, height, width, 3),
    }


@pytest.mark.parametrize("name", ["images_only", "all_inputs"])
def test_every_stage_is_the_originals(name: str) -> None:
    case, model = load_case(name), golden_model(name)
    spec = case["views"]
    grid = (spec["height"] // 14, spec["width"] // 14)
    found = stages(model, golden_views(**spec), grid)
    if name == "images_only":
        assert not set(found) & set(TOKENIZERS)  # a modality that nobody gave is never computed
        with torch.no_grad():
            for key, value in nothing_given(spec["num_views"] * spec["batch"], spec["height"], spec["width"]).items():
                tokens = getattr(model, key)(value)
                found[key] = tokens if tokens.ndim == 2 else tokens.transpose(1, 2).unflatten(2, grid)
    recorded = {k.removeprefix("stage."): v for k, v in load_outputs(name).items() if k.startswith("stage.")}
    assert set(found) == set(recorded)
    for key, value in recorded.items():
        assert relative_error(found[key], value) <= BUDGET, key


# Every scene representation.

OUTPUTS: dict[str, set[str]] = {
    "pointmap": {"pts3d"},
    "raymap+depth": {"pts3d", "ray_origins", "ray_directions", "depth_along_ray"},
    **dict.fromkeys(
        ("raydirs+depth+pose", "campointmap+pose", "pointmap+raydirs+depth+pose"),
        {"pts3d", "pts3d_cam", "ray_directions", "depth_along_ray", "cam_trans", "cam_quats"},
    ),
}
"""Upstream's keys by representation, without `scene_flow` and `metric_scaling_factor`, which all have."""

CHANNELS = {"depth_along_ray": (1,), "conf": (), "non_ambiguous_mask": (), "non_ambiguous_mask_logits": ()}


HEADS = [(r, head) for r in REPRESENTATIONS for head in (True, False) if head or not r.endswith("+pose")]
"""Representation and whether there is a pose head; those with poses need one."""


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("confidence", [False, True])
@pytest.mark.parametrize(("representation", "pose_head"), HEADS)
def test_every_representation_gives_upstreams_keys(
    representation: str, confidence: bool, mask: bool, pose_head: bool
) -> None:
    model = small_model(small_config(small_scene(representation, confidence, mask, pose_head=pose_head)))
    assert hasattr(model, "pose_head") == pose_head
    with torch.no_grad():
        outputs = model(views(2))
    keys = OUTPUTS[representation] | {"scene_flow", "metric_scaling_factor"}
    keys |= {"conf"} if confidence else set()
    keys |= {"non_ambiguous_mask", "non_ambiguous_mask_logits"} if mask else set()
    assert len(outputs) == 2
    for view in outputs:
        assert set(view) == keys
        for key, value in view.items():
            per_view = {"cam_trans": (2, 3), "cam_quats": (2, 4), "metric_scaling_factor": (2, 1)}
            assert value.shape == per_view.get(key, (2, 28, 42, *CHANNELS.get(key, (3,)))), key
            assert value.dtype == (torch.bool if key == "non_ambiguous_mask" else torch.float32), key
            assert bool(value.isfinite().all()), key


@pytest.mark.parametrize("kind", ["alternating_attention", "global_attention"])
def test_without_intermediate_features_the_dense_heads_get_the_last_ones(kind: str) -> None:
    # Upstream's constructor accepts this combination; its heads then ask for features that nobody returned.
    model = small_model(small_config(kind=kind, indices=None))
    seen: list[list[Tensor]] = []
    model.dpt_feature_head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        assert all(bool(v["pts3d"].isfinite().all()) for v in model(views(2)))
    encoder_map, *transformer_maps = seen[0]
    assert encoder_map.shape[1] == model.encoder.enc_embed_dim
    assert all(torch.equal(m, transformer_maps[0]) for m in transformer_maps)


def test_with_three_taps_the_dense_heads_get_no_encoder_map() -> None:
    model = small_model(small_config(indices=(0, 1, 2)))
    seen: list[list[Tensor]] = []
    model.dpt_feature_head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(views(2))
    assert [m.shape[1] for m in seen[0]] == [48] * 4


# What must not change the results.


@pytest.mark.parametrize("minibatch", [1, 2, 3, 5, 9])
def test_minibatches_of_views_do_not_change_the_results(minibatch: int) -> None:
    model, given = small_model().double(), in_double(views(5))
    with torch.no_grad():
        # Convolutions over another number of images may add in another order: rounding of float64, nothing more.
        with_matching(model(given, minibatch_size=minibatch), model(given), 1e-13)


def test_samples_of_a_batch_do_not_see_each_other() -> None:
    model, both = small_model(), views(3, batch=2)
    with torch.no_grad():
        together = model(both)
        for b in range(2):
            one = [{k: v[b : b + 1] if isinstance(v, Tensor) else v for k, v in view.items()} for view in both]
            picked = [{k: v[b : b + 1] for k, v in view.items()} for view in together]
            with_matching(model(one), picked, BUDGET)


def test_the_order_of_the_other_views_does_not_matter() -> None:
    model, given = small_model(), views(4, batch=1)
    order = [0, 3, 1, 2]
    with torch.no_grad():
        outputs, permuted = model(given), model([given[i] for i in order])
    with_matching(permuted, [outputs[i] for i in order], BUDGET)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("num_views", [1, 2])
def test_few_views_and_one_patch(num_views: int, batch: int) -> None:
    with torch.no_grad():
        outputs = small_model()(views(num_views, batch, height=14, width=14))
    assert len(outputs) == num_views
    assert all(bool(v.isfinite().all()) for view in outputs for v in view.values())


def test_views_and_their_tensors_are_not_changed() -> None:
    given = views()
    before = copy.deepcopy(given)
    with torch.no_grad():
        small_model()(given)
    for view, kept in zip(given, before, strict=True):
        assert list(view) == list(kept)
        assert all(torch.equal(v, kept[k]) for k, v in view.items() if isinstance(v, Tensor))


def loss(outputs: list[dict[str, Tensor]]) -> Tensor:
    """Every floating-point output, with a cotangent of its own."""
    generator = torch.Generator().manual_seed(1)
    parts = []
    for view in outputs:
        for _, value in sorted(view.items()):
            if value.is_floating_point():
                parts.append((value * torch.randn(value.shape, generator=generator)).sum())
    return torch.stack(parts).sum()


def test_gradient_flows_to_every_parameter_when_everything_is_given() -> None:
    model = small_model().train()
    loss(model(views())).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert without == []


def test_all_views_share_one_step_of_the_backward_pass() -> None:
    """A slice for each view would make gradients of all views' size, as many as there are views."""
    outputs = small_model().train()(views())
    for key, value in outputs[0].items():
        if value.requires_grad:
            assert len({view[key].grad_fn for view in outputs}) == 1, key


def test_a_modality_that_nobody_gave_gets_no_gradient() -> None:
    model = small_model().train()
    given = [{"img": v["img"], "data_norm_type": v["data_norm_type"]} for v in views()]
    loss(model(given)).backward()
    without = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is None}
    assert without == set(TOKENIZERS)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    plain = small_config()
    head = {"checkpoint_gradient": True, "feature_dim": 8, "layer_dims": (8, 8, 8, 8)}
    checkpointed = type(plain)(
        name="small",
        encoder=EncoderConfig(size="small", keep_first_n_layers=1, gradient_checkpointing=True),
        transformer=TransformerConfig(**{**vars(plain.transformer), "gradient_checkpointing": True}),
        tokenizers=plain.tokenizers,
        scene=type(plain.scene)(
            **{**vars(plain.scene), "geometry_head": DenseHeadConfig(output_dim=6, **head),
               "flow_head": DenseHeadConfig(output_dim=3, **head)}
        ),
    )  # fmt: skip
    found = []
    for config in (plain, checkpointed):
        model = small_model(config).train()
        loss(model(views())).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=0, msg=name)


def test_bf16_autocast_runs_on_the_cpu_and_heads_stay_in_float32() -> None:
    model, given = small_model(), views()
    with torch.no_grad():
        expected = model(given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(given)
    for found, other in zip(outputs, expected, strict=True):
        assert set(found) == set(other)
        for key, value in other.items():
            assert found[key].dtype == value.dtype, key
            if value.is_floating_point():
                # bfloat16 has 8 bits: one rounding is 0.4 %, and some ten follow each other here.
                assert relative_error(found[key], value) <= 5e-2, key


def test_double_precision_agrees_with_float32() -> None:
    model, given = small_model(), views()
    with torch.no_grad():
        expected = model(given)
        outputs = model.double()(in_double(given))
    for found, other in zip(outputs, expected, strict=True):
        for key, value in other.items():
            if value.is_floating_point():
                assert found[key].dtype == torch.float64, key
                assert relative_error(value, found[key]) <= BUDGET, key


# Errors.


def wrong(change: Callable[[list[dict[str, Any]]], Any]) -> list[dict[str, Any]]:
    given = views(2)
    change(given)
    return given


ERRORS: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "no views": (lambda g: g.clear(), "views: expected at least one view, got none"),
    "channels last": (lambda g: g[1].update(img=torch.zeros(2, 28, 42, 3)),
                      r"views\[1\]\['img'\]: expected float \[B, 3, H, W\], got .*\[2, 28, 42, 3\]; model.infer"),
    "bytes": (lambda g: g[0].update(img=torch.zeros(2, 3, 28, 42, dtype=torch.uint8)), r"views\[0\].*uint8"),
    "no batch": (lambda g: g[0].update(img=torch.zeros(3, 28, 42)), r"got torch.float32 \[3, 28, 42\]"),
    "two sizes": (lambda g: g[1].update(img=torch.zeros(2, 3, 28, 28)), r"views\[1\].*one shape, got \[2, 3, 28, 28\]"),
    "two batches": (lambda g: g[1].update(img=torch.zeros(1, 3, 28, 42)), r"views\[1\].*one shape"),
    "another normalisation": (lambda g: g[1].update(data_norm_type=["croco"]),
                              r"views\[1\]\['data_norm_type'\]: the encoder expects 'dinov2', got 'croco'"),
    "another normalisation of one sample": (lambda g: g[1].update(data_norm_type=["dinov2", "croco"]),
                                            r"views\[1\].*expects 'dinov2', got \['dinov2', 'croco'\]"),
    "no normalisation": (lambda g: g[0].update(data_norm_type=[]), r"views\[0\].*expects 'dinov2', got \[\]"),
    "no image": (lambda g: g[1].pop("img"), r"views\[1\]: expected the key 'img', got \["),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_views_are_refused(name: str) -> None:
    change, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        small_model()(wrong(change))


@pytest.mark.parametrize("minibatch_size", [0, -1, 1.5])
def test_wrong_minibatches_are_refused(minibatch_size: Any) -> None:
    with pytest.raises(ValueError, match=f"minibatch_size: expected at least 1 view, or None, got {minibatch_size}"):
        small_model()(views(2), minibatch_size=minibatch_size)


def test_a_size_that_is_no_multiple_of_14_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 14, got 30 x 42; resize to 28 x 42, or use model.infer"):
        small_model()([{"img": torch.zeros(1, 3, 30, 42)}])


def test_a_view_may_leave_out_its_normalisation() -> None:
    given = views(1)
    named = [{**given[0], "data_norm_type": "dinov2"}]
    unnamed = [{k: v for k, v in given[0].items() if k != "data_norm_type"}]
    with torch.no_grad():
        with_matching(small_model()(unnamed), small_model()(named), 0)
