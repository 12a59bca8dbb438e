"""SIGKILL at any moment, a checkpoint's writing included, loses nothing.

The runs are children forked from this process, which has imported everything: so a kill costs no more than a run.
"""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from test_resume import outcome, train
from training_problems import run_config

from deat_rb import files
from deat_rb.runs import RunDirectory

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its runs")


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


def dies_at_write(number: int) -> None:
    """Lets this process kill itself at its n-th call of fsync, when a file is written and not yet renamed."""
    calls = 0
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    files.os.fsync = fsync  # type: ignore[attr-defined]  # the child is not to live on


@pytest.mark.slow
@pytest.mark.parametrize("method", ["m+trades", "free-3", "m-deat"])
def test_a_run_killed_again_and_again_is_the_run_that_was_not(method: str, tmp_path: Path) -> None:
    whole = RunDirectory.create(tmp_path / "whole", run_config())
    began = time.monotonic()
    assert in_a_child(lambda: _ignore(train(method, whole, save_every=0)))
    wall = time.monotonic() - began
    expected = outcome(whole)

    moments = random.Random(method)
    kills = inside = 0
    for number in range(20):
        if kills >= 7 and inside >= 2:
            break
        run = RunDirectory.create(tmp_path / f"killed-{number}", run_config())
        done = False
        while not done:
            writing = kills % 4 == 3

            def work(run: RunDirectory = run, writing: bool = writing) -> None:
                if writing:
                    dies_at_write(moments.randint(1, 8))
                train(method, run, resume=True, save_every=0)

            done = in_a_child(work, None if writing else moments.uniform(0, wall))
            moments.random()
            kills += not done
            inside += writing and not done
        assert outcome(run) == expected
        assert not list(run.path.rglob("*.tmp"))
    assert kills >= 7, "at least 21 over the three methods"
    assert inside >= 2, "some of them while a file is written"


def _ignore(result: object) -> None:
    """Makes a procedure of a function."""
