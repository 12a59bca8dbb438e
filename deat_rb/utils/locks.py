"""Exclusive lock files, which the operating system frees when their process ends, however it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deat_rb.utils.errors import DeatError


@contextmanager
def exclusive_lock(path: Path, *, busy: str = "", failed: str = "") -> Iterator[None]:
    """Hold a lock file; a symbolic link is not followed.

    Args:
        path: The lock file, created if missing and not removed.
        busy: The error message if another process holds the lock; without one this waits until it is free.
        failed: The error message if the file cannot be opened or locked; the cause is appended in brackets.

    Raises:
        DeatError: With one of the two messages.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0 if busy else -1)
    except Timeout:
        raise DeatError(busy) from None
    except OSError as error:
        raise DeatError(f"{failed} ({error.strerror or error})") from None
    try:
        yield
    finally:
        lock.release()
