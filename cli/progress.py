"""Progress over a known number of images: a bar on a terminal, otherwise a line every 30 seconds."""

from __future__ import annotations

from contextlib import AbstractContextManager
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Self

from deat_rb.utils.text import counted, duration

if TYPE_CHECKING:
    from rich.console import Console

LINE_EVERY = 30.0
"""Minimum interval between two plain lines, in seconds."""


class ImageProgress(AbstractContextManager["ImageProgress"]):
    """Number of images done, and the time left, on stderr; nothing before the first image.

    Args:
        action: The action in the past tense, such as "classified".
        bar: Whether to show a bar on a terminal; False if results are printed there at the same time.
        console: Where to print; by default stderr.
    """

    def __init__(self, action: str, *, bar: bool = True, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._action = action
        self._console = console or Console(stderr=True)
        self._interactive = self._console.is_interactive
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            redirect_stdout=False,
            disable=not (bar and self._interactive),
        )
        self._task = self._bar.add_task(action, total=None, rate="")
        self._start = self._last_line = monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` images are done."""
        now = monotonic()
        rate = done / max(now - self._start, 1e-9)
        self._bar.update(self._task, completed=done, total=total, rate=f"{rate:.0f}/s")
        self._bar.start()
        if not self._interactive and now - self._last_line >= LINE_EVERY:
            self._last_line = now
            left = (total - done) / rate if rate else 0.0
            self._console.print(f"{done:,} of {counted(total, 'image')} {self._action}, {rate:.0f} images/s, about "
                                f"{duration(left)} left", highlight=False, soft_wrap=True, markup=False)  # fmt: skip
