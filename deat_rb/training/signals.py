"""Handling of Ctrl-C and SIGTERM: training writes a checkpoint after the current batch and stops."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class StopRequested(KeyboardInterrupt):
    """A first SIGINT or SIGTERM that stops training where a checkpoint can be written."""


class StopRequests:
    """Context manager that records the first SIGINT or SIGTERM as a stop request; a second raises KeyboardInterrupt.

    It has no effect outside the main thread, because only that thread can handle signals.

    Args:
        enabled: Whether to handle signals at all.

    Attributes:
        requested: Whether a signal was received.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.requested = False
        self._at_once = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        if self.enabled and threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._handle) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each, handler in self._before.items():
            # torchrun sends SIGTERM to all ranks when one fails; ignore it so that the others can report the failure.
            ending = isinstance(error, RuntimeError) and "TORCHELASTIC_RUN_ID" in os.environ
            signal.signal(each, signal.SIG_IGN if ending and each == signal.SIGTERM else handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise `StopRequested` immediately if a stop is requested in this context, where interrupting is safe."""
        self._at_once = True
        try:
            if self.requested:
                raise StopRequested
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.requested = self.requested, True
        if again:
            raise KeyboardInterrupt
        if self._at_once:
            raise StopRequested
