"""SIGKILL at any moment, a checkpoint's writing included, loses nothing."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from children import in_a_child
from resumed_runs import outcome, train
from training_problems import run_config

from deat_rb.runs.directory import RunDirectory
from deat_rb.training import checkpoint
from deat_rb.training.checkpoint import Checkpoint
from deat_rb.utils import files

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its runs")

MOMENTS = ("before the file", "within the file", "before its new name", "after its new name")
KILLS = 7
"""For each method: 21 over the three; the run that has the last of them then goes on to its end."""


def dies_in_a_checkpoint(number: int, moment: str) -> None:
    """Lets this process kill itself while it writes its n-th checkpoint: it is a child, and is not to live on."""
    write, written, put_in_place, done = checkpoint.write, files._write_synced, os.replace, 0

    def killed_write(folder: Path, checkpoint: Checkpoint) -> Path:
        nonlocal done
        done += 1
        if done == number:
            if moment == "before the file":
                die()
            files._write_synced = within
            files.os.replace = renamed  # type: ignore[attr-defined]  # the module's own
        return write(folder, checkpoint)

    def within(path: Path, data: bytes) -> None:
        if moment == "within the file":
            path.write_bytes(data[: len(data) // 2])
            die()
        written(path, data)

    def renamed(old: Path, new: Path) -> None:
        if moment == "before its new name":
            die()
        put_in_place(old, new)
        die()

    checkpoint.write = killed_write


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("alive")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["m+trades", "free-3", "m-deat"])
def test_a_run_killed_again_and_again_is_the_run_that_was_not(
    method: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """A quarter and more of the kills fall inside a checkpoint's writing, the others anywhere in the run's time."""
    for name in ("whole", "again"):  # the first time here and not in each child torch prepares its kernels
        whole = RunDirectory.create(tmp_path / name, run_config())
        began = time.monotonic()
        train(method, whole, save_every=0)
        wall = time.monotonic() - began
    expected = outcome(whole)

    draw = random.Random(method)
    kills = inside = 0
    for number in range(20):
        if kills >= KILLS:
            break
        run = RunDirectory.create(tmp_path / f"killed-{number}", run_config())
        done = False
        while not done:
            killing = kills < KILLS
            writing = killing and 4 * inside <= kills
            nth, moment, after = draw.randint(1, 4), draw.choice(MOMENTS), draw.uniform(0, wall)

            def work(run: RunDirectory = run, writing: bool = writing, nth: int = nth, moment: str = moment) -> None:
                if writing:
                    dies_in_a_checkpoint(nth, moment)
                train(method, run, resume=True, save_every=0)

            done = in_a_child(work, after if killing and not writing else None)
            kills += not done
            inside += writing and not done
        assert outcome(run) == expected
        assert not list(run.path.rglob("*.tmp"))
    print(f"{method}: {kills} kills, {inside} of them inside a checkpoint's writing")
    record_property("kills", kills)
    record_property("kills inside a checkpoint's writing", inside)
    assert kills == KILLS
    assert 4 * inside >= kills
