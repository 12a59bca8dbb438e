"""Progress of an evaluation: a bar on a terminal, plain lines otherwise."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Self

from deat_rb.cli.progress import LINE_EVERY, ProgressDisplay
from deat_rb.evaluation.runner import EvaluationCallback
from deat_rb.utils.text import counted, duration

if TYPE_CHECKING:
    from rich.console import Console


class EvaluationProgress(EvaluationCallback, ProgressDisplay):
    """Progress of an evaluation on stderr: attack, images done, accuracy so far and time left.

    Args:
        console: Where to print; by default stderr.
    """

    def __init__(self, console: Console | None = None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

        EvaluationCallback.__init__(self)
        ProgressDisplay.__init__(
            self, BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[accuracy]}", markup=False),
            TimeRemainingColumn(),
            description="loading", console=console, accuracy="",
        )  # fmt: skip
        self._n_examples = 0
        self._attack = self._accuracy = ""
        self._resumed = 0.0
        self._start = self._last_line = self._last = monotonic()

    def __enter__(self) -> Self:
        super().__enter__()
        self._start = self._last_line = self._last = monotonic()
        return self

    def __call__(self, attack: str, done: int, total: int, robust: int) -> None:
        """Show a finished batch."""
        self._switch_to(attack, total)
        self._last = monotonic()
        if attack == "natural":  # the first, and on all examples
            self._n_examples = total
        share = robust / (self._n_examples if "/" in attack.partition("(")[0] else done)
        self._accuracy = f"{100 * share:.2f} % correct"
        if self.console.is_interactive:
            self._bar.update(self._task, completed=done, total=total, accuracy=self._accuracy)
        elif done == total:
            self._print(f"{attack}: {counted(total, 'image', '')}, {self._accuracy}, {self._last - self._start:.1f} s")
        elif self._last - self._last_line >= LINE_EVERY:
            images = f"{done} of {counted(total, 'image', '')}"
            self._print(f"{attack}: {images}, {self._accuracy} so far, {self._left(done / total)}")

    def within(self, attack: str, batch: int, batches: int, share: float) -> None:
        """Show progress within a batch."""
        self._switch_to(attack, None, (batch - 1) / batches)
        self._last = monotonic()
        so_far = f"{self._accuracy} so far, " if self._accuracy else ""
        if self.console.is_interactive:
            shown = f"batch {batch}/{batches} at {share:.0%}{', ' * bool(so_far)}{self._accuracy}"
            self._bar.update(self._task, accuracy=shown)
        elif self._last - self._last_line >= LINE_EVERY:
            self._print(f"{attack}: batch {batch} of {batches} at {share:.0%}, {so_far}"
                      f"{self._left((batch - 1 + share) / batches)}")  # fmt: skip

    def say(self, sentence: str) -> None:
        """Print a sentence."""
        self._print(sentence)

    def checking(self, check: str, done: int, total: int) -> None:
        """Show the check that is running."""
        self._switch_to("checks", total)
        if self.console.is_interactive:
            self._bar.update(self._task, completed=done, total=total, accuracy=check)

    def _switch_to(self, attack: str, total: int | None, done: float = 0.0) -> None:
        """Switch the display to another attack or to the checks, unless it is already shown.

        Args:
            attack: The attack, or "checks".
            total: Number of images or checks; None if unknown.
            done: Fraction in [0, 1] that an interrupted evaluation had done, which the estimated time leaves out.
        """
        if attack != self._attack:
            self._attack, self._accuracy, self._resumed = attack, "", done
            self._start = self._last_line = self._last
            if self.console.is_interactive:
                self._bar.reset(self._task, description=attack, total=total, accuracy="")

    def _left(self, done: float) -> str:
        spent, share = self._last - self._start, done - self._resumed
        return f"about {duration(spent * (1 - done) / share)} left" if share > 0 else f"{duration(spent)} spent"

    def _print(self, line: str) -> None:
        self._last_line = self._last
        super()._print(line)
