"""Dataset statistics: fingerprint, and mean and standard deviation per channel."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from deat_rb.data.image_folder import ImageFolder
from deat_rb.data.images import LabeledImages
from deat_rb.data.normalization import Normalization
from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import cache_folder, read_json, write_json
from deat_rb.utils.versions import version

Progress = Callable[[int, int], None]
"""Callback that receives the number of decoded images and the total number."""

CACHE_VERSION = "2"
"""Part of the cache key; increased when decoding changes."""


@dataclass(frozen=True)
class DatasetStatistics:
    """Results of one pass over all images.

    Attributes:
        fingerprint: SHA-256 of all decoded images, labels and class names.
        mean: Mean of the training images per channel, in [0, 1] units.
        std: Standard deviation of the training images per channel, in [0, 1] units.
        transparent: Number of images with transparent pixels.
    """

    fingerprint: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    transparent: int = 0


def compute_statistics(
    train: LabeledImages,
    test: LabeledImages,
    classes: tuple[str, ...],
    *,
    val: LabeledImages | None = None,
    normalization: Normalization | None = None,
    progress: Progress | None = None,
) -> DatasetStatistics:
    """Compute the statistics chunk by chunk; the result is the same for images in memory and in files.

    Args:
        train: The training images.
        test: The test images.
        classes: Names of the classes.
        val: The dataset's own validation images, if any.
        normalization: Mean and standard deviation, if they are known.
        progress: Called after each chunk.

    Raises:
        DeatError: An image file cannot be read.
    """
    digest = hashlib.sha256(repr(classes).encode())
    counts = torch.zeros(train.shape[0], 256, dtype=torch.int64)
    done = transparent = 0
    parts = [train, test, *([] if val is None else [val])]
    for part in parts:
        digest.update(repr((len(part), *part.shape)).encode())
        for images, transparent_here in part.chunks():
            digest.update(images.contiguous().numpy().data)
            if part is train and normalization is None:
                counts += _value_counts(images)
            transparent += transparent_here
            done += len(images)
            if progress is not None:
                progress(done, sum(map(len, parts)))
        digest.update(part.labels.contiguous().numpy().data)
    mean, std = normalization or _mean_and_std(counts)
    return DatasetStatistics(digest.hexdigest(), mean, std, transparent)


def _value_counts(images: Tensor) -> Tensor:
    """Count each of the 256 values per channel: (C, 256)."""
    return torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])


def _mean_and_std(counts: Tensor) -> Normalization:
    """Compute mean and standard deviation per channel, in [0, 1], exactly from the counts (C, 256)."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in counts:
        shares = channel.double() / channel.sum()
        mean = (shares * values).sum()
        means.append(mean.item())
        # A constant channel has standard deviation 0, by which the model would divide.
        stds.append(max((shares * (values - mean) ** 2).sum().sqrt().item(), 1 / 255))
    return tuple(means), tuple(stds)


class StatisticsCache:
    """Cache of the statistics of image files in the user's cache folder, since computing them can take minutes.

    An entry is valid until any file's relative path, size, mtime or ctime changes. Nothing is written to the image
    folder, and a cache that cannot be read or written is ignored.
    """

    def __init__(
        self,
        root: Path,
        train: ImageFolder,
        test: ImageFolder,
        classes: tuple[str, ...],
        val: ImageFolder | None = None,
    ) -> None:
        """Derive the cache key from the state of the files in ``root``.

        Raises:
            DeatError: A file cannot be read, for instance because it was removed.
        """
        self._parts = train, test, classes
        self._val = val
        parts = [train, test, *([] if val is None else [val])]
        self._path = cache_folder("statistics") / f"{_state_key(root, parts, classes)}.json"

    def read(self) -> DatasetStatistics | None:
        """Return the cached statistics, None if there are none."""
        with contextlib.suppress(DeatError, ValidationError):
            return TypeAdapter(DatasetStatistics).validate_python(read_json(self._path))
        return None

    def write(self, statistics: DatasetStatistics) -> None:
        """Write statistics to the cache."""
        with contextlib.suppress(DeatError, OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, asdict(statistics))

    def read_or_compute(self, progress: Progress | None = None) -> DatasetStatistics:
        """Return the cached statistics, or decode all files with worker processes and store the result.

        Raises:
            DeatError: A file cannot be read.
        """
        statistics = self.read()
        if statistics is None:
            statistics = compute_statistics(*self._parts, val=self._val, progress=progress)
            self.write(statistics)
        return statistics


def _state_key(root: Path, parts: Sequence[ImageFolder], classes: tuple[str, ...]) -> str:
    """Return a key that depends on the state of every file, the class names and the decoders."""
    import PIL

    decoders = PIL.__version__, version("pillow-heif")
    digest = hashlib.sha256(repr((CACHE_VERSION, decoders, parts[0].size, classes)).encode())
    for part in parts:
        for path in part.files():
            try:
                facts = os.stat(path)
            except OSError as error:
                raise DeatError(f"{path} cannot be read: {error.strerror}") from error
            state = facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns
            digest.update(os.fsencode(path.relative_to(root)) + repr(state).encode())
        digest.update(b"\0")
    return digest.hexdigest()
