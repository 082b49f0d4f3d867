"""Post-processing of made-up raw outputs: derived keys, masks, known cameras, the given size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from any4d_fast import geometry
from any4d_fast import outputs as outputs_module
from any4d_fast.inputs import InputError, PreparedViews, prepare_views
from any4d_fast.masking import confident, depth_edges, normal_edges, output_mask, point_normals
from any4d_fast.outputs import postprocess
from tests.dispatched import Counted, Waits

H, W = 28, 42
K = torch.tensor([[30.0, 0.0, 20.0], [0.0, 32.0, 13.0], [0.0, 0.0, 1.0]])
K_PREDICTED = torch.tensor([[35.0, 0.0, 21.0], [0.0, 35.0, 14.0], [0.0, 0.0, 1.0]])


def pose(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return geometry.quats_trans_to_pose(torch.randn(4, generator=generator), torch.randn(3, generator=generator))


def raw_output(seed: int, batch: int = 1, hw: tuple[int, int] = (H, W)) -> dict[str, Tensor]:
    """A view's outputs as the model composes them: a smooth surface with one step in depth."""
    generator = torch.Generator().manual_seed(seed)
    rays = geometry.rays_from_intrinsics(K_PREDICTED, *hw).expand(batch, *hw, 3).contiguous()
    grid = geometry.pixel_grid(*hw)
    depth = (3 + 0.01 * grid[..., 0] + 0.02 * seed).expand(batch, *hw).clone()
    depth[:, 5:15, 10:20] *= 0.5
    camera = pose(seed + 100)
    quats, trans = (part.expand(batch, -1) for part in geometry.pose_to_quats_trans(camera))
    points = rays * depth[..., None]
    logits = torch.randn(batch, *hw, generator=generator) + 2
    return {
        "pts3d": geometry.transform_points(camera.expand(batch, 4, 4), points),
        "pts3d_cam": points,
        "ray_directions": rays,
        "depth_along_ray": depth[..., None],
        "cam_trans": trans,
        "cam_quats": quats,
        "scene_flow": torch.randn(batch, *hw, 3, generator=generator),
        "metric_scaling_factor": torch.ones(batch, 1),
        "conf": 1 + torch.rand(batch, *hw, generator=generator),
        "non_ambiguous_mask": logits > 0,
        "non_ambiguous_mask_logits": logits,
    }


def prepared_views(count: int = 3, **arguments: Any) -> PreparedViews:
    given_views = [
        {"img": torch.rand(3, H, W, generator=torch.Generator().manual_seed(i)), "camera_poses": pose(i)}
        for i in range(count)
    ]
    given_views[1]["intrinsics"] = K
    return prepare_views(given_views, **arguments)


def test_derived_keys_in_the_callers_order() -> None:
    prepared = prepared_views(reference=2)
    raw = [raw_output(i) for i in range(3)]
    before = [{k: v.clone() for k, v in r.items()} for r in raw]
    outputs = postprocess(raw, prepared, apply_mask=False)
    assert prepared.order == [2, 0, 1]
    for caller, model in enumerate((1, 2, 0)):
        out, r = outputs[caller], raw[model]
        assert set(out) == {*r, "img_no_norm", "depth_z", "intrinsics", "camera_poses"}
        for key in r:
            assert torch.equal(out[key], before[model][key]) and torch.equal(r[key], before[model][key])
        assert torch.equal(out["depth_z"], r["pts3d_cam"][..., 2:])
        torch.testing.assert_close(out["intrinsics"], K_PREDICTED[None], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(out["camera_poses"][0], pose(model + 100), atol=1e-6, rtol=1e-5)
        image = torch.rand(3, H, W, generator=torch.Generator().manual_seed(caller)).permute(1, 2, 0)
        torch.testing.assert_close(out["img_no_norm"][0], image)


@pytest.mark.parametrize("options", [{}, {"apply_mask": False}, {"apply_confidence_mask": True}, {"known": "keep"}])
@pytest.mark.parametrize("original_size", [False, True])
def test_views_finished_together_are_those_finished_alone(
    options: dict[str, Any], original_size: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepared_views(5, size=(14, 28) if original_size else None)
    raw = [raw_output(i, hw=prepared.sizes[0].model) for i in range(5)]
    found = []
    for views in (1, 2, 5):
        monkeypatch.setattr(outputs_module, "PIXELS_AT_ONCE", views * math.prod(prepared.sizes[0].model))
        found.append(postprocess(raw, prepared, original_size=original_size, **options))
    for alone, *others in zip(*found, strict=True):
        for other in others:
            assert list(alone) == list(other)
            for key, value in alone.items():
                assert torch.equal(other[key], value), key


def test_finishing_waits_for_nothing_and_launches_little() -> None:
    """On a GPU the host is ahead of the device then, whatever the number of views."""
    counts = []
    for views in (3, 8):
        prepared, raw = prepared_views(views), [raw_output(i) for i in range(views)]
        with Waits() as waits, Counted() as counted:
            postprocess(raw, prepared)
        assert waits.found == []
        counts.append(counted.launches)
    assert counts[1] - counts[0] <= 5 * 20


def numpy_edge_mask(points: np.ndarray, depth: np.ndarray, mask: np.ndarray, degrees: float, rtol: float) -> np.ndarray:
    """The rule once more, pixel by pixel: True where depth and normals both have an edge."""
    h, w = mask.shape
    normals, has = np.zeros((h, w, 3)), np.zeros((h, w), bool)
    turn = [(-1, 0), (0, -1), (1, 0), (0, 1)]
    for y in range(h):
        for x in range(w):
            for (ay, ax), (by, bx) in zip(turn, turn[1:] + turn[:1], strict=True):
                corners = [(y, x), (y + ay, x + ax), (y + by, x + bx)]
                if all(0 <= cy < h and 0 <= cx < w and mask[cy, cx] for cy, cx in corners):
                    a, b = (points[c] - points[y, x] for c in corners[1:])
                    face = np.cross(a, b)
                    normals[y, x] += face / (np.linalg.norm(face) + 1e-12)
                    has[y, x] = True
            normals[y, x] /= np.linalg.norm(normals[y, x]) + 1e-12
    turns, jumps = np.zeros((h, w), bool), np.zeros((h, w), bool)
    for y in range(h):
        for x in range(w):
            near = []
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    ny, nx = np.clip(y + dy, 0, h - 1), np.clip(x + dx, 0, w - 1)
                    # Upstream looks the neighbour's validity up with its two offsets exchanged.
                    if has[np.clip(y + dx, 0, h - 1), np.clip(x + dy, 0, w - 1)]:
                        cosine = np.clip(normals[y, x] @ normals[ny, nx], -1, 1)
                        turns[y, x] |= np.degrees(np.arccos(cosine)) > degrees
                    if 0 <= y + dy < h and 0 <= x + dx < w and mask[y + dy, x + dx]:
                        near.append(depth[y + dy, x + dx])
            jumps[y, x] = bool(near) and (max(near) - min(near)) / depth[y, x] > rtol
    grown = np.zeros_like(turns)
    for y in range(h):
        for x in range(w):
            grown[y, x] = turns[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].any()
    return grown & jumps


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 14), st.integers(1, 17), st.floats(0.5, 30), st.floats(0.005, 0.3))
def test_edges_equal_a_restatement_in_numpy(seed: int, h: int, w: int, degrees: float, rtol: float) -> None:
    # float64, so that no pixel is decided by rounding.
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, h, w, generator=generator, dtype=torch.float64)
    depth = 2 + 0.01 * noise + (noise[:, :1, :1] > 0) * 0.5 * (torch.arange(w) > w // 2)
    points = geometry.rays_from_intrinsics(K.double(), h, w, unit=False) * depth[..., None]
    mask = torch.rand(2, h, w, generator=generator) > 0.1
    normals, has_normal = point_normals(points, mask)
    edges = normal_edges(normals, has_normal, degrees) & depth_edges(depth, mask, rtol)
    for b in range(2):
        expected = numpy_edge_mask(points[b].numpy(), depth[b].numpy(), mask[b].numpy(), degrees, rtol)
        assert np.array_equal((edges[b] & mask[b]).numpy(), expected & mask[b].numpy())


def test_step_in_depth_is_masked_and_slope_is_not() -> None:
    raw = raw_output(0)
    raw["non_ambiguous_mask"] = torch.ones(1, H, W, dtype=torch.bool)
    out = postprocess([raw], prepare_views([{"img": torch.zeros(3, H, W)}]))[0]
    mask = out["mask"][0, :, :, 0]
    assert out["mask"].dtype == torch.bool and out["mask"].shape == (1, H, W, 1)
    assert not mask[5, 10:20].any() and not mask[4, 10:20].any() and not mask[6:14, 9:11].any()
    assert mask[8:12, 13:17].all() and mask[20:].all() and mask[:, 25:].all()
    for key in ("pts3d", "pts3d_cam", "depth_along_ray", "depth_z"):
        assert (out[key][0][~mask] == 0).all() and torch.equal(out[key][0][mask], _plain(raw)[key][0][mask])
    for key in ("conf", "ray_directions", "scene_flow"):
        assert torch.equal(out[key], raw[key])
    kept = postprocess([raw], prepare_views([{"img": torch.zeros(3, H, W)}]), mask_edges=False)[0]
    assert kept["mask"].all()


def _plain(raw: dict[str, Tensor]) -> dict[str, Tensor]:
    return raw | {"depth_z": raw["pts3d_cam"][..., 2:]}


def test_mask_is_ambiguity_confidence_and_edges() -> None:
    raw = raw_output(1, batch=2)
    prepared = prepare_views([{"img": torch.zeros(2, 3, H, W)}])
    out = postprocess([raw], prepared, apply_confidence_mask=True, confidence_percentile=30)[0]
    threshold = torch.quantile(raw["conf"].flatten(1), 0.3, dim=1)[:, None, None]
    mask = raw["non_ambiguous_mask"] & (raw["conf"] > threshold)
    normals, has_normal = point_normals(raw["pts3d"], mask)
    edges = normal_edges(normals, has_normal, 5.0) & depth_edges(raw["pts3d_cam"][..., 2], mask, 0.03)
    assert torch.equal(out["mask"][..., 0], mask & ~edges)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.floats(0, 100), st.integers(0, 1000))
def test_confidence_threshold_is_the_quantile(count: int, percentile: float, seed: int) -> None:
    conf = torch.rand(2, 1, count, generator=torch.Generator().manual_seed(seed))
    threshold = torch.quantile(conf.double().flatten(1), percentile / 100, dim=1)[:, None, None]
    away = (conf - threshold).abs() > 1e-6  # elsewhere rounding decides
    assert torch.equal(confident(conf, percentile)[away], (conf > threshold)[away])


def test_nan_outside_the_mask_does_not_leak() -> None:
    raw = raw_output(0)
    raw["non_ambiguous_mask"][0, 20, 20] = False
    for key in ("pts3d", "pts3d_cam", "depth_along_ray"):
        raw[key] = raw[key].clone()
        raw[key][0, 20, 20] = math.nan
    out = postprocess([raw], prepare_views([{"img": torch.zeros(3, H, W)}]))[0]
    assert out["pts3d"].isfinite().all() and not out["mask"][0, 20, 20]
    assert out["mask"][0, 22:, 25:].float().mean() > 0.8


def test_known_cameras_are_kept_exactly() -> None:
    prepared = prepared_views(reference=2)
    raw = [raw_output(i) for i in range(3)]
    hints = postprocess(raw, prepared, apply_mask=False)
    outputs = postprocess(raw, prepared, apply_mask=False, known="keep")
    for caller, model in enumerate((1, 2, 0)):
        out, r = outputs[caller], raw[model]
        expected = torch.linalg.inv(pose(2).double()) @ pose(caller).double()
        torch.testing.assert_close(out["camera_poses"][0], expected.float(), atol=1e-6, rtol=1e-5)
        assert torch.equal(out["camera_poses"], prepared.known[model].cam2world)
        again = geometry.quats_trans_to_pose(out["cam_quats"], out["cam_trans"])
        torch.testing.assert_close(again, out["camera_poses"], atol=1e-6, rtol=1e-5)
        if caller == 1:
            assert torch.equal(out["intrinsics"], K[None])
            torch.testing.assert_close(out["ray_directions"], geometry.rays_from_intrinsics(K, H, W)[None])
        else:
            assert torch.equal(out["ray_directions"], r["ray_directions"])
            assert torch.equal(out["intrinsics"], hints[caller]["intrinsics"])
        assert torch.equal(out["depth_along_ray"], r["depth_along_ray"])
        assert torch.equal(out["scene_flow"], r["scene_flow"])
        torch.testing.assert_close(out["pts3d_cam"], out["ray_directions"] * r["depth_along_ray"])
        assert torch.equal(out["depth_z"], out["pts3d_cam"][..., 2:])
        moved = geometry.transform_points(out["camera_poses"], out["pts3d_cam"])
        torch.testing.assert_close(out["pts3d"], moved)
        assert not torch.allclose(out["pts3d"], hints[caller]["pts3d"])
    assert torch.equal(outputs[2]["camera_poses"], torch.eye(4)[None])


def test_keep_without_anything_known_changes_nothing() -> None:
    prepared = prepare_views([{"img": torch.zeros(3, H, W)}] * 2)
    raw = [raw_output(i) for i in range(2)]
    for a, b in zip(postprocess(raw, prepared), postprocess(raw, prepared, known="keep"), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a) and a.keys() == b.keys()


@pytest.mark.parametrize("known", ["hint", "keep"])
def test_outputs_at_the_given_size(known: str) -> None:
    sizes = [(60, 100), (28, 42), (40, 63)]  # the caller's; the reference view is the last
    given_views: list[dict[str, Any]] = [
        {"img": torch.rand(3, *hw, generator=torch.Generator().manual_seed(i))} for i, hw in enumerate(sizes)
    ]
    given_views[0]["intrinsics"] = K
    prepared = prepare_views(given_views, size=(28, 42), reference=2)
    raw = [raw_output(i) for i in range(3)]
    at_model = postprocess(raw, prepared, known=known)
    outputs = postprocess(raw, prepared, known=known, original_size=True)
    for caller, (h, w) in enumerate(sizes):
        out, small = outputs[caller], at_model[caller]
        assert out.keys() == small.keys()
        torch.testing.assert_close(out["img_no_norm"][0], given_views[caller]["img"].permute(1, 2, 0))
        assert out["scene_flow"].shape == (1, 40, 63, 3)
        for key in ("pts3d", "pts3d_cam", "ray_directions", "depth_along_ray", "depth_z", "mask"):
            assert out[key].shape[1:3] == (h, w), key
        for key in ("conf", "non_ambiguous_mask", "non_ambiguous_mask_logits"):
            assert out[key].shape == (1, h, w) and out[key].dtype == small[key].dtype
        # The lens, whoever knew it, in pixels of the given size.
        lens = small["intrinsics"] if caller or known == "hint" else K[None]
        if caller or known == "hint":
            lens = geometry.resize_intrinsics(lens, (28, 42), (h, w))
        torch.testing.assert_close(out["intrinsics"], lens)
        rays = geometry.rays_from_intrinsics(out["intrinsics"], h, w)
        torch.testing.assert_close(out["ray_directions"], rays, atol=1e-4, rtol=1e-4)
        # Factors still compose, masked alike.
        points = out["ray_directions"] * out["depth_along_ray"]
        torch.testing.assert_close(out["pts3d_cam"], points)
        moved = geometry.transform_points(out["camera_poses"], points)
        torch.testing.assert_close(out["pts3d"], torch.where(out["mask"], moved, 0))
        assert (out["depth_along_ray"][~out["mask"]] == 0).all()
        # Interpolated before masking: no zero bleeds into what is kept.
        assert out["depth_along_ray"][out["mask"]].min() > 1.4


@pytest.mark.parametrize("original_size", [False, True])
def test_representations_without_factors(original_size: bool) -> None:
    prepared = prepare_views([{"img": torch.zeros(3, 40, 63)}], size=(28, 42))
    full = raw_output(0)
    pointmap = {"pts3d": full["pts3d"], "metric_scaling_factor": full["metric_scaling_factor"]}
    out = postprocess([pointmap], prepared, original_size=original_size)[0]
    assert set(out) == {"pts3d", "metric_scaling_factor", "img_no_norm", "mask"} and out["mask"].all()
    raymap = {key: full[key] for key in ("pts3d", "ray_directions", "depth_along_ray", "conf")}
    raymap["ray_origins"] = raymap["pts3d"] - raymap["ray_directions"] * raymap["depth_along_ray"]
    out = postprocess([raymap], prepared, original_size=original_size, apply_mask=False)[0]
    assert set(out) == {*raymap, "img_no_norm"}
    composed = out["ray_origins"] + out["ray_directions"] * out["depth_along_ray"]
    torch.testing.assert_close(out["pts3d"], composed, atol=1e-5, rtol=1e-5)
    assert out["pts3d"].shape == ((1, 40, 63, 3) if original_size else (1, 28, 42, 3))


def test_mask_needs_points() -> None:
    assert output_mask({"conf": torch.ones(1, 3, 3)}) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"known": "exact"}, 'known: expected "hint" or "keep", got str \'exact\''),
        ({"confidence_percentile": 101}, "confidence_percentile: expected 0 to 100, got int 101"),
        ({"confidence_percentile": math.nan}, "confidence_percentile"),
        ({"edge_normal_threshold": 0}, "edge_normal_threshold: expected a positive number"),
        ({"edge_depth_threshold": -1.0}, "edge_depth_threshold.*mask_edges=False"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        postprocess([raw_output(i) for i in range(3)], prepared_views(), **arguments)


def test_outputs_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="raw_outputs: expected one dictionary for each of 3 views, got 2"):
        postprocess([raw_output(i) for i in range(2)], prepared_views())
    pointmaps = [{"pts3d": raw_output(i)["pts3d"]} for i in range(3)]
    with pytest.raises(InputError, match="no camera to put in place"):
        postprocess(pointmaps, prepared_views(), known="keep")
