"""The hooks of callbacks and interruption from within one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fits import fitted
from training_problems import images_and_labels, loader, made, normalized, run_config

import deat_rb
import deat_rb.methods
from deat_rb.runs.directory import RunDirectory
from deat_rb.training.callbacks import Action, Callback
from deat_rb.training.history import History
from deat_rb.training.metrics import EpochAccumulator, EpochStats
from deat_rb.training.state import TrainingState
from deat_rb.utils.distributed import World
from deat_rb.utils.errors import DeatError, Interrupted


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
    assert caught.value.kept == (
        f"{run.path} keeps 1 of 3 epochs; deat-rb train --resume {run.path} --trust-code resumes it"
    )
    assert run.checkpoint("last")["epoch"] == 1
    deat_rb.load_model(run.path, trust_code=True)

    run = RunDirectory.create(tmp_path / "first", run_config())
    with pytest.raises(Interrupted, match="keeps 0 of 3 epochs"):
        deat_rb.create("pgd-1", normalized()).fit(loader(), epochs=3, run=run, callbacks=[Interrupts(1)])
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoints", "config.json"]


class Everything(Callback):
    """Record each hook that is called."""

    def __init__(self, name: str, calls: list[str]) -> None:
        for hook in (each for each in vars(Callback) if not each.startswith("_")):
            self.__dict__[hook] = partial(self.record, f"{name}.{hook}", calls, getattr(self, hook))

    def record(self, name: str, calls: list[str], hook: Any, *args: Any) -> Any:
        calls.append(name)
        return hook(*args)


def test_callbacks_of_a_list_are_called_in_its_order() -> None:
    calls: list[str] = []
    deat_rb.create("pgd-1", made()).fit(
        loader(1), [images_and_labels()], epochs=1, callbacks=[Everything("a", calls), Everything("b", calls)]
    )
    hooks = [
        "on_fit_start", "on_epoch_start", "on_batch_start", "on_step_end", "on_batch_end", "requested_action",
        "on_train_epoch_end", "on_validation_start", "on_validation_end", "on_epoch_end", "on_fit_end",
    ]  # fmt: skip
    assert calls == [f"{name}.{hook}" for hook in hooks for name in ("a", "b")]


def test_callbacks_may_stop_training() -> None:
    class Budget(Callback):
        """Stop after three batches."""

        batches = 0

        def on_batch_end(self, sums: EpochAccumulator) -> None:
            self.batches += 1

        def requested_action(self) -> Action:
            return Action.STOP if self.batches == 3 else Action.CONTINUE

    with pytest.raises(Interrupted, match="1 of 3 epochs were trained"):
        deat_rb.create("pgd-1", made()).fit(loader(2), epochs=3, callbacks=[Budget()])


def test_callbacks_see_the_state_and_the_selected_weights() -> None:
    class Reads(Callback):
        def on_fit_start(self, state: TrainingState) -> None:
            self.state = state

        def on_fit_end(self, history: History) -> None:
            self.end = (history.selected, self.state.epoch, self.state.batches, len(self.state.history.rows))

    reads = Reads()
    history = deat_rb.create("pgd-1", made()).fit(loader(2), epochs=2, callbacks=[reads])
    assert reads.end == (history.selected, 3, 2, 2) == (2, 3, 2, 2)


def test_callbacks_of_other_ranks_are_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deat_rb.training.fit.world", lambda cpu: World(rank=1, size=1))
    calls: list[str] = []
    deat_rb.create("pgd-1", made()).fit(loader(1), epochs=1, callbacks=[Everything("a", calls)])
    assert calls == []


def test_callbacks_may_stop_a_run_that_resumes(tmp_path: Path) -> None:
    """A time limit, as in docs/own_method.md."""

    class TimeLimit(Callback):
        def requested_action(self) -> Action:
            return Action.STOP

    run = RunDirectory.create(tmp_path / "run", run_config())
    trainer = deat_rb.create("pgd-1", normalized())
    with pytest.raises(Interrupted, match="keeps 0 of 2 epochs and 1 batch of the next; deat-rb train --resume"):
        trainer.fit(loader(2), epochs=2, run=run, callbacks=[TimeLimit()])
    assert len(trainer.fit(loader(2), epochs=2, run=run, resume=True).rows) == 2


class Requests(Callback):
    """Request something after the second batch of the first epoch."""

    def __init__(self, action: Any) -> None:
        self.action = action

    def requested_action(self) -> Any:
        return self.action if self.state.batch == 2 else Action.CONTINUE


def test_callbacks_may_abort_training() -> None:
    model = made()
    trainer = deat_rb.create("pgd-1", model)
    message = (
        "^a callback aborted training after batch 2 of epoch 1; 0 of 2 epochs were trained; the model has the newest"
    )
    with pytest.raises(DeatError, match=message):
        trainer.fit(loader(3), epochs=2, lr=0.1, callbacks=[Requests(Action.ABORT)])


@pytest.mark.parametrize("action", [None, 7, "stop"])
def test_callbacks_must_request_an_action(action: Any) -> None:
    with pytest.raises(DeatError, match=f"Requests.requested_action returned {action!r}: return an Action, such as"):
        fitted(callbacks=[Requests(action)])


@pytest.mark.parametrize("callbacks", [Callback(), [Callback], [lambda: None], "Callback"])
def test_callbacks_must_be_a_list_of_callbacks(callbacks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DeatError, match=r"callbacks = .* is not a list of callbacks: give one such as \[MyCallback\(\)"
    ):
        fitted(callbacks=callbacks)
    with pytest.raises(DeatError, match="is not a list of callbacks"):
        deat_rb.train({"method": "pgd-1", "dataset": "digits"}, callbacks=callbacks)
    assert not list(tmp_path.iterdir())
