"""Results of runs: accuracies, cost and stopping epoch of each, and their mean and deviation over seeds."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deat_rb.evaluation.report import Report, page_file
from deat_rb.evaluation.statistics import mean_and_deviation
from deat_rb.reproduction.folder import StudyFolder
from deat_rb.reproduction.planning import begun_runs, check_not_extended, check_one_dataset, check_one_precision
from deat_rb.reproduction.provenance import eval_command, train_command
from deat_rb.reproduction.study import RunSpec
from deat_rb.runs.directory import CONFIG, RunDirectory
from deat_rb.training.metrics import EpochStats

PASSES, MINUTES, EPOCHS = "backward passes", "minutes", "epochs"


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Attributes:
        name: The run's name.
        label: Name of its row: the same for runs that differ only in the seed.
        seed: The random seed.
        status: ``waiting``, ``begun``, ``running``, ``done`` or ``failed``.
        reason: Why it failed.
        values: Values by column: accuracies in percent by attack, ``backward passes`` in mini-batches, ``minutes`` of
            training, and ``epochs`` trained until the end or the stopping rule.
        images: Number of test images by attack.
        page: Path of the page of its evaluation.
        commit: Git commit of deat-rb.
        hardware: Description of the device.
        finished: When it was done (ISO 8601, UTC).
        commands: The commands that train and evaluate it.
    """

    name: str
    label: str
    seed: int
    status: str
    reason: str = ""
    values: dict[str, float] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)
    page: Path | None = None
    commit: str = ""
    hardware: str = ""
    finished: str = ""
    commands: tuple[str, ...] = ()


def cost(rows: Sequence[EpochStats]) -> dict[str, float]:
    """Return backward passes, minutes of training without validation, and epochs."""
    return {
        PASSES: sum(row.backwards for row in rows),
        MINUTES: sum(row.seconds for row in rows) / 60,
        EPOCHS: float(len(rows)),
    }


def collect(folder: StudyFolder, runs: Sequence[RunSpec]) -> list[RunResult]:
    """Return the results of all runs, including unfinished ones.

    Raises:
        DeatError: A file of a run is damaged, a run was extended, runs that are done and for which the study names
            the same data or initial weights had different ones, or seeds of one setting differ in precision.
    """
    results = [_result(folder, run) for run in runs]
    done = [run for run, result in zip(runs, results, strict=True) if result.status == "done"]
    begun = begun_runs(folder, done)
    check_one_dataset(folder, begun)
    check_one_precision(folder, begun)
    return results


def _result(folder: StudyFolder, run: RunSpec) -> RunResult:
    check_not_extended(folder, run)
    status, record = folder.status(run), folder.record(run)
    commands = [train_command(run, folder.runs)]
    commands += [eval_command(run, folder.runs, attacks, asked) for attacks, asked in run.evaluation.parts()]
    if record is None or status not in ("done", "failed"):
        return RunResult(run.name, run.label, run.seed, status, commands=tuple(commands))
    values, images, page = dict[str, float](), dict[str, int](), None
    for attacks, asked in run.evaluation.parts():
        for attack in ("natural", *attacks):
            found = folder.report(run, attack, asked)
            if found is not None and attack not in values:
                values[attack], images[attack] = 100 * found[1].results[attack].accuracy, found[1].n_examples
                written = page_file(found[0])
                page = page or (written if written.is_file() else None)
    values |= cost(folder.rows(run)) if status == "done" else {}
    return RunResult(run.name, run.label, run.seed, status, record.reason, values, images, page, record.commit,
                     record.hardware, record.finished, tuple(commands))  # fmt: skip


def of_run(path: Path, report: Report, label: str, *, worst_case: bool) -> RunResult:
    """Return the result of a run directory with its evaluation, and with its worst case if wanted."""
    run = RunDirectory.open(path)
    shown = [*report.results.values(), *([report.worst_case] if worst_case else [])]
    values = {each.name: 100 * each.accuracy for each in shown}
    return RunResult(path.absolute().name, label, run.config.optim.seed, "done",
                     values={**values, **cost(run.rows())},
                     commands=(shlex.join(["deat-rb", "train", "--config", str(path / CONFIG)]),))  # fmt: skip


@dataclass(frozen=True)
class Mean:
    """Mean of a value over the runs of a row.

    Attributes:
        mean: The mean.
        deviation: The sample standard deviation; None for a single run.
        count: Number of runs.
    """

    mean: float
    deviation: float | None
    count: int


def mean_of(results: Sequence[RunResult], column: str) -> Mean | None:
    """Return the mean of a column over runs; None if there are none or one lacks the column."""
    if not results or any(column not in each.values for each in results):
        return None
    return Mean(*mean_and_deviation([each.values[column] for each in results]), len(results))


def by_label(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """Group results by their rows, in the order of their first runs."""
    rows: dict[str, list[RunResult]] = {}
    for each in results:
        rows.setdefault(each.label, []).append(each)
    return rows
