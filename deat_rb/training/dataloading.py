"""Data loading for `fit`: any iterable of (images, labels), its first batch checked, sharded across ranks."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deat_rb.data.check import check_batch
from deat_rb.training.engine import Engine
from deat_rb.utils import seeding
from deat_rb.utils.distributed import World
from deat_rb.utils.errors import DeatError
from deat_rb.utils.module_state import preserve_modes

if TYPE_CHECKING:
    from deat_rb.training.base import Batch, TrainerBase


def count_batches(loader: Iterable[Batch]) -> int:
    """Return the number of batches of an epoch; a loader without a length is read once to count them."""
    with contextlib.suppress(TypeError):  # len() of a DataLoader over an IterableDataset raises
        if isinstance(loader, Sized):
            return len(loader)
    return sum(1 for _ in loader)


class ShardedLoader:
    """One rank's share of each batch of a loader.

    Args:
        loader: Yields the global batches, the same on every rank.
        world: The ranks.
    """

    def __init__(self, loader: Iterable[Batch], world: World) -> None:
        self.loader = loader
        self.world = world

    def epoch_batches(self, epoch: int, batch: int, seed: int) -> Iterator[tuple[Batch, int]]:
        """Yield as `epoch_batches` does.

        Raises:
            DeatError: A batch has fewer images than there are ranks.
        """
        for (images, labels), total in epoch_batches(self.loader, epoch, batch, seed):
            if total < self.world.size:
                raise DeatError(
                    f"a batch of {total} images cannot be divided among {self.world.size} ranks; "
                    "drop short batches (drop_last), or start fewer ranks"
                )
            part = self.world.share(total)
            yield (images[part], labels[part]), total


class PreShardedLoader:
    """One rank's share of each batch of a loader that can load the share alone.

    Args:
        loader: Has the methods ``divided`` and ``examples_in`` of `deat_rb.data.batches.Batches`.
        world: The ranks.
    """

    def __init__(self, loader: Any, world: World) -> None:
        self.loader = loader.divided(world.rank, world.size)

    def epoch_batches(self, epoch: int, batch: int, seed: int) -> Iterator[tuple[Batch, int]]:
        """Yield as `epoch_batches` does."""
        for number, (part, _) in enumerate(epoch_batches(self.loader, epoch, batch, seed), start=batch):
            yield part, self.loader.examples_in(number)


Loader = Iterable["Batch"] | ShardedLoader | PreShardedLoader


def shard(loader: Iterable[Batch], world: World) -> Loader:
    """Return the loader of this rank's shares; with one rank the loader itself."""
    if world.size == 1:
        return loader
    return PreShardedLoader(loader, world) if hasattr(loader, "divided") else ShardedLoader(loader, world)


def epoch_batches(loader: Loader, epoch: int, batch: int, seed: int) -> Iterator[tuple[Batch, int]]:
    """Iterate over the batches of an epoch from batch number ``batch`` on, from 0.

    A loader without ``starting_at`` is read from its beginning, and the earlier batches are discarded.

    Yields:
        A batch, or this rank's share of it, and the number of examples of the global batch.
    """
    if isinstance(loader, ShardedLoader | PreShardedLoader):
        yield from loader.epoch_batches(epoch, batch, seed)
        return
    set_epoch = getattr(loader, "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)
    starting_at: Callable[[int], Iterator[Batch]] | None = getattr(loader, "starting_at", None)
    for each in _seeded(iter(loader), epoch, batch, seed) if starting_at is None else starting_at(batch):
        yield each, len(each[-1])  # `check_first_batch` refuses anything but pairs of tensors


def _seeded(batches: Iterator[Batch], epoch: int, first: int, seed: int) -> Iterator[Batch]:
    """Seed torch's generators before each batch, so that what a loader draws depends on epoch and batch alone."""
    for number in itertools.count():
        seeding.seed_global(seed, "load", epoch, number)
        batch = next(batches, None)
        if batch is None:
            return
        if number >= first:
            yield batch


def materialize(trainer: TrainerBase, loader: Iterable[Batch], engine: Engine) -> Batch:
    """Return all images and labels of a validation loader as one batch on the device.

    Raises:
        DeatError: There are none, or they cannot be used.
    """
    batches = list(loader)
    if not batches:
        raise DeatError("the validation loader yields no batch; give validation images or no val_loader")
    images, labels = torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])
    check_first_batch(trainer, (images, labels), engine)
    return engine.to_device(images, labels)


def check_first_batch(trainer: TrainerBase, batch: Any, engine: Engine) -> None:
    """Check a batch, the model's outputs on it and whether the attack can be trained with.

    Raises:
        DeatError: One of them cannot be used.
    """
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        raise DeatError("a loader must yield pairs of tensors (images, labels), and this one yields something else")
    images, labels = batch
    check_batch(images, labels)
    with preserve_modes(trainer.model), torch.no_grad():
        classes = trainer.model.eval()(images[:1].to(engine.device)).shape[1]
    check_batch(images, labels, classes)
    trainer.check_attack(images.to(engine.device))
