"""Folders of image files: listing, decoding, and reading in every epoch if they do not fit in memory."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deat_rb.data.images import ImageSet, LabeledImages, Reader
from deat_rb.data.workers import WorkerReader
from deat_rb.utils.errors import DeatError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = {"AVIF", "BMP", "DIB", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP"}
"""Pillow formats that are read if the installed Pillow supports them."""

SYSTEM_FOLDERS = {"@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX", "lost+found", "System Volume Information"}
"""Folders created by operating systems and network drives; they are skipped like hidden files."""

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

        with ThreadPoolExecutor(min(DECODING_THREADS, os.cpu_count() or 1)) as pool:
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


@cache
def image_suffixes() -> frozenset[str]:
    """Return the file suffixes, such as ``.png``, of those `FORMATS` that the installed Pillow can read."""
    from PIL import Image

    Image.init()
    return frozenset(
        suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS and name in Image.OPEN
    )


def class_names(root: Path) -> list[str]:
    """Return the names of the class folders in ``root``, in alphabetical order, without reading the folders.

    Raises:
        DeatError: The folder cannot be read.
    """
    try:
        return _scan(str(root), {}, Counter())[0]
    except OSError as error:
        raise DeatError(f"{error.filename or root} cannot be read: {error.strerror}") from error


def image_files(
    root: Path, visited: dict[tuple[int, int], str] | None = None
) -> tuple[dict[str, list[str]], Counter[str]]:
    """List the image files of each class, ``<class>/**``.

    Links are followed. Hidden files, `SYSTEM_FOLDERS` and files of other types are skipped.

    Args:
        root: The folder of the class folders.
        visited: Folders already read, by device and inode; updated in place. Pass the same dictionary for ``train``
            and ``test`` to detect links from one to the other.

    Returns:
        The files of each class, with classes and files in alphabetical order; and the number of skipped files by
        reason: "hidden", "outside the class folders", or the suffix.

    Raises:
        DeatError: A folder cannot be read or is reached twice through a link, a class has no images or a name that is
            not UTF-8, or an image is a broken link or not a regular file.
    """
    left_out: Counter[str] = Counter()
    visited = {} if visited is None else visited
    try:
        classes, others = _scan(str(root), visited, left_out)
        if others:
            left_out["outside the class folders"] += len(others)
        return {name: _class_files(root, name, visited, left_out) for name in classes}, left_out
    except OSError as error:
        raise DeatError(f"{error.filename or root} cannot be read: {error.strerror}") from error


def _class_files(root: Path, name: str, visited: dict[tuple[int, int], str], left_out: Counter[str]) -> list[str]:
    check_utf8(root / name, "the class folder")
    before = left_out.copy()
    folders = sorted(_walk(os.path.join(root, name), visited, left_out))
    files = [os.path.join(folder, file) for folder, inside in folders for file in inside]
    if not files:
        others = describe_left_out(left_out - before)
        raise DeatError(f"the class folder {root / name} has no images{others and f' ({others})'}: "
                        "add some, or remove it")  # fmt: skip
    return files


def _walk(folder: str, visited: dict[tuple[int, int], str], left_out: Counter[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder with the names of its image files."""
    subfolders, names = _scan(folder, visited, left_out)
    images = []
    for name in names:
        suffix = os.path.splitext(name)[1].lower()
        if suffix not in image_suffixes():
            left_out[suffix or "no suffix"] += 1
        elif os.path.isfile(os.path.join(folder, name)):
            images.append(name)
        else:
            raise DeatError(f"{os.path.join(folder, name)} is a broken link or not a regular file: repair or remove it")
    yield folder, images
    for name in subfolders:
        yield from _walk(os.path.join(folder, name), visited, left_out)


def _scan(folder: str, visited: dict[tuple[int, int], str], left_out: Counter[str]) -> tuple[list[str], list[str]]:
    """Return the sorted names of a folder's visible subfolders and files; raise if it was visited before."""
    state = os.stat(folder)
    first = visited.setdefault((state.st_dev, state.st_ino), folder)
    if first != folder and state.st_ino:  # 0 on file systems without inode numbers
        raise DeatError(f"{folder} is the same folder as {first}, through a link: remove the link, "
                        "which would add the same images twice")  # fmt: skip
    names: tuple[list[str], list[str]] = ([], [])
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and entry.name not in SYSTEM_FOLDERS:
                names[0 if entry.is_dir() else 1].append(entry.name)
            elif entry.is_dir(follow_symlinks=False):
                left_out["hidden"] += sum(len(files) for _, _, files in os.walk(entry.path))
            else:
                left_out["hidden"] += 1
    return sorted(names[0]), sorted(names[1])


def describe_left_out(left_out: Counter[str]) -> str:
    """Return a summary such as "3 files skipped: .heic (2), hidden (1)", "" for none."""
    count = left_out.total()
    reasons = ", ".join(f"{reason} ({number})" for reason, number in left_out.most_common() if number)
    return f"{count} {'file' if count == 1 else 'files'} skipped: {reasons}" if count else ""


def check_utf8(path: str | Path, what: str) -> None:
    """Check that a path is valid UTF-8, because a run's JSON files cannot store others.

    Raises:
        DeatError: The path is not valid UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        readable = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise DeatError(f"{what} {readable} has a name that is not UTF-8: rename it") from None


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

    try:
        with Image.open(path) as image:
            mode = image.mode
            if mode.startswith(("I", "F")):
                raise DeatError(f"{path} has more than 8 bits per value, which Pillow would clip at 255: "
                                "convert it to 8 bits")  # fmt: skip
            image.load()
            with contextlib.suppress(Exception):  # an intact image may have damaged EXIF data
                ImageOps.exif_transpose(image, in_place=True)
            rgb, transparent = _to_rgb(image)
        pixels = np.asarray(ImageOps.fit(rgb, (size, size), Image.Resampling.BILINEAR))
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
    return pixels.transpose(2, 0, 1), transparent


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
