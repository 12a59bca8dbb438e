"""How far an evaluation is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from contextlib import AbstractContextManager
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Self

from deat_rb.training.callbacks import Callback
from deat_rb.training.history import History
from deat_rb.training.metrics import EpochAccumulator, EpochStats
from deat_rb.utils.distributed import is_main

if TYPE_CHECKING:
    from rich.console import Console

    from deat_rb.runs.directory import RunDirectory
    from deat_rb.runs.plan import TrainingPlan


LINE_EVERY = 30.0
"""Seconds between two plain lines of one attack."""


class EvaluationProgress(AbstractContextManager["EvaluationProgress"]):
    """Shows the attack, how many images are done, the accuracy so far and the time left, on stderr.

    It is called as `deat_rb.evaluate` calls its ``progress``.

    Args:
        n_examples: N, how many images are evaluated.
        console: Where to show it.
    """

    def __init__(self, n_examples: int, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.n_examples = n_examples
        self.console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[accuracy]}", markup=False),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._task = self._bar.add_task("loading", total=None, accuracy="")
        self._attack = self._accuracy = ""
        self._kept = 0.0
        self._began = self._said = monotonic()
        self._last = self._began

    def __enter__(self) -> Self:
        if self.console.is_interactive:
            self._bar.start()
        self._began = self._said = self._last = monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.console.is_interactive:
            self._bar.stop()

    def __call__(self, attack: str, done: int, total: int, correct: int) -> None:
        """Takes note of a batch.

        Args:
            attack: Its name.
            done: Examples that it has attacked.
            total: Examples that it attacks.
            correct: Of those done, or for the parts of an attack of all examples, how many are correct.
        """
        self._attend(attack, total)
        self._last = monotonic()
        share = correct / (self.n_examples if "/" in attack.partition("(")[0] else done)
        self._accuracy = f"{100 * share:.2f} % correct"
        if self.console.is_interactive:
            self._bar.update(self._task, completed=done, total=total, accuracy=self._accuracy)
        elif done == total:
            self._say(f"{attack}: {total} images, {self._accuracy}, {self._last - self._began:.1f} s")
        elif self._last - self._said >= LINE_EVERY:
            self._say(f"{attack}: {done} of {total} images, {self._accuracy} so far, {self._left(done / total)}")

    def within(self, attack: str, batch: int, batches: int, share: float) -> None:
        """Takes note of how far the attack on a batch is.

        Args:
            attack: Its name.
            batch: Which batch, from 1 on.
            batches: Of how many.
            share: The share of its passes that is done at most, in [0, 1].
        """
        self._attend(attack, None, (batch - 1) / batches)
        self._last = monotonic()
        so_far = f"{self._accuracy} so far, " if self._accuracy else ""
        if self.console.is_interactive:
            shown = f"batch {batch}/{batches} at {share:.0%}{', ' * bool(so_far)}{self._accuracy}"
            self._bar.update(self._task, accuracy=shown)
        elif self._last - self._said >= LINE_EVERY:
            self._say(f"{attack}: batch {batch} of {batches} at {share:.0%}, {so_far}"
                      f"{self._left((batch - 1 + share) / batches)}")  # fmt: skip

    def say(self, sentence: str) -> None:
        """Prints a sentence."""
        self._say(sentence)

    def checking(self, check: str, done: int, total: int) -> None:
        """Shows which of the checks is being made."""
        self._attend("checks", total)
        if self.console.is_interactive:
            self._bar.update(self._task, completed=done, total=total, accuracy=check)

    def _attend(self, attack: str, total: int | None, done: float = 0.0) -> None:
        """Begins the clock of an attack that is new, of which the share ``done`` was found as it had been kept."""
        if attack != self._attack:
            self._attack, self._accuracy, self._kept = attack, "", done
            self._began = self._said = self._last
            if self.console.is_interactive:
                self._bar.reset(self._task, description=attack, total=total, accuracy="")

    def _left(self, done: float) -> str:
        spent, share = self._last - self._began, done - self._kept
        return f"{spent * (1 - done) / share:.0f} s left" if share > 0 else f"{spent:.0f} s spent"

    def _say(self, line: str) -> None:
        self._said = self._last
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)


class TrainingProgress(Callback, AbstractContextManager["TrainingProgress"]):
    """Shows training: a bar per epoch with the figures that matter on a terminal, and a line per epoch everywhere.

    Args:
        console: Where to show it; by default stderr.
    """

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = console or Console(stderr=True, quiet=not is_main())
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._task = self._bar.add_task("loading", total=None, figures="")
        self._said = self._began = monotonic()
        self._validated = ""

    def __enter__(self) -> Self:
        if self.console.is_interactive:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.console.is_interactive:
            self._bar.stop()

    def on_epoch_start(self, epoch: int, epochs: int, batches: int, steps: int) -> None:
        """Sets the bar on the run's whole number of batches, so that the time left is the run's."""
        self._began = monotonic()
        self._epoch, self._epochs, self._batches, self._steps = epoch, epochs, batches, steps
        self._bar.update(
            self._task,
            description=f"epoch {epoch}/{epochs}, r = {steps}",
            total=epochs * batches,
            completed=(epoch - 1) * batches,
        )

    def on_batch_end(self, sums: EpochAccumulator) -> None:
        """Shows the epoch's figures so far, twice a second: reading them waits for the device."""
        if not self.console.is_interactive or monotonic() - self._said < 0.5:
            return
        self._said = monotonic()
        so_far = sums.read()
        rate = sums.examples / (self._said - self._began)
        self._bar.update(
            self._task,
            completed=(self._epoch - 1) * self._batches + sums.batches,
            figures=f"loss {so_far['loss'] / sums.examples:.3f}, train {so_far['correct'] / sums.examples:.1%}, "
            f"l_X {so_far['l_x']:.4g}, {rate:.0f} images/s{self._validated}",
        )

    def on_validation_start(self) -> None:
        """Says that the epoch is being validated."""
        self._bar.update(self._task, description=f"epoch {self._epoch}/{self._epochs}, validating")

    def on_warning(self, message: str) -> None:
        """Prints the sentence."""
        self.console.print(f"warning: {message}", highlight=False, soft_wrap=True)

    def on_epoch_end(self, row: EpochStats) -> None:
        """Prints the epoch's line."""
        if row.val_acc is not None and row.val_robust_acc is not None:
            self._validated = f", validation {row.val_acc:.1%}, PGD-20 {row.val_robust_acc:.1%}"
        left = (row.seconds + row.val_seconds) * (self._epochs - row.epoch)
        self.console.print(
            f"epoch {row.epoch}/{self._epochs}: r = {row.steps}, loss {row.loss:.3f}, "
            f"train {row.train_acc:.1%}{self._validated}, l_X {row.l_x:.4g}, "
            f"{row.images_per_second:.0f} images/s, about {left:.0f} s left",
            highlight=False,
            soft_wrap=True,
        )
        if row.stopped:
            self.console.print(f"stopped: {row.stopped}", highlight=False, soft_wrap=True)


def print_plan(planned: TrainingPlan) -> None:
    """Prints a plan's lines on stdout."""
    for name, text in planned.lines():
        print(f"{name:<10} {text}")


def print_seeds(results: list[tuple[RunDirectory, History]]) -> None:
    """Prints what several seeds came to: mean and standard deviation."""
    from deat_rb.runs.train import mean_and_std

    chosen = [next(row for row in history.rows if row.epoch == history.selected) for _, history in results]
    figures = {
        "validation natural, %": [100 * row.val_acc for row in chosen if row.val_acc is not None],
        "validation PGD-20, %": [100 * row.val_robust_acc for row in chosen if row.val_robust_acc is not None],
        "backward passes": [history.backwards for _, history in results],
        "epochs": [float(len(history.rows)) for _, history in results],
        "training seconds": [sum(row.seconds for row in history.rows) for _, history in results],
    }
    print(f"{len(results)} seeds, mean and standard deviation:")
    for name, values in figures.items():
        if values:
            mean, std = mean_and_std(values)
            print(f"  {name:<22} {mean:,.2f} ± {std:,.2f}")
    print("next       deat-rb eval " + " ".join(str(run.path) for run, _ in results))


def print_result(run: RunDirectory, history: History) -> None:
    """Prints where a run ended and what to do with it next."""
    chosen = next(row for row in history.rows if row.epoch == history.selected)
    print(f"result     epoch {chosen.epoch} of {run.path}")
    if chosen.val_robust_acc is not None:
        print(f"validation natural {chosen.val_acc:.2%}, PGD-20 {chosen.val_robust_acc:.2%}")
    seconds = sum(row.seconds for row in history.rows)
    print(f"cost       {history.backwards:,.0f} backward passes, {seconds:.0f} s of training")
    print(f"next       deat-rb eval {run.path}")
