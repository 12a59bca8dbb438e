"""Accuracy on test images after each epoch, only for plots such as the paper's Figure 7.

The values are stored in a separate file and not among the metrics, so that no schedule, stopping rule or selection of
weights can depend on them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from deat_rb.training.callbacks import Callback
from deat_rb.training.metrics import EpochStats
from deat_rb.training.state import TrainingState
from deat_rb.training.validation import validate
from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import atomic_write

CURVE_TEST = "curve-test.jsonl"

_ROW = TypeAdapter(dict[str, float])


class CurveTest(Callback):
    """Attacks test images with PGD-20 after each epoch and stores the accuracies.

    Args:
        path: The run directory.
        images: Test images in [0, 1], (N, C, H, W).
        labels: Their labels, (N,).
    """

    def __init__(self, path: Path, images: Tensor, labels: Tensor) -> None:
        self._file = path / CURVE_TEST
        self._images, self._labels = images, labels
        self._state: TrainingState | None = None

    def on_fit_start(self, state: TrainingState) -> None:
        """Drop the epochs that will be trained again."""
        self._state = state
        self._write([row for row in _rows(self._file) if row["epoch"] < state.epoch])

    def on_validation_end(self, row: EpochStats) -> None:
        """Store the epoch's accuracies before its metrics are stored, so that no epoch is missing after a kill."""
        state = self._state
        assert state is not None
        with state.engine.eager(state.model), state.averaged(), state.engine.autocast():
            result = validate(state.model, self._images, self._labels, eps=state.trainer.eps, norm=state.trainer.norm,
                              seed=state.seed)  # fmt: skip
        stored = [each for each in _rows(self._file) if each["epoch"] != row.epoch]
        own = {"epoch": row.epoch, "images": len(self._labels), "natural": result.natural, "pgd-20": result.robust}
        self._write([*stored, own])

    def _write(self, rows: Sequence[dict[str, float]]) -> None:
        if rows or self._file.exists():
            atomic_write(self._file, "".join(json.dumps(row) + "\n" for row in rows).encode())


def curve_test(path: Path) -> dict[int, float]:
    """Return a run's PGD-20 accuracy on test images in [0, 1] by epoch; empty if it was not measured.

    Raises:
        DeatError: The file is damaged.
    """
    return {int(row["epoch"]): row["pgd-20"] for row in _rows(path / CURVE_TEST)}


def _rows(file: Path) -> list[dict[str, float]]:
    try:
        rows = [_ROW.validate_json(line) for line in file.read_bytes().splitlines()] if file.is_file() else []
        for row in rows:
            row["epoch"], row["pgd-20"]
    except (ValidationError, KeyError):
        raise DeatError(f"{file} is not valid; remove it (the accuracies of earlier epochs are then lost)") from None
    return rows
