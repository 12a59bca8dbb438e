"""Images in memory, parts of them, and the batches made of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from deat_rb.errors import DeatError
from deat_rb.randomness import generator

PADDING = 4
ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class ImageSet:
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

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Tensor | Sequence[int]) -> ImageSet:
        """The images at these positions, in this order."""
        positions = torch.as_tensor(indices, dtype=torch.int64)
        return ImageSet(self.images[positions], self.labels[positions])

    def first(self, count: int) -> ImageSet:
        """The first images, as a view.

        Raises:
            DeatError: There are not that many.
        """
        if not 1 <= count <= len(self):
            raise DeatError(
                f"the first {count} of {len(self)} images were asked for: give a number from 1 to {len(self)}"
            )
        return ImageSet(self.images[:count], self.labels[:count])

    def tensors(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """The whole set at once.

        Returns:
            float32 images (N, C, H, W) in [0, 1] and labels (N,), both on the device.
        """
        return self.images.to(device).to(torch.float32).div_(255), self.labels.to(device)


def hold_out(train: ImageSet, size: int, *, seed: int) -> tuple[ImageSet, ImageSet]:
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


def subset(train: ImageSet, size: int, seed: int) -> ImageSet:
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
    for label, share in enumerate(shares.tolist()):
        members = torch.nonzero(labels == label)[:, 0]
        chosen[members[torch.randperm(len(members), generator=stream)[:share]]] = True
    return chosen


class Batches:
    """The batches of one epoch after another, on the device, which also holds the images.

    The order and the augmentation of an epoch follow from the seed and the epoch's number alone, on every device.
    Iterating twice without `set_epoch` between gives the same batches twice.
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        drop_last: bool = False,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        """Puts the images on the device.

        Args:
            data: The images.
            batch_size: Images per batch; the last batch has what remains.
            shuffle: Another order in every epoch.
            augment: Crops each image at random from itself with 4 black pixels around it, and mirrors half of them.
            seed: Of the order and the augmentation.
            device: Where the batches are wanted.
            drop_last: Leaves a last batch out that is not full.
            memory_format: Of the images; ``torch.channels_last`` gives the same values.

        Raises:
            DeatError: ``batch_size`` is below 1, or there are fewer images than a batch of training takes.
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
        self._images = data.images.to(device)
        self._labels = data.labels.to(device)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self._labels), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.starting_at(0)

    def starting_at(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch from one batch on: the same batches that the whole epoch has there.

        Yields:
            float32 images (N, C, H, W) in [0, 1] and int64 labels (N,).

        Raises:
            DeatError: The epoch is shorter.
        """
        if not 0 <= batch <= len(self):
            raise DeatError(f"an epoch of {len(self)} batches cannot be continued at batch {batch}")
        count, epoch = len(self._labels), self.epoch
        order = torch.randperm(count, generator=generator(self.seed, "order", epoch)) if self.shuffle else None
        if order is not None:
            order = order.to(self._labels.device)
        return (self._batch(order, epoch, number) for number in range(batch, len(self)))

    def _batch(self, order: Tensor | None, epoch: int, number: int) -> tuple[Tensor, Tensor]:
        window = slice(number * self.batch_size, (number + 1) * self.batch_size)
        chosen = window if order is None else order[window]
        images, labels = self._images[chosen], self._labels[chosen]
        if self.augment:
            images = _augment(images, generator(self.seed, "augment", epoch, number))
        return images.to(torch.float32).div_(255).contiguous(memory_format=self.memory_format), labels


def _augment(images: Tensor, stream: torch.Generator) -> Tensor:
    """Draws, for each image, where it is cropped and whether it is mirrored."""
    offsets = torch.randint(0, 2 * PADDING + 1, (2, len(images)), generator=stream)
    mirrored = torch.randint(0, 2, (1, len(images)), generator=stream)
    top, left, flip = torch.cat((offsets, mirrored)).to(images.device, non_blocking=True)
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
