"""Every wrong input is an error that names the view and the key and says what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from any4d_fast.inputs import InputError, InputTypeError, prepare_views

H, W = 28, 42
K = torch.tensor([[30.0, 0.0, 20.0], [0.0, 32.0, 13.0], [0.0, 0.0, 1.0]])
EYE = torch.eye(4)
RAYS = torch.ones(H, W, 3)


def changed(tensor: Tensor, index: Any, value: float) -> Tensor:
    out = tensor.clone()
    out[index] = value
    return out


def view(**more: Any) -> dict[str, Any]:
    return {"img": torch.zeros(3, H, W), **more}


def second(**more: Any) -> list[dict[str, Any]]:
    return [view(), view(**more)]


def depth(value: Any, **more: Any) -> list[dict[str, Any]]:
    return [view(intrinsics=K, depth_z=value, **more)]


def doppler(value: Any = None, **more: Any) -> list[dict[str, Any]]:
    value = torch.ones(H, W) if value is None else value
    return [view(timestamps=0.0), view(**{"intrinsics": K, "doppler": value, "timestamps": 1.0} | more)]


def posed(value: Any) -> list[dict[str, Any]]:
    return [view(camera_poses=EYE), view(camera_poses=value)]


def moved(value: Any) -> list[dict[str, Any]]:
    return [view(), view(imu=value)]


V, T = InputError, InputTypeError
CASES: dict[str, tuple[Any, type[InputError], str]] = {
    # The list and its keys.
    "no list": (view(), T, r"views: expected a list.*of type dict.*\[view\]"),
    "empty list": ([], V, "views: expected at least one view"),
    "view is a path": (["a.png"], T, r"views\[0\]: expected a dictionary.*'a.png'.*\"img\""),
    "no img": ([view(), {"idx": 1}], V, r"views\[1\]: expected the key \"img\", got keys \['idx'\]"),
    "img is None": ([{"img": None}], V, r"views\[0\]: expected the key \"img\""),
    "misspelt key": (second(intrinsic=K), V, r"views\[1\]: unknown key 'intrinsic'; did you mean 'intrinsics'\?"),
    "unknown key": (second(foo=1), V, r"unknown key 'foo'; remove it. Allowed keys: img"),
    "a forward key": (second(depth_along_ray=1), V, r"'depth_along_ray' belongs to model.forward.*depth_z"),
    # Images.
    "img rank 2": ([{"img": np.zeros((H, W))}], V, r"views\[0\]\[\"img\"\].*\[28, 42\] float64; repeat a grey"),
    "img rank 5": ([{"img": torch.zeros(1, 1, 3, H, W)}], V, r"\[1, 1, 3, 28, 42\].*a batch of images"),
    "img 4 channels": ([{"img": torch.zeros(4, H, W)}], V, "alpha"),
    "img 1 channel": ([{"img": torch.zeros(H, W, 1)}], V, r"\[28, 42, 1\].*repeat a grey image"),
    "img of no pixels": ([{"img": torch.zeros(3, 0, W)}], V, r"an image with pixels.*\[3, 0, 42\]"),
    "img of no batch": ([{"img": torch.zeros(0, 3, H, W)}], V, "an image with pixels"),
    "img bool": ([{"img": torch.zeros(3, H, W, dtype=torch.bool)}], T, r"views\[0\]\[\"img\"\].*bool"),
    "img complex": ([{"img": torch.zeros(3, H, W, dtype=torch.complex64)}], T, "complex64.*real"),
    "img uint16": ([{"img": np.zeros((H, W, 3), np.uint16)}], T, "uint16.*65535"),
    "img text array": ([{"img": np.array(["a"])}], T, r"views\[0\]\[\"img\"\]"),
    "img object": ([{"img": object()}], T, "a value of type object"),
    "img NaN": ([{"img": changed(torch.zeros(3, H, W), (0, 0, 0), math.nan)}], V, "1 NaN or infinite values"),
    "img inf": ([{"img": changed(torch.zeros(3, H, W), (0, 0, 0), math.inf)}], V, "1 NaN or infinite values"),
    "img 0..255 float": ([{"img": torch.full((3, H, W), 200.0)}], V, "within 0..1.*divide by 255"),
    "img normalised": ([{"img": torch.full((3, H, W), -1.5)}], V, "within 0..1.*data_norm_type"),
    "img no file": ([{"img": "no/such.png"}], V, r"'no/such.png', which does not exist"),
    "wrong data_norm_type": (second(data_norm_type="croco"), V, r"views\[1\]\[\"data_norm_type\"\].*'dinov2'.*croco"),
    "uint8 data_norm_type": (
        [{"img": torch.zeros(3, H, W, dtype=torch.uint8), "data_norm_type": "dinov2"}], T, "remove data_norm_type",
    ),
    "two sizes": ([view(), {"img": torch.zeros(3, 14, W)}], V, r"views\[1\].*\(14, 42\).*pass size=\(H, W\)"),
    "two batches": ([view(), {"img": torch.zeros(2, 3, H, W)}], V, r"views\[1\].*batch of 1.*got 2"),
    # Intrinsics and rays.
    "K shape": (second(intrinsics=torch.eye(4)), V, r"views\[1\]\[\"intrinsics\"\].*\[3, 3\].*\[4, 4\]"),
    "K batch": (second(intrinsics=K.expand(2, 3, 3)), V, r"\[2, 3, 3\].*one for each image"),
    "K NaN": (second(intrinsics=changed(K, (0, 0), math.nan)), V, "NaN or infinite values; leave intrinsics out"),
    "K inf": (second(intrinsics=changed(K, (0, 2), math.inf)), V, "NaN or infinite values"),
    "K zero focal": (second(intrinsics=changed(K, (0, 0), 0)), V, "positive focal lengths.*fx"),
    "K negative focal": (second(intrinsics=changed(K, (1, 1), -30)), V, "positive focal lengths.*OpenCV"),
    "K transposed": (second(intrinsics=K.T), V, r"last row of \(0, 0, 1\).*transpose"),
    "K skew": (second(intrinsics=changed(K, (0, 1), 2)), V, "no skew.*ray_directions"),
    "K normalised": (second(intrinsics=torch.diag(torch.tensor([0.3, 0.3, 1]))), V, "multiply normalised"),
    "K text": (second(intrinsics="pinhole"), T, "str 'pinhole'"),
    "K ragged": (second(intrinsics=[[1, 2], [3]]), T, r"views\[1\]\[\"intrinsics\"\]"),
    "K bool": (second(intrinsics=torch.eye(3).bool()), T, "not booleans"),
    "K and rays": (second(intrinsics=K, ray_directions=RAYS), V, r"views\[1\]: both intrinsics and ray_directions"),
    "rays shape": (second(ray_directions=torch.ones(3, H, W)), V, r"\[28, 42, 3\].*channels last"),
    "rays of other size": (second(ray_directions=torch.ones(14, 14, 3)), V, r"\[14, 14, 3\].*size of img"),
    "rays NaN": (second(ray_directions=changed(RAYS, (0, 0, 0), math.nan)), V, "every pixel a direction"),
    "rays zero": (second(ray_directions=changed(RAYS, (0, 0), 0)), V, "1 zero rays"),
    "rays backwards": (second(ray_directions=-RAYS), V, r"no ray that points forward.*OpenGL"),
    # Depth.
    "depth alone": ([view(depth_z=torch.ones(H, W))], V, r"views\[0\]: depth_z needs.*add intrinsics or ray_dir"),
    "depth size": (depth(torch.ones(14, 14)), V, r"\[28, 42\].*\[14, 14\].*nearest"),
    "depth rank": (depth(torch.ones(H)), V, r"views\[0\]\[\"depth_z\"\].*\[28\] float32"),
    "depth batch": (depth(torch.ones(2, H, W)), V, r"\[1, 28, 42\].*\[2, 28, 42\]"),
    "depth negative": (depth(changed(torch.ones(H, W), (0, 0), -1)), V, "1 negative values"),
    "depth infinite": (depth(changed(torch.ones(H, W), (0, 0), math.inf)), V, "1 infinite values.*0 or NaN"),
    "depth millimetres": (depth(torch.full((H, W), 900)), T, "int64.*/ 1000 for millimetres"),
    "depth of half a batch": (
        [{"img": torch.zeros(2, 3, H, W), "intrinsics": K, "depth_z": changed(torch.ones(2, H, W), 1, 0)}],
        V, r"none in \[1\].*split the batch",
    ),
    # Poses.
    "pose without reference": (second(camera_poses=EYE), V, r"views \[1\] but not for the reference view 0"),
    "pose shape": (posed(torch.eye(3)), V, r"views\[1\]\[\"camera_poses\"\].*\[3, 3\]"),
    "pose 3x4": (posed(EYE[:3]), V, r"append the row \(0, 0, 0, 1\)"),
    "pose NaN": (posed(changed(EYE, (0, 3), math.nan)), V, "NaN or infinite values"),
    "pose transposed": (posed(changed(EYE, (3, 0), 2)), V, r"last row of \(0, 0, 0, 1\).*transpose"),
    "pose singular": (posed(changed(EYE, (0, 0), 0)), V, "a singular 3x3 part"),
    "pose scaled": (posed(changed(EYE, (0, 0), 2)), V, r"rigid.*columns of length \[2.0, 1.0, 1.0\]"),
    "pose reflected": (posed(changed(EYE, (0, 0), -1)), V, "a reflection.*OpenCV"),
    "pose zero quaternion": (posed((torch.zeros(4), torch.zeros(3))), V, "a zero quaternion"),
    "pose NaN quaternion": (posed((torch.full((4,), math.nan), torch.zeros(3))), V, "rotation.*NaN or infinite"),
    "pose quaternion shape": (posed((torch.ones(3), torch.zeros(3))), V, r"quaternion \(x, y, z, w\).*\[3\]"),
    "pose translation shape": (posed((torch.ones(4), torch.zeros(4))), V, r"translation.*\[3\].*\[4\]"),
    "pose text": (posed("identity"), T, "str 'identity'"),
    # Egomotion.
    "imu and poses": ([view(camera_poses=EYE), view(imu=(EYE[:3, :3], [0, 0, 0]))], V, "both camera_poses.*imu"),
    "imu chain broken": ([view(), view(imu=(EYE[:3, :3], [0, 0, 0])), view()], V, r"views\[2\]\[\"imu\"\].*a chain"),
    "imu no pair": (moved(EYE), V, r"views\[1\]\[\"imu\"\].*a pair.*\[4, 4\]"),
    "imu scaled": (moved((2 * EYE[:3, :3], [0, 0, 0])), V, r"imu.*rotation.*rigid"),
    "imu NaN": (moved(([0, 0, 0, 1.0], [0, 0, math.nan])), V, "imu.*translation.*NaN"),
    # Doppler and time.
    "doppler alone": ([view(), view(doppler=torch.ones(H, W), timestamps=1.0)], V, "doppler needs.*add intrinsics"),
    "doppler without time": ([view(timestamps=0.0), view(intrinsics=K, doppler=torch.ones(H, W))], V,
                             r"views\[1\]: doppler.*views\[1\] has no timestamps"),
    "doppler without reference time": (
        [view(), view(intrinsics=K, doppler=torch.ones(H, W), timestamps=1.0)], V, r"views\[0\] has no timestamps",
    ),
    "doppler shape": (doppler(torch.ones(W, H)), V, r"views\[1\]\[\"doppler\"\].*\[42, 28\]"),
    "doppler infinite": (doppler(torch.full((H, W), math.inf)), V, "finite m/s"),
    "doppler integers": (doppler(torch.ones(H, W).long()), T, "float m/s"),
    "doppler and unscaled depth": (doppler(depth_z=torch.ones(H, W), is_metric_scale=False), V,
                                   r"views\[1\]: doppler is in metres per second.*is_metric_scale=False"),
    "time NaN": (doppler(timestamps=math.nan), V, r"views\[1\]\[\"timestamps\"\].*NaN"),
    "time shape": (doppler(timestamps=[1.0, 2.0]), V, r"timestamps.*\[2\]"),
    "time in nanoseconds": (doppler(timestamps=1e9), V, "convert nanoseconds"),
    "metric scale number": (second(is_metric_scale=1.0), T, r"is_metric_scale.*float 1.0"),
    "metric scale shape": (second(is_metric_scale=[True, False]), V, r"is_metric_scale.*\[2\] bool"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_view(name: str) -> None:
    bad, error, words = CASES[name]
    with pytest.raises(error, match=f"(?s){words}") as caught:
        prepare_views(bad)
    assert isinstance(caught.value, TypeError if error is InputTypeError else ValueError)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"reference": 2}, V, "reference: expected 0 to 1 for 2 views, got 2"),
        ({"reference": -1}, V, "reference: expected 0 to 1"),
        ({"reference": 0.0}, T, "reference: expected the index of a view, got float 0.0"),
        ({"reference": True}, T, "reference.*bool True"),
        ({"size": 13}, V, "size: expected at least one patch of 14"),
        ({"size": 0}, V, "size: expected at least one patch"),
        ({"size": 224.0}, T, "size: expected None, an int"),
        ({"size": (28,)}, V, r"size: expected a tuple \(H, W\)"),
        ({"size": (28, 30)}, V, r"multiples of 14, got \(28, 30\); \(28, 28\) is the nearest"),
        ({"size": (28, 28, 28)}, T, "size"),
        ({"size": "large"}, T, "size.*'large'"),
        ({"patch_size": 0}, V, "patch_size"),
        ({"data_norm_type": "croco"}, V, "data_norm_type: expected one of.*croco"),
    ],
)
def test_bad_argument(arguments: dict[str, Any], error: type[InputError], words: str) -> None:
    with pytest.raises(error, match=words):
        prepare_views([view(), view()], **arguments)


def _truncated(path: Path) -> None:
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def _sixteen_bit(path: Path) -> None:
    from PIL import Image

    Image.fromarray(np.zeros((H, W), np.uint16)).save(path)


def _broken_decoder(path: Path) -> None:
    """A picture whose decoder raises what AVIF's does for damage in the middle."""
    from PIL import Image, ImageFile

    class Broken(ImageFile.ImageFile):
        format = "BROKEN"

        def _open(self) -> None:
            self._size, self._mode = (4, 4), "RGB"

        def load(self) -> None:
            raise RuntimeError("decoding of color planes failed")

    Image.register_open("BROKEN", Broken, lambda prefix: prefix.startswith(b"BROKEN"))
    path.write_bytes(b"BROKEN")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_truncated, "truncated, broken or no image"),
        (lambda path: path.write_bytes(b""), "truncated, broken or no image"),
        (lambda path: path.write_text("not an image"), "readable image file.*a.png"),
        (_broken_decoder, "color planes failed.*truncated, broken or no image"),
        (lambda path: path.mkdir(), "the folder.*one view of each"),
        (_sixteen_bit, "8-bit image.*PIL mode 'I"),
    ],
)
def test_bad_file(make: Callable[[Path], Any], words: str, tmp_path: Path) -> None:
    make(tmp_path / "a.png")
    with pytest.raises(InputError, match=r'views\[1\]\["img"\].*' + words):
        prepare_views([view(), {"img": tmp_path / "a.png"}])


def test_pose_missing_at_another_reference() -> None:
    with pytest.raises(InputError, match=r"views \[0\] but not for the reference view 1"):
        prepare_views([view(camera_poses=EYE), view()], reference=1)
