"""Labeled images in memory or in files, and their subsets and splits."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from deat_rb.data.check import _check_labels, _describe
from deat_rb.utils.device_copier import DeviceCopier
from deat_rb.utils.errors import DeatError
from deat_rb.utils.seeding import generator


class Reader(Protocol):
    """Interface for reading batches to a device."""

    def __call__(self, order: Tensor | None, windows: Sequence[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        """Read batches.

        Args:
            order: Indices of all images in the order of the epoch, (N,) int64 on the CPU; None for 0 to N - 1.
            windows: The slice of ``order`` for each batch.

        Yields:
            uint8 images (n, C, H, W) and int64 labels (n,).
        """
        ...


class LabeledImages(ABC):
    """Images of equal size with labels, in memory (`ImageSet`) or in files (`ImageFolder`).

    Attributes:
        labels: Class indices, (N,) int64.
    """

    labels: Tensor

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of each image."""

    @abstractmethod
    def _part(self, chosen: slice | Tensor) -> Self:
        """Return the images at the chosen positions."""

    @abstractmethod
    def in_memory(self) -> ImageSet:
        """Return all images in memory."""

    @abstractmethod
    def chunks(self) -> Iterator[tuple[Tensor, int]]:
        """Yield all images once, in order, as uint8 (n, C, H, W), with the number of images with transparency."""

    @abstractmethod
    def reader(self, device: torch.device | str) -> Reader:
        """Return a reader of batches."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        """Total size of the decoded images in bytes."""
        return len(self) * math.prod(self.shape)

    def select(self, indices: Tensor | Sequence[int]) -> Self:
        """Return the images at these positions, in this order."""
        return self._part(torch.as_tensor(indices, dtype=torch.int64))

    def first(self, count: int) -> Self:
        """Return the first ``count`` images, without copying them.

        Raises:
            DeatError: ``count`` is below 1 or above the number of images.
        """
        if not 1 <= count <= len(self):
            raise DeatError(f"cannot take the first {count} of {len(self)} images: give 1 to {len(self)}")
        return self._part(slice(count))

    def tensors(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Return all images and labels as tensors.

        Returns:
            float32 images (N, C, H, W) in [0, 1] and labels (N,), both on the device.
        """
        in_memory = self.in_memory()
        return as_floats(in_memory.images.to(device)), in_memory.labels.to(device)


def as_floats(images: Tensor) -> Tensor:
    """Return uint8 images as new float32 images in [0, 1], with the same values on every device."""
    # CUDA divides by a number by multiplying with its reciprocal, which rounds differently.
    return images.to(torch.float32).div_(torch.full((), 255.0, device=images.device))


Images = TypeVar("Images", bound=LabeledImages)


@dataclass(frozen=True, eq=False)
class ImageSet(LabeledImages):
    """Labeled images in memory, one byte per value.

    Attributes:
        images: Images (N, C, H, W), uint8.
        labels: Class indices, (N,) int64.

    Raises:
        DeatError: A shape or dtype is wrong, the lengths differ, or a label is negative.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            raise DeatError(
                f"an ImageSet takes uint8 images of shape (N, C, H, W), not {_describe(self.images)}: "
                "convert images in [0, 1] with (255 * images).round().to(torch.uint8)"
            )
        _check_labels(self.labels, len(self.images), None)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of each image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def _part(self, chosen: slice | Tensor) -> Self:
        return type(self)(self.images[chosen], self.labels[chosen])

    def in_memory(self) -> ImageSet:
        """Return this set."""
        return self

    def chunks(self) -> Iterator[tuple[Tensor, int]]:
        """Yield all images at once; the number with transparency is unknown after decoding and given as 0."""
        yield self.images, 0

    def reader(self, device: torch.device | str) -> Reader:
        """Return a reader, after moving the images to the device if they fit."""
        device = torch.device(device)
        place = device if fits_on_device(self.nbytes, device) else torch.device("cpu")
        return _InMemoryReader(self.images.to(place), self.labels.to(place), device)


def first_test_examples(
    test: LabeledImages, count: int | None = None, logit_of_class: Sequence[int] = ()
) -> tuple[Tensor | LabeledImages, Tensor]:
    """Return the first test images, by default all, and their labels, as `images_and_logits` does.

    Raises:
        DeatError: ``count`` is less than 1 or more than the number of test images.
    """
    count = len(test) if count is None else count
    if not 1 <= count <= len(test):
        raise DeatError(f"--n-examples {count} is out of range for {len(test)} test images: "
                        f"give a number from 1 to {len(test)}")  # fmt: skip
    return images_and_logits(test.first(count), logit_of_class)


def images_and_logits(images: LabeledImages, logit_of_class: Sequence[int]) -> tuple[Tensor | LabeledImages, Tensor]:
    """Return images as float32 (N, C, H, W), or unchanged if stored in files, and labels as logit indices (N,).

    Args:
        images: The images.
        logit_of_class: Index of the logit of each class of the data; empty if labels are logit indices.
    """
    labels = torch.tensor(logit_of_class)[images.labels] if logit_of_class else images.labels
    return images.tensors()[0] if isinstance(images, ImageSet) else images, labels


def fits_on_device(size: int, device: torch.device) -> bool:
    """Return whether ``size`` bytes of images may be kept on a device: at most a quarter of a GPU's free memory."""
    return device.type != "cuda" or size <= torch.cuda.mem_get_info(device)[0] // 4


@dataclass(frozen=True, eq=False)
class _InMemoryReader:
    """Gathers batches on the images' device and moves them to the target device."""

    images: Tensor
    labels: Tensor
    device: torch.device

    def __call__(self, order: Tensor | None, windows: Sequence[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        if order is not None:
            order = order.to(self.labels.device)
        copier = DeviceCopier(self.device)
        for window in windows:
            chosen = window if order is None else order[window]
            images, labels = copier(self.images[chosen], self.labels[chosen])
            yield images, labels


def train_val_split(train: Images, size: int, *, seed: int) -> tuple[Images, Images]:
    """Split training images into training and validation images, stratified by class.

    Each class keeps a training image, unless there are too few images of other classes.

    Args:
        train: The images to split.
        size: The number of validation images.
        seed: Seed of the split.

    Returns:
        Training and validation images, both in the order of ``train``.

    Raises:
        DeatError: ``size`` is below 1 or leaves no training images.
    """
    if not 1 <= size < len(train):
        raise DeatError(
            f"--val-size {size} cannot be held out of {len(train)} training images: give 1 to {len(train) - 1}"
        )
    held_out = _stratified(train.labels, size, generator(seed, "hold-out"), keep=1)
    return train.select(torch.nonzero(~held_out)[:, 0]), train.select(torch.nonzero(held_out)[:, 0])


def subset(train: Images, size: int, seed: int, flag: str = "--train-size") -> Images:
    """Return a subset of images, stratified by class, in the order of ``train``.

    Args:
        train: The images to choose from.
        size: The number of images.
        seed: Seed of the choice.
        flag: Name of ``size`` in the error message.

    Raises:
        DeatError: ``size`` is below 1 or above the number of images.
    """
    if not 1 <= size <= len(train):
        raise DeatError(f"{flag} {size} cannot be taken from {len(train)} images: give a number from 1 to {len(train)}")
    return train.select(torch.nonzero(_stratified(train.labels, size, generator(seed, "subset")))[:, 0])


def _stratified(labels: Tensor, size: int, stream: torch.Generator, keep: int = 0) -> Tensor:
    """Choose ``size`` positions, stratified by class, and return a mask (N,).

    Class counts are rounded down, and the classes with the largest remainders get one more. Where that would leave
    fewer than ``keep`` positions of a class, the largest class is drawn from instead.
    """
    counts = torch.bincount(labels)
    shares = size * counts // len(labels)
    remainders = size * counts % len(labels)
    shares[remainders.argsort(descending=True, stable=True)[: size - int(shares.sum())]] += 1
    most = (counts - keep).clamp(min=0)
    if size <= most.sum():
        while (shares > most).any():
            shares[(shares - most).argmax()] -= 1
            shares[(most - shares).argmax()] += 1
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label, share in enumerate(shares.tolist()):
        members = torch.nonzero(labels == label)[:, 0]
        chosen[members[torch.randperm(len(members), generator=stream)[:share]]] = True
    return chosen


def interleave_classes(images: Images) -> Images:
    """Interleave the classes of images that are sorted by class, so that the first images cover all classes.

    Images in any other order are not reordered, since RobustBench evaluates the first ones as well.
    """
    labels = images.labels
    if not bool((labels.diff() >= 0).all()):
        return images
    counts = torch.bincount(labels)
    within_class = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels]
    return images.select(within_class.argsort(stable=True))
