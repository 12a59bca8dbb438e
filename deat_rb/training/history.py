"""The training history that `fit` returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from deat_rb.training.metrics import EpochStats


@dataclass
class History:
    """The metrics of each epoch and how training ended.

    Attributes:
        rows: One per epoch.
        selected: The epoch whose weights the model holds, from 1.
        stopped: Why a stopping rule ended training, or None.
    """

    rows: list[EpochStats] = field(default_factory=list)
    selected: int = 0
    stopped: str | None = None

    @property
    def steps(self) -> list[int]:
        """The number of attack steps of each epoch."""
        return [row.steps for row in self.rows]

    @property
    def backwards(self) -> float:
        """Backward passes of the whole run, in units of mini-batches."""
        return sum(row.backwards for row in self.rows)
