"""Labelled images in memory or in files, and parts of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from deat_rb.data.check import _check_labels, _describe
from deat_rb.utils.errors import DeatError
from deat_rb.utils.seeding import generator


class Reader(Protocol):
    """Gives the images of one batch after another, on a device."""

    def __call__(self, order: Tensor | None, windows: Sequence[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        """Reads batches.

        Args:
            order: The positions of all images, (N,) int64 on the CPU, in the order of the epoch; None for their own.
            windows: Which parts of the order are wanted, a batch each.

        Yields:
            uint8 images (n, C, H, W) and int64 labels (n,).
        """
        ...


class LabeledImages(ABC):
    """Images of one size with their labels: in memory (`ImageSet`) or in files (`deat_rb.data.image_folder.FileSet`).

    Attributes:
        labels: int64 of shape (N,), from 0 on.
    """

    labels: Tensor

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of each image."""

    @abstractmethod
    def _part(self, chosen: slice | Tensor) -> Self:
        """Those at the chosen positions."""

    @abstractmethod
    def in_memory(self) -> ImageSet:
        """All of them in memory."""

    @abstractmethod
    def chunks(self) -> Iterator[Tensor]:
        """All of them once, in order: uint8 (n, C, H, W), of which files are read as few at a time as is quick."""

    @abstractmethod
    def reader(self, device: torch.device | str) -> Reader:
        """What gives batches of them."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        """The bytes that all of them take, decoded."""
        return len(self) * math.prod(self.shape)

    def select(self, indices: Tensor | Sequence[int]) -> Self:
        """The images at these positions, in this order."""
        return self._part(torch.as_tensor(indices, dtype=torch.int64))

    def first(self, count: int) -> Self:
        """The first images, as a view.

        Raises:
            DeatError: There are not that many.
        """
        if not 1 <= count <= len(self):
            raise DeatError(
                f"the first {count} of {len(self)} images were asked for: give a number from 1 to {len(self)}"
            )
        return self._part(slice(count))

    def tensors(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """The whole set at once.

        Returns:
            float32 images (N, C, H, W) in [0, 1] and labels (N,), both on the device.
        """
        in_memory = self.in_memory()
        return in_memory.images.to(device).to(torch.float32).div_(255), in_memory.labels.to(device)


Images = TypeVar("Images", bound=LabeledImages)


@dataclass(frozen=True, eq=False)
class ImageSet(LabeledImages):
    """Labelled images in memory, a byte per value.

    Attributes:
        images: uint8 of shape (N, C, H, W), 0 to 255.
        labels: int64 of shape (N,), from 0 on.

    Raises:
        DeatError: Shapes or types are others, the lengths differ, or a label is negative.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            raise DeatError(
                f"an image set holds uint8 images of shape (N, C, H, W), not {_describe(self.images)}: "
                "images in [0, 1] become such by (255 * images).round().to(torch.uint8)"
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
        """Itself."""
        return self

    def chunks(self) -> Iterator[Tensor]:
        """All images, once."""
        yield self.images

    def reader(self, device: torch.device | str) -> Reader:
        """Takes the images to the device, if they leave it room, and gathers batches from them where they are."""
        device = torch.device(device)
        place = device if fits_on_device(self.nbytes, device) else torch.device("cpu")
        return _HeldImages(self.images.to(place), self.labels.to(place), device)


def fits_on_device(size: int, device: torch.device) -> bool:
    """Whether so many bytes of images can lie on a device all the time: a quarter of what is free on a GPU."""
    return device.type != "cuda" or size <= torch.cuda.mem_get_info(device)[0] // 4


@dataclass(frozen=True, eq=False)
class _HeldImages:
    """Gathers batches where the images are, and takes them to the device."""

    images: Tensor
    labels: Tensor
    device: torch.device

    def __call__(self, order: Tensor | None, windows: Sequence[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        if order is not None:
            order = order.to(self.labels.device)
        for window in windows:
            chosen = window if order is None else order[window]
            yield self.images[chosen].to(self.device), self.labels[chosen].to(self.device)


def train_val_split(train: Images, size: int, *, seed: int) -> tuple[Images, Images]:
    """Takes a validation part out of the training images, each class in proportion.

    Args:
        train: The images to divide.
        size: How many are held out.
        seed: Decides which; the same seed takes the same.

    Returns:
        What remains, and what is held out. Both keep the order of ``train``.

    Raises:
        DeatError: Nothing would be held out, or nothing remain.
    """
    if not 1 <= size < len(train):
        raise DeatError(
            f"--val-size {size} does not divide {len(train)} training images: give a number from 1 to {len(train) - 1}"
        )
    in_memory = _stratified(train.labels, size, generator(seed, "hold-out"))
    return train.select(torch.nonzero(~in_memory)[:, 0]), train.select(torch.nonzero(in_memory)[:, 0])


def subset(train: Images, size: int, seed: int) -> Images:
    """Takes fewer training images, each class in proportion, in the order of ``train``.

    Args:
        train: The images to choose from.
        size: How many are wanted.
        seed: Decides which; the same seed takes the same.

    Raises:
        DeatError: There are not that many.
    """
    if not 1 <= size <= len(train):
        raise DeatError(
            f"--train-size {size} cannot be taken from {len(train)} training images: "
            f"give a number from 1 to {len(train)}"
        )
    return train.select(torch.nonzero(_stratified(train.labels, size, generator(seed, "subset")))[:, 0])


def _stratified(labels: Tensor, size: int, stream: torch.Generator) -> Tensor:
    """Chooses ``size`` positions, each class in proportion: a mask (N,).

    What the rounding down of the shares leaves over goes to the classes with the largest remainders.
    """
    counts = torch.bincount(labels)
    shares = size * counts // len(labels)
    remainders = size * counts % len(labels)
    shares[remainders.argsort(descending=True, stable=True)[: size - int(shares.sum())]] += 1
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label, taken in enumerate(shares.tolist()):
        members = torch.nonzero(labels == label)[:, 0]
        chosen[members[torch.randperm(len(members), generator=stream)[:taken]]] = True
    return chosen


def interleave_classes(images: Images) -> Images:
    """Orders images that lie class by class, as a folder's do, so that the classes take turns.

    The first images are then of all classes. Others stay in their order, in which RobustBench takes the first, too.
    """
    labels = images.labels
    if not bool((labels.diff() >= 0).all()):
        return images
    counts = torch.bincount(labels)
    within_class = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels]
    return images.select(within_class.argsort(stable=True))
