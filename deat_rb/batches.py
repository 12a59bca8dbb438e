"""Labelled images, parts of them, and the batches made of them."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from deat_rb.errors import DeatError
from deat_rb.processes import share
from deat_rb.randomness import generator

PADDING = 4
ROUNDING = 1e-6


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


class LabelledImages(ABC):
    """Images of one size with their labels: in memory (`ImageSet`) or in files (`deat_rb.folders.FileSet`).

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
    def held(self) -> ImageSet:
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
        held = self.held()
        return held.images.to(device).to(torch.float32).div_(255), held.labels.to(device)


Images = TypeVar("Images", bound=LabelledImages)


@dataclass(frozen=True, eq=False)
class ImageSet(LabelledImages):
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

    def held(self) -> ImageSet:
        """Itself."""
        return self

    def chunks(self) -> Iterator[Tensor]:
        """All images, once."""
        yield self.images

    def reader(self, device: torch.device | str) -> Reader:
        """Takes the images to the device, if they leave it room, and gathers batches from them where they are."""
        device = torch.device(device)
        place = device if leaves_room(self.nbytes, device) else torch.device("cpu")
        return _HeldImages(self.images.to(place), self.labels.to(place), device)


def leaves_room(size: int, device: torch.device) -> bool:
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


def hold_out(train: Images, size: int, *, seed: int) -> tuple[Images, Images]:
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
    held = _stratified(train.labels, size, generator(seed, "hold-out"))
    return train.select(torch.nonzero(~held)[:, 0]), train.select(torch.nonzero(held)[:, 0])


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


class Batches:
    """The batches of one epoch after another, on the device.

    The order and the augmentation of an epoch follow from the seed and the epoch's number alone, on every device, for
    any number of processes, and whether the images are held in memory or read from files. Iterating twice without
    `set_epoch` between gives the same batches twice.
    """

    def __init__(
        self,
        data: LabelledImages,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        drop_last: bool = False,
        memory_format: torch.memory_format = torch.contiguous_format,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        """Puts images that are in memory on the device; where they would fill it, each batch as it is wanted.

        Args:
            data: The images.
            batch_size: Images per batch, of all processes together; the last batch has what remains.
            shuffle: Another order in every epoch.
            augment: Crops each image at random from itself with 4 black pixels around it, and mirrors half of them.
            seed: Of the order and the augmentation.
            device: Where the batches are wanted.
            drop_last: Leaves a last batch out that is not full.
            memory_format: Of the images; ``torch.channels_last`` gives the same values.
            rank: Which process this is; see `divided`.
            processes: How many there are.

        Raises:
            DeatError: ``batch_size`` is below 1, there are fewer images than a batch of training takes, or a batch
                cannot be divided over the processes.
        """
        if batch_size < 1:
            raise DeatError(f"--batch-size {batch_size} is not possible: give 1 or more")
        if (shuffle or drop_last) and len(data) < batch_size:
            raise DeatError(
                f"{len(data)} training images are fewer than one batch of --batch-size {batch_size}: "
                "give a smaller batch or more images"
            )
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augment = augment
        self.seed = seed
        self.drop_last = drop_last
        self.memory_format = memory_format
        self.epoch = 0
        self._count = len(data)
        self._divide(rank, processes)
        self._read = data.reader(device)

    def divided(self, rank: int, processes: int) -> Batches:
        """The same batches, of which each is a process's share (`deat_rb.processes.share`) of the global one.

        Order and augmentation are drawn for the global batch and then divided: the shares of all ranks, one after
        another, are the batch of a single process. The images are not copied.

        Args:
            rank: Which process this is, from 0 on.
            processes: How many there are.

        Raises:
            DeatError: There is no such rank, or a batch has fewer images than there are processes.
        """
        part = copy.copy(self)
        part._divide(rank, processes)
        return part

    def _divide(self, rank: int, processes: int) -> None:
        if not 0 <= rank < processes:
            raise DeatError(f"rank {rank} of {processes} processes is not possible: ranks are 0 to {processes - 1}")
        rest = self._count % self.batch_size
        smallest = rest if rest and not self.drop_last else self.batch_size
        if smallest < processes:
            raise DeatError(
                f"{self._count} images in batches of {self.batch_size} leave one of {smallest}, which cannot be "
                f"divided over {processes} processes: give another --batch-size or --train-size, or fewer processes"
            )
        self.rank = rank
        self.processes = processes

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(self._count, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def examples_in(self, batch: int) -> int:
        """How many images the global batch of this number has, from 0 on: the shares of all processes together."""
        return min(self.batch_size, self._count - batch * self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.starting_at(0)

    def starting_at(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch from one batch on: the same batches that the whole epoch has there.

        Yields:
            float32 images (N, C, H, W) in [0, 1] and int64 labels (N,).

        Raises:
            DeatError: The epoch is shorter; while iterating, that an image file cannot be read.
        """
        if not 0 <= batch <= len(self):
            raise DeatError(f"an epoch of {len(self)} batches cannot be continued at batch {batch}")
        stream = generator(self.seed, "order", self.epoch)
        order = torch.randperm(self._count, generator=stream) if self.shuffle else None
        return self._batches(order, self.epoch, range(batch, len(self)))

    def _batches(self, order: Tensor | None, epoch: int, numbers: range) -> Iterator[tuple[Tensor, Tensor]]:
        windows = []
        for number in numbers:
            own = self._share(number)
            windows.append(slice(number * self.batch_size + own.start, number * self.batch_size + own.stop))
        for number, (images, labels) in zip(numbers, self._read(order, windows), strict=True):
            if self.augment:
                stream = generator(self.seed, "augment", epoch, number)
                images = _augment(images, stream, self._size(number), self._share(number))
            yield images.to(torch.float32).div_(255).contiguous(memory_format=self.memory_format), labels

    def _size(self, number: int) -> int:
        """How many images the global batch has."""
        return min(self.batch_size, self._count - number * self.batch_size)

    def _share(self, number: int) -> slice:
        """Which of them are this process's."""
        return share(self._size(number), self.rank, self.processes)


def _augment(images: Tensor, stream: torch.Generator, size: int, own: slice) -> Tensor:
    """Draws, for each of the ``size`` images of a global batch, its crop and its mirroring, and applies one's own."""
    offsets = torch.randint(0, 2 * PADDING + 1, (2, size), generator=stream)
    mirrored = torch.randint(0, 2, (1, size), generator=stream)
    top, left, flip = torch.cat((offsets, mirrored))[:, own].to(images.device, non_blocking=True)
    return crop_and_flip(images, top, left, flip > 0)


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Crops each image from itself with 4 zeros on every side, and mirrors some from left to right.

    One gather does both for the whole batch, because the pixels of a mirrored crop are those of the crop, read
    backwards.

    Args:
        images: (N, C, H, W), of any type.
        top: (N,) int64, 0 to 8: the first row of the crop; 4 is the image's own.
        left: (N,) int64, 0 to 8: the first column of the crop.
        flip: (N,) bool: which crops are mirrored.

    Returns:
        (N, C, H, W), of the same type.
    """
    count, channels, height, width = images.shape
    padded = functional.pad(images, (PADDING, PADDING, PADDING, PADDING))
    column = torch.arange(width, device=images.device)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - column, column)
    pixels = rows[:, :, None] * padded.shape[3] + columns[:, None, :]
    flat = pixels.view(count, 1, height * width).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, flat).view(count, channels, height, width)


def check_batch(images: Tensor, labels: Tensor, num_classes: int | None = None) -> None:
    """Checks that a batch is what every function here takes. It waits for the device: once per loader, not per batch.

    Args:
        images: Should be floating-point (N, C, H, W) in [0, 1].
        labels: Should be int64 (N,), from 0 to ``num_classes`` - 1.
        num_classes: How many classes there are, where that is known.

    Raises:
        DeatError: Something is not so.
    """
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        raise DeatError(f"images and labels must be tensors, not {type(images).__name__} and {type(labels).__name__}")
    if not images.is_floating_point():
        raise DeatError(
            f"images must be floating-point in [0, 1], not {_describe(images)}: divide images of 0 to 255 by 255"
        )
    if images.ndim != 4 or images.numel() == 0:
        raise DeatError(f"images must have the shape (N, C, H, W) and not be empty, not {_describe(images)}")
    low, high = (bound.item() for bound in images.detach().aminmax())
    if low != low:
        raise DeatError("the images contain NaN: look for a division by zero where they are made")
    # Resampling float images ends a rounding error outside; the attacks' own clamp brings that back.
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise DeatError(
            f"images must be in [0, 1], not in [{low:.4g}, {high:.4g}]: "
            "divide by 255 if they are 0 to 255; normalisation belongs in the model, as its first layer"
        )
    _check_labels(labels, len(images), num_classes)


def _check_labels(labels: Tensor, count: int, num_classes: int | None) -> None:
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise DeatError(f"labels must be int64 class numbers of shape (N,), not {_describe(labels)}")
    if len(labels) != count:
        raise DeatError(f"{count} images have {len(labels)} labels: each image needs one")
    if count == 0:
        return
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0 or (num_classes is not None and high >= num_classes):
        wrong = low if low < 0 else high
        allowed = "0 or more" if num_classes is None else f"0 to {num_classes - 1}, as there are {num_classes} classes"
        raise DeatError(f"label {wrong} is out of range: labels are {allowed}")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
