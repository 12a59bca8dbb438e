"""Files of a run that are written while training goes on."""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path

import pytest
from resumed_runs import Stops, outcome, train
from training_problems import run_config

from deat_rb.runs.directory import RunDirectory
from deat_rb.training import checkpoint
from deat_rb.training.background import BackgroundWriter
from deat_rb.training.callbacks import Callback
from deat_rb.training.checkpoint import Checkpoint
from deat_rb.training.metrics import EpochAccumulator
from deat_rb.utils.errors import DeatError, Interrupted, UnwritableError


def test_writer_runs_in_order_in_one_other_thread() -> None:
    ran: list[tuple[int, int]] = []

    def job(number: int) -> None:
        time.sleep(0.01 * (3 - number))
        ran.append((number, threading.get_ident()))

    with BackgroundWriter() as writer:
        for number in range(3):
            writer.start(partial(job, number))
        writer.wait()
        assert [number for number, _ in ran] == [0, 1, 2]
        assert {thread for _, thread in ran} != {threading.get_ident()}
        assert len({thread for _, thread in ran}) == 1


def fail() -> None:
    raise DeatError("the disk is full")


def fail_after_starting(writer: BackgroundWriter) -> None:
    writer.start(fail)
    raise ZeroDivisionError


def test_writer_raises_an_error_once() -> None:
    done: list[int] = []
    writer = BackgroundWriter()
    writer.start(fail)
    writer.start(lambda: done.append(1))
    with pytest.raises(DeatError, match="the disk is full"):
        writer.wait()
    assert done == [1]
    assert not writer.has_failed
    writer.wait()


def test_writer_raises_on_leaving_unless_another_error_does() -> None:
    with pytest.raises(DeatError, match="the disk is full"), BackgroundWriter() as writer:
        writer.start(fail)
    with pytest.raises(ZeroDivisionError), BackgroundWriter() as writer:
        fail_after_starting(writer)


class AfterFirstBatch(Callback):
    def __init__(self) -> None:
        self.reached = threading.Event()
        self.batches = 0

    def on_batch_end(self, sums: EpochAccumulator) -> None:
        self.batches += 1
        self.reached.set()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, callback = checkpoint.write, AfterFirstBatch()
    in_time: list[bool] = []

    def slow(folder: Path, copied: Checkpoint) -> Path:
        in_time.append(callback.reached.wait(60))
        return write(folder, copied)

    whole, run = (RunDirectory.create(tmp_path / name, run_config()) for name in ("whole", "run"))
    train("pgd-1", whole)
    monkeypatch.setattr(checkpoint, "write", slow)
    train("pgd-1", run, callback)
    assert in_time
    assert all(in_time)
    assert outcome(run) == outcome(whole)


def test_interruption_waits_for_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = checkpoint.write

    def slow(folder: Path, copied: Checkpoint) -> Path:
        time.sleep(0.2)
        return write(folder, copied)

    monkeypatch.setattr(checkpoint, "write", slow)
    run = RunDirectory.create(tmp_path / "run", run_config())
    with pytest.raises(Interrupted, match="keeps 0 of 3 epochs and 2 batches of the next"):
        train("pgd-1", run, Stops(2))


def test_a_failed_checkpoint_ends_training_before_the_next_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()

    def full(folder: Path, copied: Checkpoint) -> Path:
        failed.set()
        raise UnwritableError("checkpoints/00000001.safetensors cannot be written (No space left on device)")

    class Waits(AfterFirstBatch):
        def on_batch_end(self, sums: EpochAccumulator) -> None:
            super().on_batch_end(sums)
            assert failed.wait(60)
            time.sleep(0.05)  # until the exception is stored

    callback = Waits()
    monkeypatch.setattr(checkpoint, "write", full)
    run = RunDirectory.create(tmp_path / "run", run_config())
    with pytest.raises(DeatError, match=r"No space left on device\); .*run keeps 0 of 3 epochs; deat-rb"):
        train("pgd-1", run, callback)
    assert callback.batches == 1
