"""Factor composition against uniception's adaptors, composed by hand as upstream's forward composes them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from any4d_fast.config import DENSE_PARTS, PART_CHANNELS, AdaptorConfig
from any4d_fast.config_upstream import from_upstream, to_upstream
from any4d_fast.modules import factors
from any4d_fast.testing import relative_error
from tests.oracles import FORWARD_BUDGET, needs_oracles, upstream
from tests.small_models import REPRESENTATIONS, small_config, small_scene

INF = float("inf")
B, V, H, W = 2, 3, 4, 5

DENSE_ADAPTORS = {
    "pointmap": "PointMap",
    "raymap+depth": "RayMapPlusDepth",
    "raydirs+depth+pose": "RayDirectionsPlusDepth",
    "campointmap+pose": "PointMap",
    "pointmap+raydirs+depth+pose": "PointMapPlusRayDirectionsPlusDepth",
}
"""uniception's class of each representation's dense adaptor; `With...Adaptor` is appended."""

RAYS = {
    "ray_directions_mode": "linear",
    "ray_directions_normalize_to_unit_sphere": True,
    "ray_directions_normalize_to_unit_image_plane": False,
    "ray_directions_vmin": -INF,
    "ray_directions_vmax": INF,
    "ray_directions_clamp_min_of_z_dir": False,
    "ray_directions_z_dir_min": -INF,
}
PARTS = {
    "points": {"pointmap_mode": "exp", "pointmap_vmin": -INF, "pointmap_vmax": INF},
    "ray_origins": {"ray_origins_mode": "linear", "ray_origins_vmin": -INF, "ray_origins_vmax": INF},
    "ray_directions": RAYS,
    "depth": {"depth_mode": "exp", "depth_vmin": 0, "depth_vmax": INF},
}
CONFIDENCE = {"confidence_type": "exp", "confidence_vmin": 1, "confidence_vmax": INF}
POSE = {
    "cam_trans_mode": "linear", "cam_trans_vmin": -INF, "cam_trans_vmax": INF, "quaternions_mode": "linear",
    "quaternions_normalize": True, "quaternions_vmin": -INF, "quaternions_vmax": INF,
}  # fmt: skip
SINGLE = {"mode": "linear", "vmin": -INF, "vmax": INF}
SCALE = {"mode": "exp", "vmin": 1e-8, "vmax": INF}


class Case:
    """One choice of representation and adaptor options, as upstream's dictionaries."""

    def __init__(
        self,
        representation: str = "raydirs+depth+pose",
        confidence: bool = True,
        mask: bool = True,
        *,
        factored: bool = True,
        dense: dict[str, Any] | None = None,
        pose: dict[str, Any] | None = None,
        flow: dict[str, Any] | None = None,
        scale: dict[str, Any] | None = None,
    ) -> None:
        self.representation, self.confidence, self.mask, self.factored = representation, confidence, mask, factored
        options = {k: v for part in DENSE_PARTS[representation] for k, v in PARTS[part].items()}
        options |= (CONFIDENCE if confidence else {}) | (dense or {})
        if DENSE_ADAPTORS[representation] == "PointMap" and not (confidence or mask):
            options = {k.removeprefix("pointmap_"): v for k, v in options.items()}
        self.dense = options
        self.pose, self.flow, self.scale = POSE | (pose or {}), SINGLE | (flow or {}), SCALE | (scale or {})

    def compose(self, raw: dict[str, Tensor]) -> dict[str, Tensor]:
        """Ours, through the translation of upstream's dictionaries."""
        arguments = to_upstream(small_config(small_scene(self.representation, self.confidence, self.mask)))
        heads = arguments["pred_head_config"]
        heads["dpt_adaptor" if self.representation.endswith("pose") else "adaptor"] = self.dense
        if not self.representation.endswith("pose"):
            heads.pop("dpt_adaptor")
        heads |= {"pose_adaptor": self.pose, "scale_adaptor": self.scale}
        heads["adaptor_config"] = {"use_factored_predictions_for_global_pointmaps": self.factored}
        arguments["scene_flow_pred_head_config"]["dpt_adaptor"] = self.flow
        scene = from_upstream(**arguments).scene
        return factors.compose(scene, raw["geometry"], raw["flow"], raw["pose"], raw["log_scale"])

    def raw(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(3)
        channels = sum(PART_CHANNELS[p] for p in DENSE_PARTS[self.representation]) + self.confidence + self.mask
        n = V * B
        shapes = {"geometry": (n, H, W, channels), "flow": (n, H, W, 3), "pose": (n, 7), "log_scale": (B, 1)}
        return {k: torch.randn(shape, generator=generator).requires_grad_() for k, shape in shapes.items()}


def adapt(name: str, options: dict[str, Any], channels_first: Tensor) -> Any:
    given = upstream("prediction_heads.base").AdaptorInput(adaptor_feature=channels_first, output_shape_hw=(H, W))
    return getattr(upstream("prediction_heads.adaptors"), name)(name="adaptor", **options)(given)


def rotate(quats: Tensor, vectors: Tensor) -> Tensor:
    """Rotate [N, H, W, 3] by [N, 4] quaternions (x, y, z, w): v + 2 w (q x v) + 2 q x (q x v)."""
    quats = quats / quats.norm(dim=-1, keepdim=True)
    axis = quats[:, None, None, :3].expand_as(vectors)
    once = torch.linalg.cross(axis, vectors)
    return vectors + 2 * quats[:, None, None, 3:] * once + 2 * torch.linalg.cross(axis, once)


def expected_outputs(case: Case, raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adaptors of uniception, then the composition: cam2world on the points of the camera, all lengths in metres."""
    name = DENSE_ADAPTORS[case.representation] + {
        (False, False): "Adaptor",
        (True, False): "WithConfidenceAdaptor",
        (False, True): "WithMaskAdaptor",
        (True, True): "WithConfidenceAndMaskAdaptor",
    }[case.confidence, case.mask]  # fmt: skip
    dense = adapt(name, case.dense, raw["geometry"].permute(0, 3, 1, 2))
    flow = adapt("SceneFlowAdaptor", case.flow, raw["flow"].permute(0, 3, 1, 2)).value.permute(0, 2, 3, 1)
    scale = adapt("ScaleAdaptor", case.scale, raw["log_scale"][..., None]).value[..., 0]  # [B, 1]
    metres = scale.repeat(V, 1)[:, :, None, None]  # [V * B, 1, 1, 1]
    values = dense.value.permute(0, 2, 3, 1).split([PART_CHANNELS[p] for p in DENSE_PARTS[case.representation]], dim=-1)
    parts = dict(zip(DENSE_PARTS[case.representation], values, strict=True))
    out = {"scene_flow": flow * metres, "metric_scaling_factor": scale}
    if case.representation == "pointmap":
        out["pts3d"] = parts["points"] * metres
    elif case.representation == "raymap+depth":
        out["pts3d"] = (parts["ray_origins"] + parts["ray_directions"] * parts["depth"]) * metres
        out["ray_origins"] = parts["ray_origins"] * metres
    else:
        trans, quats = adapt("CamTranslationPlusQuatsAdaptor", case.pose, raw["pose"]).value.split([3, 4], dim=-1)
        if case.representation == "campointmap+pose":
            parts["depth"] = parts["points"].norm(dim=-1, keepdim=True)
            parts["ray_directions"] = parts["points"] / parts["depth"]
        camera = parts["ray_directions"] * parts["depth"]
        world = rotate(quats, camera) + trans[:, None, None]
        if case.representation.startswith("pointmap") and not case.factored:
            world = parts["points"]
        out |= {"pts3d": world * metres, "pts3d_cam": camera * metres}
        out |= {"cam_trans": trans * metres[:, :, 0, 0], "cam_quats": quats}
    if "depth" in parts:
        out |= {"ray_directions": parts["ray_directions"], "depth_along_ray": parts["depth"] * metres}
    if case.confidence:
        out["conf"] = dense.confidence[:, 0]
    if case.mask:
        out |= {"non_ambiguous_mask": dense.mask[:, 0] > 0.5, "non_ambiguous_mask_logits": dense.logits[:, 0]}
    return out


def check(case: Case) -> None:
    mine, theirs = case.raw(), case.raw()
    found, expected = case.compose(mine), expected_outputs(case, theirs)
    assert set(found) == set(expected)
    generator = torch.Generator().manual_seed(4)
    outputs, expected_list, cotangents = [], [], []
    for key, value in expected.items():
        if value.dtype == torch.bool:
            assert torch.equal(found[key], value), key
            continue
        assert relative_error(found[key], value) <= FORWARD_BUDGET, key
        outputs.append(found[key])
        expected_list.append(value)
        cotangents.append(torch.randn(value.shape, generator=generator))
    torch.autograd.backward(outputs, cotangents)
    torch.autograd.backward(expected_list, cotangents)
    for key, value in theirs.items():
        gradient = mine[key].grad
        assert (gradient is None) == (value.grad is None), key
        if gradient is not None and value.grad is not None:
            # The forward's budget holds for gradients too: nothing is summed over more than one image.
            assert relative_error(gradient, value.grad) <= FORWARD_BUDGET, key


@needs_oracles
@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize(("confidence", "mask"), list(itertools.product([False, True], repeat=2)))
def test_every_representation(representation: str, confidence: bool, mask: bool) -> None:
    check(Case(representation, confidence, mask))


@needs_oracles
def test_direct_points_stand_beside_the_factors() -> None:
    case = Case("pointmap+raydirs+depth+pose", factored=False)
    check(case)
    raw = case.raw()
    direct = case.compose(raw)
    factored = Case("pointmap+raydirs+depth+pose", factored=True).compose(raw)
    assert {k for k in direct if not torch.equal(direct[k], factored[k])} == {"pts3d"}


@needs_oracles
@pytest.mark.parametrize("mode", ["linear", "square", "exp", "z_exp"])
@pytest.mark.parametrize("bounds", [(-INF, INF), (-0.5, 1.5)])
@pytest.mark.parametrize("representation", ["pointmap", "campointmap+pose", "pointmap+raydirs+depth+pose"])
def test_points(mode: str, bounds: tuple[float, float], representation: str) -> None:
    options = {"pointmap_mode": mode, "pointmap_vmin": bounds[0], "pointmap_vmax": bounds[1]}
    for confidence in (False, True):  # without, upstream's options have no prefix
        check(Case(representation, confidence, False, factored=False, dense=options))


SPHERE, PLANE = "ray_directions_normalize_to_unit_sphere", "ray_directions_normalize_to_unit_image_plane"
CLAMP, Z_MIN = "ray_directions_clamp_min_of_z_dir", "ray_directions_z_dir_min"
RAY_OPTIONS: dict[str, dict[str, Any]] = {
    "as they are": {SPHERE: False},
    "image plane": {SPHERE: False, PLANE: True},
    "image plane, z clamped": {SPHERE: False, PLANE: True, CLAMP: True, Z_MIN: 0.1},
    "sphere before plane": {SPHERE: True, PLANE: True},
    "sphere, z clamped": {CLAMP: True, Z_MIN: 0.5},
    "bounded": {"ray_directions_vmin": -0.7, "ray_directions_vmax": 0.4},
    "all": {SPHERE: False, PLANE: True, CLAMP: True, Z_MIN: 0.2, "ray_directions_vmin": -1.0, "ray_directions_vmax": 1},
}  # fmt: skip


@needs_oracles
@pytest.mark.parametrize("name", RAY_OPTIONS)
@pytest.mark.parametrize("representation", ["raymap+depth", "raydirs+depth+pose"])
def test_ray_directions(name: str, representation: str) -> None:
    check(Case(representation, dense=RAY_OPTIONS[name]))


@needs_oracles
@pytest.mark.parametrize("mode", ["linear", "square", "exp"])
@pytest.mark.parametrize("bounds", [(-INF, INF), (0.2, 1.5)])
def test_every_mode_and_bound_of_the_other_factors(mode: str, bounds: tuple[float, float]) -> None:
    low, high = bounds
    single = {"mode": mode, "vmin": low, "vmax": high}
    depth = {f"depth_{k}": v for k, v in single.items()}
    origins = {f"ray_origins_{k}": v for k, v in single.items()}
    check(Case("raymap+depth", dense=depth | origins))
    check(Case(flow=single))
    check(Case(scale=single))
    check(Case(pose={f"cam_trans_{k}": v for k, v in single.items()}))


@needs_oracles
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bounds", [(-INF, INF), (-0.5, 0.6)])
def test_quaternions(normalize: bool, bounds: tuple[float, float]) -> None:
    options = {"quaternions_normalize": normalize, "quaternions_vmin": bounds[0], "quaternions_vmax": bounds[1]}
    for representation in ("raydirs+depth+pose", "campointmap+pose"):
        check(Case(representation, pose=options))


@needs_oracles
@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [("exp", 1, INF), ("exp", 0.5, 2.0), ("sigmoid", 0.0, 1.0), ("sigmoid", 1, 5), ("softmax", 0, INF)],
)
@pytest.mark.parametrize("mask", [False, True])
def test_confidence(kind: str, low: float, high: float, mask: bool) -> None:
    options = {"confidence_type": kind, "confidence_vmin": low, "confidence_vmax": high}
    for representation in REPRESENTATIONS:
        check(Case(representation, True, mask, dense=options))


@needs_oracles
def test_the_released_adaptors_take_the_one_pass_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = Case().raw()
    expected = Case().compose(raw)
    monkeypatch.setattr(AdaptorConfig, "is_released", lambda self: False)
    for key, value in Case().compose(raw).items():
        error = relative_error(value.float(), expected[key].float())
        assert error <= FORWARD_BUDGET, f"{key}: the general composition differs from the operator by {error:.1e}"


def test_a_point_at_the_camera_has_a_direction_of_zero_not_nan() -> None:
    # Upstream divides by the distance as it is; zero points would then be NaN in every output.
    case = Case("campointmap+pose", dense={"pointmap_mode": "linear"})
    raw = case.raw()
    with torch.no_grad():
        raw["geometry"][..., :3] = 0
    found = case.compose(raw)
    assert all(bool(torch.isfinite(value).all()) for value in found.values())
    assert torch.equal(found["ray_directions"], torch.zeros(V * B, H, W, 3))
