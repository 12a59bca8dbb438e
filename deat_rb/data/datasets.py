"""The data sets: digits, which come with scikit-learn, CIFAR-10 and CIFAR-100, and folders of images.

A data set is a loader and its row in `DATASETS`. What batches are made of is in `deat_rb.batches`, whose names are
offered here too.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from deat_rb.data.batches import Batches
from deat_rb.data.check import check_batch
from deat_rb.data.image_folder import ImageFolder, image_files
from deat_rb.data.images import ImageSet, LabeledImages, subset, train_val_split
from deat_rb.data.normalization import NORMALIZATION, Normalization
from deat_rb.data.statistics import DatasetStatistics, Progress, cached_statistics, compute_statistics
from deat_rb.utils.errors import DeatError, did_you_mean

__all__ = [
    "DATASETS",
    "Batches",
    "Dataset",
    "ImageSet",
    "LabeledImages",
    "check_batch",
    "load_data",
    "subset",
    "train_val_split",
]

DIGITS_TEST_SIZE = 500

DOWNLOAD_TIMEOUT = 30.0


@dataclass(frozen=True, eq=False)
class Dataset:
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
    train: LabeledImages
    test: LabeledImages
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
        if self.train.shape != self.test.shape:
            raise DeatError(
                f"{self.name} has training images of {self.train.shape} and test images of {self.test.shape}: "
                "both must have the same (C, H, W)"
            )
        for part, images in (("training", self.train), ("test", self.test)):
            highest = int(images.labels.max())
            if highest >= len(self.classes):
                raise DeatError(
                    f"{self.name} has the {part} label {highest}, out of range: "
                    f"its {len(self.classes)} classes are 0 to {len(self.classes) - 1}"
                )


@dataclass(frozen=True)
class _Request:
    """What `load_data` was asked for, besides the name."""

    data_dir: Path | None
    image_size: int
    memory_limit: int | None
    progress: Progress | None


def load_data(
    name: str,
    *,
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    memory_limit: int | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Loads a data set into memory, or leaves it in its files where it is too large for that.

    Args:
        name: "digits", "cifar10", "cifar100" or "folder".
        data_dir: Where CIFAR's files are or shall be downloaded to (default "data"), or the folder. Digits need none.
        image_size: Height and width that images of a folder are brought to (default 32). The others are 32x32.
        memory_limit: Bytes that the decoded images of a folder may take, a byte per value. Where they would take more
            they stay in their files and are decoded by worker processes in each epoch; batches, fingerprint, mean and
            standard deviation are the same. By default all are held in memory.
        progress: Is told how many of how many images have been seen where they stay in their files and are new here.

    Raises:
        DeatError: The name is unknown, or the data cannot be had or used.
    """
    if name not in DATASETS:
        raise DeatError(f"--dataset {name} is unknown: {did_you_mean(name, DATASETS)}")
    if name != "folder" and image_size not in (None, 32):
        raise DeatError(
            f"--image-size {image_size} cannot be had: the images of {name} are 32x32; --dataset folder resizes"
        )
    if memory_limit is not None and memory_limit < 0:
        raise DeatError(f"--memory-limit {memory_limit} is below 0: give a number of bytes, such as 8G")
    folder = None if data_dir is None else Path(data_dir).expanduser()
    return DATASETS[name](_Request(folder, 32 if image_size is None else image_size, memory_limit, progress))


def _data_set(
    name: str,
    train: LabeledImages,
    test: LabeledImages,
    classes: tuple[str, ...],
    seen: DatasetStatistics,
    *,
    augment: bool,
) -> Dataset:
    return Dataset(name, train, test, classes, seen.mean, seen.std, augment, seen.fingerprint)


def _digits(request: _Request) -> Dataset:
    """scikit-learn's 1,797 handwritten digits: 8x8 values of 0 to 16, enlarged bilinearly to 32x32 RGB.

    500 of them, each class in proportion and the same in every run, are the test set.
    """
    if request.data_dir is not None:
        raise DeatError(
            f"--data-dir {request.data_dir} is of no use to the digits; for a folder of images say --dataset folder"
        )
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)
    large = functional.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    images = large.round().clamp(0, 255).to(torch.uint8).repeat(1, 3, 1, 1)
    train, test = train_val_split(ImageSet(images, torch.from_numpy(bunch.target).long()), DIGITS_TEST_SIZE, seed=0)
    classes = tuple(str(digit) for digit in range(10))
    return _data_set("digits", train, test, classes, compute_statistics(train, test, classes), augment=False)


def _cifar10(request: _Request) -> Dataset:
    from torchvision.datasets import CIFAR10

    return _cifar("cifar10", CIFAR10, request.data_dir or Path("data"), NORMALIZATION["cifar10"])


def _cifar100(request: _Request) -> Dataset:
    from torchvision.datasets import CIFAR100

    return _cifar("cifar100", CIFAR100, request.data_dir or Path("data"), NORMALIZATION["cifar100"])


def _cifar(name: str, source: Any, root: Path, normalization: Normalization) -> Dataset:
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
    classes = tuple(parts[0].classes)
    seen = compute_statistics(train, test, classes, normalization=normalization)
    return _data_set(name, train, test, classes, seen, augment=True)


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


def _folder(request: _Request) -> Dataset:
    """``train/<class>/*`` and ``test/<class>/*``, read as torchvision's ``ImageFolder`` reads them."""
    data_dir, image_size = request.data_dir, request.image_size
    if data_dir is None:
        raise DeatError("--dataset folder needs --data-dir: the folder that has train/<class>/* and test/<class>/*")
    if image_size < 1:
        raise DeatError(f"--image-size {image_size} is not possible: give 1 or more pixels")
    for part in ("train", "test"):
        if not (data_dir / part).is_dir():
            raise DeatError(
                f"--data-dir {data_dir} has no folder {part}: it must have train/<class>/* and test/<class>/*"
            )
    train_files, test_files = image_files(data_dir / "train"), image_files(data_dir / "test")
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
    train, test = ImageFolder.of(train_files, image_size), ImageFolder.of(test_files, image_size)
    classes = tuple(train_files)
    if request.memory_limit is not None and train.nbytes + test.nbytes > request.memory_limit:
        seen = cached_statistics(train, test, classes, request.progress)
        return _data_set("folder", train, test, classes, seen, augment=True)
    in_memory = train.in_memory(), test.in_memory()
    return _data_set("folder", *in_memory, classes, compute_statistics(*in_memory, classes), augment=True)


DATASETS: dict[str, Callable[[_Request], Dataset]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "folder": _folder,
}
