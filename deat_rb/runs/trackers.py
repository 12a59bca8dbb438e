"""Experiment trackers supported by Accelerate, such as TensorBoard, in addition to ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from deat_rb.training.callbacks import Callback
from deat_rb.utils.errors import DeatError, did_you_mean

if TYPE_CHECKING:
    from deat_rb.runs.directory import RunDirectory
    from deat_rb.training.metrics import EpochStats


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers exist and are installed.

    Raises:
        DeatError: A tracker does not exist, or its package is not installed.
    """
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(each) for each in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise DeatError(f"--track {name} is unknown: {did_you_mean(name, list(LOGGER_TYPE_TO_CLASS))}")
        if name not in available:
            raise DeatError(f"--track {name} needs the package {name}, which is not installed: pip install {name}")


class Trackers(Callback):
    """Log the metrics of each epoch to experiment trackers.

    Args:
        names: Accelerate's names of the trackers, such as ``tensorboard``.
        run: The run; trackers store local files in its directory.
    """

    def __init__(self, names: Sequence[str], run: RunDirectory) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        self._trackers: list[Any] = []
        for name in names:
            kind = LOGGER_TYPE_TO_CLASS[name]
            place = {"logging_dir": run.path / name} if kind.requires_logging_directory else {}
            tracker = kind(run.path.name, **place)
            if hasattr(tracker, "start"):
                tracker.start()
            self._trackers.append(tracker)
        plain = {key: value for key, value in run.config.flat().items() if isinstance(value, bool | int | float | str)}
        for tracker in self._trackers:
            tracker.store_init_configuration(plain)

    def on_epoch_end(self, row: EpochStats) -> None:
        """Log the epoch's metrics; the step is the epoch number."""
        metrics = {key: value for key, value in asdict(row).items() if isinstance(value, int | float)}
        del metrics["epoch"]
        for tracker in self._trackers:
            tracker.log(metrics, step=row.epoch)

    def close(self) -> None:
        """Flush and close all trackers."""
        for tracker in self._trackers:
            tracker.finish()
