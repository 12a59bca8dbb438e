"""Data loading for `fit`: any iterable of (images, labels), sharded across ranks."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor

from deat_rb.data.validation_images import ValidationImages
from deat_rb.training.base import Batch
from deat_rb.training.checks import BatchChecker
from deat_rb.utils import seeding
from deat_rb.utils.distributed import World
from deat_rb.utils.errors import DeatError
from deat_rb.utils.text import counted

Check = Callable[[Any, int], Batch]

HeldOut = tuple[Tensor | ValidationImages, Tensor]
"""Validation images and their labels."""


def check_loader(loader: Iterable[Any], name: str) -> None:
    """Check that a loader is iterable, without creating an iterator, which would start a DataLoader's workers.

    Raises:
        DeatError: It is not iterable.
    """
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise DeatError(f"{name} ({type(loader).__name__}) is not iterable; use an iterable such as a DataLoader")


def count_batches(loader: Iterable[Any]) -> int:
    """Return the number of batches per epoch; a loader without a length is iterated once to count them."""
    with contextlib.suppress(TypeError):  # len() of a DataLoader over an IterableDataset raises
        if isinstance(loader, Sized):
            return len(loader)
    return sum(1 for _ in loader)


class ShardedLoader:
    """One rank's share of each batch of a loader.

    Args:
        loader: The loader of the global batches, the same on every rank.
        world: The ranks.
    """

    def __init__(self, loader: Iterable[Any], world: World) -> None:
        self.loader = loader
        self.world = world

    def epoch_batches(self, epoch: int, batch: int, seed: int, check: Check) -> Iterator[tuple[Batch, int]]:
        """Do the same as the function `epoch_batches`.

        Raises:
            DeatError: A batch has fewer images than there are ranks.
        """
        for (images, labels), total in epoch_batches(self.loader, epoch, batch, seed, check):
            if total < self.world.size:
                raise DeatError(
                    f"a batch of {counted(total, 'image')} cannot be split among {self.world.size} ranks; "
                    "drop short batches with drop_last=True, or use fewer ranks"
                )
            part = self.world.share(total)
            yield (images[part], labels[part]), total


class PreShardedLoader:
    """One rank's share of each global batch, from a loader that does not load the other ranks' images.

    `ShardedLoader` is for other loaders: it loads the whole batch on each rank and keeps a part.

    Args:
        loader: A loader like `deat_rb.data.batches.Batches`: its method ``divided`` returns the loader of one rank's
            share, whose method ``examples_in`` returns the size of a global batch.
        world: The ranks.
    """

    def __init__(self, loader: Any, world: World) -> None:
        self.loader = loader.divided(world.rank, world.size)

    def epoch_batches(self, epoch: int, batch: int, seed: int, check: Check) -> Iterator[tuple[Batch, int]]:
        """Do the same as the function `epoch_batches`."""
        for number, (part, _) in enumerate(epoch_batches(self.loader, epoch, batch, seed, check), start=batch):
            yield part, self.loader.examples_in(number)


Loader = Iterable[Any] | ShardedLoader | PreShardedLoader


def shard(loader: Iterable[Any], world: World) -> Loader:
    """Return a loader of this rank's share of each batch; with a single rank, the loader itself."""
    if world.size == 1:
        return loader
    return PreShardedLoader(loader, world) if hasattr(loader, "divided") else ShardedLoader(loader, world)


def epoch_batches(loader: Loader, epoch: int, batch: int, seed: int, check: Check) -> Iterator[tuple[Batch, int]]:
    """Iterate over the batches of an epoch, starting with number ``batch``.

    If a loader has no ``starting_at``, it is iterated from its beginning, and the earlier batches are discarded.

    Args:
        loader: A loader returned by `shard`.
        epoch: The epoch, numbered from 1.
        batch: The first batch, numbered from 0.
        seed: The seed of the run.
        check: Checks a batch, given the batch and its number, and returns it; see `BatchChecker.check_values`.

    Yields:
        A batch, or this rank's share of it, and the number of examples in the global batch.
    """
    if isinstance(loader, ShardedLoader | PreShardedLoader):
        yield from loader.epoch_batches(epoch, batch, seed, check)
        return
    set_epoch = getattr(loader, "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)
    starting_at: Callable[[int], Iterator[Any]] | None = getattr(loader, "starting_at", None)
    batches = _seeded(iter(loader), epoch, batch, seed) if starting_at is None else starting_at(batch)
    for number, each in enumerate(batches, start=batch):
        images, labels = check(each, number)
        yield (images, labels), len(labels)


def _seeded(batches: Iterator[Any], epoch: int, first: int, seed: int) -> Iterator[Any]:
    """Seed the global generators before each batch, so that its random numbers depend on epoch and batch only."""
    for number in itertools.count():
        seeding.seed_global(seed, "load", epoch, number)
        try:
            batch = next(batches)
        except StopIteration:
            return
        if number >= first:
            yield batch


def materialize(checker: BatchChecker, loader: Iterable[Any]) -> HeldOut:
    """Return all images and labels of a validation loader as one batch on the device; `ValidationImages` as they are.

    Raises:
        DeatError: The loader yields no batch, or the batches are invalid.
    """
    if isinstance(loader, ValidationImages):
        checker.check_model(loader.first(2), loader.labels, "the validation images")
        return loader, loader.labels
    check_loader(loader, checker.name)
    batches = [
        checker.check_values(batch, f"validation batch {number}") for number, batch in enumerate(loader, start=1)
    ]
    if not batches:
        raise DeatError("the validation loader yields no batches; give validation images, or omit val_loader")
    kinds = {(images.shape[1:], images.dtype): None for images, _ in batches}
    if len(kinds) > 1:
        (first, _), (other, _) = list(kinds)[:2]
        what = f"{tuple(first)} and {tuple(other)}" if first != other else "different types"
        raise DeatError(
            f"the validation images must all have the same shape and type, not {what}; resize or convert them"
        )
    images, labels = checker.engine.to_device(
        torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])
    )
    checker.check_model(images, labels, "the validation images")
    return images, labels
