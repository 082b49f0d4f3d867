"""`model.infer`: from what a person has to every output, against `model.forward` on views converted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import roma
import torch
from torch import Tensor

from any4d_fast import Any4D
from any4d_fast.inference import _evaluating
from any4d_fast.inputs import InputError
from any4d_fast.testing import relative_error
from tests.small_models import REPRESENTATIONS, small_config, small_model, small_scene

BUDGET = 1e-5  # two float32 passes over inputs that differ by rounding
V, H, W = 3, 28, 42
K = torch.tensor([[40.0, 0.0, 20.0], [0.0, 42.0, 14.0], [0.0, 0.0, 1.0]])
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

DERIVED = {"depth_z", "intrinsics", "camera_poses", "img_no_norm"}
RAW = {"pts3d", "pts3d_cam", "ray_directions", "depth_along_ray", "cam_trans", "cam_quats", "scene_flow",
       "metric_scaling_factor", "conf", "non_ambiguous_mask", "non_ambiguous_mask_logits"}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any4D:
    return small_model()


def image(seed: int, height: int = H, width: int = W) -> Tensor:
    """[H, W, 3] uint8"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)


def pose(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    matrix = torch.eye(4)
    matrix[:3, :3] = roma.unitquat_to_rotmat(torch.nn.functional.normalize(torch.randn(4, generator=generator), dim=0))
    matrix[:3, 3] = torch.randn(3, generator=generator)
    return matrix


def depth(seed: int) -> Tensor:
    """[H, W] metres, a tenth of it unknown."""
    generator = torch.Generator().manual_seed(200 + seed)
    values = 1 + 4 * torch.rand(H, W, generator=generator)
    return torch.where(torch.rand(H, W, generator=generator) < 0.1, torch.nan, values)


def doppler(seed: int) -> Tensor:
    return torch.randn(H, W, generator=torch.Generator().manual_seed(300 + seed))


def views(*kinds: str) -> list[dict[str, Any]]:
    """Three views with images and whatever else is asked for."""
    out = []
    for i in range(V):
        view: dict[str, Any] = {"img": image(i)}
        values = {
            "intrinsics": K + torch.diag(torch.tensor([float(i), 0.0, 0.0])),
            "depth_z": depth(i),
            "camera_poses": pose(i),
            "doppler": doppler(i),
            "timestamps": 0.5 * i,
            "is_metric_scale": i != 1,
        }
        out.append(view | {k: v for k, v in values.items() if k in kinds})
    return out


def by_hand(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `forward` takes for these views, by the formulas of docs/inputs.md."""
    v, u = torch.meshgrid(torch.arange(H, dtype=torch.float64), torch.arange(W, dtype=torch.float64), indexing="ij")
    out = []
    for view in given:
        new: dict[str, Any] = {"img": ((view["img"] / 255 - MEAN) / STD).permute(2, 0, 1)[None]}
        new["is_metric_scale"] = torch.tensor([view.get("is_metric_scale", True)])
        if "intrinsics" in view:
            k = view["intrinsics"].double()
            rays = torch.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], torch.ones_like(u)], dim=-1)
            rays = rays / rays.norm(dim=-1, keepdim=True)
            new["ray_directions_cam"] = rays.float()[None]
            if "depth_z" in view:
                z = view["depth_z"].nan_to_num(0).double()
                new["depth_along_ray"] = (z / rays[..., 2]).float()[None, ..., None]
            if "doppler" in view:
                seconds = view["timestamps"] - given[0]["timestamps"]
                new["radial_scene_flow"] = (view["doppler"][..., None] * seconds * rays).float()[None]
        if "camera_poses" in view:
            new["camera_pose_quats"] = roma.rotmat_to_unitquat(view["camera_poses"][:3, :3])[None]
            new["camera_pose_trans"] = view["camera_poses"][:3, 3][None]
        out.append(new)
    if "radial_scene_flow" in out[0] and "depth_along_ray" in out[0]:
        out[0]["pts3d_cam"] = out[0]["ray_directions_cam"] * out[0]["depth_along_ray"]
        out[0]["valid_mask"] = out[0]["depth_along_ray"][..., 0] > 0
    return out


def check(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]], budget: float = BUDGET) -> None:
    assert len(found) == len(expected)
    for view, other in zip(found, expected, strict=True):
        assert set(view) >= set(other)
        for key, value in other.items():
            if value.dtype == torch.bool:
                assert torch.equal(view[key], value), key
            else:
                assert relative_error(view[key], value) <= budget, key


KINDS = {
    "images": (),
    "intrinsics": ("intrinsics",),
    "depth": ("intrinsics", "depth_z"),
    "depth of unknown scale": ("intrinsics", "depth_z", "is_metric_scale"),
    "poses": ("camera_poses",),
    "poses of unknown scale": ("camera_poses", "is_metric_scale"),
    "doppler": ("intrinsics", "depth_z", "doppler", "timestamps"),
    "everything": ("intrinsics", "depth_z", "camera_poses", "doppler", "timestamps"),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_input_means_what_the_documentation_says(name: str, model: Any4D) -> None:
    given = views(*KINDS[name])
    with torch.no_grad():
        expected = model(by_hand(given))
    found = model.infer(given, apply_mask=False)
    check(found, expected)
    assert all(set(view) == RAW | DERIVED for view in found)
    if name != "images":
        plain = model.infer(views(), apply_mask=False)
        assert relative_error(found[2]["pts3d"], plain[2]["pts3d"]) > 1e-4  # it matters


def test_doppler_without_depth_is_measured_against_one_metre(model: Any4D) -> None:
    given = views("intrinsics", "doppler", "timestamps")
    converted = by_hand(given)
    # Points at one metre everywhere: their mean distance is the unit.
    converted[0]["pts3d_cam"] = converted[0]["ray_directions_cam"]
    converted[0]["valid_mask"] = torch.ones(1, H, W, dtype=torch.bool)
    with torch.no_grad():
        expected = model(converted)
    check(model.infer(given, apply_mask=False), expected)


def test_images_may_come_in_any_form(model: Any4D, tmp_path: Path) -> None:
    from PIL import Image

    expected = model.infer(views(), apply_mask=False)
    array = image(1).numpy()
    Image.fromarray(array).save(tmp_path / "b.png")
    for form in (
        array,
        Image.fromarray(array),
        tmp_path / "b.png",
        image(1).permute(2, 0, 1),
        image(1)[None].float() / 255,
    ):
        given = views()
        given[1]["img"] = form
        check(model.infer(given, apply_mask=False), expected)


def test_rays_instead_of_intrinsics(model: Any4D) -> None:
    given = views("intrinsics", "depth_z")
    rays = [3 * view["ray_directions_cam"][0] for view in by_hand(given)]  # of any length
    with_rays = [{**{k: v for k, v in view.items() if k != "intrinsics"}, "ray_directions": r}
                 for view, r in zip(given, rays, strict=True)]  # fmt: skip
    check(model.infer(with_rays), model.infer(given))


def test_imu_egomotion_instead_of_poses(model: Any4D) -> None:
    given = views("camera_poses")
    chained = views()
    for i in range(1, V):
        motion = torch.linalg.inv(given[i - 1]["camera_poses"].double()) @ given[i]["camera_poses"].double()
        chained[i]["imu"] = (motion[:3, :3].numpy(), motion[:3, 3].numpy())
    check(model.infer(chained), model.infer(given), budget=1e-4)  # float32 poses are chained and inverted


def test_poses_as_quaternions_in_another_world(model: Any4D) -> None:
    given = views("camera_poses")
    moved = views()
    for view, other in zip(moved, given, strict=True):
        matrix = pose(9).double() @ other["camera_poses"].double()
        view["camera_poses"] = (roma.rotmat_to_unitquat(matrix[:3, :3]), matrix[:3, 3])
    check(model.infer(moved), model.infer(given), budget=1e-4)  # float32 poses, rotated and rotated back


def test_a_batch_of_scenes(model: Any4D) -> None:
    single = [views("camera_poses"), [{**v, "img": image(10 + i)} for i, v in enumerate(views("camera_poses"))]]
    both = [{"img": torch.stack([a["img"], b["img"]]), "camera_poses": a["camera_poses"]}
            for a, b in zip(*single, strict=True)]  # fmt: skip
    found = model.infer(both)
    for b, scene in enumerate(single):
        picked = [{k: v[b : b + 1] for k, v in view.items()} for view in found]
        check(picked, model.infer(scene))


def test_reference_chooses_the_world_and_the_order_stays(model: Any4D) -> None:
    given = views("intrinsics", "depth_z", "camera_poses")
    order = [1, 0, 2]
    manual = model.infer([given[i] for i in order])
    found = model.infer(given, reference=1)
    check(found, [manual[i] for i in order])
    for i, view in enumerate(found):
        np.testing.assert_allclose(view["img_no_norm"][0].numpy(), given[i]["img"].numpy() / 255, atol=1e-6)
    kept = model.infer(given, reference=1, known="keep")
    torch.testing.assert_close(kept[1]["camera_poses"][0], torch.eye(4), atol=1e-6, rtol=0)


def test_known_cameras_are_returned_exactly(model: Any4D) -> None:
    given = views("intrinsics", "camera_poses")
    del given[2]["intrinsics"]
    hint, keep = (model.infer(given, known=known, apply_mask=False) for known in ("hint", "keep"))
    world = torch.linalg.inv(given[0]["camera_poses"].double())
    for i in range(V):
        relative = (world @ given[i]["camera_poses"].double()).float()[None]
        torch.testing.assert_close(keep[i]["camera_poses"], relative, atol=1e-6, rtol=0)
        camera = keep[i]["ray_directions"] * keep[i]["depth_along_ray"]
        torch.testing.assert_close(keep[i]["pts3d_cam"], camera)
        points = camera @ relative[:, None, :3, :3].mT + relative[:, None, None, :3, 3]
        torch.testing.assert_close(keep[i]["pts3d"], points, atol=1e-4, rtol=1e-4)
        for key in ("depth_along_ray", "scene_flow", "metric_scaling_factor", "conf"):
            assert torch.equal(keep[i][key], hint[i][key]), key
    for i in range(2):
        assert torch.equal(keep[i]["intrinsics"], given[i]["intrinsics"][None])
        assert not torch.allclose(hint[i]["intrinsics"], keep[i]["intrinsics"])
    assert torch.equal(keep[2]["ray_directions"], hint[2]["ray_directions"])  # nothing was known of this lens


IGNORED = {
    "ignore_depth_inputs": ("depth_z",),
    "ignore_pose_inputs": ("camera_poses",),
    "ignore_doppler_inputs": ("doppler", "timestamps"),
}


@pytest.mark.parametrize("switch", IGNORED)
def test_an_ignored_input_is_as_if_it_were_not_given(switch: str, model: Any4D) -> None:
    everything = KINDS["everything"]
    kept = [kind for kind in everything if kind not in IGNORED[switch]]
    check(model.infer(views(*everything), **{switch: True}), model.infer(views(*kept)), budget=0)


def test_ignored_calibration_is_not_shown_but_depth_is_still_converted_with_it(model: Any4D) -> None:
    given = views("intrinsics", "depth_z")
    converted = by_hand(given)
    for view in converted:
        del view["ray_directions_cam"]
    with torch.no_grad():
        expected = model(converted)
    check(model.infer(given, ignore_calibration_inputs=True, apply_mask=False), expected)


@pytest.mark.parametrize(
    ("switch", "kinds"),
    [("ignore_depth_scale_inputs", ("intrinsics", "depth_z")), ("ignore_pose_scale_inputs", ("camera_poses",))],
)
def test_an_ignored_scale_is_as_if_it_were_unknown(switch: str, kinds: tuple[str, ...], model: Any4D) -> None:
    unknown = [{**view, "is_metric_scale": False} for view in views(*kinds)]
    ignored = model.infer(views(*kinds), **{switch: True})
    check(ignored, model.infer(unknown), budget=0)
    assert relative_error(ignored[2]["pts3d"], model.infer(views(*kinds))[2]["pts3d"]) > 0


SIZES: list[tuple[Any, tuple[int, int]]] = [((28, 56), (28, 56)), (56, (42, 56)), (None, (42, 70))]


@pytest.mark.parametrize(("size", "expected"), SIZES)
def test_size_is_the_models_or_what_is_asked_for(size: Any, expected: tuple[int, int], model: Any4D) -> None:
    given = [{"img": image(i, 42, 70), "intrinsics": K} for i in range(2)]
    if size == 56:
        given = [{"img": image(i, 30, 40)} for i in range(2)]
    for view in model.infer(given, size=size):
        assert view["pts3d"].shape == (1, *expected, 3)
        assert view["img_no_norm"].shape == (1, *expected, 3)


def test_outputs_can_come_back_at_the_given_size(model: Any4D) -> None:
    given = [{"img": image(i, 50, 61), "intrinsics": K} for i in range(2)]
    small, full = (model.infer(given, size=(28, 42), original_size=flag, known="keep") for flag in (False, True))
    for view, reduced, source in zip(full, small, given, strict=True):
        for key in ("pts3d", "depth_z", "scene_flow", "ray_directions", "mask", "conf", "img_no_norm"):
            assert view[key].shape[1:3] == (50, 61), key
            assert reduced[key].shape[1:3] == (28, 42), key
        torch.testing.assert_close(view["img_no_norm"][0], source["img"] / 255)
        torch.testing.assert_close(view["intrinsics"][0], K)


@pytest.mark.parametrize("minibatch_size", [1, 2, 7])
def test_minibatches_give_the_same(minibatch_size: int, model: Any4D) -> None:
    # Rounding only: convolutions over another number of images may add in another order.
    given = views("intrinsics")
    check(model.infer(given, minibatch_size=minibatch_size, apply_mask=False), model.infer(given, apply_mask=False))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_and_nothing_is_drawn_or_recorded(training: bool) -> None:
    model = small_model(small_config(drop_path=0.5, modalities={"overall_prob": 0.5})).train(training)
    state = torch.get_rng_state()
    first, second = model.infer(views("intrinsics")), model.infer(views("intrinsics"))
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), state)
    check(first, second, budget=0)
    assert not any(value.requires_grad for view in first for value in view.values())


@pytest.mark.parametrize("training", [True, False])
def test_parts_in_another_mode_stay_in_it(training: bool) -> None:
    """A frozen encoder is in evaluation mode while the rest trains."""
    model = small_model().train(training)
    model.encoder.train(not training)
    before = [module.training for module in model.modules()]
    model.infer(views())
    assert [module.training for module in model.modules()] == before


def test_threads_leave_a_training_model_when_the_last_one_is_done() -> None:
    model, modes = small_model(small_config(drop_path=0.5)).train(), []
    outer, inner = _evaluating(model), _evaluating(model)
    outer.__enter__()
    inner.__enter__()
    for context in (outer, inner):  # the first one to come goes first
        modes.append(model.info_sharing.training)
        context.__exit__(None, None, None)
    assert modes == [False, False] and all(module.training for module in model.modules())


def test_the_mode_is_restored_after_an_error(model: Any4D, monkeypatch: pytest.MonkeyPatch) -> None:
    model.train()
    with pytest.raises(RuntimeError, match="stop"), monkeypatch.context() as patch:
        patch.setattr(model, "run", lambda *args: (_ for _ in ()).throw(RuntimeError("stop")))
        model.infer(views())
    assert model.training
    model.eval()


def test_masks(model: Any4D) -> None:
    raw = model.infer(views(), apply_mask=False)
    plain = model.infer(views(), mask_edges=False)
    edges = model.infer(views(), edge_normal_threshold=0.5, edge_depth_threshold=0.001)
    confident = model.infer(views(), mask_edges=False, apply_confidence_mask=True, confidence_percentile=30)
    for i in range(V):
        assert "mask" not in raw[i]
        assert torch.equal(plain[i]["mask"][..., 0], raw[i]["non_ambiguous_mask"])
        assert edges[i]["mask"].sum() < plain[i]["mask"].sum()
        assert not (edges[i]["mask"] & ~plain[i]["mask"]).any()
        threshold = raw[i]["conf"].quantile(0.3)
        expected = raw[i]["non_ambiguous_mask"] & (raw[i]["conf"] > threshold)
        assert (confident[i]["mask"][..., 0] != expected).sum() <= 2  # pixels at the threshold itself
        for key in ("pts3d", "pts3d_cam", "depth_along_ray", "depth_z"):
            assert torch.equal(plain[i][key], torch.where(plain[i]["mask"], raw[i][key], 0)), key


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_every_representation_gives_what_it_has(representation: str) -> None:
    model = small_model(small_config(small_scene(representation)))
    for view in model.infer(views("intrinsics", "depth_z")):
        assert bool(view["pts3d"].isfinite().all())
        assert ("camera_poses" in view) == ("cam_quats" in view) == representation.endswith("pose")
        assert ("intrinsics" in view) == ("ray_directions" in view and "ray_origins" not in view)
        assert ("depth_z" in view) == ("pts3d_cam" in view)
        assert {"mask", "img_no_norm", "scene_flow"} <= set(view)


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "amp_dtype": (
        {"amp_dtype": "fp8"},
        ValueError,
        r"amp_dtype: expected one of \['bf16', 'fp16', 'fp32'\], got 'fp8'",
    ),
    "no views at once": ({"minibatch_size": 0}, ValueError, "minibatch_size: expected at least 1 view, or None, got 0"),
    "size": ({"size": (30, 42)}, InputError, "size: expected .*14"),
    "reference": ({"reference": 3}, InputError, "reference: expected .*3"),
    "known": ({"known": "use"}, InputError, 'known: expected "hint" or "keep"'),
    "percentile": ({"confidence_percentile": 101}, InputError, "confidence_percentile: expected 0 to 100"),
    "threshold": ({"edge_depth_threshold": 0}, InputError, "edge_depth_threshold: expected a positive number"),
    "unknown option": ({"use_amps": True}, TypeError, "use_amps"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_options_are_refused(name: str, model: Any4D) -> None:
    options, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        model.infer(views(), **options)


def test_wrong_views_are_refused_by_name(model: Any4D) -> None:
    with pytest.raises(InputError, match="views: expected at least one view"):
        model.infer([])
    given = views("depth_z")
    with pytest.raises(InputError, match=r"views\[0\].*depth_z.*intrinsics"):
        model.infer(given)
