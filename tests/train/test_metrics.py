"""The metrics against cases computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from any4d_fast.geometry import pose_to_quats_trans
from any4d_fast.train.batch import Batch
from any4d_fast.train.metrics import (
    Accumulator,
    depth_errors,
    direction_angle,
    evaluate,
    masked_mean,
    masked_median,
    point_errors,
    pose_auc,
    rotation_angle,
)

NAN = float("nan")


def turn(degrees: float, axis: int = 2) -> Tensor:
    """A rotation about one axis."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = torch.eye(3)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
    return matrix


def pose(degrees: float = 0.0, place: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Tensor:
    matrix = torch.eye(4)
    matrix[:3, :3], matrix[:3, 3] = turn(degrees), torch.tensor(place)
    return matrix


def make_batch(**changes: Tensor) -> Batch:
    """One sample of two views of 1 x 4 pixels: the scene is 2 m ahead; the camera moves to the right by 1 m."""
    shape = (1, 2, 1, 4)
    rays = torch.zeros(*shape, 3)
    rays[..., 2] = 1
    flow = torch.zeros(*shape, 3)
    flow[:, 1, :, :2, 1] = 1.0  # the first two points sink by 1 m
    values = {
        "images": torch.zeros(1, 2, 3, 1, 4),
        "ray_directions": rays,
        "depth_along_ray": torch.full((*shape, 1), 2.0),
        "camera_poses": torch.stack([pose(), pose(0, (1.0, 0.0, 0.0))])[None],
        "scene_flow": flow,
        "depth_mask": torch.ones(shape, dtype=torch.bool),
        "flow_mask": torch.ones(shape, dtype=torch.bool),
        "dynamic_mask": torch.tensor([True, True, False, False]).expand(shape).clone(),
        "surface_mask": torch.ones(shape, dtype=torch.bool),
        **{name: torch.tensor([True]) for name in ("has_rays", "has_poses", "has_surface", "is_metric")},
    }
    return Batch(**(values | changes))


def right(batch: Batch, scale: float = 1.0) -> list[dict[str, Tensor]]:
    """The truth as the model's outputs, times a scale."""
    quats, trans = pose_to_quats_trans(batch.camera_poses)
    return [
        {
            "pts3d": scale * batch.pts3d[:, i],
            "scene_flow": scale * batch.scene_flow[:, i],
            "depth_along_ray": scale * batch.depth_along_ray[:, i],
            "cam_trans": scale * trans[:, i],
            "cam_quats": quats[:, i],
        }
        for i in range(batch.num_views)
    ]


def numbers(outputs: list[dict[str, Tensor]], batch: Batch) -> dict[str, float]:
    return {name: float(value) for name, value in evaluate(outputs, batch).items()}


def test_the_truth_is_perfect() -> None:
    found = numbers(right(make_batch()), make_batch())
    for name, value in found.items():
        perfect = any(part in name for part in ("delta", "apd", "inlier", "auc"))
        moved = name in ("flow_epe_dynamic_zero", "translation_error_zero")  # baselines: by one metre, without a turn
        expected = 1.0 if perfect or moved else 0.0
        assert value == pytest.approx(expected, abs=1e-6), name


def test_twice_as_large() -> None:
    """Metres are wrong by a factor of two; what is scaled is perfect."""
    batch = make_batch()
    found = numbers(right(batch, 2.0), batch)
    assert found["scale_error"] == pytest.approx(1.0)
    assert found["depth_abs_rel"] == pytest.approx(0, abs=1e-6) and found["depth_delta_1_25"] == 1
    assert found["depth_abs_rel_metric"] == pytest.approx(1.0) and found["depth_delta_1_25_metric"] == 0
    assert found["points_abs_rel"] == pytest.approx(0, abs=1e-6)
    # Moving points: 2 m of flow for 1 m; resting ones: right.
    assert found["flow_epe"] == pytest.approx(0.5) and found["flow_epe_dynamic"] == pytest.approx(1.0)
    assert found["flow_epe_static"] == 0 and found["flow_epe_scaled"] == pytest.approx(0, abs=1e-6)
    assert found["flow_inlier_0_1m"] == 0.5 and found["flow_inlier_0_1m_dynamic"] == 0
    # Tracks: (0, 1, 2) becomes (0, 2, 4), and (0, 0, 2) becomes (0, 0, 4).
    assert found["track_epe_dynamic"] == pytest.approx(math.sqrt(5)) and found["track_epe_static"] == pytest.approx(2)
    assert found["track_epe"] == pytest.approx((math.sqrt(5) + 2) / 2)
    assert found["track_apd_scaled"] == 1 and found["track_apd"] == 0
    assert found["translation_error"] == pytest.approx(1.0)
    assert found["translation_error_scaled"] == pytest.approx(0, abs=1e-6)
    assert found["pose_auc_5"] == 1


def test_flow_that_is_off() -> None:
    batch = make_batch()
    outputs = right(batch)
    flow = outputs[1]["scene_flow"].clone()
    flow[0, 0, :, 0] += torch.tensor([0.05, 0.2, 0.4, 2.0])
    outputs[1]["scene_flow"] = flow
    found = numbers(outputs, batch)
    assert found["flow_epe"] == pytest.approx((0.05 + 0.2 + 0.4 + 2.0) / 4)
    assert found["flow_epe_dynamic"] == pytest.approx(0.125) and found["flow_epe_static"] == pytest.approx(1.2)
    # Below 0.1, 0.3, 0.5 and 1 m: one, two, three and three of four.
    assert found["flow_apd"] == pytest.approx((1 + 2 + 3 + 3) / 16)
    assert found["flow_inlier_0_1m"] == 0.25 and found["flow_inlier_0_1m_dynamic"] == 0.5
    assert found["track_epe"] == pytest.approx(found["flow_epe"])
    assert found["flow_epe_dynamic_zero"] == 1.0


def test_view_0_and_masked_pixels_do_not_count() -> None:
    batch = make_batch()
    batch.flow_mask[0, 1, 0, 3] = False
    batch.scene_flow[0, 1, 0, 3] = NAN
    outputs = right(batch)
    outputs[0]["scene_flow"] = outputs[0]["scene_flow"] + 5
    found = numbers(outputs, batch)
    assert found["flow_epe"] == 0 and found["flow_apd"] == 1 and found["track_epe"] == 0


def test_depth() -> None:
    target = torch.tensor([[1.0, 2.0, 4.0, 0.0, NAN]])
    pred = torch.tensor([[1.2, 1.5, 5.2, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    abs_rel, delta = depth_errors(pred, target, mask)
    assert float(abs_rel) == pytest.approx((0.2 + 0.25 + 0.3) / 3) and float(delta) == pytest.approx(1 / 3)


def test_depth_is_scaled_by_medians() -> None:
    batch = make_batch(depth_along_ray=torch.tensor([1.0, 2.0, 3.0, 40.0]).view(1, 1, 1, 4, 1).repeat(1, 2, 1, 1, 1))
    outputs = right(batch)
    for view in outputs:
        view["depth_along_ray"] = torch.tensor([0.5, 1.0, 1.5, 10.0]).view(1, 1, 4, 1)
    found = numbers(outputs, batch)
    # Medians are 2 and 1; scaled by 2 only the last one is wrong, by half.
    assert found["depth_abs_rel"] == pytest.approx(0.5 / 4) and found["depth_delta_1_25"] == 0.75
    assert found["depth_abs_rel_metric"] == pytest.approx((0.5 * 3 + 0.75) / 4)


def test_point_errors() -> None:
    error, mask = torch.tensor([[0.05, 0.25, 0.45, 0.95, NAN]]), torch.tensor([[True] * 4 + [False]])
    epe, apd, inlier = point_errors(error, mask)
    assert float(epe) == pytest.approx(1.7 / 4)
    assert float(apd) == pytest.approx((1 + 2 + 3 + 4) / 16) and float(inlier) == 0.25


@pytest.mark.parametrize("degrees", [0.0, 1e-3, 1.0, 90.0, 179.0, 180.0])
def test_rotation_angle(degrees: float) -> None:
    axis = turn(37, 0) @ turn(11, 1)
    found = float(rotation_angle(axis, axis @ turn(degrees)))
    # Entries of the matrices are rounded to 6e-8; near 180 degrees the angle's error is that one's square root.
    assert found == pytest.approx(degrees, abs=2e-5 if degrees < 170 else 0.05)


def test_direction_angle() -> None:
    def between(a: list[float], b: list[float]) -> float:
        return float(direction_angle(torch.tensor(a), torch.tensor(b)))

    assert between([1, 0, 0], [2, 2, 0]) == pytest.approx(45)
    assert between([1, 0, 0], [-3, 0, 0]) == pytest.approx(0)  # one line
    assert between([1, 0, 0], [0, 0, 1]) == pytest.approx(90)
    assert between([0, 0, 0], [0, 0, 0]) == 0 and between([0, 0, 0], [0, 0, 1]) == 90


def test_rotation_and_translation() -> None:
    poses = torch.stack([pose(), pose(10, (1, 0, 0)), pose(20, (0, 2, 0)), pose(30, (0, 0, 3))])[None]
    maps = {k: v[:, :1].expand(1, 4, *v.shape[2:]) for k, v in vars(make_batch()).items() if v.ndim > 1}
    batch = make_batch(**(maps | {"camera_poses": poses}))
    wrong = torch.stack([pose(), pose(11, (1, 0, 0.5)), pose(24, (0, 2, 1)), pose(60, (0, 0, 3))])[None]
    outputs = right(batch)
    quats, trans = pose_to_quats_trans(wrong)
    for i, view in enumerate(outputs):
        view["cam_quats"], view["cam_trans"] = quats[:, i], trans[:, i]
    found = numbers(outputs, batch)
    assert found["rotation_degrees"] == pytest.approx(4, abs=1e-3)  # of 1, 4 and 30; view 0 does not count
    assert found["translation_error"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert found["rotation_degrees_zero"] == pytest.approx(20, abs=1e-3)
    assert found["translation_error_zero"] == pytest.approx(2)


def test_pose_auc() -> None:
    """Two views: the one pair's error is the larger of rotation and direction."""
    target = torch.stack([pose(), pose(0, (1, 0, 0))])[None]
    for rotation, direction, expected in (
        (0, 0, (1, 1, 1)),
        (7.5, 2, (0, 8 / 15, 23 / 30)),
        (2, 20.5, (0, 0, 10 / 30)),
    ):
        place = (math.cos(math.radians(direction)), math.sin(math.radians(direction)), 0.0)
        pred = torch.stack([pose(), pose(rotation, place)])[None]
        assert [float(x) for x in pose_auc(pred, target)] == pytest.approx(expected)
    assert all(x.isnan().all() for x in pose_auc(target[:, :1], target[:, :1]))
    # Of three pairs, those with the turned view fail.
    target = torch.stack([pose(), pose(0, (1, 0, 0)), pose(0, (0, 1, 0))])[None]
    pred = torch.stack([pose(), pose(0, (1, 0, 0)), pose(90, (0, 1, 0))])[None]
    assert float(pose_auc(pred, target, [5])[0]) == pytest.approx(1 / 3)


def test_a_sample_that_is_not_metric() -> None:
    batch = make_batch(is_metric=torch.tensor([False]))
    found = numbers(right(batch, 2.0), batch)
    undefined = {name for name, value in found.items() if math.isnan(value)}
    assert undefined == {
        *("scale_error", "depth_abs_rel_metric", "depth_delta_1_25_metric"),
        *(name for name in found if "apd" in name or "inlier" in name),
    }
    assert found["flow_epe"] == found["track_epe"] == found["translation_error"] == pytest.approx(0, abs=1e-6)


def test_what_is_not_known_is_not_measured() -> None:
    no = torch.tensor([False])
    batch = make_batch(has_poses=no, camera_poses=torch.full((1, 2, 4, 4), NAN))
    outputs = right(make_batch())
    undefined = {name for name, value in numbers(outputs, batch).items() if math.isnan(value)}
    assert {"rotation_degrees", "translation_error", "pose_auc_5", "scale_error", "points_abs_rel"} <= undefined
    assert not {"flow_epe", "flow_apd", "depth_abs_rel", "depth_abs_rel_metric"} & undefined
    assert {"track_epe", "flow_epe_scaled", "flow_apd_scaled"} <= undefined

    empty = torch.zeros(1, 2, 1, 4, dtype=torch.bool)
    batch = make_batch(depth_mask=empty, flow_mask=empty, has_poses=no)
    assert all(math.isnan(value) for value in numbers(outputs, batch).values())
    batch = make_batch(dynamic_mask=empty)
    found = numbers(outputs, batch)
    assert math.isnan(found["flow_epe_dynamic"]) and math.isnan(found["flow_epe_dynamic_zero"])
    assert found["flow_epe"] == found["flow_epe_static"] == 0


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["pts3d", "depth_along_ray", "scene_flow", "cam_quats", "cam_trans"])
def test_a_prediction_that_is_not_finite_stays_in_the_average(key: str, value: float) -> None:
    batch = make_batch()
    outputs, good = right(batch), numbers(right(batch), batch)
    outputs[1][key] = torch.full_like(outputs[1][key], value)
    found = numbers(outputs, batch)
    assert found.keys() == good.keys() and not any(math.isnan(found[name]) for name in good if good[name] == good[name])
    changed = {name for name in good if found[name] != good[name] and good[name] == good[name]}
    assert changed  # fractions fall below 1, and errors are infinite
    assert all(found[name] < 1 if good[name] == 1 else found[name] == math.inf for name in changed)
    unknown = make_batch(has_poses=torch.tensor([False]), depth_mask=torch.zeros_like(batch.depth_mask))
    for name in numbers(right(unknown), unknown):
        assert math.isnan(numbers(outputs, unknown)[name]) == math.isnan(numbers(right(unknown), unknown)[name])


def test_a_single_pixel_that_is_not_finite_counts_where_there_is_truth() -> None:
    batch = make_batch()
    batch.depth_mask[0, 1, 0, 3] = False
    outputs = right(batch)
    outputs[1]["depth_along_ray"] = outputs[1]["depth_along_ray"].clone()
    outputs[1]["depth_along_ray"][0, 0, 3] = math.inf
    assert numbers(outputs, batch)["depth_abs_rel"] == 0
    outputs[1]["depth_along_ray"][0, 0, 2] = NAN
    assert numbers(outputs, batch)["depth_abs_rel"] == math.inf


def test_one_view() -> None:
    batch = make_batch()
    batch = Batch(**{k: v[:, :1] if v.ndim > 1 else v for k, v in vars(batch).items()})
    found = numbers(right(batch), batch)
    assert math.isnan(found["flow_epe"]) and math.isnan(found["rotation_degrees"]) and found["depth_abs_rel"] == 0


def test_masked_statistics() -> None:
    values, mask = torch.tensor([[1.0, 5.0, NAN, 3.0], [1.0, 2.0, 3.0, 4.0]]), torch.ones(2, 4, dtype=torch.bool)
    mask[0, 2], mask[1] = False, False
    assert masked_mean(values, mask).tolist()[0] == 3 and masked_mean(values, mask)[1].isnan()
    assert masked_median(values, mask).tolist()[0] == 3 and masked_median(values, mask)[1].isnan()


def test_accumulator() -> None:
    accumulator = Accumulator()
    accumulator.add({"flow_epe": torch.tensor([1.0, NAN]), "rotation_degrees": torch.tensor([1.0, 2.0])})
    accumulator.add(
        {"flow_epe": torch.tensor([4.0]), "rotation_degrees": torch.tensor([90.0]), "x": torch.tensor([NAN])}
    )
    result = accumulator.result()
    assert result["flow_epe"] == 2.5 and result["rotation_degrees"] == 2 and math.isnan(result["x"])
    assert accumulator.counts() == {"flow_epe": 2, "rotation_degrees": 3, "x": 0}
    assert accumulator.values()["rotation_degrees"].tolist() == [1, 2, 90]


def test_errors() -> None:
    with pytest.raises(ValueError, match="2 views, got 1"):
        evaluate(right(make_batch())[:1], make_batch())
