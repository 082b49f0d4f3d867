"""Reading one view's values: what a person passes, checked and turned into tensors of one layout.

Every function takes `where`, the name of the value in error messages, such as `views[2]["depth_z"]`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from any4d_fast.io.images import over_white, warn_of_others

IMAGE_NORMALISATIONS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "dust3r": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "identity": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
"""`data_norm_type` -> (mean, standard deviation) per RGB channel."""


class InputError(ValueError):
    """A view or an argument that cannot be used; the message says which, why, and what to do."""


class InputTypeError(InputError, TypeError):
    """A value of a type or dtype that cannot be used."""


def describe(value: Any) -> str:
    """Shape and dtype of an array or tensor, else the type's name."""
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, np.ndarray):
        return f"{list(value.shape)} {value.dtype}"
    if isinstance(value, (bool, int, float, str, os.PathLike)) or value is None:
        return f"{type(value).__name__} {value!r}"
    return f"a value of type {type(value).__name__}"


def fail(where: str, expected: str, got: str, fix: str, *, kind: type[InputError] = InputError) -> NoReturn:
    """Raise `kind` with the message that every input error has."""
    raise kind(f"{where}: expected {expected}, got {got}; {fix}")


def to_tensor(value: Any, where: str, expected: str) -> Tensor:
    """A number, nested list, array or tensor as a tensor of its own dtype, detached.

    Raises:
        InputTypeError: if it is none of these, or holds text, complex numbers or objects.
    """
    fix = "pass a torch tensor, a NumPy array or nested lists of numbers"
    if isinstance(value, Tensor):
        if value.is_complex():
            fail(where, expected, describe(value), "pass real numbers", kind=InputTypeError)
        return value.detach()
    try:
        array = np.array(value, order="C")
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputTypeError(f"{where}: expected {expected}, got {describe(value)} ({error}); {fix}") from error
    if array.dtype.kind not in "fiub":
        fail(where, expected, describe(array if isinstance(value, np.ndarray) else value), fix, kind=InputTypeError)
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def to_real(value: Any, where: str, expected: str) -> Tensor:
    """As `to_tensor`, in float64; booleans are refused."""
    tensor = to_tensor(value, where, expected)
    if tensor.dtype == torch.bool:
        fail(where, expected, describe(tensor), "pass numbers, not booleans", kind=InputTypeError)
    return tensor.double()


def load_image(value: Any, where: str, *, normalised: bool = False, device: torch.device | None = None) -> Tensor:
    """An image as a person has it, as RGB [B, 3, H, W] float32 (0..1 unless `normalised`).

    Args:
        value: path, PIL image (both turned upright by their EXIF orientation and laid over white where transparent),
            or tensor or array [H, W, 3], [3, H, W], [B, H, W, 3] or [B, 3, H, W]; uint8, or float in 0..1. A 3 in the
            place of the channels of both layouts counts as channels first.
        where: name in error messages.
        normalised: a float image from which mean and standard deviation are already taken out.
        device: where the image goes; by default where it is. Bytes are sent before they become floats, which are four
            times as many.

    Raises:
        InputError: if it cannot be read, is empty, has a wrong shape, or values that are not finite or out of range.
        InputTypeError: if it is of a type or dtype that is not an image's.
    """
    expected = "an image [H, W, 3], [3, H, W], [B, H, W, 3] or [B, 3, H, W] of uint8 or float 0..1, PIL or path"
    if not isinstance(value, (Tensor, np.ndarray)):
        value = _read_picture(value, where, expected)
    image = to_tensor(value, where, expected)
    if image.dtype != torch.uint8 and not image.is_floating_point():
        fix = "pass uint8, or float within 0..1 (16-bit: image / 65535)"
        fail(where, expected, describe(image), fix, kind=InputTypeError)
    if normalised and image.dtype == torch.uint8:
        fail(where, "a normalised float image, because data_norm_type is given", describe(image),
             "remove data_norm_type for a uint8 image", kind=InputTypeError)  # fmt: skip
    if image.dtype == torch.uint8:
        image = _channels_first(image.to(device), where, expected).float()
        # By a tensor: a number's reciprocal would be multiplied with on a GPU, and round otherwise than on a CPU.
        return image / image.new_full((), 255)
    image = _channels_first(image, where, expected).float()
    if not bool(image.isfinite().all()):
        fail(where, "finite values", f"{int((~image.isfinite()).sum())} NaN or infinite values", "repair the image")
    if normalised:
        return image.to(device)
    low, high = image.min().item(), image.max().item()
    # A thousandth over the range is what resampling filters overshoot after rounding, not a wrong unit.
    if low < -1e-3 or high > 1 + 1e-3:
        fix = "if mean and standard deviation are already taken out, say so with data_norm_type"
        if high > 2 and low >= 0:
            fix = "divide by 255 or pass uint8"
        fail(where, "a float image within 0..1", f"values from {low:.4g} to {high:.4g}", fix)
    return image.clamp(0, 1).to(device)


def _read_picture(value: Any, where: str, expected: str) -> np.ndarray:
    """Decode a path or a PIL image to [H, W, 3] uint8."""
    from PIL import Image, ImageOps

    if isinstance(value, (str, os.PathLike)):
        path = Path(value)
        if path.is_dir():
            fail(where, "an image file", f"the folder {str(path)!r}", "make one view of each of its images")
        if not path.exists():
            fail(where, "an image file", f"{str(path)!r}, which does not exist", "check the path")
        try:
            with Image.open(path) as opened:
                warn_of_others(opened, path)
                return _read_picture(opened, where, expected)
        except InputError:
            raise
        # Pillow's decoders report damage by many exception types (OSError, SyntaxError, RuntimeError ...).
        except Exception as error:
            raise InputError(
                f"{where}: expected a readable image file, got {str(path)!r} ({error}); "
                "the file is truncated, broken or no image: replace it"
            ) from error
    if not isinstance(value, Image.Image):
        fail(where, expected, describe(value), "pass one of these", kind=InputTypeError)
    if value.width == 0 or value.height == 0:
        fail(where, "an image with pixels", f"size {value.width}x{value.height}", "drop the view")
    if value.mode.startswith(("I", "F")):
        fail(where, "an 8-bit image", f"PIL mode {value.mode!r}", "convert it to a float array within 0..1 first",
             kind=InputTypeError)  # fmt: skip
    return over_white(ImageOps.exif_transpose(value))


def _channels_first(image: Tensor, where: str, expected: str) -> Tensor:
    """Any of the four layouts as [B, 3, H, W]."""
    if image.ndim not in (3, 4):
        fix = "repeat a grey image to 3 channels" if image.ndim == 2 else "pass one image, or a batch of images, a view"
        fail(where, expected, describe(image), fix)
    if image.numel() == 0:
        fail(where, "an image with pixels", describe(image), "drop the view")
    batched = image if image.ndim == 4 else image[None]
    if batched.shape[1] == 3:
        return batched
    if batched.shape[3] == 3:
        return batched.permute(0, 3, 1, 2).contiguous()
    alpha = 4 in (batched.shape[1], batched.shape[3])
    fix = "drop the alpha channel: image[..., :3]" if alpha else "pass RGB; repeat a grey image to 3 channels"
    fail(where, expected, describe(image), fix)


def normalise_image(image: Tensor, norm_type: str) -> Tensor:
    """Take out mean and standard deviation of `norm_type`: [B, 3, H, W] 0..1 -> normalised."""
    mean, std = (_channels(image, values) for values in IMAGE_NORMALISATIONS[norm_type])
    return (image - mean) / std


def _channels(image: Tensor, values: Sequence[float]) -> Tensor:
    """[3, 1, 1] on the image's device.

    Filled there: numbers that come from the host would make it wait, and a CUDA graph cannot capture their way.
    """
    return torch.cat([image.new_full((1, 1, 1), value) for value in values])


def denormalise_image(image: Tensor, norm_type: str) -> Tensor:
    """Undo `normalise_image` and move channels last: [B, 3, H, W] -> [B, H, W, 3] within 0..1."""
    mean, std = (_channels(image, values) for values in IMAGE_NORMALISATIONS[norm_type])
    return (image * std + mean).clamp(0, 1).permute(0, 2, 3, 1)


def read_intrinsics(value: Any, where: str, batch: int, hw: tuple[int, int]) -> Tensor:
    """Pinhole intrinsics [3, 3] or [B, 3, 3], pixels of the given image, as [B, 3, 3] float64.

    Raises:
        InputError: if the shape is wrong, a value is not finite, a focal length is not positive or too short for
            pixels, there is skew, or the last row is not (0, 0, 1).
    """
    expected = f"[3, 3] or [{batch}, 3, 3] pinhole intrinsics in pixels"
    matrix = to_real(value, where, expected)
    if tuple(matrix.shape) not in {(3, 3), (batch, 3, 3)}:
        batched = tuple(matrix.shape[-2:]) == (3, 3)
        fix = "pass one for each image of the batch" if batched else "build [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]"
        fail(where, expected, describe(matrix), fix)
    matrix = matrix.expand(batch, 3, 3)
    if not bool(matrix.isfinite().all()):
        fail(where, expected, "NaN or infinite values", "leave intrinsics out if the camera is not calibrated")
    last = matrix.new_tensor([0.0, 0.0, 1.0])
    if not torch.allclose(matrix[:, 2], last.expand(batch, 3), atol=1e-6):
        fail(where, "a last row of (0, 0, 1)", f"{matrix[0, 2].tolist()}",
             "transpose a row-vector matrix, or divide by its last element")  # fmt: skip
    fx, fy = matrix[:, 0, 0], matrix[:, 1, 1]
    if not bool((fx > 0).all() and (fy > 0).all()):
        fail(where, "positive focal lengths", f"fx {fx.tolist()}, fy {fy.tolist()}",
             "use the OpenCV convention (x right, y down)")  # fmt: skip
    if bool((matrix[:, 0, 1].abs() > 1e-6 * fx).any() or (matrix[:, 1, 0].abs() > 1e-6 * fy).any()):
        fail(where, "no skew (K[0, 1] = K[1, 0] = 0)", f"{matrix[0, :2, :2].tolist()}",
             "undistort the image, or pass ray_directions instead")  # fmt: skip
    if bool((fx < 0.01 * hw[1]).any() or (fy < 0.01 * hw[0]).any()):
        fail(where, f"focal lengths in pixels of the {hw[1]}x{hw[0]} image", f"fx {fx.tolist()}, fy {fy.tolist()}",
             "multiply normalised intrinsics by the image's width and height")  # fmt: skip
    return matrix


def read_rays(value: Any, where: str, batch: int, hw: tuple[int, int]) -> Tensor:
    """Ray directions [H, W, 3] or [B, H, W, 3] of the given image, any length, as unit [B, H, W, 3] float32.

    Raises:
        InputError: if the shape is wrong, a value is not finite, a ray has no length, or no ray points forward.
    """
    height, width = hw
    expected = f"[{height}, {width}, 3] or [{batch}, {height}, {width}, 3] ray directions, one for each pixel of img"
    rays = to_real(value, where, expected)
    if tuple(rays.shape) not in {(height, width, 3), (batch, height, width, 3)}:
        fail(where, expected, describe(rays), "give rays at the size of img, channels last")
    rays = rays.expand(batch, height, width, 3)
    if not bool(rays.isfinite().all()):
        fail(where, expected, "NaN or infinite values", "give every pixel a direction")
    length = rays.norm(dim=-1, keepdim=True)
    if not bool((length > 1e-8).all()):
        fail(where, "rays with a length", f"{int((length <= 1e-8).sum())} zero rays", "give every pixel a direction")
    if not bool((rays[..., 2] > 0).any()):
        fail(where, "rays with z > 0 (OpenCV: x right, y down, z forward)", "no ray that points forward",
             "turn OpenGL rays round: rays * [1, -1, -1]")  # fmt: skip
    return (rays / length).float()


def _read_map(value: Any, where: str, expected: str, batch: int, hw: tuple[int, int], unit_hint: str) -> Tensor:
    """A one-channel float map in any of its four shapes, as [B, H, W, 1] float32."""
    height, width = hw
    expected = f"[{height}, {width}] or [{batch}, {height}, {width}], with or without a last 1, {expected}"
    values = to_tensor(value, where, expected)
    if not values.is_floating_point():
        fail(where, expected, describe(values), unit_hint, kind=InputTypeError)
    shapes = {(batch, height, width), (batch, height, width, 1)}
    if batch == 1:
        shapes |= {(height, width), (height, width, 1)}
    if tuple(values.shape) not in shapes:
        fail(where, expected, describe(values), "resample it to the size of img with nearest neighbours, one a sample")
    return values.reshape(batch, height, width, 1).float()


def read_depth(value: Any, where: str, batch: int, hw: tuple[int, int]) -> Tensor:
    """Depth along the optical axis in metres, 0 or NaN where unknown, as [B, H, W, 1] float32 with NaN for unknown.

    Raises:
        InputError: if the shape is wrong or a value is negative or infinite.
        InputTypeError: if it is not floating point.
    """
    hint = "convert to float metres: depth.astype('float32') / 1000 for millimetres"
    depth = _read_map(value, where, "float metres", batch, hw, hint)
    if bool(depth.isinf().any()):
        fail(where, "finite metres", f"{int(depth.isinf().sum())} infinite values", "set unknown pixels to 0 or NaN")
    if bool((depth < 0).any()):
        fail(where, "depth > 0, or 0 or NaN where unknown", f"{int((depth < 0).sum())} negative values",
             "flip the sign of OpenGL depth; set unknown pixels to 0 or NaN")  # fmt: skip
    return torch.where(depth == 0, torch.nan, depth)


def read_doppler(value: Any, where: str, batch: int, hw: tuple[int, int]) -> Tensor:
    """Radial velocity in m/s (positive: moving away), NaN where there is none, as [B, H, W, 1] float32.

    Raises:
        InputError: if the shape is wrong or a value is infinite.
        InputTypeError: if it is not floating point.
    """
    doppler = _read_map(value, where, "float m/s", batch, hw, "convert to float m/s, NaN where there is no return")
    if bool(doppler.isinf().any()):
        fail(where, "finite m/s", f"{int(doppler.isinf().sum())} infinite values", "set pixels without a return to NaN")
    return doppler


def read_timestamps(value: Any, where: str, batch: int) -> Tensor:
    """Time in seconds, one number or [B], as [B] float64.

    Raises:
        InputError: if the shape is wrong or a value is not finite.
    """
    expected = f"seconds, a number or [{batch}]"
    times = to_real(value, where, expected)
    if tuple(times.shape) not in {(), (1,), (batch,)}:
        fail(where, expected, describe(times), "give one time for each image of the batch")
    if not bool(times.isfinite().all()):
        fail(where, expected, "NaN or infinite values", "give the capture time in seconds")
    return times.reshape(-1).expand(batch)


def read_metric_scale(value: Any, where: str, batch: int) -> Tensor:
    """Whether depth and poses are in metres, a bool or [B] bools, as [B] bool.

    Raises:
        InputError: if the shape is wrong.
        InputTypeError: if it is not boolean.
    """
    expected = f"True, False or [{batch}] bool"
    flags = to_tensor(value, where, expected)
    if flags.dtype != torch.bool:
        fail(where, expected, describe(value), "True: metres, False: any other unit", kind=InputTypeError)
    if tuple(flags.shape) not in {(), (1,), (batch,)}:
        fail(where, expected, describe(flags), "give one flag for each image of the batch")
    return flags.reshape(-1).expand(batch)
