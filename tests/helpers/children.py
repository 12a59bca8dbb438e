"""Forked child processes, which have everything imported."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable


def run_in_child(work: Callable[[], None], kill_after: float | None = None) -> bool:
    """Run ``work`` in a fork, killed after ``kill_after`` seconds, and return whether it finished."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)
