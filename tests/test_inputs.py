"""Views that a person has become the model's views: each conversion against its formula."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import roma
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from any4d_fast import geometry
from any4d_fast.inputs import InputError, prepare_views
from any4d_fast.resize import resize_dense, resize_image, resize_nearest, resize_rays, resize_sparse, target_size

H, W = 28, 42
K = torch.tensor([[30.0, 0.0, 20.0], [0.0, 32.0, 13.0], [0.0, 0.0, 1.0]])


def image(batch: int | None = None, h: int = H, w: int = W, seed: int = 0) -> Tensor:
    shape = (3, h, w) if batch is None else (batch, 3, h, w)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def pose(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    quats = torch.randn(4, generator=generator, dtype=dtype)
    return geometry.quats_trans_to_pose(quats, torch.randn(3, generator=generator, dtype=dtype))


def views(count: int = 3, **same: Any) -> list[dict[str, Any]]:
    return [{"img": image(seed=i), **same} for i in range(count)]


def test_image_layouts_and_types_agree(tmp_path: Path) -> None:
    from PIL import Image

    pixels = (image() * 255).round().to(torch.uint8)  # [3, H, W]
    array = pixels.permute(1, 2, 0).contiguous().numpy()  # [H, W, 3]
    Image.fromarray(array).save(tmp_path / "a.png")
    forms = [
        pixels, pixels[None], array, array[None], torch.from_numpy(array), pixels.float() / 255, pixels.double() / 255,
        array[:, ::-1][:, ::-1], array.astype(">f4") / 255, Image.fromarray(array), tmp_path / "a.png",
        str(tmp_path / "a.png"), Image.fromarray(array).convert("RGBA"),
    ]  # fmt: skip
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((pixels.permute(1, 2, 0).float() / 255 - mean) / std).permute(2, 0, 1)[None]
    for form in forms:
        prepared = prepare_views([{"img": form}])
        view = prepared.views[0]
        assert view["img"].dtype == torch.float32
        torch.testing.assert_close(view["img"], expected)
        assert view["data_norm_type"] == ["dinov2"]
        assert view["is_metric_scale"].tolist() == [True]
        torch.testing.assert_close(prepared.image(0)[0], pixels.permute(1, 2, 0).float() / 255)


def test_transparent_pixels_are_white_as_the_command_reads_them(tmp_path: Path) -> None:
    from PIL import Image

    from any4d_fast.io import load_image

    rgba = np.random.default_rng(0).integers(0, 255, (H, W, 4), dtype=np.uint8)
    rgba[:5, :, 3] = 0
    picture = Image.fromarray(rgba)
    picture.save(tmp_path / "a.png")
    expected = torch.from_numpy(load_image(tmp_path / "a.png")).float() / 255
    assert bool((expected[:5] == 1).all())
    for form in (picture, tmp_path / "a.png"):
        torch.testing.assert_close(prepare_views([{"img": form}]).image(0)[0], expected)


def test_path_is_turned_upright(tmp_path: Path) -> None:
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (W, H, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to view
    picture.save(tmp_path / "a.png", exif=exif)
    assert prepare_views([{"img": tmp_path / "a.png"}]).size == (H, W)


def test_normalised_image_passes_unchanged() -> None:
    img = torch.randn(2, 3, H, W)
    prepared = prepare_views([{"img": img, "data_norm_type": ["dinov2"]}])
    assert torch.equal(prepared.views[0]["img"], img)
    assert prepare_views([{"img": img, "data_norm_type": "dinov2"}], size=56).views[0]["img"].shape == (2, 3, 42, 56)


def test_rays_depth_and_known() -> None:
    depth = torch.rand(H, W) + 1
    depth[0, :5] = math.nan
    depth[1, :5] = 0
    view = {"img": image(), "intrinsics": K.tolist(), "depth_z": depth.numpy()}
    prepared = prepare_views([view])
    out, known = prepared.views[0], prepared.known[0]
    u, v = torch.meshgrid(torch.arange(W), torch.arange(H), indexing="xy")
    plane = torch.stack([(u - 20) / 30, (v - 13) / 32, torch.ones(H, W)], -1)
    unit = plane / plane.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(out["ray_directions_cam"][0], unit)
    points = torch.where(depth > 0, depth, 0)[..., None] * plane
    torch.testing.assert_close(out["depth_along_ray"][0] * unit, points)
    assert torch.equal(known.intrinsics, K[None]) and torch.equal(known.intrinsics_given, K[None])
    assert known.cam2world is None and "camera_pose_quats" not in out

    by_rays = prepare_views([{"img": image(), "ray_directions": plane * 3, "depth_z": depth[None, :, :, None]}])
    for key in ("ray_directions_cam", "depth_along_ray"):
        torch.testing.assert_close(by_rays.views[0][key], out[key])


@pytest.mark.parametrize("shape", [(H, W), (H, W, 1), (1, H, W), (1, H, W, 1)])
def test_depth_shapes(shape: tuple[int, ...]) -> None:
    out = prepare_views([{"img": image(), "intrinsics": K, "depth_z": torch.ones(shape)}]).views[0]
    assert out["depth_along_ray"].shape == (1, H, W, 1)


def test_rays_behind_the_camera_have_no_depth() -> None:
    rays = torch.randn(H, W, 3)
    rays[..., 2] = 1
    rays[:3, :, 2] = -1
    out = prepare_views([{"img": image(), "ray_directions": rays, "depth_z": torch.ones(H, W)}]).views[0]
    assert (out["depth_along_ray"][0, :3] == 0).all() and (out["depth_along_ray"][0, 3:] > 0).all()


def test_batch_and_broadcast() -> None:
    view = {
        "img": image(2), "intrinsics": K, "depth_z": torch.ones(2, H, W), "camera_poses": torch.eye(4),
        "is_metric_scale": np.array([True, False]),
    }  # fmt: skip
    out = prepare_views([view]).views[0]
    assert out["ray_directions_cam"].shape == (2, H, W, 3)
    assert out["camera_pose_quats"].shape == (2, 4)
    assert out["is_metric_scale"].tolist() == [True, False]


def test_poses_are_relative_to_the_reference_in_any_world() -> None:
    poses = [pose(i) for i in range(4)]
    # UTM-like coordinates, in which float32 would leave errors of a quarter of a metre.
    world = pose(9)
    world[:3, 3] = torch.tensor([5e6, 4e5, 120.0])
    local = prepare_views([{"img": image(), "camera_poses": p} for p in poses], reference=2)
    moved = prepare_views([{"img": image(), "camera_poses": (world @ p).numpy()} for p in poses], reference=2)
    assert local.order == [2, 0, 1, 3] and local.inverse == [1, 2, 0, 3] and local.reference == 2
    assert local.in_given_order(["c", "a", "b", "d"]) == ["a", "b", "c", "d"]
    assert torch.equal(local.known[0].cam2world, torch.eye(4)[None])
    for m, index in enumerate(local.order):
        expected = (torch.linalg.inv(poses[2]) @ poses[index]).float()[None]
        torch.testing.assert_close(local.known[m].cam2world, expected)
        torch.testing.assert_close(moved.known[m].cam2world, expected, atol=1e-6, rtol=1e-6)
        view = local.views[m]
        assert (view["camera_pose_quats"][:, 3] >= 0).all()
        again = geometry.quats_trans_to_pose(view["camera_pose_quats"], view["camera_pose_trans"])
        torch.testing.assert_close(again, expected)


def test_pose_forms_agree() -> None:
    matrices = [pose(i, torch.float32) for i in range(2)]
    pairs = [geometry.pose_to_quats_trans(p) for p in matrices]
    a = prepare_views([{"img": image(), "camera_poses": p} for p in matrices])
    b = prepare_views([{"img": image(), "camera_poses": (-3 * q, t[None])} for q, t in pairs])
    c = prepare_views([{"img": image(), "camera_poses": [q.tolist(), t.tolist()]} for q, t in pairs])
    for other in (b, c):
        torch.testing.assert_close(a.known[1].cam2world, other.known[1].cam2world, atol=1e-6, rtol=1e-5)
    two = prepare_views([{"img": image(2), "camera_poses": matrices}])
    assert two.known[0].cam2world.shape == (2, 4, 4)


def test_reference_pose_at_the_origin_keeps_others_bit_for_bit() -> None:
    given_pose = pose(3, torch.float32)
    prepared = prepare_views([{"img": image(), "camera_poses": p} for p in (torch.eye(4), given_pose)])
    assert torch.equal(prepared.known[1].cam2world[0], given_pose)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 2), st.booleans())
def test_imu_is_the_chain_of_relative_poses(seed: int, reference: int, as_quats: bool) -> None:
    poses = [pose(seed + i) for i in range(3)]
    given_views: list[dict[str, Any]] = []
    for i, p in enumerate(poses):
        step = torch.linalg.inv(poses[max(i - 1, 0)]) @ p
        rotation = roma.rotmat_to_unitquat(step[:3, :3]) if as_quats else step[:3, :3]
        given_views.append({"img": image()} | ({"imu": (rotation, step[:3, 3])} if i else {}))
    prepared = prepare_views(given_views, reference=reference)
    expected = prepare_views([{"img": image(), "camera_poses": p} for p in poses], reference=reference)
    for a, b in zip(prepared.known, expected.known, strict=True):
        torch.testing.assert_close(a.cam2world, b.cam2world, atol=1e-5, rtol=1e-5)


def test_the_first_frames_imu_is_not_used() -> None:
    step = (torch.eye(3), torch.ones(3))
    prepared = prepare_views(views(2, imu=step))
    assert torch.equal(prepared.known[1].cam2world[0, :3, 3], torch.ones(3))


def doppler_views() -> list[dict[str, Any]]:
    doppler = torch.full((H, W), math.nan)
    doppler[3:5, 4:9] = 2.0
    return [{"img": image(), "intrinsics": K, "doppler": doppler, "timestamps": 10.0 + 0.5 * i} for i in range(3)]


def test_doppler_becomes_flow_along_the_ray() -> None:
    prepared = prepare_views(doppler_views(), reference=1)
    for m, seconds in enumerate((0.0, -0.5, 0.5)):
        flow, rays = prepared.views[m]["radial_scene_flow"], prepared.views[m]["ray_directions_cam"]
        expected = torch.zeros(1, H, W, 3)
        expected[:, 3:5, 4:9] = 2 * seconds * rays[:, 3:5, 4:9]
        torch.testing.assert_close(flow, expected)
    assert prepared.geometric_input_config["doppler_prob"] == 1


def mean_distance(view: dict[str, Any]) -> float:
    points, valid = view["pts3d_cam"], view["valid_mask"]
    return float(points[valid].norm(dim=-1).mean())


def test_doppler_is_normalised_by_the_references_depth_then_others_then_one_metre() -> None:
    given_views = doppler_views()
    assert mean_distance(prepare_views(given_views).views[0]) == pytest.approx(1)
    sparse = torch.zeros(H, W)
    sparse[7, 9], sparse[20, 30] = 4.0, 8.0  # a radar's ranges
    plane = geometry.rays_from_intrinsics(K, H, W, unit=False)
    expected = (4 * plane[7, 9].norm() + 8 * plane[20, 30].norm()).item() / 2
    given_views[1]["depth_z"] = sparse
    for reference in (0, 1):
        prepared = prepare_views(given_views, reference=reference)
        assert mean_distance(prepared.views[0]) == pytest.approx(expected)
        assert prepared.views[0]["valid_mask"].sum() == (2 if reference == 1 else H * W)
    assert mean_distance(prepare_views(given_views, reference=1, ignore_depth_inputs=True).views[0]) == pytest.approx(1)
    assert "pts3d_cam" not in prepare_views(given_views, ignore_doppler_inputs=True).views[0]


def test_doppler_of_the_reference_alone_warns() -> None:
    given_views = doppler_views()
    del given_views[1]["doppler"], given_views[2]["doppler"]
    with pytest.warns(UserWarning, match="no more than a flow of zero"):
        prepare_views(given_views)
    given_views[1]["doppler"] = torch.full((H, W), math.nan)
    with pytest.warns(UserWarning, match="no more than a flow of zero"):
        assert "radial_scene_flow" not in prepare_views(given_views).views[1]


def test_depth_without_a_known_pixel_is_left_out_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"views\[0\].*no pixel is known"):
        prepared = prepare_views([{"img": image(), "intrinsics": K, "depth_z": torch.zeros(H, W)}])
    assert "depth_along_ray" not in prepared.views[0] and prepared.geometric_input_config["depth_prob"] == 0


def test_ignore_switches() -> None:
    full = [{"img": image(), "intrinsics": K, "depth_z": torch.ones(H, W), "camera_poses": pose(i)} for i in range(2)]
    plain = prepare_views(full)
    config = plain.geometric_input_config
    assert (config["ray_dirs_prob"], config["depth_prob"], config["cam_prob"], config["doppler_prob"]) == (1, 1, 1, 0)
    lens = prepare_views(full, ignore_calibration_inputs=True)
    assert "ray_directions_cam" not in lens.views[0] and lens.known[0].intrinsics is None
    assert torch.equal(lens.views[0]["depth_along_ray"], plain.views[0]["depth_along_ray"])
    assert "depth_along_ray" not in prepare_views(full, ignore_depth_inputs=True).views[0]
    posed = prepare_views(full, ignore_pose_inputs=True)
    assert "camera_pose_quats" not in posed.views[0] and posed.known[1].cam2world is None
    scaled = prepare_views(full, ignore_depth_scale_inputs=True).geometric_input_config
    assert (scaled["depth_scale_norm_all_prob"], scaled["pose_scale_norm_all_prob"]) == (1, 0)
    # What is ignored may be in contradiction with the rest.
    prepare_views([{"img": image(), "depth_z": torch.ones(3)}], ignore_depth_inputs=True)


def test_none_means_not_given_and_information_is_passed_on() -> None:
    view = {"img": image(), "intrinsics": None, "depth_z": None, "camera_poses": None, "idx": [7], "instance": ["a"]}
    out = prepare_views([view]).views[0]
    assert out["idx"] == [7] and out["instance"] == ["a"] and "ray_directions_cam" not in out


@pytest.mark.parametrize(
    ("given_hw", "size", "expected"),
    [
        ((28, 42), None, (28, 42)),
        ((480, 640), None, (392, 518)),
        ((640, 480), None, (518, 392)),
        ((1000, 1500), None, (336, 518)),
        ((720, 1280), None, (294, 518)),
        ((100, 100), None, (518, 518)),
        ((480, 640), 224, (168, 224)),
        ((480, 640), 512, (392, 518)),
        ((10, 1000), 280, (14, 280)),
        ((480, 640), (56, 70), (56, 70)),
    ],
)
def test_target_size(given_hw: tuple[int, int], size: Any, expected: tuple[int, int]) -> None:
    assert target_size(given_hw, size, 14) == expected


@pytest.mark.parametrize("target", [(14, 28), (56, 42), (84, 98), (28, 42)])
def test_resizing_keeps_a_plane_where_it_is(target: tuple[int, int]) -> None:
    """Frontal plane at 2 m: every resized pixel with K or rays unprojects onto it, at the place its centre sees."""
    plane = geometry.rays_from_intrinsics(K, H, W, unit=False)
    for lens in ({"intrinsics": K}, {"ray_directions": plane}):
        prepared = prepare_views([{"img": image(), "depth_z": torch.full((H, W), 2.0), **lens}], size=target)
        out = prepared.views[0]
        points = out["depth_along_ray"] * out["ray_directions_cam"]
        v, u = torch.meshgrid(torch.arange(target[0]) + 0.5, torch.arange(target[1]) + 0.5, indexing="ij")
        given_u, given_v = u * W / target[1] - 0.5, v * H / target[0] - 0.5
        expected = torch.stack([(given_u - 20) / 30 * 2, (given_v - 13) / 32 * 2, torch.full(target, 2.0)], -1)
        torch.testing.assert_close(points[0], expected, atol=1e-5, rtol=1e-5)
        assert prepared.sizes[0].given == (H, W) and prepared.sizes[0].model == target


def test_resized_depth_stays_within_half_a_given_pixel_of_a_slanted_plane() -> None:
    rays = geometry.rays_from_intrinsics(K, H, W, unit=False)
    depth = 2 / (1 - 0.3 * rays[..., 0] - 0.2 * rays[..., 1])  # plane z = 2 + 0.3 x + 0.2 y
    out = prepare_views([{"img": image(), "intrinsics": K, "depth_z": depth}], size=(14, 28)).views[0]
    x, y, z = (out["depth_along_ray"] * out["ray_directions_cam"])[0].unbind(-1)
    # Nearest sampling takes depth up to half a given pixel beside the new centre; slope times footprint bounds it.
    bound = 0.5 * (0.3 / 30 + 0.2 / 32) * depth.max() ** 2 / 2
    assert (z - (2 + 0.3 * x + 0.2 * y)).abs().max() < bound * 1.5


def test_resized_intrinsics_go_back_exactly() -> None:
    there = geometry.resize_intrinsics(K.double(), (H, W), (70, 14))
    torch.testing.assert_close(geometry.resize_intrinsics(there, (70, 14), (H, W)), K.double())


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 40), st.integers(1, 40))
def test_pinhole_rays_resize_exactly(h: int, w: int, new_h: int, new_w: int) -> None:
    rays = geometry.rays_from_intrinsics(K.double(), h, w)[None]
    resized = resize_rays(rays, (new_h, new_w))
    expected = geometry.rays_from_intrinsics(
        geometry.resize_intrinsics(K.double(), (h, w), (new_h, new_w)), new_h, new_w
    )
    torch.testing.assert_close(resized[0], expected)


def test_bilinear_matches_torch() -> None:
    x = torch.randn(2, 9, 7, 3, dtype=torch.float64)
    for hw in ((18, 15), (5, 30), (1, 1)):
        expected = torch.nn.functional.interpolate(x.permute(0, 3, 1, 2), hw, mode="bilinear", align_corners=False)
        torch.testing.assert_close(resize_dense(x, hw), expected.permute(0, 2, 3, 1))
        nearest = torch.nn.functional.interpolate(x.permute(0, 3, 1, 2), hw, mode="nearest-exact")
        assert torch.equal(resize_nearest(x, hw), nearest.permute(0, 2, 3, 1))
    assert resize_image(image(1), (H, W)).shape == (1, 3, H, W)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 20), st.integers(1, 20), st.integers(1, 30), st.integers(1, 30))
def test_sparse_values_neither_mix_nor_get_lost(seed: int, h: int, w: int, new_h: int, new_w: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.where(torch.rand(2, h, w, 1, generator=generator) < 0.1, 1.0, math.nan)
    values = values * torch.rand(2, h, w, 1, generator=generator)
    out = resize_sparse(values, (new_h, new_w))
    assert out.shape == (2, new_h, new_w, 1)
    for b in range(2):
        had, has = set(values[b][~values[b].isnan()].tolist()), set(out[b][~out[b].isnan()].tolist())
        assert has <= had
        # A new pixel that an old known pixel's centre falls into is known.
        ys, xs, _ = (~values[b].isnan()).nonzero(as_tuple=True)
        rows = ((ys.double() + 0.5) * (new_h / h)).floor().long().clamp(max=new_h - 1)
        columns = ((xs.double() + 0.5) * (new_w / w)).floor().long().clamp(max=new_w - 1)
        if new_h < h or new_w < w:
            assert not out[b, rows, columns].isnan().any()


def test_views_of_different_given_sizes_meet_at_one_size() -> None:
    prepared = prepare_views([{"img": image(h=30, w=40)}, {"img": image(h=60, w=90)}], size=(28, 42))
    assert [view["img"].shape for view in prepared.views] == [(1, 3, 28, 42)] * 2
    assert prepared.image(1, given_size=True).shape == (1, 60, 90, 3)
    torch.testing.assert_close(prepared.image(1, given_size=True)[0], image(h=60, w=90).permute(1, 2, 0))


def test_inputs_are_not_changed() -> None:
    given_views = doppler_views()
    given_views[0]["depth_z"] = torch.zeros(H, W)
    given_views[0]["depth_z"][0] = math.nan
    given_views[0]["depth_z"][1] = 3
    before = [{k: v.clone() if isinstance(v, Tensor) else v for k, v in view.items()} for view in given_views]
    prepare_views(given_views, size=56)
    for a, b in zip(before, given_views, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            if isinstance(value, Tensor):
                assert torch.equal(value.nan_to_num(-1), b[key].nan_to_num(-1))


def test_known_keep_refuses_poses_of_another_unit() -> None:
    prepared = prepare_views([{"img": image(), "camera_poses": pose(i), "is_metric_scale": False} for i in range(2)])
    prepared.check_known("hint")
    with pytest.raises(InputError, match="metres"):
        prepared.check_known("keep")
    with pytest.raises(InputError, match='"hint" or "keep"'):
        prepared.check_known("exact")
