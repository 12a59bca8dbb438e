"""What training tells while it runs, and how the command shows it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from training_problems import images_and_labels, loader, normalized, run_config

import deat_rb
from deat_rb.cli.progress import TrainingProgress, print_result
from deat_rb.runs.directory import RunDirectory
from deat_rb.training.metrics import BatchStats, EpochAccumulator, EpochStats
from deat_rb.training.trainer import Trainer

ROW = EpochStats(epoch=2, steps=3, loss=1.25, train_acc=0.5, val_acc=0.625, val_robust_acc=0.25, l_x=12345.678,
                 seconds=4, val_seconds=1, images_per_second=150)  # fmt: skip


def shown(row: EpochStats, terminal: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=terminal, force_interactive=terminal)
    with TrainingProgress(console) as progress:
        progress.on_epoch_start(2, 4, 10, 3)
        progress.on_validation_start()
        progress.on_epoch_end(row)
    return out.getvalue()


def test_progress_is_a_line_per_epoch() -> None:
    assert shown(ROW).splitlines() == [
        "epoch 2/4: r = 3, loss 1.250, train 50.0%, validation 62.5%, PGD-20 25.0%, l_X 1.235e+04, 150 images/s, "
        "about 10 s left"
    ]
    stopped = EpochStats(epoch=2, steps=3, stopped="l_X rose by 20% an epoch")
    assert shown(stopped).splitlines()[1] == "stopped: l_X rose by 20% an epoch"


def test_progress_on_a_terminal_has_a_bar_with_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("deat_rb.cli.progress.monotonic", lambda: float(next(clock)))
    console = Console(file=out, width=200, force_terminal=True, force_interactive=True)
    with TrainingProgress(console) as progress:
        progress.on_epoch_start(2, 4, 10, 3)
        sums = EpochAccumulator()
        sums.add(BatchStats(8, torch.tensor(10.0), torch.tensor(6), torch.tensor(32.0), 4, 4, 1, 192))
        progress.on_batch_end(sums)
        progress._bar.refresh()
    for text in ("epoch 2/4, r = 3", "loss 1.250", "train 75.0%", "l_X 32", "images/s"):
        assert text in out.getvalue()


def test_the_result_says_where_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory.create(tmp_path / "run", run_config())
    trainer: Trainer = deat_rb.create("pgd-1", normalized())
    history = trainer.fit(loader(), [images_and_labels()], epochs=2, lr=0.01, select="last", run=run)
    print_result(run, history)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"result     epoch 2 of {run.path}"
    assert lines[2].startswith("cost       8 backward passes")
    assert lines[3] == f"next       deat-rb eval {run.path}"
