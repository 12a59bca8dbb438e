"""Folders of image files: found, decoded, and read again in every epoch where they are too many to be held."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deat_rb.data.images import ImageSet, LabeledImages, Reader
from deat_rb.data.workers import WorkerReader
from deat_rb.utils.errors import DeatError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

DECODING_THREADS = 4

FILES_PER_TASK = 64

CHUNK_BYTES = 2**22


@dataclass(frozen=True, eq=False)
class Paths:
    """Many paths in little memory: a million strings of their own would be copied into every worker as it reads them.

    Attributes:
        joined: All of them, one after another.
        ends: int64, where each ends.
    """

    joined: bytes
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, paths: Sequence[str]) -> Paths:
        """Joins paths."""
        encoded = [os.fsencode(path) for path in paths]
        return cls(b"".join(encoded), np.cumsum([len(path) for path in encoded], dtype=np.int64))

    def __getitem__(self, number: int) -> Path:
        start = self.ends[number - 1] if number else 0
        return Path(os.fsdecode(self.joined[start : self.ends[number]]))


@dataclass(frozen=True, eq=False)
class _Files:
    """What decodes; a worker gets one."""

    paths: Paths
    numbers: NDArray[np.int64]
    labels: NDArray[np.int64]
    size: int

    def __call__(self, positions: Sequence[int]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        images = np.empty((len(positions), 3, self.size, self.size), dtype=np.uint8)
        for row, position in enumerate(positions):
            images[row] = read_image(self.paths[self.numbers[position]], self.size)
        return images, self.labels[positions]


@dataclass(frozen=True, eq=False)
class ImageFolder(LabeledImages):
    """Labelled image files of one folder, decoded when they are wanted.

    Each becomes RGB of one size: the largest centred square, resized bilinearly.

    Attributes:
        paths: The files of the whole folder.
        numbers: int64 (N,), which of them belong to this set, in its order.
        labels: int64 (N,), from 0 on.
        size: Height and width.
    """

    paths: Paths
    numbers: Tensor
    labels: Tensor
    size: int

    @classmethod
    def of(cls, files: dict[str, list[str]], size: int) -> ImageFolder:
        """The files of each class, whose labels are the classes' positions."""
        labels = [label for label, found in enumerate(files.values()) for _ in found]
        paths = Paths.of([path for found in files.values() for path in found])
        return cls(paths, torch.arange(len(labels)), torch.tensor(labels), size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of each image."""
        return 3, self.size, self.size

    def files(self) -> Iterator[Path]:
        """The files, in order."""
        return (self.paths[number] for number in self.numbers.tolist())

    def _part(self, chosen: slice | Tensor) -> Self:
        return type(self)(self.paths, self.numbers[chosen], self.labels[chosen], self.size)

    def _decoder(self) -> _Files:
        return _Files(self.paths, self.numbers.numpy(), self.labels.numpy(), self.size)

    def in_memory(self) -> ImageSet:
        """Decodes all of them into memory, in threads.

        Raises:
            DeatError: One cannot be read.
        """
        images, decode = np.empty((len(self), *self.shape), dtype=np.uint8), self._decoder()

        def fill(start: int) -> None:
            positions = range(start, min(start + FILES_PER_TASK, len(self)))
            for position in positions:
                images[position] = decode([position])[0][0]

        with ThreadPoolExecutor(min(DECODING_THREADS, os.cpu_count() or 1)) as pool:
            for _ in pool.map(fill, range(0, len(self), FILES_PER_TASK)):
                pass
        return ImageSet(torch.from_numpy(images), self.labels)

    def chunks(self) -> Iterator[Tensor]:
        """All of them once, in order: uint8 (n, 3, H, W), decoded by worker processes, a few megabytes at a time.

        Raises:
            DeatError: One cannot be read.
        """
        each = max(1, min(FILES_PER_TASK, CHUNK_BYTES * len(self) // self.nbytes))
        windows = [slice(start, min(start + each, len(self))) for start in range(0, len(self), each)]
        for images, _ in self.reader("cpu")(None, windows):
            yield images

    def reader(self, device: torch.device | str) -> Reader:
        """Gives batches that worker processes decode in each epoch anew."""
        return WorkerReader(self._decoder(), device)


def image_files(root: Path) -> dict[str, list[str]]:
    """The image files of each class, ``<class>/**``, classes and files in alphabetical order, links followed.

    Raises:
        DeatError: The folder cannot be read, or a class is empty.
    """
    try:
        classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        files = {
            name: [
                os.path.join(folder, file)
                for folder, _, inside in sorted(os.walk(root / name, followlinks=True))
                for file in sorted(inside)
                if file.lower().endswith(IMAGE_SUFFIXES)
            ]
            for name in classes
        }
    except OSError as error:
        raise DeatError(f"{error.filename} cannot be read: {error.strerror}") from error
    for name, found in files.items():
        if not found:
            raise DeatError(f"the class folder {root / name} has no image: put some there, or remove it")
    return files


def read_image(path: Path, size: int) -> NDArray[np.uint8]:
    """Decodes one image to RGB, (3, size, size): its largest centred square, resized bilinearly.

    Raises:
        DeatError: It is no image, damaged, or of more than 8 bits per value.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            mode, whole = image.mode, image.convert("RGB")
        pixels = np.asarray(ImageOps.fit(whole, (size, size), Image.Resampling.BILINEAR))
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more, each for broken content.
    except Exception as error:
        raise DeatError(f"{path} cannot be read as an image: repair or remove it") from error
    if mode.startswith(("I", "F")):
        raise DeatError(f"{path} has more than 8 bits per value, which Pillow cuts off at 255: convert it to 8 bits")
    return pixels.transpose(2, 0, 1)
