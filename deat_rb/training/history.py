"""The training history that `fit` returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from deat_rb.training.metrics import EpochStats


@dataclass
class History:
    """The metrics of each epoch and how training ended.

    Attributes:
        rows: Metrics, one row per epoch.
        selected: Epoch (1-based) whose weights the model holds.
        stopped: Reason why a stopping rule ended training, or None.
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
        """Number of backward passes in the whole run, in units of mini-batches."""
        return sum(row.backwards for row in self.rows)

    def __str__(self) -> str:
        """Return a table with one row per epoch, followed by the selected epoch."""
        if not self.rows:
            return "no epoch has been trained"
        lines = [[title for title, _ in COLUMNS], *([show(row) for _, show in COLUMNS] for row in self.rows)]
        columns = [column for column in zip(*lines, strict=True) if any(text != "-" for text in column[1:])]
        widths = [max(map(len, column)) for column in columns]
        table = [
            "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True))
            for line in zip(*columns, strict=True)
        ]
        end = f"; stopped: {self.stopped}" if self.stopped else ""
        return "\n".join([*table, f"selected epoch: {self.selected}{end}"])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


COLUMNS: list[tuple[str, Callable[[EpochStats], str]]] = [
    ("epoch", lambda row: str(row.epoch)),
    ("steps", lambda row: str(row.steps)),
    ("loss", lambda row: f"{row.loss:.4f}"),
    ("train", lambda row: _percent(row.train_acc)),
    ("validation", lambda row: _percent(row.val_acc)),
    ("PGD-20", lambda row: _percent(row.val_robust_acc)),
    ("raw PGD-20", lambda row: _percent(row.raw_val_robust_acc)),
    ("l_X", lambda row: f"{row.l_x:.4g}"),
    ("lr", lambda row: f"{row.lr:.4g}"),
    ("backward passes", lambda row: f"{row.backwards:g}"),
    ("seconds", lambda row: f"{row.seconds + row.val_seconds:.1f}"),
]
"""Columns of the table; those without a value in any epoch are omitted."""
