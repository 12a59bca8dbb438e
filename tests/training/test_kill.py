"""SIGKILL at any moment, within writing a checkpoint too, loses nothing."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn
from unittest.mock import patch

import pytest
from children import run_in_child
from resumed_runs import outcome, train
from small_image_sets import write_extra
from small_runs import SMALL
from training_problems import run_config

from deat_rb.runs import train as runs
from deat_rb.runs.directory import RunDirectory
from deat_rb.training import checkpoint
from deat_rb.training.checkpoint import Checkpoint
from deat_rb.utils import files

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its runs")

MOMENTS = ("before the file", "within the file", "before its new name", "after its new name")
KILLS = 7
"""Kills per method; after the last one the run trains to its end."""


def kill_within_checkpoint(number: int, moment: str) -> None:
    """Make this (child) process kill itself while it writes its ``number``-th checkpoint."""
    write, written, put_in_place, done = checkpoint.write, files._write_synced, os.replace, 0

    def killed_write(folder: Path, checkpoint: Checkpoint) -> Path:
        nonlocal done
        done += 1
        if done == number:
            if moment == "before the file":
                die()
            files._write_synced = within
            patch.object(os, "replace", renamed).start()
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
@pytest.mark.parametrize("method", ["m+trades", "free-3", "m-deat", "fgsm-pgi"])
def test_resume_after_repeated_kills_equals_the_uninterrupted_run(
    method: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """At least a quarter of the kills are within writing a checkpoint, the others at any time."""
    for name in ("whole", "again"):  # let torch prepare its kernels here, not in each child
        whole = RunDirectory.create(tmp_path / name, run_config())
        began = time.monotonic()
        train(method, whole, save_every=1e-9)
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
                    kill_within_checkpoint(nth, moment)
                train(method, run, resume=True, save_every=1e-9)

            done = run_in_child(work, after if killing and not writing else None)
            kills += not done
            inside += writing and not done
        assert outcome(run) == expected
        assert not list(run.path.rglob("*.tmp"))
    print(f"{method}: {kills} kills, {inside} of them inside a checkpoint's writing")
    record_property("kills", kills)
    record_property("kills inside a checkpoint's writing", inside)
    assert kills == KILLS
    assert 4 * inside >= kills


@pytest.mark.slow
@pytest.mark.usefixtures("without_curves")
def test_resume_after_kills_with_every_option_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    options = {
        **SMALL, "method": "m+trades", "epochs": 3, "save_every": 1e-9, "ema": 0.9, "label_smoothing": 0.1, "awp": 0.01,
        "awp_warmup": 1, "eps_warmup": 2, "grad_clip": 0.5, "optimizer": "adamw", "no_decay": "norm",
        "lr_schedule": "cosine", "warmup_epochs": 0.5, "augment": "randaugment", "class_weights": "balanced",
        "train_size": 75, "extra_data": str(write_extra(tmp_path / "extra.npz")), "extra_fraction": 0.4,
    }  # fmt: skip
    whole, _ = runs.train(options, output=tmp_path, name="whole")
    killed = tmp_path / "killed"
    for moment in MOMENTS:

        def work(moment: str = moment) -> None:
            kill_within_checkpoint(2, moment)
            if killed.exists():
                runs.resume(killed, {}, trust_code=True)
            else:
                runs.train(options, output=tmp_path, name="killed")

        assert not run_in_child(work)
    again, _ = runs.resume(killed, {}, trust_code=True)
    assert outcome(again) == outcome(whole)
    assert again.config.flat().items() >= (options | {"no_decay": ("norm",)}).items()
