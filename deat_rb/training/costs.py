"""Number of passes and updates of a run."""

from __future__ import annotations

from dataclasses import dataclass

from deat_rb.utils.text import counted


@dataclass(frozen=True)
class Costs:
    """Passes and updates of a run, in mini-batches.

    Attributes:
        backwards: Backward passes.
        forwards: Forward passes.
        updates: Updates of the weights.
    """

    backwards: float
    forwards: float
    updates: float

    def __str__(self) -> str:
        names = {"backward pass": self.backwards, "forward pass": self.forwards, "update": self.updates}
        return ", ".join(counted(count, name, ",.0f") for name, count in names.items())
