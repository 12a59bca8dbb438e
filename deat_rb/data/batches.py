"""Labelled images, parts of them, and the batches made of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from deat_rb.data.augment import _augment
from deat_rb.data.images import LabeledImages
from deat_rb.utils.distributed import share
from deat_rb.utils.errors import DeatError
from deat_rb.utils.seeding import generator


class Batches:
    """The batches of one epoch after another, on the device.

    The order and the augmentation of an epoch follow from the seed and the epoch's number alone, on every device, for
    any number of processes, and whether the images are held in memory or read from files. Iterating twice without
    `set_epoch` between gives the same batches twice.
    """

    def __init__(
        self,
        data: LabeledImages,
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
        """The same batches, of which each is a process's share (`deat_rb.utils.distributed.share`) of the global one.

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
