"""Handling of Ctrl-C and SIGTERM: training stops between two batches, after a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class StopRequests:
    """Context manager in which the first SIGINT or SIGTERM is a request and the second raises KeyboardInterrupt.

    Outside of the main thread, which alone may handle signals, it does nothing.

    Args:
        enabled: Whether to handle signals at all.

    Attributes:
        requested: Whether a signal has come.
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
            # torchrun terminates all ranks when one has failed; let the others report why first.
            ending = isinstance(error, RuntimeError) and "TORCHELASTIC_RUN_ID" in os.environ
            signal.signal(each, signal.SIG_IGN if ending and each == signal.SIGTERM else handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise KeyboardInterrupt at once for a request within this context, in which nothing is half done."""
        self._at_once = True
        try:
            if self.requested:
                raise KeyboardInterrupt
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.requested = self.requested, True
        if again or self._at_once:
            raise KeyboardInterrupt
