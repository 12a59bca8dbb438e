"""Progress of an evaluation: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from contextlib import AbstractContextManager
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console

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
