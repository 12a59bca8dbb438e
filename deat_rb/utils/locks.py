"""Exclusive lock files, which the operating system releases when the process exits or is killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deat_rb.utils.errors import DeatError


class BusyError(DeatError):
    """Another process holds the lock."""


HELD = ".held"
"""Suffix of the file that is the lock where the operating system has no file locks."""


@contextmanager
def exclusive_lock(path: Path, *, busy: str = "", failed: str = "") -> Iterator[None]:
    """Hold a lock file; a symbolic link is not followed.

    Args:
        path: The lock file, created if it is missing and never removed. Where the operating system has no file locks,
            the existence of a second file, ``path`` with the suffix `HELD`, serves as the lock, because systems with
            file locks leave ``path`` itself behind.
        busy: The error message if another process holds the lock; if empty, wait until it is released.
        failed: The error message if the file cannot be opened or locked; the cause is appended in parentheses.

    Raises:
        BusyError: Another process holds the lock, and there is a message ``busy``.
        DeatError: The file cannot be opened or locked.
    """
    from filelock import FileLock, SoftFileLock, Timeout

    soft = issubclass(FileLock, SoftFileLock)
    lock = FileLock(f"{path}{HELD}" if soft else path, thread_local=False)
    try:
        lock.acquire(timeout=0 if busy else -1)
    except Timeout:
        raise BusyError(busy) from None
    except OSError as error:
        raise DeatError(f"{failed} ({error.strerror or error})") from None
    try:
        yield
    finally:
        lock.release()
