"""Ctrl-C and SIGTERM, which end training between two batches, with a checkpoint, instead of within one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class StopRequests:
    """A context manager in which the first SIGINT or SIGTERM is a request, and the second one ends at once.

    Outside of the main thread, which alone may handle signals, it does nothing.

    Attributes:
        requested: Whether a signal has come.
    """

    def __init__(self) -> None:
        self.requested = False
        self._at_once = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._handle) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each, handler in self._before.items():
            # torchrun ends all processes when one is gone; the others have a sentence to say before.
            ending = isinstance(error, RuntimeError) and "TORCHELASTIC_RUN_ID" in os.environ
            signal.signal(each, signal.SIG_IGN if ending and each == signal.SIGTERM else handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A stretch in which nothing is half done, so that a request ends it by KeyboardInterrupt."""
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
