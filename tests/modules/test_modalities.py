"""Modality dropout: what is given, to whom, and that nothing else of it is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import roma
import torch
from torch import Tensor

from any4d_fast import Any4D
from any4d_fast.config import ModalityConfig
from any4d_fast.modules.modalities import Modalities, ModalityReader
from tests.dispatched import Counted
from tests.golden_cases import golden_views
from tests.small_models import small_config, small_model

V, B, H, W = 3, 2, 28, 42
T = (H // 14) * (W // 14)
RAYS, DEPTH, METRIC = ["ray_directions_cam"], ["depth_along_ray"], ["is_metric_scale"]
POSE = ["camera_pose_quats", "camera_pose_trans"]
FLOW = ["radial_scene_flow", "pts3d_cam", "valid_mask"]
ALL = [*RAYS, *DEPTH, *POSE, *METRIC, *FLOW]
OFF = {"ray_dirs_prob": 0.0, "depth_prob": 0.0, "cam_prob": 0.0, "doppler_prob": 0.0}


def views(provided: list[list[str]] | list[str] = ALL, seed: int = 0) -> list[dict[str, Any]]:
    """Three views of two samples; the same keys in each, or a list a view."""
    lists = [list(p) for p in provided] if provided and isinstance(provided[0], list) else [list(provided)] * V
    return golden_views(V, B, H, W, seed, lists)  # type: ignore[arg-type]


def fused_tokens(model: Any4D, given: list[dict[str, Any]], **probabilities: float) -> Tensor:
    """What enters the multi-view transformer, [B, V*T + 1, C]."""
    caught: list[Tensor] = []
    hook = model.info_sharing.register_forward_pre_hook(lambda module, args: caught.append(args[0].clone()))
    with torch.no_grad():
        model.run(given, ModalityConfig(**probabilities), None)
    hook.remove()
    return caught[0]


def read(given: list[dict[str, Any]], train: bool = True, **probabilities: float) -> Modalities:
    return ModalityReader(ModalityConfig(**probabilities), given, train).read()


@pytest.fixture(scope="module")
def model() -> Any4D:
    return small_model()


@pytest.fixture(scope="module")
def images_only(model: Any4D) -> Tensor:
    return fused_tokens(model, views([]))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "probabilities",
    [OFF, {"overall_prob": 0.0}, {"dropout_prob": 1.0}],
    ids=["each modality off", "all off", "all dropped"],
)
def test_a_modality_that_is_off_adds_exactly_zero(
    model: Any4D, images_only: Tensor, probabilities: dict[str, float], train: bool
) -> None:
    try:
        assert torch.equal(fused_tokens(model.train(train), views(), **probabilities), images_only)
    finally:
        model.eval()


GIVEN: dict[str, tuple[list[str], dict[str, float]]] = {
    "rays": (RAYS, {"ray_dirs_prob": 1.0}),
    "depth": (DEPTH, {"depth_prob": 1.0}),
    "metric depth": (DEPTH + METRIC, {"depth_prob": 1.0}),
    "pose": (POSE, {"cam_prob": 1.0}),
    "metric pose": (POSE + METRIC, {"cam_prob": 1.0}),
    "flow": (FLOW, {"doppler_prob": 1.0}),
}


@pytest.mark.parametrize("name", GIVEN)
def test_each_modality_alone_reaches_every_view_and_no_other_modality_does(
    model: Any4D, images_only: Tensor, name: str
) -> None:
    keys, on = GIVEN[name]
    alone = fused_tokens(model, views(keys), **on)
    assert torch.equal(fused_tokens(model, views(), **OFF | on, **_scales(name)), alone)
    for v in range(V):
        rows = slice(v * T, (v + 1) * T)
        assert not torch.allclose(alone[:, rows], images_only[:, rows])
    assert torch.equal(alone[:, -1], images_only[:, -1])  # the scale token


def _scales(name: str) -> dict[str, float]:
    """Hide the metric scale, which `views()` gives, where the case under test does not give it."""
    hidden = float("metric" not in name)
    return {"depth_scale_norm_all_prob": hidden, "pose_scale_norm_all_prob": hidden}


@pytest.mark.parametrize("name", GIVEN)
def test_views_that_do_not_give_a_modality_get_exactly_nothing(model: Any4D, images_only: Tensor, name: str) -> None:
    keys, _ = GIVEN[name]
    partial = fused_tokens(model, views([keys, [], keys]))
    middle = slice(T, 2 * T)
    assert torch.equal(partial[:, middle], images_only[:, middle])
    assert not torch.allclose(partial[:, 2 * T :], images_only[:, 2 * T :])


@pytest.mark.parametrize("name", ["depth", "pose"])
def test_the_metric_scale_is_told_only_where_it_is_metric(model: Any4D, name: str) -> None:
    keys, _ = GIVEN[name]
    plain, metric = fused_tokens(model, views(keys)), fused_tokens(model, views(keys + METRIC))
    for b in range(B):
        for v in range(V):
            rows = slice(v * T, (v + 1) * T)
            assert torch.equal(plain[b, rows], metric[b, rows]) == ((b + v) % 2 != 0)


def test_images_can_be_left_out_as_black_ones(model: Any4D) -> None:
    given, black = views(), views()
    for view in black:
        view["img"] = torch.zeros_like(view["img"])
    assert torch.equal(fused_tokens(model, given, images_prob=0.0), fused_tokens(model, black))


@pytest.mark.parametrize("key", ["ray_directions_cam", "depth_along_ray", "camera_pose_trans", "radial_scene_flow"])
def test_nan_in_a_dropped_modality_does_not_leak(model: Any4D, key: str) -> None:
    # Seed 1 drops sample 0's geometry and keeps sample 1's; a product with the mask would leave NaN as it is.
    clean, spoilt = views(), views()
    for view in spoilt:
        view[key][0] = float("nan")
    results = []
    for given in (clean, spoilt):
        torch.manual_seed(1)
        results.append(fused_tokens(model, given, overall_prob=0.5))
    torch.manual_seed(1)
    used = read(given, train=False, overall_prob=0.5).rays
    assert used is not None and used.mask.view(V, B).tolist() == [[False, True]] * V
    assert torch.equal(*results)
    assert bool(results[0].isfinite().all())


def test_nan_in_a_dropped_modality_does_not_reach_a_gradient() -> None:
    model, given = small_model(), views()
    for view in given:
        for key in ("ray_directions_cam", "depth_along_ray", "camera_pose_trans", "radial_scene_flow", "pts3d_cam"):
            view[key][0] = float("nan")
    torch.manual_seed(1)  # drops sample 0's, as above
    outputs = model.run(given, ModalityConfig(overall_prob=0.5), None)
    sum(view["pts3d"].sum() for view in outputs).backward()
    tokenizers = [p for name, p in model.named_parameters() if "_encoder." in name]
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in tokenizers)
    assert any(bool(p.grad.any()) for p in tokenizers if p.grad is not None)


def test_nan_of_a_switched_off_modality_does_not_leak(model: Any4D, images_only: Tensor) -> None:
    given = views()
    for view in given:
        for key in ("ray_directions_cam", "depth_along_ray", "camera_pose_quats", "camera_pose_trans", "pts3d_cam"):
            view[key].fill_(float("nan"))
        view["radial_scene_flow"].fill_(float("nan"))
    assert torch.equal(fused_tokens(model, given, **OFF), images_only)


@pytest.mark.parametrize("provided", [[], ALL])
def test_without_chance_no_random_number_is_drawn(model: Any4D, provided: list[str]) -> None:
    state = torch.get_rng_state()
    for probability in (0.0, 1.0):
        names = ("images", "overall", "ray_dirs", "depth", "cam", "doppler", "depth_scale_norm_all",
                 "pose_scale_norm_all")  # fmt: skip
        fused_tokens(model, views(provided), **{f"{name}_prob": probability for name in names})
    assert torch.equal(torch.get_rng_state(), state)


def test_in_training_the_draws_follow_upstreams_order() -> None:
    """Images, all geometry, each view's dropout, rays, depth, poses, Doppler: in this order from one generator."""
    names = ("ray_dirs_prob", "depth_prob", "cam_prob", "doppler_prob")
    torch.manual_seed(0)
    found = read(views(), images_prob=0.5, overall_prob=0.7, dropout_prob=0.3, **dict.fromkeys(names, 0.5))
    torch.manual_seed(0)
    images = torch.rand(B) < 0.5
    overall = (torch.rand(B) < 0.7).repeat(V) & (torch.rand(V * B) < 0.7)
    assert found.image_mask is not None and torch.equal(found.image_mask, images.repeat(V))
    parts = (found.rays, found.depth, found.rotation, found.flow)
    for part in parts:
        expected = (torch.rand(B) < 0.5).repeat(V) & overall
        assert part is not None and torch.equal(part.mask, expected)


def test_a_sample_keeps_or_loses_a_modality_in_all_views_and_dropout_is_per_view() -> None:
    shares, per_view = [], []
    torch.manual_seed(0)
    for _ in range(200):
        whole = read(views(RAYS), ray_dirs_prob=0.5).rays
        single = read(views(RAYS), dropout_prob=0.25).rays
        assert whole is not None and single is not None
        assert torch.equal(whole.mask.view(V, B), whole.mask.view(V, B)[:1].expand(V, B))
        shares.append(whole.mask.float().mean())
        per_view.append(single.mask.float().mean())
    # Three standard deviations: sqrt(.25 / 400) * 3 = 0.075, sqrt(.1875 / 1200) * 3 = 0.0375.
    assert abs(torch.stack(shares).mean() - 0.5) < 0.075
    assert abs(torch.stack(per_view).mean() - 0.75) < 0.0375


def test_outside_training_a_probability_between_0_and_1_is_still_drawn() -> None:
    torch.manual_seed(0)
    masks = []
    for _ in range(20):
        found = read(views(RAYS), train=False, ray_dirs_prob=0.5).rays
        assert found is not None
        masks.append(found.mask.tolist())
    assert any(mask != masks[0] for mask in masks)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_sparse_depth_removes_the_given_share_of_valid_pixels(share: float) -> None:
    given = views(DEPTH)
    before = [view["depth_along_ray"].clone() for view in given]
    torch.manual_seed(0)
    found = read(given, sparse_depth_prob=1.0, sparsification_removal_percent=share).depth
    assert found is not None
    for v, depth in enumerate(before):
        valid = int((depth > 0).sum())
        kept = int((found.maps[v * B : (v + 1) * B] != 0).sum())
        assert kept == valid - int(valid * share)
        assert torch.equal(given[v]["depth_along_ray"], depth)  # the caller's map is not touched


def test_sparse_depth_that_removes_nothing_draws_no_permutation() -> None:
    # Upstream draws none then, and the draws for poses, which come later, follow from it.
    given, states = views(DEPTH), []
    for share in (0.0, 1e-6):
        torch.manual_seed(0)
        read(given, sparse_depth_prob=1.0, sparsification_removal_percent=share)
        states.append(torch.get_rng_state())
    torch.manual_seed(0)
    read(given, sparse_depth_prob=0.0)
    assert torch.equal(states[0], torch.get_rng_state()) and torch.equal(states[1], torch.get_rng_state())


Part = Callable[[Modalities], Any]


@pytest.mark.parametrize(
    ("option", "part", "keys"),
    [
        ("depth_scale_norm_all_prob", lambda found: found.depth_scale, DEPTH + METRIC),
        ("pose_scale_norm_all_prob", lambda found: found.pose_scale, POSE + METRIC),
    ],
    ids=["depth", "pose"],
)
def test_the_metric_scale_is_hidden_by_probability(option: str, part: Part, keys: list[str]) -> None:
    metric = torch.cat([view["is_metric_scale"] for view in views(keys)])
    assert torch.equal(part(read(views(keys), **{option: 0.0})).mask, metric)
    assert not part(read(views(keys), **{option: 1.0})).mask.any()
    torch.manual_seed(0)
    seen = {tuple(part(read(views(keys), **{option: 0.5})).mask.tolist()) for _ in range(20)}
    assert len(seen) > 1
    assert all(not (torch.tensor(mask) & ~metric).any() for mask in seen)


def test_poses_are_relative_to_the_reference_and_normalised_by_their_mean_distance() -> None:
    given = views(POSE)
    found = read(given, train=False)
    assert found.translation is not None and found.rotation is not None and found.pose_scale is not None
    trans = found.translation.values.view(V, B, 3)
    assert torch.equal(trans[0], torch.zeros(B, 3))
    torch.testing.assert_close(trans[1:].norm(dim=-1).mean(dim=0), torch.ones(B))
    moved = [view["camera_pose_trans"] - given[0]["camera_pose_trans"] for view in given[1:]]
    distance = torch.stack(moved).norm(dim=-1).mean(dim=0)
    torch.testing.assert_close(found.pose_scale.values.view(V, B), distance.log().expand(V, B))
    torch.testing.assert_close(found.rotation.values[:B], torch.tensor([0.0, 0, 0, 1]).expand(B, 4))


@pytest.mark.parametrize("provided", [[POSE] * 3, [POSE, [], POSE]], ids=["all views", "some views"])
def test_relative_poses_are_those_of_matrices_also_under_autocast(provided: list[list[str]]) -> None:
    given = views(provided)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = read(given, train=False)
    assert found.translation is not None and found.rotation is not None and found.pose_scale is not None
    scale = found.pose_scale.values.view(V, B).double().exp()
    for v in range(V):
        for b in range(B):
            expected = torch.eye(4, dtype=torch.float64)
            if "camera_pose_quats" in given[v]:
                expected = torch.linalg.inv(matrix(given[0], b)) @ matrix(given[v], b)
            row = v * B + b
            rotation = roma.unitquat_to_rotmat(found.rotation.values[row].double())
            torch.testing.assert_close(rotation, expected[:3, :3], rtol=0, atol=2e-6)
            moved = found.translation.values[row].double() * scale[v, b]
            torch.testing.assert_close(moved, expected[:3, 3], rtol=0, atol=1e-5)


def matrix(view: dict[str, Any], sample: int) -> Tensor:
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = roma.unitquat_to_rotmat(view["camera_pose_quats"][sample].double())
    pose[:3, 3] = view["camera_pose_trans"][sample].double()
    return pose


@pytest.mark.parametrize("partial", [False, True])
def test_the_number_of_launches_does_not_grow_with_the_views(partial: bool) -> None:
    counts = []
    for count in (3, 9):
        given = golden_views(count, 1, 14, 14, 0, [ALL if i == 0 or not partial else ALL[: 3 * (i % 2)]
                                                  for i in range(count)])  # fmt: skip
        with Counted() as counted:
            read(given, train=False)
        counts.append(counted.launches)
    assert counts[0] == counts[1] < 150


def test_flow_is_divided_by_the_reference_views_mean_distance() -> None:
    given = views(FLOW)
    found = read(given, train=False).flow
    assert found is not None
    points, valid = given[0]["pts3d_cam"], given[0]["valid_mask"]
    for b in range(B):
        mean = points[b][valid[b]].norm(dim=-1).mean()
        torch.testing.assert_close(found.maps.view(V, B, H, W, 3)[2, b], given[2]["radial_scene_flow"][b] / mean)


def test_the_views_are_not_changed(model: Any4D) -> None:
    given = views()
    before = [{k: v.clone() if isinstance(v, Tensor) else v for k, v in view.items()} for view in given]
    torch.manual_seed(0)
    model.train()
    fused_tokens(model, given, images_prob=0.5, dropout_prob=0.5, sparse_depth_prob=1.0, depth_scale_norm_all_prob=1.0)
    model.eval()
    for view, copy in zip(given, before, strict=True):
        assert set(view) == set(copy)
        assert all(torch.equal(v, copy[k]) if isinstance(v, Tensor) else v == copy[k] for k, v in view.items())


ERRORS: dict[str, tuple[list[list[str]], str]] = {
    "pose without the reference's": ([[], POSE, POSE], "reference view 0 does not; poses are relative to"),
    "flow without points": ([[], ["radial_scene_flow"], []], "radial_scene_flow needs 'pts3d_cam' of view 0"),
    "flow without mask": ([["pts3d_cam"], ["radial_scene_flow"], []], "radial_scene_flow needs 'valid_mask' of view 0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_another_input_needs_is_asked_for(name: str) -> None:
    provided, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        read(views(provided), train=False)


@pytest.mark.parametrize("key", ["ray_directions_cam", "depth_along_ray", "radial_scene_flow"])
def test_a_map_of_another_size_than_the_images_is_refused(key: str) -> None:
    given = views()
    given[1][key] = given[1][key][:, :-1]
    with pytest.raises(ValueError, match=rf"views\[1\]\['{key}'\]: expected .* as the images are"):
        read(given, train=False)


WRONG: dict[str, tuple[int, str, Any, str]] = {
    "poses of one sample": (
        1,
        "camera_pose_quats",
        torch.zeros(1, 4),
        r"expected a tensor \[2, 4\] as the .* \[1, 4\]",
    ),
    "matrices": (1, "camera_pose_trans", torch.zeros(2, 4, 4), r"expected a tensor \[2, 3\] as .* \[2, 4, 4\]"),
    "no tensor": (1, "depth_along_ray", None, "expected a tensor .*, got None"),
    "scale of another batch": (0, "is_metric_scale", torch.ones(3, dtype=torch.bool), r"expected a tensor \[2\]"),
    "scale as a number": (0, "is_metric_scale", True, r"expected a tensor \[2\], got True"),
    "points of one sample": (0, "pts3d_cam", torch.ones(1, 28, 42, 3), r"expected a tensor \[2, 28, 42, 3\]"),
    "points of another size": (0, "pts3d_cam", torch.ones(2, 14, 14, 3), r"expected a tensor \[2, 28, 42, 3\]"),
    "a mask of numbers": (0, "valid_mask", torch.ones(2, 28, 42), "expected bool, got torch.float32"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_the_images_is_refused(name: str) -> None:
    view, key, value, message = WRONG[name]
    given = views()
    assert given[0]["img"].shape == (2, 3, 28, 42)
    given[view][key] = value
    with pytest.raises(ValueError, match=rf"views\[{view}\]\['{key}'\]: {message}"):
        read(given, train=False)


def test_the_configurations_probabilities_are_forwards() -> None:
    given = views()
    off = small_model(small_config(modalities={"overall_prob": 0.0}))
    on = small_model(small_config(modalities={"overall_prob": 1.0}))
    with torch.no_grad():
        assert not torch.allclose(off(given)[0]["pts3d"], on(given)[0]["pts3d"])
        assert torch.equal(off(given)[0]["pts3d"], on(views([]))[0]["pts3d"])
