"""Children forked from the process of the tests, which has imported everything: a run costs no more than itself."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable


def in_a_child(work: Callable[[], None], kill_after: float | None = None) -> bool:
    """Forks, works there, and says whether the work was done; the child is killed after so many seconds."""
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
