"""The progress and the summary of training, as the command prints them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from training_problems import images_and_labels, loader, normalized, run_config

import deat_rb
from deat_rb.cli import training_progress
from deat_rb.cli.training_progress import TrainingProgress, duration, print_result, print_seeds
from deat_rb.runs.directory import RunDirectory
from deat_rb.training.metrics import BatchStats, EpochAccumulator, EpochStats
from deat_rb.training.trainer import Trainer

Progress = Callable[..., TrainingProgress]


class Clock:
    """A clock that the test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(training_progress, "monotonic", clock)
    return clock


def console(*, terminal: bool = False, width: int = 200) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, force_interactive=terminal)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def sums(batches: int) -> EpochAccumulator:
    """Batches of 8 images each with loss 10, 6 correct and gradient magnitude 32."""
    total = EpochAccumulator()
    for _ in range(batches):
        total.add(BatchStats(8, torch.tensor(10.0), torch.tensor(6), torch.tensor(32.0), 4, 4, 1, 192))
    return total


def started(seed: int = 0, batch: int = 0, seconds: float = 10.0) -> Any:
    return SimpleNamespace(seed=seed, batch=batch, seconds=seconds)


ROW = EpochStats(epoch=2, steps=3, loss=1.25, train_acc=0.5, val_acc=0.625, val_robust_acc=0.25, l_x=12345.678,
                 images_per_second=150)  # fmt: skip


def test_training_progress_prints_a_line_per_epoch(clock: Clock) -> None:
    out = console()
    with TrainingProgress(out) as progress:
        progress.on_fit_start(started())
        progress.on_epoch_start(2, 4, 10, 3)
        clock.now += 5
        progress.on_epoch_end(ROW)
        progress.on_epoch_end(EpochStats(epoch=3, steps=3, stopped="l_X rose by 20% an epoch"))
    assert text(out).splitlines() == [
        "epoch 2/4: steps 3, loss 1.250, train 50.0%, validation 62.5%, PGD-20 25.0%, grad. magnitude 1.235e+04, "
        "150 images/s, about 10 s left",
        "epoch 3/4: steps 3, loss 0.000, train 0.0%, grad. magnitude 0, 0 images/s, about 2 s left",
        "stopped: l_X rose by 20% an epoch",
    ]


def test_training_progress_prints_a_line_a_minute_to_a_log_file(clock: Clock) -> None:
    out, state = console(), started()
    with TrainingProgress(out) as progress:
        progress.on_fit_start(state)
        progress.on_epoch_start(1, 2, 300, 1)
        for batch in range(1, 301):
            clock.now += 1
            state.seconds = float(batch)
            progress.on_batch_end(sums(batch))
    lines = text(out).splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"epoch 1/2, batch {n}/300" for n in range(60, 301, 60)]
    assert lines[1].endswith("loss 1.250, train 75.0%, grad. magnitude 3840, 8 images/s, about 8 min left")


def test_training_progress_names_the_seed_and_the_time_left_of_all(clock: Clock) -> None:
    out = console()
    with TrainingProgress(out, seeds=(0, 7)) as progress:
        for seed in (0, 7):
            progress.on_fit_start(started(seed))
            progress.on_epoch_start(1, 1, 10, 3)
            clock.now += 50
            progress.on_epoch_end(EpochStats(epoch=1, steps=3))
    assert [(line.split(":")[0], line.split(", ")[-1]) for line in text(out).splitlines()] == [
        ("seed 0, epoch 1/1", "about 50 s left"), ("seed 7, epoch 1/1", "0 images/s"),
    ]  # fmt: skip


def test_training_progress_after_a_resume_counts_only_what_it_saw(clock: Clock) -> None:
    out = console()
    with TrainingProgress(out) as progress:
        progress.on_fit_start(started(batch=8))
        progress.on_epoch_start(9, 10, 10, 3)
        clock.now += 4
        progress.on_epoch_end(EpochStats(epoch=9, steps=3))
    assert text(out).splitlines()[0].endswith("about 20 s left")  # 2 batches in 4 s, 10 to come


def test_training_progress_after_a_resume_divides_all_images_of_the_epoch_by_all_its_seconds(clock: Clock) -> None:
    """300 batches of 8 images in 40 s before the resume, and one in 60 s after it: 2,408 images in 100 s."""
    out, state = console(), started(batch=300, seconds=40.0)
    with TrainingProgress(out) as progress:
        progress.on_fit_start(state)
        progress.on_epoch_start(1, 10, 390, 1)
        clock.now += 60
        state.seconds += 60
        progress.on_batch_end(sums(301))
    assert ", 24 images/s, " in text(out)


@pytest.mark.parametrize("width", [80, 100, 200])
def test_training_progress_bar_keeps_the_time_left_and_drops_metrics(width: int, clock: Clock) -> None:
    out = console(terminal=True, width=width)
    with TrainingProgress(out) as progress:
        progress.on_fit_start(started())
        progress.on_epoch_start(2, 40, 10, 3)
        clock.now += 10
        progress.on_batch_end(sums(5))
        progress._bar.refresh()
    shown = text(out)
    assert "epoch 2/40, steps 3" in shown
    assert "13 min left" in shown  # 5 batches in 10 s, 385 to come
    assert "loss 1.250" in shown
    assert ("images/s" in shown) == (width == 200)
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown))
    assert max(len(line) for line in lines) <= width
    assert all("left" in line for line in lines if "loss" in line)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (12000, "3 h 20 min")]
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_print_result_says_where_the_run_is_and_how_to_evaluate_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory.create(tmp_path / "run", run_config())
    trainer: Trainer = deat_rb.create("pgd-1", normalized())
    history = trainer.fit(loader(), [images_and_labels()], epochs=2, lr=0.01, select="last", run=run)
    print_result(run, history)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"result     epoch 2 of {run.path}"
    assert lines[2].startswith("cost       8 backward passes")
    assert lines[3] == f"next       deat-rb eval {run.path} --trust-code"  # the network is a factory of the tests
    print_seeds([(run, history), (run, history)])
    assert capsys.readouterr().out.endswith(f"next       deat-rb eval {run.path} {run.path} --trust-code\n")
