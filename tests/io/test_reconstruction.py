"""The container: what it takes from the model's outputs and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from any4d_fast.reconstruction import Reconstruction

Make = Callable[..., Reconstruction]


def _outputs(r: Reconstruction, batch: int = 2, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """The reconstruction as `infer` returns it, as sample 1 of the batch; other samples are NaN."""

    def batched(value: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(value)
        out = torch.zeros(batch, *tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
        if out.is_floating_point():
            out.fill_(float("nan"))
        out[1] = tensor
        return out.requires_grad_(out.is_floating_point())

    views = []
    for i in range(r.num_views):
        view = {name: batched(getattr(r, name)[i]) for name in ("pts3d", "ray_directions", "scene_flow", "conf")}
        view |= {name: batched(getattr(r, name)[i]) for name in ("intrinsics", "camera_poses")}
        view |= {name: batched(getattr(r, name)[i][..., None]) for name in ("depth_z", "depth_along_ray", "mask")}
        view["img_no_norm"] = batched(r.images[i].astype(np.float32) / 255)
        view["metric_scaling_factor"] = batched(np.array([r.metric_scale], np.float32))
        view["non_ambiguous_mask"] = ~batched(r.mask[i])  # type: ignore[index]
        views.append(view)
    return views


def test_from_outputs(make_reconstruction: Make) -> None:
    expected = make_reconstruction(reference=1)
    got = Reconstruction.from_outputs(
        _outputs(expected), batch_index=1, reference=1, timestamps=[0, 0.1, 0.2], names=expected.names
    )
    for name, value in vars(expected).items():
        np.testing.assert_array_equal(getattr(got, name), value, err_msg=name)
        assert type(getattr(got, name)) is type(value)
    assert (got.num_views, got.height, got.width) == (3, 21, 28)


def test_half_precision_and_missing_factors(make_reconstruction: Make) -> None:
    source = make_reconstruction()
    outputs = [
        {key: view[key] for key in ("pts3d", "img_no_norm", "non_ambiguous_mask")}
        for view in _outputs(source, dtype=torch.bfloat16)
    ]
    got = Reconstruction.from_outputs(outputs, batch_index=1)
    assert got.pts3d.dtype == np.float32 and got.depth_z is None and got.metric_scale == 1.0
    np.testing.assert_array_equal(got.mask, ~source.mask)  # type: ignore[operator]
    assert got.names == ["frame 0", "frame 1", "frame 2"]
    with pytest.raises(ValueError, match="scene_flow: this reconstruction has none"):
        got.tracks()


def test_images_can_be_given(make_reconstruction: Make) -> None:
    source = make_reconstruction()
    outputs = [{"pts3d": view["pts3d"]} for view in _outputs(source)]
    got = Reconstruction.from_outputs(outputs, batch_index=1, images=source.images)
    np.testing.assert_array_equal(got.images, source.images)
    with pytest.raises(ValueError, match="hold no img_no_norm"):
        Reconstruction.from_outputs(outputs)


def test_from_outputs_errors(make_reconstruction: Make) -> None:
    outputs = _outputs(make_reconstruction())
    with pytest.raises(ValueError, match="at least one view"):
        Reconstruction.from_outputs([])
    with pytest.raises(ValueError, match="expected a key pts3d"):
        Reconstruction.from_outputs([{}])
    with pytest.raises(ValueError, match="batch_index: expected 0 to 1, got 2"):
        Reconstruction.from_outputs(outputs, batch_index=2)
    del outputs[1]["conf"]
    with pytest.raises(ValueError, match="view 1 has no conf"):
        Reconstruction.from_outputs(outputs, batch_index=1)


def test_tracks_and_valid(make_reconstruction: Make) -> None:
    r = make_reconstruction(reference=1)
    assert r.scene_flow is not None and r.conf is not None and r.mask is not None
    np.testing.assert_array_equal(r.tracks()[2], r.pts3d[1] + r.scene_flow[2])
    r.pts3d[0, 10, 10] = np.nan
    valid = r.valid(0)
    assert not valid[10, 10] and not valid[0, 0] and valid.sum() == r.mask[0].sum() - 1
    np.testing.assert_array_equal(r.valid(1, 2.0), r.mask[1] & (r.conf[1] >= 2))
    assert r.mask[0, 10, 10], "the container's own mask stays as it was"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((3, 4), np.uint8)}, "images: expected"),
        ({"images": np.zeros((3, 21, 28, 3), np.float32)}, r"images: .*got \[3, 21, 28, 3\] float32"),
        ({"pts3d": None}, "pts3d: expected .* got NoneType"),
        ({"depth_z": np.zeros((3, 21, 27), np.float32)}, r"depth_z: expected \[V, H, W\] = \[3, 21, 28\]"),
        ({"mask": np.zeros((3, 21, 28), np.uint8)}, "mask: expected"),
        ({"reference": 3}, "reference: expected a view from 0 to 2"),
        ({"timestamps": [0.0]}, "timestamps: expected 3"),
        ({"names": ["a"]}, "names: expected 3"),
    ],
)
def test_bad_fields(make_reconstruction: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_reconstruction(**changes)
