"""The data sets: digits, which come with scikit-learn, CIFAR-10 and CIFAR-100, and folders of images.

A data set is a loader and its row in `DATASETS`. What batches are made of is in `deat_rb.batches`, whose names are
offered here too.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from deat_rb.batches import Batches, ImageSet, check_batch, hold_out, subset
from deat_rb.errors import DeatError, nearest

__all__ = ["DATASETS", "Batches", "DataSet", "ImageSet", "check_batch", "hold_out", "load_data", "subset"]

CIFAR10_NORMALISATION = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
CIFAR100_NORMALISATION = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
DIGITS_TEST_SIZE = 500
DOWNLOAD_TIMEOUT = 30.0
DECODING_THREADS = 4
FILES_PER_TASK = 64


@dataclass(frozen=True, eq=False)
class DataSet:
    """A data set with its test part.

    Attributes:
        name: As given to `load_data`.
        train: The training images.
        test: The test images, of the same size.
        classes: Names of the classes, in the order of the labels.
        mean: Per channel, of images in [0, 1], for the model's normalisation.
        std: Likewise.
        augment: Whether training images are to be cropped and mirrored.
        fingerprint: SHA-256 over all images, labels and class names.

    Raises:
        DeatError: There is one class only, the image sizes differ, or a label is out of range.
    """

    name: str
    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: bool
    fingerprint: str

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise DeatError(
                f"{self.name} has only one class, {self.classes[0]}: there must be two or more to tell apart"
            )
        if self.train.images.shape[1:] != self.test.images.shape[1:]:
            raise DeatError(
                f"{self.name} has training images of {tuple(self.train.images.shape[1:])} and test images of "
                f"{tuple(self.test.images.shape[1:])}: both must have the same (C, H, W)"
            )
        for part, images in (("training", self.train), ("test", self.test)):
            highest = int(images.labels.max())
            if highest >= len(self.classes):
                raise DeatError(
                    f"{self.name} has the {part} label {highest}, out of range: "
                    f"its {len(self.classes)} classes are 0 to {len(self.classes) - 1}"
                )


def load_data(name: str, *, data_dir: str | Path | None = None, image_size: int | None = None) -> DataSet:
    """Loads a data set into memory.

    Args:
        name: "digits", "cifar10", "cifar100" or "folder".
        data_dir: Where CIFAR's files are or shall be downloaded to (default "data"), or the folder. Digits need none.
        image_size: Height and width that images of a folder are brought to (default 32). The others are 32x32.

    Raises:
        DeatError: The name is unknown, or the data cannot be had or used.
    """
    if name not in DATASETS:
        raise DeatError(f"--dataset {name} is unknown: {nearest(name, DATASETS)}")
    if name != "folder" and image_size not in (None, 32):
        raise DeatError(
            f"--image-size {image_size} cannot be had: the images of {name} are 32x32; --dataset folder resizes"
        )
    folder = None if data_dir is None else Path(data_dir).expanduser()
    return DATASETS[name](folder, 32 if image_size is None else image_size)


def _data_set(
    name: str,
    train: ImageSet,
    test: ImageSet,
    classes: tuple[str, ...],
    *,
    augment: bool,
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> DataSet:
    mean, std = normalisation or _mean_and_std(train.images)
    return DataSet(name, train, test, classes, mean, std, augment, _fingerprint(train, test, classes))


def _mean_and_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, in [0, 1], from the counts of the 256 values: exact and small."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        shares = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = (shares * values).sum()
        means.append(mean.item())
        # A channel that is everywhere the same has no spread, and the model divides by it.
        stds.append(max((shares * (values - mean) ** 2).sum().sqrt().item(), 1 / 255))
    return tuple(means), tuple(stds)


def _fingerprint(train: ImageSet, test: ImageSet, classes: tuple[str, ...]) -> str:
    digest = hashlib.sha256(repr(classes).encode())
    for part in (train, test):
        digest.update(repr(tuple(part.images.shape)).encode())
        digest.update(part.images.contiguous().numpy().data)
        digest.update(part.labels.contiguous().numpy().data)
    return digest.hexdigest()


def _digits(data_dir: Path | None, image_size: int) -> DataSet:
    """scikit-learn's 1,797 handwritten digits: 8x8 values of 0 to 16, enlarged bilinearly to 32x32 RGB.

    500 of them, each class in proportion and the same in every run, are the test set.
    """
    if data_dir is not None:
        raise DeatError(
            f"--data-dir {data_dir} is of no use to the digits; for a folder of images say --dataset folder"
        )
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)
    large = functional.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    images = large.round().clamp(0, 255).to(torch.uint8).repeat(1, 3, 1, 1)
    train, test = hold_out(ImageSet(images, torch.from_numpy(bunch.target).long()), DIGITS_TEST_SIZE, seed=0)
    return _data_set("digits", train, test, tuple(str(digit) for digit in range(10)), augment=False)


def _cifar10(data_dir: Path | None, image_size: int) -> DataSet:
    from torchvision.datasets import CIFAR10

    return _cifar("cifar10", CIFAR10, data_dir or Path("data"), CIFAR10_NORMALISATION)


def _cifar100(data_dir: Path | None, image_size: int) -> DataSet:
    from torchvision.datasets import CIFAR100

    return _cifar("cifar100", CIFAR100, data_dir or Path("data"), CIFAR100_NORMALISATION)


def _cifar(name: str, source: Any, root: Path, normalisation: tuple[tuple[float, ...], tuple[float, ...]]) -> DataSet:
    """Loads the files that torchvision's class ``source`` reads, and fetches them before if they are not there."""
    if not (root / source.base_folder).exists():
        _fetch_cifar(name, source, root)
    try:
        parts = [source(root, train=train) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise DeatError(
            f"{root / source.base_folder} is incomplete or damaged: remove it, and it is unpacked from "
            f"{root / source.filename} or downloaded again"
        ) from error
    train, test = (
        ImageSet(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    )
    return _data_set(name, train, test, tuple(parts[0].classes), augment=True, normalisation=normalisation)


def _fetch_cifar(name: str, source: Any, root: Path) -> None:
    """Unpacks the archive under ``root``, or downloads it; only what is whole is moved to its place."""
    from torchvision.datasets.utils import check_integrity, extract_archive

    archive = root / source.filename
    if archive.exists() and not check_integrity(archive, source.tgz_md5):
        raise DeatError(
            f"{archive} is incomplete or damaged (its MD5 is not {source.tgz_md5}): fetch it anew from {source.url}"
        )
    created = not root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            if archive.exists():
                extract_archive(str(archive), scratch)
            else:
                with _socket_timeout(DOWNLOAD_TIMEOUT):
                    source(scratch, download=True)
            os.replace(Path(scratch, source.base_folder), root / source.base_folder)
    # Everything between here and the server can fail, each in its own way, and the answer is always the same.
    except Exception as error:
        if created:
            with contextlib.suppress(OSError):
                root.rmdir()
        raise DeatError(
            f"{name} could not be had ({type(error).__name__}: {error}): fetch {source.url} elsewhere and put it "
            f"there as {archive}, or its files into {root / source.base_folder}; --dataset digits and --dataset folder "
            "need no download"
        ) from error


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Bounds how long torchvision's download waits for an answer: it sets no limit itself."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _folder(data_dir: Path | None, image_size: int) -> DataSet:
    """``train/<class>/*`` and ``test/<class>/*``, read as torchvision's ``ImageFolder`` reads them."""
    if data_dir is None:
        raise DeatError("--dataset folder needs --data-dir: the folder that has train/<class>/* and test/<class>/*")
    if image_size < 1:
        raise DeatError(f"--image-size {image_size} is not possible: give 1 or more pixels")
    for part in ("train", "test"):
        if not (data_dir / part).is_dir():
            raise DeatError(
                f"--data-dir {data_dir} has no folder {part}: it must have train/<class>/* and test/<class>/*"
            )
    train_files, test_files = _image_files(data_dir / "train"), _image_files(data_dir / "test")
    if differing := sorted(train_files.keys() ^ test_files.keys()):
        raise DeatError(
            f"the class '{differing[0]}' is under only one of {data_dir / 'train'} and {data_dir / 'test'}: "
            "both must have the same classes"
        )
    if len(train_files) < 2:
        raise DeatError(
            f"{data_dir / 'train'} has {f'only one class, {min(train_files)}' if train_files else 'no class'}: "
            "there must be two or more, a folder each"
        )
    train, test = _decode(train_files, image_size), _decode(test_files, image_size)
    return _data_set("folder", train, test, tuple(train_files), augment=True)


def _image_files(root: Path) -> dict[str, list[Path]]:
    """The image files of each class, classes and files in alphabetical order, links followed."""
    try:
        classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        files = {
            name: [
                Path(folder, file)
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


def _decode(files: dict[str, list[Path]], size: int) -> ImageSet:
    """Decodes all files to RGB of one size: the largest centred square, resized bilinearly."""
    paths = [path for found in files.values() for path in found]
    labels = [label for label, found in enumerate(files.values()) for _ in found]
    images = np.empty((len(paths), 3, size, size), dtype=np.uint8)

    def decode(start: int) -> None:
        for position, path in enumerate(paths[start : start + FILES_PER_TASK], start):
            images[position] = _read_image(path, size)

    with ThreadPoolExecutor(min(DECODING_THREADS, os.cpu_count() or 1)) as pool:
        for _ in pool.map(decode, range(0, len(paths), FILES_PER_TASK)):
            pass
    return ImageSet(torch.from_numpy(images), torch.tensor(labels))


def _read_image(path: Path, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """One image (3, size, size)."""
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


DATASETS: dict[str, Callable[[Path | None, int], DataSet]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "folder": _folder,
}
