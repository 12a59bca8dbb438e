"""Forked child processes, which have everything imported."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def fork(work: Callable[[], None], output: Path | None = None) -> int:
    """Start ``work`` in a fork, which prints into ``output`` if given, and return its process id.

    It exits as an interpreter does: with the status of SystemExit, or with 1 and a traceback of another exception.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if output is not None:
                sys.stdout = sys.stderr = output.open("w", buffering=1, encoding="utf-8")
                for descriptor in (1, 2):
                    os.dup2(sys.stdout.fileno(), descriptor)
            work()
            status = 0
        except SystemExit as error:
            status = int(error.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def exit_status(child: int) -> int:
    """Wait for a child and return its exit status, or less than 0 if a signal killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_in_child(work: Callable[[], None], kill_after: float | None = None) -> bool:
    """Run ``work`` in a fork, killed after ``kill_after`` seconds, and return whether it finished."""
    child = fork(work)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    status = exit_status(child)
    assert status <= 0
    return status == 0
