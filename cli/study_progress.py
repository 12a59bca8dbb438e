"""Progress of a study."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import click

from deat_rb.cli.evaluation_progress import EvaluationProgress
from deat_rb.cli.training_progress import TrainingProgress
from deat_rb.reproduction.results import collect
from deat_rb.reproduction.work import StudyCallback

if TYPE_CHECKING:
    from deat_rb.reproduction.folder import Record, StudyFolder
    from deat_rb.reproduction.study import RunSpec


class StudyProgress(StudyCallback):
    """Progress of a study on stderr."""

    def __init__(self, folder: StudyFolder) -> None:
        self._folder = folder

    def on_run_start(self, run: RunSpec, number: int, total: int) -> None:
        """Print which run starts."""
        click.echo(f"run {number} of {total}: {run.label}, seed {run.seed} ({run.name})", err=True)

    def on_run_end(self, run: RunSpec, record: Record) -> None:
        """Print a run's result, or why it failed."""
        if record.status == "failed":
            click.echo(f"failed: {run.label}, seed {run.seed}: {record.reason}", err=True)
            return
        values = collect(self._folder, [run])[0].values
        text = ", ".join(f"{column} {value:,.2f}" for column, value in values.items())
        click.echo(f"done: {run.label}, seed {run.seed}: {text}", err=True)

    def on_refused(self, run: RunSpec, reason: str) -> None:
        """Print why a run cannot begin on this machine."""
        click.echo(f"cannot begin here: {run.label}, seed {run.seed}: {reason}", err=True)

    def on_waiting(self, busy: int) -> None:
        """Print that other processes are working on the remaining runs."""
        click.echo(f"waiting for the runs of other processes: {busy} (--no-wait exits instead)", err=True)

    def training(self) -> AbstractContextManager[TrainingProgress]:
        """Show a bar, or a line per minute."""
        progress: AbstractContextManager[TrainingProgress] = TrainingProgress()
        return progress

    def evaluating(self) -> AbstractContextManager[EvaluationProgress]:
        """Show a bar, or a line per 30 seconds."""
        progress: AbstractContextManager[EvaluationProgress] = EvaluationProgress()
        return progress
