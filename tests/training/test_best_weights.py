"""Selection of the best and the last weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fits import equal, weights
from torch import Tensor, nn
from training_problems import images_and_labels, loader, made, normalized, run_config

import deat_rb
import deat_rb.methods
from deat_rb.runs.directory import RunDirectory
from deat_rb.training.callbacks import Callback
from deat_rb.training.metrics import EpochStats
from deat_rb.training.stopping_rule import Stop, StoppingRule
from deat_rb.training.validation import Validation


class Seen(Callback):
    """Keeps the weights at every epoch's end."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.weights: list[dict[str, Tensor]] = []

    def on_epoch_end(self, row: EpochStats) -> None:
        self.weights.append(weights(self.model))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("robust", "select", "epoch"),
    [
        ([0.2, 0.5, 0.3], "best", 2),
        ([0.2, 0.5, 0.3], None, 2),
        ([0.5, 0.5, 0.3], "best", 1),
        ([0.2, 0.5, 0.3], "last", 3),
        ([0.1, 0.2, 0.3], "best", 3),
    ],
)
def test_best_weights_end_in_the_model_and_the_run(
    robust: list[float], select: Any, epoch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = list(robust)
    monkeypatch.setattr(
        "deat_rb.training.validation.validate", lambda *args, **options: Validation(0.9, script.pop(0), 3, 2)
    )
    model, run = normalized(), RunDirectory.create(tmp_path / "run", run_config(select=select or "best"))
    seen = Seen(model)
    history = deat_rb.create("pgd-1", model).fit(
        loader(), [images_and_labels()], epochs=3, lr=0.05, select=select, run=run, callbacks=[seen]
    )
    assert history.selected == epoch
    assert [row.val_robust_acc for row in history.rows] == robust
    assert equal(weights(model), seen.weights[epoch - 1])
    assert not equal(seen.weights[epoch - 1], seen.weights[epoch - 2])
    assert equal(deat_rb.load_model(run.path, trust_code=True).state_dict(), seen.weights[epoch - 1])
    assert run.checkpoint("best")["epoch"] == max(range(3), key=lambda i: robust[i]) + 1
    assert run.checkpoint("last")["epoch"] == 3


def test_best_weights_prefer_natural_accuracy_at_equal_robustness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain training has 0 % PGD-20 accuracy in every epoch: its first epoch is not the best."""
    script = [(0.3, 0.0), (0.9, 0.0), (0.8, 0.0)]
    monkeypatch.setattr(
        "deat_rb.training.validation.validate", lambda *args, **options: Validation(*script.pop(0), 3, 2)
    )
    history = deat_rb.create("standard", made()).fit(loader(), [images_and_labels()], epochs=3, select="best")
    assert history.selected == 2


class AfterEpoch(StoppingRule):
    """Stops after one epoch and keeps another."""

    def __init__(self, last: int, keep: int) -> None:
        self.last, self.keep, self.lookback = last, keep, last - keep + 1

    def update(self, stats: EpochStats) -> Stop | None:
        return Stop("the script says so", keep=self.keep) if stats.epoch == self.last else None


@pytest.mark.parametrize("select", ["last", "best"])
def test_best_weights_after_a_stop_are_those_the_rule_keeps(
    select: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    robust = [0.3, 0.4, 0.9]  # what is sick may look best
    monkeypatch.setattr(
        "deat_rb.training.validation.validate", lambda *args, **options: Validation(0.9, robust.pop(0), 3, 2)
    )
    model, run = normalized(), RunDirectory.create(tmp_path / "run", run_config(select=select))
    seen = Seen(model)
    trainer = deat_rb.AttackTrainer(deat_rb.PGD(model, steps=1), stopping=AfterEpoch(3, keep=2))
    history = trainer.fit(loader(), [images_and_labels()], epochs=6, lr=0.05, select=select, run=run, callbacks=[seen])
    assert history.stopped == "the script says so"
    assert history.selected == 2
    assert equal(weights(model), seen.weights[1])
    assert [row.stopped for row in run.rows()] == [None, None, "the script says so"]
    assert run.checkpoint("last")["epoch"] == run.checkpoint("best")["epoch"] == 2
    assert equal(deat_rb.load_model(run.path, trust_code=True).state_dict(), seen.weights[1])


def test_best_weights_after_a_stop_before_any_validation_are_those_the_rule_keeps(tmp_path: Path) -> None:
    model, run = normalized(), RunDirectory.create(tmp_path / "run", run_config(select="best"))
    seen = Seen(model)
    trainer = deat_rb.AttackTrainer(deat_rb.PGD(model, steps=1), stopping=AfterEpoch(3, keep=2))
    options: dict[str, Any] = {"epochs": 6, "lr": 0.05, "select": "best", "validate_every": 5, "run": run}
    history = trainer.fit(loader(), [images_and_labels()], callbacks=[seen], **options)
    assert (history.stopped, history.selected) == ("the script says so", 2)
    assert run.selected_epoch == run.checkpoint("best")["epoch"] == 2
    assert equal(deat_rb.load_model(run.path, trust_code=True).state_dict(), seen.weights[1])
    trainer.fit(loader(), [images_and_labels()], resume=True, **options)
    assert run.selected_epoch == 2


@pytest.mark.parametrize(("robust", "keep", "selected"), [([0.1, 0.4, 0.9], 1, 1), ([0.5, 0.1, 0.3, 0.9], 2, 1)])
def test_best_weights_ignore_epochs_after_the_one_kept(
    robust: list[float], keep: int, selected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last, script = len(robust), list(robust)
    monkeypatch.setattr(
        "deat_rb.training.validation.validate", lambda *args, **options: Validation(0.9, script.pop(0), 3, 2)
    )
    model, run = normalized(), RunDirectory.create(tmp_path / "run", run_config(select="best"))
    seen = Seen(model)
    trainer = deat_rb.AttackTrainer(deat_rb.PGD(model, steps=1), stopping=AfterEpoch(last, keep=keep))
    history = trainer.fit(loader(), [images_and_labels()], epochs=6, lr=0.05, select="best", run=run, callbacks=[seen])
    assert history.selected == selected
    assert equal(weights(model), seen.weights[selected - 1])
    assert (run.checkpoint("best")["epoch"], run.checkpoint("last")["epoch"]) == (selected, keep)
    assert equal(deat_rb.load_model(run.path, trust_code=True).state_dict(), seen.weights[selected - 1])
