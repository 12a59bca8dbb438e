"""Files of a run that are written while training goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
from resumed_runs import EPOCHS, Stops, outcome, train
from torch import Tensor
from training_problems import run_config

from deat_rb.runs.directory import RunDirectory
from deat_rb.training import checkpoint
from deat_rb.training.background import BackgroundWriter
from deat_rb.training.callbacks import Callback
from deat_rb.training.checkpoint import Checkpoint
from deat_rb.training.metrics import EpochAccumulator, EpochStats
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
    writer.start(lambda: done.append(1))  # such as a checkpoint, whose weights files are missing
    with pytest.raises(DeatError, match="the disk is full"):
        writer.wait()
    assert done == []
    assert not writer.has_failed
    writer.start(lambda: done.append(2))
    writer.wait()
    assert done == [2]


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


class Goes(Callback):
    """Sets an event when the validation after an epoch begins, and when the first batch of an epoch is done."""

    def __init__(self) -> None:
        self.validations, self.batches = ([threading.Event() for _ in range(EPOCHS + 2)] for _ in range(2))

    def on_validation_start(self) -> None:
        self.validations[self.state.epoch].set()

    def on_batch_end(self, sums: EpochAccumulator) -> None:
        self.batches[self.state.epoch].set()


def test_training_goes_on_while_weights_and_checkpoints_are_written_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are written only once a batch of the next epoch is done, and checkpoints once its validation begins."""
    write, callback = checkpoint.write, Goes()
    missed: list[str] = []
    ended: list[str] = []

    def reached(events: list[threading.Event], epoch: int, what: str) -> None:
        if epoch <= EPOCHS and not events[epoch].wait(20):
            missed.append(what)

    def slow_checkpoint(folder: Path, copied: Checkpoint) -> Path:
        epoch = copied.facts["epoch"]
        reached(callback.validations, epoch, f"checkpoint before epoch {epoch}")
        path = write(folder, copied)
        ended.append(f"checkpoint {epoch - 1}")
        return path

    class Slow(RunDirectory):
        def save_weights(self, which: str, state: Mapping[str, Tensor], row: EpochStats) -> None:
            reached(callback.batches, row.epoch + 1, f"{which} of epoch {row.epoch}")
            super().save_weights(which, state, row)
            if which == "last":
                ended.append(f"weights {row.epoch}")

        def append(self, row: EpochStats) -> None:
            super().append(row)
            ended.append(f"metrics {row.epoch}")

    whole, run = RunDirectory.create(tmp_path / "whole", run_config()), Slow.create(tmp_path / "run", run_config())
    train("pgd-1", whole)
    monkeypatch.setattr(checkpoint, "write", slow_checkpoint)
    train("pgd-1", run, callback)
    assert missed == []
    assert ended == [
        "checkpoint 0",
        *(f"{what} {epoch}" for epoch in range(1, EPOCHS + 1) for what in ("metrics", "weights", "checkpoint")),
    ]
    assert outcome(run) == outcome(whole)


def test_a_checkpoint_is_not_written_without_the_weights_of_its_epoch(tmp_path: Path) -> None:
    class Fails(RunDirectory):
        def save_weights(self, which: str, state: Mapping[str, Tensor], row: EpochStats) -> None:
            if row.epoch == 2:
                raise UnwritableError(f"cannot write {which}.safetensors: No space left on device")
            super().save_weights(which, state, row)

    run = Fails.create(tmp_path / "run", run_config())
    with pytest.raises(DeatError, match=r"No space left on device; .*run keeps 1 of 3 epochs; deat-rb"):
        train("pgd-1", run)
    whole = RunDirectory.create(tmp_path / "whole", run_config())
    train("pgd-1", whole)
    train("pgd-1", RunDirectory.open(run.path), resume=True)
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
