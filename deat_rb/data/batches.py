"""Batches of labeled images: order, augmentation and sharding across ranks."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from deat_rb.data.augment import augment, check_augmentation, draw, mix
from deat_rb.data.augmentations import MIXING
from deat_rb.data.extra_data import MixedReader, check_share, mixed_order
from deat_rb.data.images import LabeledImages, Reader, as_floats
from deat_rb.utils.distributed import share
from deat_rb.utils.errors import DeatError
from deat_rb.utils.seeding import generator
from deat_rb.utils.text import counted


class Batches:
    """Iterable over the batches of an epoch, on a device.

    The order and what an augmentation draws depend only on the seed and the epoch (see `set_epoch`), not on the device,
    the number of ranks, or whether the images are in memory or in files; pixels that torchvision resizes, as with
    ``resized-crop``, are rounded differently on a GPU. Iterating twice over an epoch yields the same batches.
    """

    def __init__(
        self,
        data: LabeledImages,
        batch_size: int,
        *,
        shuffle: bool = False,
        augmentation: str = "none",
        num_classes: int | None = None,
        extra: LabeledImages | None = None,
        extra_fraction: float = 0.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
        drop_last: bool = False,
        memory_format: torch.memory_format = torch.contiguous_format,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        """Move in-memory images to the device if they fit.

        Args:
            data: The images.
            batch_size: Images per global batch, over all ranks; the last batch may be smaller.
            shuffle: Whether to reshuffle the images in every epoch.
            augmentation: A key of `deat_rb.data.augmentations.AUGMENTATIONS`.
            num_classes: Number of classes; needed only for ``cutmix`` and ``mixup``.
            extra: Images in addition to the training images; every batch contains the same number of them. The number
                of batches per epoch stays the same; see `deat_rb.data.extra_data.mixed_order`.
            extra_fraction: Fraction of extra images in a batch, in (0, 1); their number is rounded down.
            seed: Seed of order and augmentation.
            device: Device of the batches.
            drop_last: Whether to drop a smaller last batch.
            memory_format: Memory format of the images; ``torch.channels_last`` gives the same values.
            rank: Rank of this process; see `divided`.
            processes: Number of ranks.

        Raises:
            DeatError: ``batch_size`` is below 1, there is no such augmentation, it needs ``num_classes``, there are
                fewer training images than one batch needs, or a batch has fewer images than there are ranks.
        """
        check_augmentation(augmentation)
        if augmentation in MIXING and num_classes is None:
            raise DeatError(f"augmentation = '{augmentation}' needs num_classes, the number of classes of its labels")
        if batch_size < 1:
            raise DeatError(f"--batch-size {batch_size} is below 1: give 1 or more")
        if (shuffle or drop_last) and len(data) < batch_size:
            raise DeatError(
                f"{len(data)} training images are fewer than one batch of --batch-size {batch_size}: "
                "reduce --batch-size or use more images"
            )
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augmentation = augmentation
        self.num_classes = num_classes
        self.seed = seed
        self.drop_last = drop_last
        self.memory_format = memory_format
        self.epoch = 0
        self._count = len(data)
        self._extra = 0 if extra is None else len(extra)
        self._extra_size = int(batch_size * extra_fraction)
        if extra is not None:
            check_share(extra, data.shape, extra_fraction, batch_size)
            if not shuffle:
                raise DeatError("extra images are mixed into shuffled batches only: set shuffle=True")
        self._divide(rank, processes)
        self._size = data.shape[1:]
        self._device = torch.device(device)
        own = data.reader(device)
        self._positions: tuple[int, Tensor] | None = None
        self._read: Reader = own if extra is None else MixedReader(own, extra.reader(device), len(data))

    def divided(self, rank: int, processes: int) -> Batches:
        """Return one rank's parts of these global batches; see `deat_rb.utils.distributed.share`.

        Order and augmentation are drawn for the global batch, which is the concatenation of all ranks' parts. The
        images are not copied. For ``cutmix`` and ``mixup`` each rank also reads the image before its part,
        which is mixed into the first one.

        Args:
            rank: Rank of the process (0-based).
            processes: Number of ranks.

        Raises:
            DeatError: There is no such rank, or a batch has fewer images than there are ranks.
        """
        part = copy.copy(self)
        part._divide(rank, processes)
        return part

    def _divide(self, rank: int, processes: int) -> None:
        if not 0 <= rank < processes:
            raise DeatError(f"rank {rank} is out of range: with {processes} ranks, give 0 to {processes - 1}")
        rest = 0 if self._extra else self._count % self.batch_size
        smallest = rest if rest and not self.drop_last else self.batch_size
        if smallest < processes:
            raise DeatError(
                f"{counted(self._count, 'image', '')} in batches of {self.batch_size} leave a batch of {smallest}, "
                f"fewer than the {processes} ranks: change --batch-size or --train-size, or use fewer ranks"
            )
        self.rank = rank
        self.processes = processes

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(self._count, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def examples_in(self, batch: int) -> int:
        """Return the number of images in global batch ``batch`` (0-based)."""
        return self.batch_size if self._extra else min(self.batch_size, self._count - batch * self.batch_size)

    @property
    def number_of_images(self) -> int:
        """The number of images, without extra ones."""
        return self._count

    def positions(self, epoch: int, batch: int) -> Tensor:
        """Return the positions of the images of a global batch in the dataset, int64, on the device of the batches.

        Args:
            epoch: The epoch.
            batch: Number of the batch, from 0.

        Raises:
            DeatError: There are extra images.
        """
        if self._extra:
            raise DeatError("batches with extra images have no positions in the training images: omit the extra images")
        if self._positions is None or self._positions[0] != epoch:
            order = self._order(epoch)
            self._positions = epoch, (torch.arange(self._count) if order is None else order).to(self._device)
        start = batch * self.batch_size
        return self._positions[1][start : start + self.examples_in(batch)]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.starting_at(0)

    def starting_at(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the epoch, starting with batch ``batch`` (0-based); skipping batches does not change the others.

        Yields:
            float32 images (N, C, H, W) in [0, 1] and int64 labels (N,); for ``cutmix`` and ``mixup`` the shares of
            the classes, float32 (N, num_classes).

        Raises:
            DeatError: The epoch has fewer batches, or an image file cannot be read.
        """
        if not 0 <= batch <= len(self):
            raise DeatError(
                f"cannot continue from batch {batch}: the epoch has {counted(len(self), 'batch')}; "
                "use the same data and batch size"
            )
        return self._batches(self._order(self.epoch), self.epoch, range(batch, len(self)))

    def _order(self, epoch: int) -> Tensor | None:
        """Return the order of an epoch's images, int64; None if they are not shuffled."""
        if self._extra:
            return mixed_order(self._count, self._extra, len(self), self.batch_size - self._extra_size,
                               self._extra_size, self.seed, epoch)  # fmt: skip
        if self.shuffle:
            return torch.randperm(self._count, generator=generator(self.seed, "order", epoch))
        return None

    def _batches(self, order: Tensor | None, epoch: int, numbers: range) -> Iterator[tuple[Tensor, Tensor]]:
        own = {number: self._share(number) for number in numbers}
        windows = [slice(number * self.batch_size + part.start, number * self.batch_size + part.stop)
                   for number, part in own.items()]  # fmt: skip
        columns: Sequence[slice | Tensor] = list(own.values())
        if self.augmentation in MIXING and self.processes > 1:
            columns = positions = [self._with_partner(number) for number in numbers]
            order, windows = self._reordered(order, numbers, positions)
        drawn = []
        for number, chosen in zip(numbers, columns, strict=True):
            numbers_of_batch = draw(
                self.augmentation, seed=self.seed, epoch=epoch, batch=number, size=self.examples_in(number),
                height=self._size[0], width=self._size[1],
            )  # fmt: skip
            drawn.append(numbers_of_batch[:, chosen])
        # One copy per epoch: copying each batch's few numbers from pageable memory would wait for the device.
        parts = (
            torch.cat(drawn, dim=1).to(self._device).split([part.shape[1] for part in drawn], dim=1) if drawn else []
        )
        for number, part, (images, labels) in zip(numbers, parts, self._read(order, windows), strict=True):
            images = augment(self.augmentation, images, seed=self.seed, epoch=epoch, batch=number,
                             size=self.examples_in(number), own=own[number], drawn=part)  # fmt: skip
            images = as_floats(images)
            if self.augmentation in MIXING and self.num_classes is not None:
                images, labels = mix(self.augmentation, images, labels, num_classes=self.num_classes, seed=self.seed,
                                     epoch=epoch, batch=number)  # fmt: skip
                count = own[number].stop - own[number].start
                images, labels = images[-count:], labels[-count:]  # without the partner of the first one
            yield images.contiguous(memory_format=self.memory_format), labels

    def _with_partner(self, number: int) -> Tensor:
        """Return the positions in a global batch of this rank's part, after that of the image before it.

        The image before the first one of the batch is its last one, as in `mix`.
        """
        own = self._share(number)
        return torch.arange(own.start - 1, own.stop) % self.examples_in(number)

    def _reordered(self, order: Tensor | None, numbers: range, columns: list[Tensor]) -> tuple[Tensor, list[slice]]:
        """Return the order and its slices with which a reader yields these positions of the global batches."""
        places = torch.cat([torch.empty(0, dtype=torch.int64),
                            *(number * self.batch_size + each for number, each in zip(numbers, columns, strict=True))]
                           )  # fmt: skip
        ends = accumulate(map(len, columns))
        windows = [slice(end - len(each), end) for end, each in zip(ends, columns, strict=True)]
        return places if order is None else order[places], windows

    def _share(self, number: int) -> slice:
        """Return this rank's part of a global batch."""
        return share(self.examples_in(number), self.rank, self.processes)
