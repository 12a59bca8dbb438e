"""Background thread that writes a run's files during training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType

from deat_rb.utils.errors import DeatError


class BackgroundWriter:
    """Context manager that runs functions one after the other in a background thread, up to the first that fails.

    On exit it waits for them and raises their first error, unless another exception is being raised.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._jobs: list[Future[None]] = []

    def start(self, action: Callable[[], None]) -> None:
        """Queue ``action``; the thread runs it after the earlier ones, unless `has_failed`."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="deat-rb-writer")
        self._jobs.append(self._pool.submit(self._run, action))

    def _run(self, action: Callable[[], None]) -> None:
        # A checkpoint must never be newer than the weights files that were to be written before it.
        if not self.has_failed:
            action()

    @property
    def has_failed(self) -> bool:
        """Whether an action has raised an exception that `wait` has not raised yet."""
        return any(job.done() and job.exception() is not None for job in self._jobs)

    def wait(self) -> None:
        """Wait for all actions and raise their first exception; Ctrl-C ends the wait, but not the actions."""
        wait(self._jobs)
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.result()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.nullcontext() if kind is None else contextlib.suppress(DeatError, OSError):
            self.wait()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
