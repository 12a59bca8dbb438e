from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from deat_rb.data.image_files import find_images, image_suffixes, readable_formats
from deat_rb.data.image_folder import read_image
from deat_rb.utils.errors import DeatError


def upright() -> Image.Image:
    """64x32: red on the left, blue on the right, green above."""
    image = Image.new("RGB", (64, 32), (255, 0, 0))
    image.paste((0, 0, 255), (32, 0, 64, 32))
    image.paste((0, 255, 0), (0, 0, 64, 8))
    return image


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (5, Image.Transpose.TRANSPOSE),
        (6, Image.Transpose.ROTATE_90),
        (7, Image.Transpose.TRANSVERSE),
        (8, Image.Transpose.ROTATE_270),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_read_image_follows_the_exif_orientation(
    tmp_path: Path, orientation: int, stored: Image.Transpose, suffix: str
) -> None:
    """The camera stores rotated pixels and the orientation; every viewer shows both files alike."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path, plain = tmp_path / f"phone.{suffix}", tmp_path / f"plain.{suffix}"
    lossless: Any = {"lossless": True} if suffix == "webp" else {}
    upright().transpose(stored).save(path, exif=exif, **lossless)
    upright().save(plain, **lossless)
    assert np.array_equal(read_image(path, 16), read_image(plain, 16))


def test_heic_files_are_read_with_pillow_heif(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_heif(file: Any, name: Any) -> Any:
        return Image.open(io.BytesIO(file.read()[12:]))

    def register() -> None:
        Image.register_open("HEIF", open_heif, lambda prefix: prefix[4:12] == b"ftypheic")
        Image.register_extension("HEIF", ".heic")

    for name in ("OPEN", "EXTENSION", "ID"):
        monkeypatch.setattr(Image, name, getattr(Image, name).copy())
    upright().save(tmp_path / "photo.png")
    path = tmp_path / "photo.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic" + (tmp_path / "photo.png").read_bytes())
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    for cached in (readable_formats, image_suffixes):
        cached.cache_clear()
    try:
        assert find_images([tmp_path])[0] == [str(path), str(tmp_path / "photo.png")]
        assert np.array_equal(read_image(path, 16), read_image(tmp_path / "photo.png", 16))
    finally:
        for cached in (readable_formats, image_suffixes):
            cached.cache_clear()


def test_read_image_tries_the_formats_of_photos_only(tmp_path: Path) -> None:
    """An EPS file would be given to Ghostscript."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(DeatError, match="cannot be read as an image") as refused:
        read_image(path, 8)
    assert isinstance(refused.value.__cause__, UnidentifiedImageError)


def test_read_image_ignores_damaged_exif_data(tmp_path: Path) -> None:
    upright().save(tmp_path / "a.jpg", quality=95, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    upright().save(tmp_path / "b.jpg", quality=95)
    assert np.array_equal(read_image(tmp_path / "a.jpg", 16), read_image(tmp_path / "b.jpg", 16))


def transparent(mode: str) -> Image.Image:
    """Left half opaque, right half transparent over another, hidden color."""
    image = Image.new("RGBA", (32, 32), (100, 150, 200, 255))
    image.paste((1, 2, 3, 0), (16, 0, 32, 32))
    return image.quantize(4) if mode == "P" else image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGBA", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "gif"), ("RGBA", "webp"), ("RGBA", "tif")],
)
def test_read_image_composites_transparency_on_white(tmp_path: Path, mode: str, suffix: str) -> None:
    lossless: Any = {"lossless": True} if suffix == "webp" else {}
    transparent(mode).save(tmp_path / f"a.{suffix}", **lossless)
    pixels = read_image(tmp_path / f"a.{suffix}", 32)
    assert (pixels[:, :, 17:] == 255).all()
    assert (pixels[:, :, :15] < 255).all()


def test_read_image_composites_half_transparency_proportionally(tmp_path: Path) -> None:
    Image.new("RGBA", (32, 32), (55, 155, 255, 128)).save(tmp_path / "a.png")
    # 255 - (255 - 55) * 128 / 255 = 154.6; 255 - (255 - 155) * 128 / 255 = 204.8
    assert np.abs(read_image(tmp_path / "a.png", 8)[:, 0, 0].astype(int) - [155, 205, 255]).max() <= 1


def test_read_image_names_the_limit_of_a_huge_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    upright().save(tmp_path / "a.png")
    with pytest.raises(DeatError, match=r"a\.png has 2048 pixels, more than Pillow decodes: reduce its size"):
        read_image(tmp_path / "a.png", 16)
