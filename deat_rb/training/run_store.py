"""The interface through which the training loop accesses a run directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from deat_rb.training.metrics import EpochStats


class RunStore(Protocol):
    """Storage of a run's metrics, weights and checkpoints; `deat_rb.runs.directory.RunDirectory` implements it."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        ...

    @property
    def config_json(self) -> dict[str, Any]:
        """The configuration as JSON values."""
        ...

    def command(self, name: str) -> str:
        """Return the command ``deat-rb NAME`` for the run, to be shown to the user."""
        ...

    def rows(self) -> list[EpochStats]:
        """Return the metrics of the epochs so far."""
        ...

    def append(self, row: EpochStats) -> None:
        """Append the metrics of an epoch."""
        ...

    def truncate(self, epochs: int) -> list[EpochStats]:
        """Keep only the metrics of the first ``epochs`` epochs, and return them."""
        ...

    def discard_unfinished(self) -> None:
        """Remove incomplete files of a killed process."""
        ...

    def save_weights(self, which: str, state: Mapping[str, Tensor], row: EpochStats) -> None:
        """Write the ``best`` or ``last`` weights with their metrics."""
        ...

    def discard_weights(self, which: str) -> None:
        """Remove weights and their metrics."""
        ...
