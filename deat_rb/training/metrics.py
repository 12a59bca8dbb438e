"""What a batch and an epoch leave behind: the figures on which schedules, stopping rules and metrics rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from deat_rb.utils.distributed import World


@dataclass
class BatchStats:
    """What one training step did. Sums over the batch stay on the device as 0-d tensors (law 10).

    Attributes:
        examples: N, the number of examples.
        loss: The surrogate loss summed over the examples (for replays: the last replay's).
        correct: How many examples were classified correctly as trained on.
        l_x: See `CraftStats`.
        forwards: Forward passes of crafting and updating, in units of mini-batches.
        backwards: Backward passes of crafting and updating, in units of mini-batches.
        updates: Optimiser steps.
        image_size: |x|, the number of values of one image: C * H * W.
    """

    examples: int
    loss: Tensor
    correct: Tensor
    l_x: Tensor
    forwards: float | Tensor
    backwards: float | Tensor
    updates: int
    image_size: int


class EpochAccumulator:
    """Sums of `BatchStats` over an epoch; they stay on the device until `read`.

    Attributes:
        examples: How many examples.
        updates: Optimiser steps.
        batches: Mini-batches.
        image_size: |x|, the number of values of one image.
    """

    def __init__(self) -> None:
        self.examples = self.updates = self.batches = self.image_size = 0
        self._sums: dict[str, float | Tensor] = dict.fromkeys(("loss", "correct", "l_x", "forwards", "backwards"), 0.0)

    def add(self, stats: BatchStats, share: float = 1.0) -> None:
        """Adds a batch, or a process's share of one, to which its passes are in proportion."""
        self.examples += stats.examples
        self.updates += stats.updates
        self.batches += 1
        self.image_size = stats.image_size
        for name, value in self._sums.items():
            term = getattr(stats, name)
            if name in ("forwards", "backwards"):
                term = term * share
            self._sums[name] = value + (term.double() if name == "l_x" and term.device.type != "mps" else term)

    def read(self) -> dict[str, float]:
        """The sums as numbers: the epoch's one wait for the device."""
        return {name: float(value) for name, value in self._sums.items()}

    def over(self, world: World) -> EpochAccumulator:
        """The sums of all processes together."""
        return self if world.size == 1 else EpochAccumulator.of(world.all_gather(self.facts()))

    def facts(self) -> dict[str, float]:
        """The sums of an unfinished epoch, as JSON values that give the very sums back."""
        counts = {name: getattr(self, name) for name in ("examples", "updates", "batches", "image_size")}
        return counts | self.read()

    @classmethod
    def of(cls, parts: Sequence[Mapping[str, float]]) -> EpochAccumulator:
        """Adds up the `facts` of processes that have had the same batches."""
        sums = cls()
        sums.updates, sums.batches, sums.image_size = (
            int(parts[0][name]) for name in ("updates", "batches", "image_size")
        )
        sums.examples = sum(int(part["examples"]) for part in parts)
        sums._sums.update({name: sum(float(part[name]) for part in parts) for name in sums._sums})
        return sums

    @classmethod
    def share_of(cls, parts: Sequence[Mapping[str, float]], world: World) -> EpochAccumulator:
        """What a process goes on with of the `facts` that so many others had, its own again where they were as many."""
        own = parts[world.rank :: world.size]
        return cls.of(own or [{**parts[0], "examples": 0, **cls().read()}])


@dataclass
class EpochStats:
    """An epoch's figures: a row of ``metrics.jsonl``, which is all a schedule or a stopping rule ever sees.

    Attributes:
        epoch: Which epoch, from 1.
        steps: The attack's steps r in this epoch (for replays: the replays).
        alpha: The step size, in [0, 1] pixel units.
        l_x: Sum over the epoch's examples of the L1 norm of the last input gradient (Algorithms 2-5).
        lipschitz: Theorem 1's lower bound on the Lipschitz constant of the loss's input gradient, the examples' mean.
        examples: How many examples were trained on.
        loss: The surrogate loss, mean.
        train_acc: Accuracy on the images as trained on, in [0, 1].
        val_acc: Natural accuracy on the validation images, in [0, 1].
        val_robust_acc: PGD-20 accuracy on the validation images, in [0, 1].
        stop_robust_acc: PGD-5 accuracy on the stopping rule's own batch, in [0, 1].
        backwards: Backward passes in units of mini-batches.
        forwards: Forward passes in units of mini-batches.
        updates: Optimiser steps.
        lr: The learning rate at the epoch's last update.
        seconds: Training time; validation is counted in ``val_seconds``.
        val_seconds: Validation time.
        val_forwards: Images forwarded for validation and for the stopping rule; training's passes are in mini-batches.
        val_backwards: Images for which these computed a gradient.
        images_per_second: Training images per second.
        peak_memory: Peak memory of training in bytes: of the GPU in this epoch, or of the process so far.
        stopped: Why a rule ended training here or, where it was not to be heeded, would have.
        skipped: Batches that were left out because something was not finite.
        processes: How many processes trained together.
    """

    epoch: int = 0
    steps: int = 0
    alpha: float | None = None
    l_x: float = 0.0
    lipschitz: float | None = None
    examples: int = 0
    loss: float = 0.0
    train_acc: float = 0.0
    val_acc: float | None = None
    val_robust_acc: float | None = None
    stop_robust_acc: float | None = None
    backwards: float = 0.0
    forwards: float = 0.0
    updates: int = 0
    lr: float = 0.0
    seconds: float = 0.0
    val_seconds: float = 0.0
    val_forwards: int = 0
    val_backwards: int = 0
    images_per_second: float = 0.0
    peak_memory: int = 0
    stopped: str | None = None
    skipped: int = 0
    processes: int = 1

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> EpochStats:
        """Reads a row of ``metrics.jsonl``; fields it does not know are left out."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in row.items() if key in known})

    @classmethod
    def of(cls, row: EpochStats | Mapping[str, Any], number: int) -> EpochStats:
        """An epoch's figures from what stands for them; of a row without an epoch it is the ``number``-th."""
        return row if isinstance(row, EpochStats) else cls.from_row({"epoch": number, **row})
