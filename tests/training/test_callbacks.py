"""The hooks of callbacks and interruption from within one."""

from __future__ import annotations

from pathlib import Path

import pytest
from fits import fitted
from training_problems import images_and_labels, loader, normalized, run_config

import deat_rb
import deat_rb.methods
from deat_rb.runs.directory import RunDirectory
from deat_rb.training.callbacks import Callback
from deat_rb.training.metrics import EpochAccumulator, EpochStats
from deat_rb.utils.errors import Interrupted


def test_callbacks_hooks_run_in_order() -> None:
    hooks: list[str] = []

    class Recorder(Callback):
        def on_epoch_start(self, epoch: int, epochs: int, batches: int, steps: int) -> None:
            hooks.append(f"epoch {epoch}/{epochs}: {batches} batches, r = {steps}")

        def on_batch_end(self, sums: EpochAccumulator) -> None:
            hooks.append(f"{sums.examples} examples, {sums.read()['backwards']:.0f} backwards")

        def on_validation_start(self) -> None:
            hooks.append("validation")

        def on_epoch_end(self, row: EpochStats) -> None:
            hooks.append(f"ended {row.epoch}")

    trainer = deat_rb.create("m-deat", normalized())
    trainer.fit(loader(), [images_and_labels()], epochs=2, lr=0.05, callbacks=[Recorder()])
    assert hooks == [
        "epoch 1/2: 2 batches, r = 1", "6 examples, 1 backwards", "12 examples, 2 backwards", "validation", "ended 1",
        "epoch 2/2: 2 batches, r = 2", "6 examples, 2 backwards", "12 examples, 4 backwards", "validation", "ended 2",
    ]  # fmt: skip


class Interrupts(Callback):
    """Ctrl-C in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.at = epoch

    def on_epoch_start(self, epoch: int, epochs: int, batches: int, steps: int) -> None:
        self.epoch = epoch

    def on_batch_end(self, sums: EpochAccumulator) -> None:
        if self.epoch == self.at:
            raise KeyboardInterrupt


def test_callbacks_keyboard_interrupt_reports_what_was_saved(tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as caught:
        fitted(epochs=3, callbacks=[Interrupts(2)])
    assert "1 of 3 epochs were trained" in caught.value.kept

    run = RunDirectory.create(tmp_path / "second", run_config())
    with pytest.raises(Interrupted) as caught:
        deat_rb.create("pgd-1", normalized()).fit(loader(), epochs=3, run=run, callbacks=[Interrupts(2)])
    assert caught.value.kept == f"{run.path} keeps 1 of 3 epochs; deat-rb train --resume {run.path} resumes it"
    assert run.checkpoint("last")["epoch"] == 1
    deat_rb.load_model(run.path, trust_code=True)

    run = RunDirectory.create(tmp_path / "first", run_config())
    with pytest.raises(Interrupted, match="keeps 0 of 3 epochs"):
        deat_rb.create("pgd-1", normalized()).fit(loader(), epochs=3, run=run, callbacks=[Interrupts(1)])
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoints", "config.json"]
