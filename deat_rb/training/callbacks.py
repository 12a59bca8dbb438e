"""What training tells while it goes on, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field

from deat_rb.training.metrics import EpochAccumulator, EpochStats


class Callback:
    """Is told how training goes; the default says nothing."""

    def on_epoch_start(self, epoch: int, epochs: int, batches: int, steps: int) -> None:
        """An epoch of so many batches is about to run."""

    def on_batch_end(self, sums: EpochAccumulator) -> None:
        """A batch has been learnt from; reading the sums waits for the device."""

    def on_validation_start(self) -> None:
        """The epoch's batches are done."""

    def on_epoch_end(self, row: EpochStats) -> None:
        """An epoch is complete, with its validation."""

    def warn(self, sentence: str) -> None:
        """Something is not as it should be, and training goes on."""


@dataclass
class History:
    """What `fit` gives back.

    Attributes:
        rows: One per epoch.
        selected: The epoch whose weights the model holds now.
        stopped: Why a rule ended training, or None.
    """

    rows: list[EpochStats] = field(default_factory=list)
    selected: int = 0
    stopped: str | None = None

    @property
    def steps(self) -> list[int]:
        """The attack's steps, per epoch."""
        return [row.steps for row in self.rows]

    @property
    def backwards(self) -> float:
        """Backward passes in units of mini-batches, over the run."""
        return sum(row.backwards for row in self.rows)
