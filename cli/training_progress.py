"""Progress of training (a bar on a terminal, otherwise a line per minute) and summaries of plans and runs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING

from deat_rb.cli.progress import ProgressDisplay
from deat_rb.models.names import trust_flag
from deat_rb.training.callbacks import Callback
from deat_rb.training.history import History
from deat_rb.training.metrics import EpochAccumulator, EpochStats
from deat_rb.training.state import TrainingState
from deat_rb.utils.distributed import is_main
from deat_rb.utils.options import OPEN
from deat_rb.utils.text import counted, duration

if TYPE_CHECKING:
    from rich.console import Console

    from deat_rb.runs.directory import RunDirectory
    from deat_rb.runs.plan import TrainingPlan


REFRESH_EVERY = 0.5
"""Minimum interval between updates of the bar in seconds; each update synchronizes with the device."""

LINE_EVERY = 60.0
"""Minimum interval between lines within an epoch, without a terminal, in seconds."""

BAR_WIDTH = 20


class TrainingProgress(Callback, ProgressDisplay):
    """Shows metrics and the remaining time.

    On a terminal there is a bar; otherwise, as in a log file, a line is printed every minute. Every epoch ends with a
    line.

    Args:
        console: Where to print; by default stderr.
        seeds: The seeds of consecutive runs, if there are several; the remaining time then covers all of them.
    """

    def __init__(self, console: Console | None = None, seeds: Sequence[int] = ()) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn

        Callback.__init__(self)
        ProgressDisplay.__init__(
            self, BarColumn(BAR_WIDTH), TextColumn("{task.fields[metrics]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
            description="loading", console=console or Console(stderr=True, quiet=not is_main()), metrics="", left="",
        )  # fmt: skip
        self._seeds = seeds
        self._run = 0
        self._label = ""
        self._validated = ""
        self._started = self._shown = monotonic()
        self._epoch = self._epochs = self._batches = self._done = 0
        self._resumed_from: int | None = None

    def on_fit_start(self, state: TrainingState) -> None:
        """Start showing the next run."""
        super().on_fit_start(state)
        self._run += 1
        self._validated = ""
        self._label = f"seed {state.seed}, " if self._seeds else ""

    def on_epoch_start(self, epoch: int, epochs: int, batches: int, steps: int) -> None:
        """Show the epoch; the bar counts the batches of all epochs."""
        self._epoch, self._epochs, self._batches = epoch, epochs, batches
        self._done = (epoch - 1) * batches + self.state.batch
        if self._resumed_from is None:
            self._resumed_from, self._started = self._done, monotonic()
        self._update(f"{self._where(epoch)}, steps {steps}", [])

    def on_batch_end(self, sums: EpochAccumulator) -> None:
        """Show the epoch's metrics so far, at intervals."""
        now = monotonic()
        if now - self._shown < (REFRESH_EVERY if self.console.is_interactive else LINE_EVERY):
            return
        self._shown = now
        so_far = sums.read()
        self._done = (self._epoch - 1) * self._batches + sums.batches
        metrics = [
            f"loss {so_far['loss'] / sums.examples:.3f}",
            f"train {so_far['correct'] / sums.examples:.1%}",
            *([self._validated] if self._validated else []),
            f"grad. magnitude {so_far['l_x']:.4g}",
            f"{sums.examples / self.state.seconds:.0f} images/s",
        ]
        if self.console.is_interactive:
            self._update(None, metrics)
        else:
            where = f"{self._where(self._epoch)}, batch {sums.batches}/{self._batches}"
            self._print(f"{where}: {', '.join([*metrics, *self._left()])}")

    def on_validation_start(self) -> None:
        """Show that validation is running."""
        self._update(f"{self._where(self._epoch)}, validating", [])

    def on_warning(self, message: str) -> None:
        """Print a warning."""
        self._print(f"warning: {message}")

    def on_epoch_end(self, row: EpochStats) -> None:
        """Print a line with the epoch's metrics."""
        if row.val_acc is not None and row.val_robust_acc is not None:
            self._validated = f"validation {row.val_acc:.1%}, PGD-20 {row.val_robust_acc:.1%}"
        if row.raw_val_acc is not None and row.raw_val_robust_acc is not None:
            self._validated += f" (raw weights {row.raw_val_acc:.1%}, {row.raw_val_robust_acc:.1%})"
        self._done = row.epoch * self._batches
        self._shown = monotonic()
        metrics = [
            f"steps {row.steps}",
            f"loss {row.loss:.3f}",
            f"train {row.train_acc:.1%}",
            *([self._validated] if row.val_acc is not None else []),
            f"grad. magnitude {row.l_x:.4g}",
            f"{row.images_per_second:.0f} images/s",
            *self._left(),
        ]
        self._print(f"{self._where(row.epoch)}: {', '.join(metrics)}")
        if row.stopped:
            self._print(f"{self._label}stopped: {row.stopped}")

    def _where(self, epoch: int) -> str:
        return f"{self._label}epoch {epoch}" + (f"/{self._epochs}" if self._epochs < OPEN else "")

    def _left(self) -> list[str]:
        """Return the remaining time of all runs as text, or nothing before it can be estimated."""
        runs = max(len(self._seeds), 1)
        total = runs * self._epochs * self._batches
        done = (max(self._run, 1) - 1) * self._epochs * self._batches + self._done
        fresh = done - (self._resumed_from or 0)
        if fresh <= 0 or done >= total or self._epochs >= OPEN:
            return []
        left = (monotonic() - self._started) / fresh * (total - done)
        return [f"about {duration(left)} left"]

    def _update(self, description: str | None, metrics: Sequence[str]) -> None:
        """Update the bar, with as many metrics as fit."""
        description = description or self._bar.tasks[0].description
        left = "".join(self._left()).removeprefix("about ")
        room = self.console.width - len(description) - BAR_WIDTH - len(left) - 3
        shown = list(metrics)
        while shown and len(", ".join(shown)) > room:
            shown.pop()
        self._bar.update(
            self._task,
            description=description,
            total=self._epochs * self._batches if self._epochs < OPEN else None,
            completed=self._done,
            metrics=", ".join(shown),
            left=left,
        )


def print_plan(planned: TrainingPlan, seeds: Sequence[int] = ()) -> None:
    """Print what a run will do and cost, as ``--dry-run`` does.

    Args:
        planned: The plan.
        seeds: The seeds if several runs are trained with this plan, one per seed; the cost is per run.
    """
    for name, text in planned.lines():
        if name == "cost" and seeds:
            print(f"{'seeds':<10} {', '.join(map(str, seeds))}: one run per seed, each at this cost")
        print(f"{name:<10} {text}")


def print_estimate(planned: TrainingPlan, seeds: Sequence[int] = ()) -> None:
    """Time a few batches and print a plan's estimated time and memory; with ``seeds``, for the runs of all seeds."""
    from deat_rb.runs.estimate import estimate

    found = estimate(planned)
    runs = max(len(seeds), 1)
    low, high = (duration(runs * seconds) for seconds in (found.low, found.high))
    how = ", ".join(f"{seconds:.2g} s with {counted(steps, 'step')}" for steps, seconds in found.timed.items())
    limits = [
        *(["one epoch"] if planned.config.optim.epochs == OPEN else []),
        *(["one rank only"] if planned.ranks > 1 else []),
        *(["without --compile"] if planned.config.runtime.compile else []),
        *(["it may end earlier"] if found.may_end_earlier else []),
    ]
    print(f"{'time':<10} about {low if low == high else f'{low} to {high}'} on {found.device}, estimated from "
          f"{counted(found.batches, 'batch')} ({how}{''.join(f'; {each}' for each in limits)})")  # fmt: skip
    where = "of the GPU's memory" if found.device.startswith("cuda") else "of memory"
    print(f"{'memory':<10} about {found.memory / 1e9:.1f} GB {where}, estimated: the peak while these were timed")


def print_seeds(results: Sequence[tuple[RunDirectory, History]]) -> None:
    """Print mean and standard deviation over the runs of several seeds."""
    from deat_rb.evaluation.statistics import mean_and_deviation

    selected = [_selected(history) for _, history in results]
    columns = {
        "validation natural, %": [100 * row.val_acc for row in selected if row.val_acc is not None],
        "validation PGD-20, %": [100 * row.val_robust_acc for row in selected if row.val_robust_acc is not None],
        "backward passes": [history.backwards for _, history in results],
        "epochs": [float(len(history.rows)) for _, history in results],
        "training seconds": [sum(row.seconds for row in history.rows) for _, history in results],
    }
    print(f"{counted(len(results), 'seed')}, mean and standard deviation:")
    for name, values in columns.items():
        if values:
            mean, deviation = mean_and_deviation(values)
            print(f"  {name:<22} {mean:,.2f} ± {deviation or 0:,.2f}")
    runs = [run for run, _ in results]
    words = [*(str(run.path) for run in runs), *trust_flag(runs[0].config.model.arch)]
    print(f"next       deat-rb eval {shlex.join(words)}")


def print_result(run: RunDirectory, history: History) -> None:
    """Print a run's result and the command that evaluates it."""
    selected = _selected(history)
    print(f"result     epoch {selected.epoch} of {run.path}")
    if selected.val_acc is not None and selected.val_robust_acc is not None:
        print(f"validation natural {selected.val_acc:.2%}, PGD-20 {selected.val_robust_acc:.2%}")
    seconds = sum(row.seconds for row in history.rows)
    print(f"cost       {history.backwards:,.0f} backward passes, {seconds:.0f} s of training")
    print(f"next       {run.command('eval')}")


def _selected(history: History) -> EpochStats:
    return next(row for row in history.rows if row.epoch == history.selected)
