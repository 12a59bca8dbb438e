"""Loading of datasets by name: scikit-learn's digits, CIFAR-10, CIFAR-100 and folders of images."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from deat_rb.data.folder_layout import LAYOUT, check_classes, folder_layout
from deat_rb.data.image_files import ImageLister, check_utf8, describe_left_out
from deat_rb.data.image_folder import ImageFolder
from deat_rb.data.images import ImageSet, LabeledImages, interleave_classes, train_val_split
from deat_rb.data.normalization import NORMALIZATION, Normalization
from deat_rb.data.statistics import DatasetStatistics, Progress, StatisticsCache, compute_statistics
from deat_rb.utils.downloads import why_failed
from deat_rb.utils.errors import DeatError, did_you_mean

DIGITS_TEST_SIZE = 500

CIFAR_SIZES = (50_000, 10_000)

DOWNLOAD_TIMEOUT = 30.0
"""Timeout of a download, in seconds."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset with a training and a test part.

    Attributes:
        name: The name given to `load_data`.
        train: The training images.
        test: The test images, of the same size; for a folder, classes are interleaved.
        classes: Class names, indexed by label.
        statistics: Fingerprint, mean and standard deviation, or a function that computes them from all images.
        left_out: Number of skipped files of a folder, by reason; see `deat_rb.data.image_files.ImageLister`.
        repeated: Number of a folder's images that are links to other images of their class.
        is_placeholder: Whether the images are black because the dataset was not downloaded.
        val: The folder's own validation images, of the same size; None if they are to be held out of ``train``.
        layout_note: Note for the user on which folders hold the validation and test images.

    Raises:
        DeatError: There is only one class, the image sizes differ, or a label is out of range.
    """

    name: str
    train: LabeledImages
    test: LabeledImages
    classes: tuple[str, ...]
    statistics: DatasetStatistics | Callable[[], DatasetStatistics]
    left_out: Counter[str] = field(default_factory=Counter)
    repeated: int = 0
    is_placeholder: bool = False
    val: LabeledImages | None = None
    layout_note: str = ""

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise DeatError(f"{self.name} has only one class, {self.classes[0]}: at least two are needed")
        if self.train.shape != self.test.shape:
            raise DeatError(
                f"{self.name} has training images of {self.train.shape} and test images of {self.test.shape}: "
                "their shapes (C, H, W) must be equal"
            )
        if self.val is not None and self.val.shape != self.train.shape:
            raise DeatError(f"{self.name} has validation images of {self.val.shape}, but training images of "
                            f"{self.train.shape}: their shapes (C, H, W) must be equal")  # fmt: skip
        own = [("training", self.train), ("test", self.test), *([("validation", self.val)] if self.val else [])]
        for part, images in own:
            highest = int(images.labels.max())
            if highest >= len(self.classes):
                raise DeatError(
                    f"{self.name} has the {part} label {highest}, which is out of range: "
                    f"labels of its {len(self.classes)} classes must be 0 to {len(self.classes) - 1}"
                )

    @cached_property
    def _statistics(self) -> DatasetStatistics:
        return self.statistics if isinstance(self.statistics, DatasetStatistics) else self.statistics()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all images, labels and class names; decodes the training images if not yet known."""
        return self._statistics.fingerprint

    @property
    def known_fingerprint(self) -> str | None:
        """The fingerprint, or None if computing it would require decoding the training images."""
        known = isinstance(self.statistics, DatasetStatistics) or "_statistics" in vars(self)
        return self.fingerprint if known else None

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of the training images per channel, in [0, 1] units, for the model's normalization."""
        return self._statistics.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of the training images per channel, in [0, 1] units."""
        return self._statistics.std

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user on the folders, skipped or repeated images and a missing download."""
        repeated = (
            f"{self.repeated} {'image is a link' if self.repeated == 1 else 'images are links'} to another image of "
            "the same class, which counts again"
        )
        missing = f"{self.name} has not been downloaded yet" if self.is_placeholder else ""
        skipped = describe_left_out(self.left_out)
        return tuple(filter(None, (self.layout_note, skipped, repeated * bool(self.repeated), missing)))

    @property
    def transparency(self) -> str:
        """Note on the transparent images of all parts; empty if there are none or they have not been counted."""
        known = self._statistics.transparent if self.known_fingerprint is not None else 0
        have, were = ("image has", "was") if known == 1 else ("images have", "were")
        return f"{known} {have} transparency and {were} composited on white" * bool(known)


@dataclass(frozen=True)
class _Request:
    """The arguments of `load_data` except the name."""

    data_dir: Path | None
    image_size: int
    memory_limit: int | None
    progress: Progress | None
    test_only: bool
    download: bool


def load_data(
    name: str,
    *,
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    memory_limit: int | None = None,
    progress: Progress | None = None,
    test_only: bool = False,
    download: bool = True,
) -> Dataset:
    """Load a dataset into memory, or leave its images in files if they would exceed ``memory_limit``.

    Args:
        name: "digits", "cifar10", "cifar100" or "folder".
        data_dir: For "folder", the folder of images, see `deat_rb.data.folder_layout.folder_layout`. For CIFAR, the
            folder of its files, to which they are downloaded if they are missing (default "data").
        image_size: Height and width to which a folder's images are resized (default 32). Other datasets are 32x32.
        memory_limit: Maximum size in bytes of a folder's decoded images, one byte per value. Larger datasets are not
            kept in memory but decoded by worker processes in each epoch; batches, fingerprint, mean and standard
            deviation are the same. By default there is no limit.
        progress: Called while the statistics of images that are not kept in memory are computed for the first time.
        test_only: Whether to decode only the test images of a folder. Training images stay in files, and
            `fingerprint`, `mean` and `std` are computed on first use unless they are cached.
        download: Whether CIFAR may be downloaded. If it may not and is missing, the right number of black images is
            returned, with `Dataset.is_placeholder` set, which is enough to plan a run.

    Raises:
        DeatError: The name is unknown, or the data cannot be loaded.
    """
    if name not in DATASETS:
        raise DeatError(f"--dataset {name} is unknown: {did_you_mean(name, DATASETS)}")
    if name != "folder" and image_size not in (None, 32):
        raise DeatError(
            f"--image-size {image_size} is invalid: the images of {name} are 32x32; only those of --dataset folder are "
            "resized"
        )
    if memory_limit is not None and memory_limit < 0:
        raise DeatError(f"--memory-limit {memory_limit} is below 0: give a number of bytes, such as 8G")
    folder = None if data_dir is None else Path(data_dir).expanduser()
    if folder is not None:
        check_utf8(folder, "--data-dir")
    size = 32 if image_size is None else image_size
    return DATASETS[name](_Request(folder, size, memory_limit, progress, test_only, download))


def _digits(request: _Request) -> Dataset:
    """Load scikit-learn's 1,797 handwritten digits: 8x8 values from 0 to 16, resized bilinearly to 32x32 RGB.

    The test set has 500 images, stratified by class and the same in every run.
    """
    if request.data_dir is not None:
        raise DeatError(
            f"--data-dir {request.data_dir} does not apply to the digits; use --dataset folder for a folder of images"
        )
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)
    large = functional.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    images = large.round().clamp(0, 255).to(torch.uint8).repeat(1, 3, 1, 1)
    train, test = train_val_split(ImageSet(images, torch.from_numpy(bunch.target).long()), DIGITS_TEST_SIZE, seed=0)
    classes = tuple(str(digit) for digit in range(10))
    return Dataset("digits", train, test, classes, compute_statistics(train, test, classes))


def _cifar10(request: _Request) -> Dataset:
    from torchvision.datasets import CIFAR10

    return _cifar("cifar10", CIFAR10, request)


def _cifar100(request: _Request) -> Dataset:
    from torchvision.datasets import CIFAR100

    return _cifar("cifar100", CIFAR100, request)


def _cifar(name: str, source: Any, request: _Request) -> Dataset:
    """Load CIFAR with torchvision's class ``source``, after downloading the files if they are missing."""
    root, normalization = request.data_dir or Path("data"), NORMALIZATION[name]
    if not (root / source.base_folder).exists():
        if not request.download:
            return _cifar_placeholder(name, normalization)
        _fetch_cifar(name, source, root)
    try:
        parts = [source(root, train=train) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise DeatError(
            f"{root / source.base_folder} is incomplete or damaged: remove it to unpack it from "
            f"{root / source.filename} or download it again"
        ) from error
    train, test = (
        ImageSet(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    )
    classes = tuple(parts[0].classes)
    statistics = compute_statistics(train, test, classes, normalization=normalization)
    return Dataset(name, train, test, classes, statistics)


def _cifar_placeholder(name: str, normalization: Normalization) -> Dataset:
    """Return a placeholder with the right number of black images, which share the memory of a single one."""
    count = {"cifar10": 10, "cifar100": 100}[name]
    train, test = (
        ImageSet(torch.zeros(1, 3, 32, 32, dtype=torch.uint8).expand(size, -1, -1, -1), torch.arange(size) % count)
        for size in CIFAR_SIZES
    )
    statistics = DatasetStatistics("not downloaded", *normalization)
    classes = tuple(str(label) for label in range(count))
    return Dataset(name, train, test, classes, statistics, is_placeholder=True)


def _fetch_cifar(name: str, source: Any, root: Path) -> None:
    """Unpack the archive in ``root``, downloading it if it is missing; the complete folder is moved into place."""
    from torchvision.datasets.utils import check_integrity, extract_archive

    archive = root / source.filename
    if archive.exists() and not check_integrity(archive, source.tgz_md5):
        raise DeatError(
            f"{archive} is incomplete or damaged (its MD5 is not {source.tgz_md5}): download it again from {source.url}"
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
    # Failures of network, server and disk raise many types of exceptions, but the advice is the same.
    except Exception as error:
        if created:
            with contextlib.suppress(OSError):
                root.rmdir()
        raise DeatError(
            f"{name} could not be downloaded ({why_failed(error)}): download {source.url} manually and "
            f"save it as {archive}, or its files in {root / source.base_folder}; --dataset digits and --dataset "
            "folder need no download"
        ) from error


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Set the default socket timeout, because torchvision's download has none."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _folder(request: _Request) -> Dataset:
    """Load an image folder; see `folder_layout`."""
    data_dir, image_size = request.data_dir, request.image_size
    if data_dir is None:
        raise DeatError(f"--dataset folder needs --data-dir: a folder with {LAYOUT}")
    if image_size < 1:
        raise DeatError(f"--image-size {image_size} is invalid: give 1 or more pixels")
    layout, lister = folder_layout(data_dir), ImageLister()
    files = {part: lister.classes(folder) for part, folder in layout.parts().items()}
    check_classes(files, layout)
    repeated = lister.count_repeated(files)
    classes = tuple(files["train"])
    folders = {part: ImageFolder.of(listed, image_size) for part, listed in files.items()}
    train, test, val = folders["train"], folders["test"], folders.get("val")
    cache = StatisticsCache(data_dir, train, test, classes, val)
    decoded = test.nbytes if request.test_only else sum(part.nbytes for part in folders.values())
    in_memory = request.memory_limit is None or decoded <= request.memory_limit
    # The fingerprint covers the images in the order of the folder, class by class.
    parts: tuple[LabeledImages, LabeledImages, LabeledImages | None] = train, interleave_classes(test), val
    statistics: DatasetStatistics | Callable[[], DatasetStatistics]
    if request.test_only:
        statistics = cache.read() or partial(cache.read_or_compute, request.progress)
        if in_memory:
            parts = train, parts[1].in_memory(), val
    elif in_memory:
        held = {part: folder.decode() for part, folder in folders.items()}
        held_train, held_test, held_val = held["train"][0], held["test"][0], held["val"][0] if val is not None else None
        statistics = replace(
            compute_statistics(held_train, held_test, classes, val=held_val),
            transparent=sum(transparent for _, transparent in held.values()),
        )
        cache.write(statistics)
        parts = held_train, interleave_classes(held_test), held_val
    else:
        statistics = cache.read_or_compute(request.progress)
    return Dataset("folder", parts[0], parts[1], classes, statistics, left_out=lister.left_out,
                   repeated=repeated, val=parts[2], layout_note=layout.note)  # fmt: skip


DATASETS: dict[str, Callable[[_Request], Dataset]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "folder": _folder,
}
