"""Folder of a study: its run directories, their locks and the record of each run that is done or has failed.

runs/NAME            the run directories, as written by `deat-rb train`
state/NAME.lock      held by the process that trains or evaluates the run
state/NAME.json      `Record`, written when the run was trained, is done or has failed
state/estimate.json  predicted seconds of each run
logs/                output of the workers that `--jobs` starts
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from deat_rb.evaluation.records import FOLDER as EVALUATIONS
from deat_rb.evaluation.report import Report
from deat_rb.reproduction.study import Evaluation, RunSpec
from deat_rb.runs.directory import RunDirectory
from deat_rb.training.metrics import EpochStats
from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import read_json, write_json
from deat_rb.utils.locks import BusyError, exclusive_lock

Status = Literal["waiting", "begun", "running", "done", "failed"]


class Evaluated(BaseModel):
    """An evaluation of a run.

    Attributes:
        attacks: The requested attacks.
        asked: The requested number of test images; None for all.
        n_examples: The number of test images.
        model_sha256: SHA-256 of the weights, as in the report.
        seconds: Wall time of the attacks in seconds, also before an interruption.
    """

    model_config = ConfigDict(frozen=True)

    attacks: tuple[str, ...]
    asked: int | None
    n_examples: int
    model_sha256: str
    seconds: float = 0.0


class Record(BaseModel):
    """Status, evaluations and provenance of a run.

    Attributes:
        status: ``trained``, ``failed``, or ``done`` if it is trained and evaluated.
        reason: Why it failed, in one sentence.
        trained: Whether it was trained before it failed.
        evaluations: Its evaluations.
        commit: Git commit of deat-rb at the end of training; empty if unknown.
        hardware: Description of the device.
        started: When training began or was last resumed (ISO 8601, UTC).
        finished: When the record was last written (ISO 8601, UTC).
        seconds: Wall time in seconds of all epochs, with validation, and of the attacks of the evaluations.
    """

    model_config = ConfigDict(frozen=True)

    status: Literal["trained", "done", "failed"]
    reason: str = ""
    trained: bool = False
    evaluations: tuple[Evaluated, ...] = ()
    commit: str = ""
    hardware: str = ""
    started: str = ""
    finished: str = ""
    seconds: float = 0.0

    def evaluated(self, attack: str, asked: int | None) -> Evaluated | None:
        """Return the evaluation with an attack on a number of test images (None for all), if there is one."""
        return next((each for each in self.evaluations if attack in each.attacks and each.asked == asked), None)

    def missing(self, evaluation: Evaluation) -> list[tuple[tuple[str, ...], int | None]]:
        """Return the missing attacks of an evaluation, with the number of test images for each group of attacks."""
        parts = [
            (tuple(name for name in attacks if self.evaluated(name, count) is None), count)
            for attacks, count in evaluation.parts()
        ]
        return [part for part in parts if part[0]]


@dataclass(frozen=True)
class StudyFolder:
    """The folder in which the runs of one or more studies are stored.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def runs(self) -> Path:
        """The parent folder of the run directories."""
        return self.path / "runs"

    @property
    def logs(self) -> Path:
        """The folder of the workers' output."""
        return self.path / "logs"

    def create(self) -> None:
        """Create the folder.

        Raises:
            DeatError: It cannot be created.
        """
        try:
            for each in (self.runs, self.path / "state"):
                each.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DeatError(
                f"the folder {self.path} cannot be created ({error.strerror}); choose another --output"
            ) from None

    def run_path(self, run: RunSpec) -> Path:
        """Return the path of a run's directory."""
        return self.runs / run.name

    @contextmanager
    def claimed(self, run: RunSpec) -> Iterator[bool]:
        """Claim a run for this process; yield False if another process has claimed it.

        The operating system releases a claim when the process ends or is killed.

        Raises:
            DeatError: The lock file cannot be used.
        """
        path = self.path / "state" / f"{run.name}.lock"
        with ExitStack() as stack:
            try:
                stack.enter_context(
                    exclusive_lock(path, busy="claimed", failed=f"cannot lock {path} against other processes")
                )
                free = True
            except BusyError:
                free = False
            yield free

    def record(self, run: RunSpec) -> Record | None:
        """Return a run's record; None if it is not trained yet.

        Raises:
            DeatError: The record is damaged.
        """
        path = self._record_path(run)
        if not path.is_file():
            return None
        try:
            return Record.model_validate(read_json(path))
        except ValidationError:
            raise DeatError(f"{path} is not a valid record; remove it to train and evaluate the run again") from None

    def write_record(self, run: RunSpec, record: Record) -> None:
        """Write a run's record, atomically."""
        write_json(self._record_path(run), record.model_dump(mode="json"))

    def forget_failure(self, run: RunSpec) -> None:
        """Let a failed run be tried again; one that was trained keeps its evaluations."""
        record = self.record(run)
        if record is None or record.status != "failed":
            return
        if record.trained or record.evaluations:
            self.write_record(run, record.model_copy(update={"status": "trained", "reason": ""}))
        else:
            self._record_path(run).unlink(missing_ok=True)

    def is_settled(self, run: RunSpec) -> bool:
        """Return whether a run has failed, or is trained and evaluated as the study requires."""
        record = self.record(run)
        if record is None:
            return False
        return record.status == "failed" or (record.status == "done" and not record.missing(run.evaluation))

    def status(self, run: RunSpec) -> Status:
        """Return a run's status; ``begun`` if it was interrupted and no process is working on it."""
        if self.is_settled(run):
            record = self.record(run)
            return "failed" if record is not None and record.status == "failed" else "done"
        if self._is_locked(run):
            return "running"
        return "begun" if self.run_path(run).is_dir() else "waiting"

    def rows(self, run: RunSpec) -> list[EpochStats]:
        """Return the metrics of a run's epochs so far; empty if it has not started."""
        if not self.run_path(run).is_dir():
            return []
        return RunDirectory.open(self.run_path(run)).rows()

    def report(self, run: RunSpec, attack: str, asked: int | None) -> tuple[Path, Report] | None:
        """Return the file and the report of a run's evaluation that includes an attack; None if there is none.

        Args:
            run: The run.
            attack: The attack, or ``natural``.
            asked: The requested number of test images; None for all.

        Raises:
            DeatError: A report is damaged, or the report named in the record is missing.
        """
        record = self.record(run)
        made = record.evaluated(attack, asked) if record is not None else None
        if made is None:
            return None
        folder = self.run_path(run)
        config = RunDirectory.open(folder).config
        trained = config.attack
        for file in (folder / "eval.json", *sorted((folder / EVALUATIONS).glob("*.json"))):
            if not file.is_file():
                continue
            report = Report.load(file)
            same = report.model_sha256 == made.model_sha256 and report.n_examples == made.n_examples
            own = math.isclose(report.eps, trained.eps, abs_tol=1e-9) and report.norm == trained.norm
            own &= report.provenance.get("data_sha256") == config.data_fingerprint
            if same and own and report.precision == "fp32" and report.seed == 0 and attack in report.results:
                return file, report
        raise DeatError(
            f"{folder} no longer has a report of {attack}; remove {self._record_path(run)} to evaluate again"
        )

    def _record_path(self, run: RunSpec) -> Path:
        return self.path / "state" / f"{run.name}.json"

    def _is_locked(self, run: RunSpec) -> bool:
        if not (self.path / "state" / f"{run.name}.lock").exists():
            return False
        with self.claimed(run) as free:
            return not free
