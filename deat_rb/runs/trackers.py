"""Experiment trackers: TensorBoard and the others that Accelerate knows. ``metrics.jsonl`` is always there beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from deat_rb.training.callbacks import Callback
from deat_rb.utils.errors import DeatError, did_you_mean

if TYPE_CHECKING:
    from deat_rb.runs.directory import RunDirectory
    from deat_rb.training.metrics import EpochAccumulator, EpochStats


def check_trackers(names: Sequence[str]) -> None:
    """Looks whether trackers can be used here.

    Raises:
        DeatError: If one does not exist or its package is not installed.
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


class Tracked(Callback):
    """Tells trackers the figures of each epoch, and another reporter everything.

    Args:
        names: Of Accelerate's trackers, such as ``tensorboard``; what they write of their own goes into the run.
        run: The run.
        reporter: The other one.
    """

    def __init__(self, names: Sequence[str], run: RunDirectory, reporter: Callback) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        self._reporter = reporter
        self._trackers: list[Any] = []
        for name in names:
            kind = LOGGER_TYPE_TO_CLASS[name]
            place = {"logging_dir": run.path / name} if kind.requires_logging_directory else {}
            tracker = kind(run.path.name, **place)
            if hasattr(tracker, "start"):
                tracker.start()
            self._trackers.append(tracker)
        config = run.config.model_dump(mode="json")
        plain = {key: value for key, value in config.items() if isinstance(value, bool | int | float | str)}
        for tracker in self._trackers:
            tracker.store_init_configuration(plain)

    def on_epoch_start(self, epoch: int, epochs: int, batches: int, steps: int) -> None:
        """Passes it on."""
        self._reporter.on_epoch_start(epoch, epochs, batches, steps)

    def on_batch_end(self, sums: EpochAccumulator) -> None:
        """Passes it on."""
        self._reporter.on_batch_end(sums)

    def on_validation_start(self) -> None:
        """Passes it on."""
        self._reporter.on_validation_start()

    def on_epoch_end(self, row: EpochStats) -> None:
        """Logs the epoch's figures at the step of its number."""
        self._reporter.on_epoch_end(row)
        figures = {key: value for key, value in asdict(row).items() if isinstance(value, int | float)}
        del figures["epoch"]
        for tracker in self._trackers:
            tracker.log(figures, step=row.epoch)

    def warn(self, sentence: str) -> None:
        """Passes it on."""
        self._reporter.warn(sentence)

    def close(self) -> None:
        """Lets the trackers finish writing."""
        for tracker in self._trackers:
            tracker.finish()
