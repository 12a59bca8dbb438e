"""Image files: decoding, and reading in every epoch if they do not fit in memory."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deat_rb.data.image_files import readable_formats
from deat_rb.data.images import ImageSet, LabeledImages, Reader
from deat_rb.data.workers import WorkerReader
from deat_rb.utils.errors import DeatError
from deat_rb.utils.threads import processors

if TYPE_CHECKING:
    from PIL import Image

ORIENTATION = 0x0112
"""EXIF tag of the orientation: 1 for upright, 2 to 8 for rotated or mirrored."""

DECODING_THREADS = 4

FILES_PER_TASK = 64

CHUNK_BYTES = 2**22


@dataclass(frozen=True, eq=False)
class Paths:
    """Many paths in one buffer, so that worker processes do not copy a Python string per path on access.

    Attributes:
        joined: The concatenated paths.
        ends: End offset of each path, int64.
    """

    joined: bytes
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, paths: Sequence[str]) -> Paths:
        """Create the buffer from a list of paths."""
        encoded = [os.fsencode(path) for path in paths]
        return cls(b"".join(encoded), np.cumsum([len(path) for path in encoded], dtype=np.int64))

    def __getitem__(self, number: int) -> Path:
        start = self.ends[number - 1] if number else 0
        return Path(os.fsdecode(self.joined[start : self.ends[number]]))


@dataclass(frozen=True, eq=False)
class _FileDecoder:
    """Decodes image files; each worker process has one.

    With ``count_transparent``, labels are replaced by 1 for images with transparency and 0 for others.
    """

    paths: Paths
    numbers: NDArray[np.int64]
    labels: NDArray[np.int64]
    size: int
    count_transparent: bool = False

    def __call__(self, positions: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        images = np.empty((len(positions), 3, self.size, self.size), dtype=np.uint8)
        transparent = np.zeros(len(positions), dtype=np.int64)
        for row, position in enumerate(positions):
            images[row], transparent[row] = _decode(self.paths[self.numbers[position]], self.size)
        return images, transparent if self.count_transparent else self.labels[positions]


@dataclass(frozen=True, eq=False)
class ImageFolder(LabeledImages):
    """Labeled image files, decoded on demand; see `read_image`.

    Attributes:
        paths: All files of the folder.
        numbers: Indices into ``paths`` of this set's images, in order, (N,) int64.
        labels: Class indices, (N,) int64.
        size: Height and width of the decoded images.
    """

    paths: Paths
    numbers: Tensor
    labels: Tensor
    size: int

    @classmethod
    def of(cls, files: dict[str, list[str]], size: int) -> ImageFolder:
        """Return a set of all files, labeled with the position of their class in ``files``."""
        labels = [label for label, paths in enumerate(files.values()) for _ in paths]
        paths = Paths.of([path for paths in files.values() for path in paths])
        return cls(paths, torch.arange(len(labels)), torch.tensor(labels), size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of each image."""
        return 3, self.size, self.size

    def files(self) -> Iterator[Path]:
        """Yield the files, in order."""
        return (self.paths[number] for number in self.numbers.tolist())

    def _part(self, chosen: slice | Tensor) -> Self:
        return type(self)(self.paths, self.numbers[chosen], self.labels[chosen], self.size)

    def _decoder(self) -> _FileDecoder:
        return _FileDecoder(self.paths, self.numbers.numpy(), self.labels.numpy(), self.size)

    def in_memory(self) -> ImageSet:
        """Decode all files into memory.

        Raises:
            DeatError: A file cannot be read.
        """
        return self.decode()[0]

    def decode(self) -> tuple[ImageSet, int]:
        """Decode all files into memory with threads; also return the number of images with transparency.

        Raises:
            DeatError: A file cannot be read.
        """
        images, decoder = np.empty((len(self), *self.shape), dtype=np.uint8), self._decoder()
        decoder = replace(decoder, count_transparent=True)

        def fill(start: int) -> int:
            transparent = 0
            for position in range(start, min(start + FILES_PER_TASK, len(self))):
                (images[position],), flags = decoder([position])
                transparent += int(flags[0])
            return transparent

        with decoding_pool() as pool:
            transparent = sum(pool.map(fill, range(0, len(self), FILES_PER_TASK)))
        return ImageSet(torch.from_numpy(images), self.labels), transparent

    def chunks(self) -> Iterator[tuple[Tensor, int]]:
        """Yield all images once, in order, decoded by worker processes in chunks of a few megabytes.

        Yields:
            uint8 images (n, 3, H, W), and the number of images with transparency.

        Raises:
            DeatError: A file cannot be read.
        """
        each = max(1, min(FILES_PER_TASK, CHUNK_BYTES * len(self) // self.nbytes))
        windows = [slice(start, min(start + each, len(self))) for start in range(0, len(self), each)]
        for images, flags in WorkerReader(replace(self._decoder(), count_transparent=True), "cpu")(None, windows):
            yield images, int(flags.sum())

    def reader(self, device: torch.device | str) -> Reader:
        """Return a reader whose worker processes decode the images in every epoch."""
        return WorkerReader(self._decoder(), device)


def decoding_pool() -> ThreadPoolExecutor:
    """Return a pool of threads for decoding images."""
    return ThreadPoolExecutor(min(DECODING_THREADS, processors()))


def read_image(path: Path, size: int) -> NDArray[np.uint8]:
    """Decode an image file to RGB, uint8 (3, size, size).

    The EXIF orientation is applied, transparent pixels are composited on white, and the largest centered square is
    resized bilinearly. For files with several frames, the first is used.

    Raises:
        DeatError: The file cannot be read, is not an image, is damaged, or has more than 8 bits per value or more
            pixels than Pillow decodes.
    """
    return _decode(path, size)[0]


def _decode(path: Path, size: int) -> tuple[NDArray[np.uint8], bool]:
    """Decode as `read_image` does; also return whether the image has transparent pixels."""
    from PIL import Image, ImageOps

    image = open_image(path)
    pixels = np.asarray(ImageOps.fit(image.rgb, (size, size), Image.Resampling.BILINEAR))
    return pixels.transpose(2, 0, 1), image.transparent


@dataclass(frozen=True, eq=False)
class OpenedImage:
    """A decoded image.

    Attributes:
        rgb: The pixels in RGB, with the EXIF orientation applied, composited on white.
        mode: Pillow's mode of the file, such as L or RGBA.
        format: Format of the file, such as JPEG.
        turned: Whether the EXIF orientation rotated or mirrored it.
        transparent: Whether it has transparent pixels.
    """

    rgb: Image.Image
    mode: str
    format: str
    turned: bool
    transparent: bool


def open_image(path: Path) -> OpenedImage:
    """Decode an image file at its original size.

    Raises:
        DeatError: See `read_image`.
    """
    from PIL import Image, ImageOps

    try:
        # In any other format, such as EPS, Pillow may start another program.
        with Image.open(path, formats=readable_formats()) as image:
            mode, kind, turned = image.mode, str(image.format), False
            if mode.startswith(("I", "F")):
                raise DeatError(f"{path} has more than 8 bits per value, which Pillow would clip at 255: "
                                "convert it to 8 bits")  # fmt: skip
            with contextlib.suppress(Exception):  # an intact image may have damaged EXIF data
                turned = kind == "TIFF" and _is_turned(image)  # load() turns a TIFF, and removes the orientation
            image.load()
            with contextlib.suppress(Exception):
                turned = turned or _is_turned(image)
                ImageOps.exif_transpose(image, in_place=True)
            rgb, transparent = _to_rgb(image)
    except DeatError:
        raise
    except Image.DecompressionBombError as error:
        pixel_count = re.search(r"\d+", str(error))
        raise DeatError(f"{path} has {pixel_count[0] if pixel_count else 'too many'} pixels, more than Pillow decodes: "
                        "reduce its size") from error  # fmt: skip
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others for damaged files.
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DeatError(f"{path} cannot be read: {error.strerror}") from error
        raise DeatError(f"{path} cannot be read as an image: repair or remove it") from error
    return OpenedImage(rgb, mode, kind, turned, transparent)


def _is_turned(image: Image.Image) -> bool:
    return image.getexif().get(ORIENTATION, 1) in range(2, 9)


def _to_rgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """Convert to RGB, compositing transparent pixels on white; also return whether there were any."""
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB"), False
    rgba = image.convert("RGBA")
    lowest, _ = rgba.getchannel("A").getextrema()
    if lowest == 255:
        return rgba.convert("RGB"), False
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB"), True
