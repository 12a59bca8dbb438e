"""What `fit` asks of a loader: any iterable of (images, labels), checked where it begins."""

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
    """How many batches an epoch has; a loader that does not say so is read once."""
    with contextlib.suppress(TypeError):  # a DataLoader over a stream has a length, which raises
        if isinstance(loader, Sized):
            return len(loader)
    return sum(1 for _ in loader)


class ShardedLoader:
    """One process's shares of the batches that a loader gives.

    Args:
        loader: Gives the global batches, the same in every process.
        world: The processes.
    """

    def __init__(self, loader: Iterable[Batch], world: World) -> None:
        self.loader = loader
        self.world = world

    def of_epoch(self, epoch: int, batch: int, seed: int) -> Iterator[tuple[Batch, int]]:
        """As `of_epoch`.

        Raises:
            DeatError: A batch has fewer images than there are processes.
        """
        for (images, labels), total in of_epoch(self.loader, epoch, batch, seed):
            if total < self.world.size:
                raise DeatError(
                    f"a batch of {total} images cannot be divided over {self.world.size} processes; "
                    "leave short batches out, or give fewer processes"
                )
            part = self.world.share(total)
            yield (images[part], labels[part]), total


class PreShardedLoader:
    """The same of a loader that makes no more than one process's share.

    Args:
        loader: Has ``shard(rank, processes)`` and ``examples_in(batch)``, as `deat_rb.data.batches.Batches`.
        world: The processes.
    """

    def __init__(self, loader: Any, world: World) -> None:
        self.loader = loader.divided(world.rank, world.size)

    def of_epoch(self, epoch: int, batch: int, seed: int) -> Iterator[tuple[Batch, int]]:
        """As `of_epoch`."""
        for number, (part, _) in enumerate(of_epoch(self.loader, epoch, batch, seed), start=batch):
            yield part, self.loader.examples_in(number)


Loader = Iterable["Batch"] | ShardedLoader | PreShardedLoader


def shard(loader: Iterable[Batch], world: World) -> Loader:
    """What `of_epoch` is to read where several processes train together."""
    if world.size == 1:
        return loader
    return PreShardedLoader(loader, world) if hasattr(loader, "divided") else ShardedLoader(loader, world)


def of_epoch(loader: Loader, epoch: int, batch: int, seed: int) -> Iterator[tuple[Batch, int]]:
    """The batches of an epoch from one on; a loader that cannot begin there is read up to it.

    Yields:
        A batch, or this process's share of one, and how many examples all shares of it have together.
    """
    if isinstance(loader, ShardedLoader | PreShardedLoader):
        yield from loader.of_epoch(epoch, batch, seed)
        return
    set_epoch = getattr(loader, "set_epoch", None)
    if set_epoch is not None:
        set_epoch(epoch)
    starting_at: Callable[[int], Iterator[Batch]] | None = getattr(loader, "starting_at", None)
    for each in _seeded(iter(loader), epoch, batch, seed) if starting_at is None else starting_at(batch):
        yield each, len(each[-1])  # what is no pair of tensors is refused by `check_first`


def _seeded(batches: Iterator[Batch], epoch: int, first: int, seed: int) -> Iterator[Batch]:
    """Seeds torch's generators before each batch, so that what a loader draws follows from the position alone."""
    for number in itertools.count():
        seeding.seed_global(seed, "load", epoch, number)
        batch = next(batches, None)
        if batch is None:
            return
        if number >= first:
            yield batch


def materialize(trainer: TrainerBase, loader: Iterable[Batch], engine: Engine) -> Batch:
    """All of a validation loader as one batch, on the device.

    Raises:
        DeatError: If there is none, or it cannot be used.
    """
    batches = list(loader)
    if not batches:
        raise DeatError("the validation loader gave no batch; give validation images or none at all")
    images, labels = torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])
    check_first(trainer, (images, labels), engine)
    return engine.receive(images, labels)


def check_first(trainer: TrainerBase, batch: Any, engine: Engine) -> None:
    """Checks a batch against what the trainer's model takes and gives, and whether its attack can be trained with.

    Raises:
        DeatError: Naming what is not admissible.
    """
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        raise DeatError("a loader has to give pairs of tensors (images, labels), and this one gives something else")
    images, labels = batch
    check_batch(images, labels)
    with preserve_modes(trainer.model), torch.no_grad():
        classes = trainer.model.eval()(images[:1].to(engine.device)).shape[1]
    check_batch(images, labels, classes)
    trainer.check_attack(images.to(engine.device))
