"""Options and actions shared by `deat-rb sweep` and `deat-rb reproduce`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from deat_rb.utils.errors import DeatError, Interrupted
from deat_rb.utils.text import counted

if TYPE_CHECKING:
    from deat_rb.reproduction.estimate import Prediction
    from deat_rb.reproduction.folder import StudyFolder
    from deat_rb.reproduction.study import Study

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--jobs", type=int, metavar="N", help="Start N worker processes on this machine."),
    click.option("--gpus", metavar="0,1,...", help="Start workers on these GPUs, --per-gpu on each."),
    click.option("--per-gpu", type=int, default=1, show_default=True, metavar="K", help="Workers per GPU."),
    click.option("--slurm", is_flag=True, help="Submit --jobs workers to a Slurm cluster through submitit, and exit."),
    click.option("--slurm-option", "slurm_options", multiple=True, metavar="NAME=VALUE",
                 help="Parameter of submitit's executor, such as timeout_min=600; may be repeated."),
    click.option("--print", "print_commands", is_flag=True,
                 help="Print one command per remaining run, for GNU parallel or a job array, and exit."),
    click.option("--only", metavar="RUN", help="Train and evaluate only this run."),
    click.option("--no-wait", is_flag=True, help="Exit when all remaining runs are claimed by other processes."),
    click.option("--retry", is_flag=True, help="Retry failed runs."),
    click.option("--status", is_flag=True, help="Print which runs are done, running or waiting, and the time left."),
    click.option("--tables", "tables_only", is_flag=True, help="Write the tables of the finished runs, and exit."),
    click.option("--dry-run", is_flag=True, help="Print the runs and their cost on this machine, without training."),
)  # fmt: skip


def study_options(command: F) -> F:
    """Add the options to a command; their values are the arguments of `WorkOptions`."""
    for each in reversed(_OPTIONS):
        command = each(command)
    return command


@dataclass(frozen=True)
class WorkOptions:
    """The options that `study_options` adds."""

    jobs: int | None
    gpus: str | None
    per_gpu: int
    slurm: bool
    slurm_options: tuple[str, ...]
    print_commands: bool
    only: str | None
    no_wait: bool
    retry: bool
    status: bool
    tables_only: bool
    dry_run: bool

    def gpu_names(self) -> tuple[str, ...]:
        """Return the indices or UUIDs of ``--gpus``.

        Raises:
            DeatError: There are none.
        """
        names = tuple(filter(None, (self.gpus or "").split(",")))
        if self.gpus is not None and not names:
            raise DeatError(f"--gpus '{self.gpus}' names no GPU; give indices or UUIDs, such as 0,1")
        return names

    def check_modes(self) -> None:
        """Check that the options select one action.

        Raises:
            DeatError: Two of them exclude each other, or one needs another.
        """
        if self.slurm and self.gpus is not None:
            raise DeatError("--slurm cannot be combined with --gpus: give --slurm-option gpus_per_node=1 instead")
        if self.slurm_options and not self.slurm:
            raise DeatError(f"--slurm-option {self.slurm_options[0]} needs --slurm")
        modes = {"--status": self.status, "--print": self.print_commands, "--tables": self.tables_only,
                 "--dry-run": self.dry_run, "--only": self.only is not None, "--slurm": self.slurm}  # fmt: skip
        chosen = [flag for flag, given in modes.items() if given]
        if len(chosen) > 1:
            raise DeatError(f"{chosen[0]} and {chosen[1]} are mutually exclusive: give only one")


def work(
    study: Study, folder: StudyFolder, options: WorkOptions, arguments: Sequence[str], write: Callable[[], None]
) -> None:
    """Run the action that the options select.

    Args:
        study: The study.
        folder: Its folder.
        options: The options.
        arguments: The command's arguments, without those of `study_options`.
        write: Writes and prints the tables.

    Raises:
        DeatError: An option is invalid, or the folder cannot be used.
    """
    from deat_rb.reproduction.planning import check_same_data
    from deat_rb.reproduction.workers import environments

    gpus = options.gpu_names()
    options.check_modes()
    workers = environments(options.jobs, gpus, options.per_gpu)
    check_same_data(folder, study.runs)
    if options.print_commands:
        _print_commands(study, folder, arguments)
    elif options.status:
        print_status(study, folder)
    elif options.dry_run:
        print_estimate(study, folder, workers)
    elif options.tables_only:
        write()
    else:
        _train_and_evaluate(study, folder, options, gpus, workers, arguments, write)


def _print_commands(study: Study, folder: StudyFolder, arguments: Sequence[str]) -> None:
    """Print one command for each remaining run."""
    import shlex

    left = [run for run in study.runs if not folder.is_settled(run)]
    for run in left:
        click.echo(shlex.join(["deat-rb", *arguments, "--only", run.name]))
    if not left:
        click.echo(_nothing_left(study, folder), err=True)


def _train_and_evaluate(
    study: Study,
    folder: StudyFolder,
    options: WorkOptions,
    gpus: Sequence[str],
    workers: list[dict[str, str]],
    arguments: Sequence[str],
    write: Callable[[], None],
) -> None:
    """Train and evaluate the remaining runs here, by worker processes, or by jobs of a cluster."""
    from deat_rb.cli.study_progress import StudyProgress
    from deat_rb.reproduction.work import Worker
    from deat_rb.reproduction.workers import check_gpus

    only = None if options.only is None else study.run(options.only)
    if gpus and only is None and (options.retry or not all(map(folder.is_settled, study.runs))):
        check_gpus(gpus)
    chosen = study.runs if only is None else (only,)
    for run in chosen if options.retry else ():
        folder.forget_failure(run)
    left = [run for run in chosen if not folder.is_settled(run)]
    if not left:
        click.echo(_nothing_left(study, folder) if only is None else f"{only.name} is {folder.status(only)}", err=True)
    worker, failures = Worker(study, folder, StudyProgress(folder)), list[str]()
    with _telling_what_is_done(study, folder):
        if not left:
            pass
        elif options.slurm:
            _submit(folder, options, len(workers), arguments)
        elif only is not None:
            if not worker.work_on(only):
                click.echo(f"another process is working on {only.name}")
        elif len(workers) > 1 or gpus:
            more = ["--no-wait"] if options.no_wait else []
            failures = _run_workers(study, folder, workers, [*arguments, *more])
        else:
            worker.work(wait=not options.no_wait)
        if only is None and not options.slurm:
            write()
    refused = [run for run in left if run.name in worker.refused and not folder.is_settled(run)]
    if refused:
        first = refused[0]
        raise DeatError(f"{counted(len(refused), 'run')} cannot begin on this machine: {first.label}, seed "
                        f"{first.seed}: {worker.refused[first.name]}")  # fmt: skip
    rest = [run for run in left if not folder.is_settled(run)]
    if failures and rest:
        raise DeatError(f"{counted(len(rest), 'run')} not done: {failures[0]}")


def _nothing_left(study: Study, folder: StudyFolder) -> str:
    """Return the sentence that all runs are done or have failed."""
    statuses = [folder.status(run) for run in study.runs]
    failed = statuses.count("failed")
    text = f"nothing is left: {counted(statuses.count('done'), 'run')} done"
    return text + (f", {failed} failed (--retry repeats them)" if failed else "")


@contextmanager
def _telling_what_is_done(study: Study, folder: StudyFolder) -> Iterator[None]:
    """Let the message after Ctrl-C say how many runs are done, whichever step it interrupts."""
    try:
        yield
    except KeyboardInterrupt:
        done = sum(folder.is_settled(run) for run in study.runs)
        total = counted(len(study.runs), "run")
        raise Interrupted(f"{folder.path} keeps {done} of {total}, and what the others have saved; repeat the command "
                          "to continue") from None  # fmt: skip


def _submit(folder: StudyFolder, options: WorkOptions, count: int, arguments: Sequence[str]) -> None:
    from deat_rb.reproduction.slurm import parse_options, submit

    folder.create()
    jobs = submit([*arguments, "--no-wait"], count, parse_options(options.slurm_options), folder.logs)
    for job in jobs:
        click.echo(f"submitted job {job.job_id}, output {job.paths.stdout}")
    click.echo("repeat the command with --status to see their progress, or with --tables to write the tables")


def _run_workers(study: Study, folder: StudyFolder, environs: list[dict[str, str]], arguments: list[str]) -> list[str]:
    """Start workers, print the runs that end, and return a sentence for each worker that ended with an error."""
    from deat_rb.cli.study_progress import StudyProgress
    from deat_rb.reproduction.workers import run_workers

    folder.create()
    settled = {run.name for run in study.runs if folder.is_settled(run)}
    progress = StudyProgress(folder)
    click.echo(
        f"runs left: {len(study.runs) - len(settled)}, workers: {len(environs)}, logs in {folder.logs}", err=True
    )

    def tell() -> None:
        for run in study.runs:
            if run.name not in settled and folder.is_settled(run):
                settled.add(run.name)
                record = folder.record(run)
                assert record is not None
                click.echo(f"{len(settled)} of {len(study.runs)}: ", nl=False, err=True)
                progress.on_run_end(run, record)

    failures: list[str] = []

    def fail(text: str) -> None:
        failures.append(text)
        click.echo(text, err=True)

    run_workers(arguments, environs, folder.logs, on_poll=tell, on_end=fail)
    tell()
    return failures


def print_status(study: Study, folder: StudyFolder) -> None:
    """Print the state of each run and the estimated time left."""
    from datetime import datetime, timedelta

    from rich.console import Console
    from rich.markup import escape

    from deat_rb.reproduction.estimate import read_estimate
    from deat_rb.reproduction.status import study_state
    from deat_rb.utils.options import format_epochs
    from deat_rb.utils.text import counted, duration, new_table

    state = study_state(folder, study.runs, read_estimate(folder))
    table = new_table(escape(study.title))
    for column in ("run", "seed", "state", "epochs"):
        table.add_column(column, overflow="fold", justify="left" if column in ("run", "state") else "right")
    for each in state.runs:
        text = f"failed: {each.reason}" if each.status == "failed" else each.status
        table.add_row(escape(each.run.label), str(each.run.seed), escape(text),
                      f"{each.epochs} of {format_epochs(each.total)}")  # fmt: skip
    Console().print(table)
    counts = state.counts()
    click.echo(", ".join(f"{counts[status]} {status}" for status in ("done", "failed", "running", "begun", "waiting")
                         if counts[status]))  # fmt: skip
    left = state.seconds_left()
    if left is None:
        click.echo("time left: unknown until an epoch is trained; --dry-run estimates it")
    elif left:
        end = datetime.now().astimezone() + timedelta(seconds=left)
        runs = counted(max(1, counts["running"]), "run")
        without = ", without evaluation" if state.is_projected else ""
        click.echo(f"time left: about {duration(left)} with {runs} at a time{without}; ends about {end:%Y-%m-%d %H:%M}")


def print_estimate(study: Study, folder: StudyFolder, environs: Sequence[Mapping[str, str]]) -> None:
    """Time the networks as the workers will compute, and print the remaining runs with their cost."""
    from rich.console import Console
    from rich.markup import escape

    from deat_rb.reproduction.estimate import estimate
    from deat_rb.reproduction.workers import at_once
    from deat_rb.utils.options import format_epochs
    from deat_rb.utils.text import counted, duration, new_table
    from deat_rb.utils.threads import cpu_threads

    threads = environs[0].get("OMP_NUM_THREADS")
    with cpu_threads(None if threads is None else int(threads)):
        predicted = estimate(folder, study.runs, notify=lambda text: click.echo(text, err=True))
    table = new_table(escape(study.title))
    table.add_column("run", overflow="fold")
    for column in ("seeds", "epochs", "backward passes", "training", "evaluation"):
        table.add_column(column, justify="right")
    rows: dict[tuple[str, str, float], list[Prediction]] = {}
    for each in predicted:
        place = f"{each.run.options.attack.setting}, {each.run.options.model.arch}"
        rows.setdefault((each.run.label, place, each.training), []).append(each)
    for (label, place, _), seeds in rows.items():
        first = seeds[0]
        name = label if len({other for same, other, _ in rows if same == label}) == 1 else f"{label} ({place})"
        passes, training = ("0", "done") if first.is_trained else (
            first.passes_text(), duration(first.training) + (" per epoch" if first.is_open else "")
        )  # fmt: skip
        table.add_row(escape(name), str(len(seeds)), str(format_epochs(first.epochs)), passes, training,
                      ("over " if first.unknown else "") + duration(first.evaluation))  # fmt: skip
    Console().print(table)
    ending = [each for each in predicted if not each.is_open]
    endless = len(predicted) - len(ending)
    if ending or not predicted:
        shared = sum(each.seconds / at_once(environs, each.threads) for each in ending)
        total = max([shared, *(each.seconds for each in ending)])
        about = f"about {duration(total)} with {len(environs)} at a time"
        besides = [counted(endless, "open-ended run")] if endless else []
    else:
        about, besides = "open-ended, so that their number of epochs is not known", []
    unknown = dict.fromkeys(name for each in predicted for name in each.unknown)
    besides += [f"{', '.join(unknown)}, whose number of passes is not known"] if unknown else []
    about += f", besides {' and '.join(besides)}" if besides else ""
    statuses = [folder.status(run) for run in study.runs]
    failed = f", {statuses.count('failed')} failed" if "failed" in statuses else ""
    click.echo(f"{counted(len(predicted), 'run')} left, {statuses.count('done')} done{failed}: {about}")
