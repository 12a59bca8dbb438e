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
    def checkpoints(self) -> Path: ...  # noqa: D102 - see RunDirectory

    @property
    def config_json(self) -> dict[str, Any]: ...  # noqa: D102 - see RunDirectory

    def rows(self) -> list[EpochStats]: ...  # noqa: D102 - see RunDirectory

    def append(self, row: EpochStats) -> None: ...  # noqa: D102 - see RunDirectory

    def truncate(self, epochs: int) -> list[EpochStats]: ...  # noqa: D102 - see RunDirectory

    def discard_unfinished(self) -> None: ...  # noqa: D102 - see RunDirectory

    def save_weights(self, which: str, state: Mapping[str, Tensor], row: EpochStats) -> None: ...  # noqa: D102 - see RunDirectory

    def discard_weights(self, which: str) -> None: ...  # noqa: D102 - see RunDirectory
