"""State of a study: which runs are done, running or waiting, and the expected time left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from deat_rb.reproduction.folder import Status, StudyFolder
from deat_rb.reproduction.study import RunSpec
from deat_rb.runs.directory import RunDirectory
from deat_rb.runs.resolution import resolve
from deat_rb.utils.errors import DeatError
from deat_rb.utils.options import OPEN


@dataclass(frozen=True)
class RunState:
    """State of a run.

    Attributes:
        run: The run.
        status: Its status.
        epochs: Epochs trained.
        total: Epochs of the whole run; `OPEN` if it is open-ended.
        seconds: Wall time that the epochs and evaluation took, if done.
        trained: Wall time of the epochs trained so far, with validation.
        reason: Why it failed.
    """

    run: RunSpec
    status: Status
    epochs: int = 0
    total: int = 0
    seconds: float | None = None
    trained: float = 0.0
    reason: str = ""

    @property
    def share(self) -> float:
        """Share of the epochs trained, in [0, 1]."""
        return min(self.epochs / self.total, 1.0) if self.total else 0.0

    @property
    def projected(self) -> float | None:
        """Seconds of training of the whole run at the pace of the epochs so far; None if there are none."""
        return self.trained / self.share if self.epochs and self.total < OPEN else None


@dataclass(frozen=True)
class StudyState:
    """State of all runs of a study.

    Attributes:
        runs: The state of each run.
        predicted: Predicted seconds by run name, as far as known.
    """

    runs: tuple[RunState, ...]
    predicted: Mapping[str, float]

    def counts(self) -> Counter[Status]:
        """Return the number of runs by status."""
        return Counter(each.status for each in self.runs)

    def seconds_left(self) -> float | None:
        """Return the expected time until all runs are done, in seconds; None if it is not known.

        It assumes that the number of concurrent runs does not change.
        """
        left = [each for each in self.runs if each.status not in ("done", "failed")]
        times = [self._expected(each) for each in left]
        known = [
            max(seconds * (1 - each.share), seconds - each.trained)  # the evaluation is left when training has ended
            for seconds, each in zip(times, left, strict=True)
            if seconds is not None
        ]
        return sum(known) / max(1, self.counts()["running"]) if len(known) == len(left) else None

    def _expected(self, state: RunState) -> float | None:
        """Return the expected seconds of a whole run: the mean of its other seeds, the prediction, or the mean run.

        Before a run is done and without a prediction, the epochs trained so far are extrapolated; see `is_projected`.
        """
        done = [each for each in self.runs if each.seconds]
        alike = [each.seconds for each in done if each.run.setting == state.run.setting and each.seconds]
        if alike:
            return fmean(alike)
        predicted = self.predicted.get(state.run.name)
        if predicted is not None:
            pairs = [(each.seconds, self.predicted[each.run.name]) for each in done
                     if each.run.name in self.predicted and each.seconds]  # fmt: skip
            ratio = sum(real for real, _ in pairs) / sum(told for _, told in pairs) if pairs else 1.0
            return predicted * ratio
        if done:
            return fmean(each.seconds for each in done if each.seconds)
        projected = [each.projected for each in self.runs if each.projected is not None]
        return state.projected or (fmean(projected) if projected else None)

    @property
    def is_projected(self) -> bool:
        """Whether the expected time is extrapolated from epochs, and so lacks evaluation."""
        left = [each for each in self.runs if each.status not in ("done", "failed")]
        return not any(each.seconds for each in self.runs) and any(each.run.name not in self.predicted for each in left)


def study_state(folder: StudyFolder, runs: Sequence[RunSpec], predicted: Mapping[str, float]) -> StudyState:
    """Return the state of runs.

    Raises:
        DeatError: A file of a run is damaged.
    """
    return StudyState(tuple(_state(folder, run) for run in runs), predicted)


def _planned_epochs(run: RunSpec) -> int:
    """Return the epochs of a run that was not begun; 0 if its options exclude each other, as training will report."""
    try:
        return resolve(run.options.but(device="cpu", precision="fp32")).optim.epochs  # which this machine has
    except DeatError:
        return 0


def _state(folder: StudyFolder, run: RunSpec) -> RunState:
    status = folder.status(run)
    record = folder.record(run)
    path = folder.run_path(run)
    epochs = RunDirectory.open(path).config.optim.epochs if path.is_dir() else _planned_epochs(run)
    seconds = record.seconds if record is not None and status == "done" else None
    rows = folder.rows(run)
    trained = sum(row.seconds + row.val_seconds for row in rows)
    return RunState(run, status, len(rows), epochs, seconds, trained, record.reason if record is not None else "")
