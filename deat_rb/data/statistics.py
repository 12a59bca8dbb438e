"""What is known of a data set once each of its images has been seen: its fingerprint, mean and standard deviation."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from deat_rb.data.image_folder import ImageFolder
from deat_rb.data.images import LabeledImages
from deat_rb.data.normalization import Normalization
from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import read_json, write_json

Progress = Callable[[int, int], None]
"""Is told how many of how many images have been seen."""

CACHE_VERSION = "1"


@dataclass(frozen=True)
class DatasetStatistics:
    """What a pass over all images gives.

    Attributes:
        fingerprint: SHA-256 over all decoded images, labels and class names.
        mean: Of the training images per channel, in [0, 1].
        std: Likewise.
    """

    fingerprint: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


def compute_statistics(
    train: LabeledImages,
    test: LabeledImages,
    classes: tuple[str, ...],
    *,
    normalization: Normalization | None = None,
    progress: Progress | None = None,
) -> DatasetStatistics:
    """Sees each image once, a chunk at a time, so that images in memory and in files give the same.

    Args:
        train: The training images.
        test: The test images.
        classes: Names of the classes.
        normalization: Mean and standard deviation, where they are known.
        progress: Is told how far it is.

    Raises:
        DeatError: An image file cannot be read.
    """
    digest = hashlib.sha256(repr(classes).encode())
    counts = torch.zeros(train.shape[0], 256, dtype=torch.int64)
    seen = 0
    for part in (train, test):
        digest.update(repr((len(part), *part.shape)).encode())
        for images in part.chunks():
            digest.update(images.contiguous().numpy().data)
            if part is train and normalization is None:
                counts += _value_counts(images)
            seen += len(images)
            if progress is not None:
                progress(seen, len(train) + len(test))
        digest.update(part.labels.contiguous().numpy().data)
    return DatasetStatistics(digest.hexdigest(), *(normalization or _mean_and_std(counts)))


def _value_counts(images: Tensor) -> Tensor:
    """How often each of the 256 values occurs, per channel: (C, 256)."""
    return torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])


def _mean_and_std(counts: Tensor) -> Normalization:
    """Mean and standard deviation per channel, in [0, 1], from the counts of the 256 values: exact and small."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in counts:
        shares = channel.double() / channel.sum()
        mean = (shares * values).sum()
        means.append(mean.item())
        # A channel that is everywhere the same has no spread, and the model divides by it.
        stds.append(max((shares * (values - mean) ** 2).sum().sqrt().item(), 1 / 255))
    return tuple(means), tuple(stds)


def cached_statistics(
    train: ImageFolder, test: ImageFolder, classes: tuple[str, ...], progress: Progress | None = None
) -> DatasetStatistics:
    """The survey of image files, which is kept in the user's cache: it decodes every file, which can take minutes.

    What was kept counts for as long as no file's path, size, and times of modification and change are others. Nothing
    is written beside the images, and nothing fails where there is no cache.

    Args:
        train: As for `compute_statistics`, like what follows.
        test: The test images.
        classes: Names of the classes.
        progress: Is told how far it is, if the images have to be seen.

    Raises:
        DeatError: An image file cannot be read.
    """
    kept = _cache_folder() / f"{_state_of(train, test, classes)}.json"
    with contextlib.suppress(DeatError, ValidationError):
        return TypeAdapter(DatasetStatistics).validate_python(read_json(kept))
    found = compute_statistics(train, test, classes, progress=progress)
    with contextlib.suppress(DeatError, OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, asdict(found))
    return found


def _cache_folder() -> Path:
    """Where the XDG base directory specification has it."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path(os.path.expanduser("~/.cache"))) / "deat-rb" / "surveys"


def _state_of(train: ImageFolder, test: ImageFolder, classes: tuple[str, ...]) -> str:
    """A key that changes with any file, and with what decodes them."""
    import PIL

    digest = hashlib.sha256(repr((CACHE_VERSION, PIL.__version__, train.size, classes)).encode())
    for part in (train, test):
        for path in part.files():
            try:
                facts = os.stat(path)
            except OSError as error:
                raise DeatError(f"{path} cannot be read as an image: repair or remove it") from error
            state = facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns
            digest.update(os.fsencode(path.absolute()) + repr(state).encode())
        digest.update(b"\0")
    return digest.hexdigest()
