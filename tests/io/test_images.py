"""Reading pictures: kinds, orientation, damage, folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from any4d_fast.io import MediaError, is_image, list_images, load_image
from any4d_fast.io.images import natural_key
from any4d_fast.views import load_image as read_view


def _rgb(height: int = 5, width: int = 7) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (13, 3)])
@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".ppm"])
def test_lossless_round_trip(tmp_path: Path, size: tuple[int, int], suffix: str) -> None:
    image = _rgb(*size)
    Image.fromarray(image).save(tmp_path / f"ä{suffix}")
    loaded = load_image(tmp_path / f"ä{suffix}")
    assert loaded.dtype == np.uint8 and loaded.flags.writeable
    np.testing.assert_array_equal(loaded, image)


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    grey = np.array([[0, 257, 32768, 65535]], np.uint16)
    for suffix in (".png", ".tif"):
        Image.fromarray(grey).save(tmp_path / f"x{suffix}")
        np.testing.assert_array_equal(load_image(tmp_path / f"x{suffix}")[0, :, 0], [0, 1, 128, 255])


def test_grey_palette_bilevel_and_cmyk(tmp_path: Path) -> None:
    grey = _rgb()[..., 0]
    Image.fromarray(grey).save(tmp_path / "l.png")
    np.testing.assert_array_equal(load_image(tmp_path / "l.png"), np.repeat(grey[..., None], 3, -1))
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), mode="P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.save(tmp_path / "p.png")
    np.testing.assert_array_equal(load_image(tmp_path / "p.png"), [[[10, 20, 30], [200, 100, 50]]])
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "1.png")
    np.testing.assert_array_equal(load_image(tmp_path / "1.png")[0, :, 0], [255, 0])
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tmp_path / "c.tif")
    np.testing.assert_array_equal(load_image(tmp_path / "c.tif")[0, 0], [255, 0, 0])


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load_image(tmp_path / "a.png"), [[[10, 20, 30], [255, 255, 255]]])
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), mode="P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.save(tmp_path / "p.png", transparency=1)
    np.testing.assert_array_equal(load_image(tmp_path / "p.png")[0, 1], [255, 255, 255])


@pytest.mark.parametrize("suffix", [".tif", ".png", ".webp"])
def test_several_pictures_in_a_file_are_not_lost_silently(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"pages{suffix}"
    first, second = (Image.fromarray(np.full((20, 30, 3), value, np.uint8)) for value in (10, 200))
    first.save(path, save_all=True, append_images=[second])
    with pytest.warns(RuntimeWarning, match=f"pages{suffix}: holds 2 pictures, of which only the first is read"):
        assert load_image(path).max() <= 11
    with pytest.warns(RuntimeWarning, match="holds 2 pictures"):
        read_view(path, "img")
    second.save(path)
    load_image(path)


def test_exif_orientation(tmp_path: Path) -> None:
    image = _rgb()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    Image.fromarray(image).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(load_image(tmp_path / "x.png"), np.rot90(image, -1))


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(MediaError, match="no defined brightness"):
        load_image(tmp_path / "f.tif")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_truncated(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    Image.fromarray(_rgb(60, 60)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(MediaError, match=rf"x\{suffix}.*(truncated|damaged)"):
        load_image(path)


def test_flipped_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(_rgb(60, 60)).save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(MediaError, match="damaged"):
        load_image(path)


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "header.ppm").write_bytes(b"P6 1x 2 255\n")  # Pillow: ValueError
    (tmp_path / "folder.png").mkdir()
    for name, message in [
        ("header.ppm", "truncated or damaged"),
        ("text.png", "not an image"),
        ("empty.jpg", "not an image"),
        ("folder.png", "got a folder"),
        ("none.png", "no such file"),
    ]:
        with pytest.raises(MediaError, match=message):
            load_image(tmp_path / name)
        assert not is_image(tmp_path / name)
    Image.fromarray(_rgb(50, 50)).save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(MediaError, match="too large"):
        load_image(tmp_path / "big.png")


def test_natural_order() -> None:
    names = ["b1.png", "a10.png", "a2.png", "A1.png", "a02.png", "10.png", "9.png"]
    assert sorted(names, key=natural_key) == ["9.png", "10.png", "A1.png", "a02.png", "a2.png", "a10.png", "b1.png"]


def test_list_images_goes_by_content(tmp_path: Path) -> None:
    image = Image.fromarray(_rgb())
    image.save(tmp_path / "f10.png", format="JPEG")
    image.save(tmp_path / "f2.dat", format="PNG")
    image.save(tmp_path / "日1.webp")
    image.save(tmp_path / ".hidden.png")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "f3.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["f2.dat", "f10.png", "日1.webp"]


def test_list_images_errors(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no images in this folder"):
        list_images(tmp_path)
    with pytest.raises(MediaError, match="got nothing"):
        list_images(tmp_path / "none")
    Image.fromarray(_rgb()).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"\x89PN")
    with pytest.raises(MediaError, match=r"1\.png: not an image"):
        list_images(tmp_path)
    with pytest.raises(MediaError, match="got a file"):
        list_images(tmp_path / "0.png")
