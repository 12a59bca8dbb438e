"""Progress on stderr: a bar on a terminal, plain lines otherwise."""

from __future__ import annotations

from contextlib import AbstractContextManager
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from deat_rb.utils.text import counted, duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn

LINE_EVERY = 30.0
"""Minimum interval between two plain lines, in seconds."""


class ProgressDisplay(AbstractContextManager["ProgressDisplay"]):
    """Base class of progress displays, whose bar is shown within a ``with`` statement, on a terminal only.

    Args:
        columns: Columns of the bar after the first one, the description.
        description: The first description.
        console: Where to print; by default stderr.
        redirect_stdout: Whether what is printed meanwhile goes above the bar.
        fields: First values of the columns' fields.
    """

    def __init__(
        self,
        *columns: ProgressColumn,
        description: str,
        console: Console | None = None,
        redirect_stdout: bool = True,
        **fields: Any,
    ) -> None:
        from rich.console import Console
        from rich.progress import Progress, TextColumn

        self.console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False), *columns,
            console=self.console, transient=True, redirect_stdout=redirect_stdout,
        )  # fmt: skip
        self._task = self._bar.add_task(description, total=None, **fields)

    def __enter__(self) -> Self:
        if self.console.is_interactive:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.console.is_interactive:
            self._bar.stop()

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)


class ImageProgress(ProgressDisplay):
    """Number of images done, and the time left; nothing before the first image.

    Args:
        action: The action in the past tense, such as "classified".
        bar: Whether to show a bar on a terminal; False if results are printed there at the same time.
        console: Where to print; by default stderr.
    """

    def __init__(self, action: str, *, bar: bool = True, console: Console | None = None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

        super().__init__(
            BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}", markup=False), TimeRemainingColumn(),
            description=action, console=console, redirect_stdout=False, rate="",
        )  # fmt: skip
        self._action, self._is_bar_shown = action, bar
        self._start = self._last_line = monotonic()

    def __enter__(self) -> Self:
        return self

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` images are done."""
        now = monotonic()
        rate = done / max(now - self._start, 1e-9)
        if not self.console.is_interactive:
            if now - self._last_line >= LINE_EVERY:
                self._last_line = now
                left = (total - done) / rate if rate else 0.0
                self._print(f"{done:,} of {counted(total, 'image')} {self._action}, {rate:.0f} images/s, about "
                            f"{duration(left)} left")  # fmt: skip
        elif self._is_bar_shown:
            self._bar.update(self._task, completed=done, total=total, rate=f"{rate:.0f}/s")
            self._bar.start()
