"""Reading pictures from files."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .errors import MediaError

if TYPE_CHECKING:
    from PIL import Image

UInt8Array = npt.NDArray[np.uint8]

# Only formats that are plain pictures: Pillow also identifies HDF5, FITS and GRIB files, which it cannot read, and
# EPS, for which it would start another program.
IMAGE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "TIFF", "PPM", "GIF", "JPEG2000", "AVIF", "QOI")
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .mpo .png .webp .bmp .dib .tif .tiff .ppm .pgm .pbm .gif .jp2 .j2k .avif .qoi".split()
)


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key that orders runs of digits as numbers: frame2 before frame10; the name itself breaks ties."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [(0, int(part), "") if i % 2 else (1, 0, part) for i, part in enumerate(parts)], name


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Open a picture with Pillow, by its content and not its name; pixels are not decoded yet.

    Raises:
        MediaError: missing, a folder, not a picture, or larger than Pillow allows (about 178 megapixels).
    """
    from PIL import Image, UnidentifiedImageError

    path = Path(path)
    if path.is_dir():
        raise MediaError(f"{path}: expected an image file, got a folder")
    Image.init()
    formats = [name for name in IMAGE_FORMATS if name in Image.OPEN]
    try:
        return Image.open(path, formats=formats)
    except FileNotFoundError as error:
        raise MediaError(f"{path}: no such file") from error
    except UnidentifiedImageError as error:
        raise MediaError(
            f"{path}: not an image that can be read, or its first bytes are damaged; "
            f"expected one of {', '.join(formats)} (convert others, such as HEIC, to PNG or JPEG)"
        ) from error
    except Image.DecompressionBombError as error:
        raise MediaError(f"{path}: the image is too large ({error}); resize it first") from error
    except OSError as error:
        # Pillow's own complaints about the content carry no errno.
        reason = "cannot be read" if error.errno else "the image is truncated or damaged"
        raise MediaError(f"{path}: {reason} ({error.strerror or error})") from error
    # Damaged headers show by further types: ValueError (PPM), RuntimeError (AVIF) ...
    except Exception as error:
        raise MediaError(f"{path}: the image is truncated or damaged ({error})") from error


def is_image(path: str | os.PathLike[str]) -> bool:
    """Whether the content of a file is a still picture. An animated GIF is not: it reads as a video."""
    try:
        with open_image(path) as image:
            return not (image.format == "GIF" and getattr(image, "is_animated", False))
    except MediaError:
        return False


def load_image(path: str | os.PathLike[str]) -> UInt8Array:
    """Read a picture as [H, W, 3] uint8 RGB, turned upright by its EXIF orientation.

    16-bit values are scaled to 8 bits, grey and palettes become RGB, transparent pixels are laid over white. Colour
    profiles are not applied. Of several pictures in a file the first is read, with a warning.

    Raises:
        MediaError: missing, not a picture, truncated or damaged, too large, or of a kind with no defined range
            (32-bit integer or float pixels).
    """
    from PIL import Image, ImageOps

    with open_image(path) as image:
        try:
            warn_of_others(image, path)
            image.load()
            upright = ImageOps.exif_transpose(image)
            return _to_rgb(upright, Path(path))
        except MediaError:
            raise
        except Image.DecompressionBombError as error:
            raise MediaError(f"{path}: the image is too large ({error}); resize it first") from error
        # Pillow's decoders report damage by many exception types (OSError, SyntaxError, struct.error, zlib.error ...).
        except Exception as error:
            raise MediaError(f"{path}: the image is truncated or damaged ({error})") from error


def _to_rgb(image: Image.Image, path: Path) -> UInt8Array:
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format in (None, "PNG", "PPM")):
        # "I" is how some Pillow versions open 16-bit grey PNG; converting either to RGB would clip at 255.
        grey = np.asarray(image).astype(np.float32) / 257.0
        return np.repeat(np.rint(grey).clip(0, 255).astype(np.uint8)[..., None], 3, axis=-1)
    if mode in ("I", "F"):
        raise MediaError(f"{path}: pixels of mode {mode} (32 bits) have no defined brightness; save it as 8-bit PNG")
    return over_white(image)


def warn_of_others(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Warn where a file holds further pictures, such as a TIFF's pages or an animation: only the first is read."""
    count = getattr(image, "n_frames", 1)
    # A phone's JPEG has its preview or depth as a second picture (MPO).
    if count > 1 and image.format != "MPO":
        warnings.warn(
            f"{path}: holds {count} pictures, of which only the first is read; save a clip as a video or as files",
            RuntimeWarning,
            stacklevel=3,
        )


def over_white(image: Image.Image) -> UInt8Array:
    """A picture of 8 bits a channel as [H, W, 3] uint8 RGB; transparent pixels, whose colours nobody saw, are white."""
    from PIL import Image

    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"), dtype=np.uint8)


def load_raw_array(path: str | os.PathLike[str]) -> npt.NDArray[Any]:
    """Read a single-channel picture with its own values, such as 16-bit depth, as [H, W].

    Raises:
        MediaError: as `load_image`, or the picture has several channels.
    """
    with open_image(path) as image:
        if len(image.getbands()) != 1 or image.mode == "P":
            raise MediaError(f"{path}: expected one channel, got mode {image.mode}")
        try:
            return np.array(image)
        # See load_image.
        except Exception as error:
            raise MediaError(f"{path}: the image is truncated or damaged ({error})") from error


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """The pictures in a folder (not in its subfolders), in natural order of their names.

    Files are told by their content; hidden files and files that are neither pictures nor named like one are skipped.

    Raises:
        MediaError: not a folder, it holds no picture, or a file is named like a picture but is not one (skipping
            it would silently lose a frame).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MediaError(f"{folder}: expected a folder of images, got {'a file' if folder.exists() else 'nothing'}")
    try:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".") and entry.is_file()]
    except OSError as error:
        raise MediaError(f"{folder}: cannot be read ({error.strerror or error})") from error
    found = []
    for entry in sorted(entries, key=lambda item: natural_key(item.name)):
        if entry.suffix.lower() in IMAGE_SUFFIXES:
            open_image(entry).close()
            found.append(entry)
        elif is_image(entry):
            found.append(entry)
    if not found:
        raise MediaError(f"{folder}: no images in this folder; expected files such as 0001.png or 0001.jpg")
    return found
