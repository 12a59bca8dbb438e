"""Early stopping by a method's rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fits import equal, fitted, weights
from resumed_runs import Stops, outcome
from torch import Tensor
from training_problems import images_and_labels, loader, made, normalized, run_config

import deat_rb
import deat_rb.methods
from deat_rb.runs.directory import RunDirectory
from deat_rb.training.callbacks import Callback
from deat_rb.training.metrics import EpochAccumulator, EpochStats
from deat_rb.training.stopping_rule import Stop, StoppingRule
from deat_rb.training.validation import Validation
from deat_rb.utils.errors import DeatError, Interrupted
from deat_rb.utils.safe_load import load_tensors


def test_fit_requires_validation_images_for_a_rule_that_validates() -> None:
    with pytest.raises(DeatError, match="u-fgsm needs validation images for its stopping rule; give a val_loader"):
        fitted("u-fgsm")


def test_early_stopping_disabled_only_records_the_reason() -> None:
    class Alarm(deat_rb.methods.GradientRatio):
        def update(self, stats: Any) -> Any:

            return Stop("because", keep=1) if stats.epoch == 2 else None

    def trainer() -> Any:
        created = deat_rb.create("m+u-fgsm", made())
        created.stopping = Alarm()
        return created

    stopped = trainer().fit(loader(2), epochs=4, lr=0.05)
    recorded = trainer().fit(loader(2), epochs=4, lr=0.05, early_stopping=False)
    assert (len(stopped.rows), stopped.stopped, stopped.selected) == (2, "because", 1)
    assert (len(recorded.rows), recorded.stopped, recorded.selected) == (4, None, 4)
    assert [row.stopped for row in recorded.rows] == [None, "because", None, None]


@pytest.mark.parametrize(("keep", "lookback"), [(1, 2), (4, 2), (0, 9)])
def test_fit_refuses_a_rule_that_keeps_weights_that_are_gone(keep: int, lookback: int) -> None:
    class Late(StoppingRule):
        def update(self, stats: EpochStats) -> Stop | None:
            return Stop("because", keep=keep) if stats.epoch == 3 else None

    rule = Late()
    rule.lookback = lookback
    trainer = deat_rb.AttackTrainer(deat_rb.PGD(made(), steps=1), stopping=rule)
    said = rf"Late keeps epoch {keep} in epoch 3, but only the weights of the last {lookback} epochs are there"
    with pytest.raises(DeatError, match=said):
        trainer.fit(loader(2), epochs=4)


@pytest.mark.parametrize(
    ("robust", "options", "epochs", "selected"),
    [
        ([0.3, 0.5, 0.5, 0.4, 0.9], {"epochs": "open"}, 4, 2),
        ([0.3, 0.5, 0.4, 0.6, 0.1, 0.2, 0.9], {"epochs": "open"}, 6, 4),
        ([0.3, 0.5, 0.4, 0.4, 0.9], {"epochs": 3}, 3, 2),
        ([0.3, 0.1, 0.9], {"epochs": "open", "validate_every": 2}, 4, 2),
    ],
)
def test_patience_ends_training(
    robust: list[float], options: dict[str, Any], epochs: int, selected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a patience of 2 epochs, of which the last case validates every other."""
    script = list(robust)
    monkeypatch.setattr(
        "deat_rb.training.validation.validate", lambda *args, **options: Validation(0.9, script.pop(0), 3, 2)
    )
    model = made()
    history = deat_rb.create("pgd-1", model).fit(
        loader(), [images_and_labels()], lr=0.05, lr_schedule="flat", patience=2, **options
    )
    assert (len(history.rows), history.selected) == (epochs, selected)
    ended = options["epochs"] == "open"
    assert history.stopped == ("robust validation accuracy has not risen for 2 epochs" if ended else None)
    assert history.rows[-1].stopped == history.stopped


def test_patience_waits_for_the_next_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The epochs between two validations are no evidence: 0.2 < 0.3 at epoch 4, 0.1 at epoch 6 ends training."""
    script = [0.2, 0.3, 0.1]
    monkeypatch.setattr(
        "deat_rb.training.validation.validate", lambda *args, **options: Validation(0.9, script.pop(0), 3, 2)
    )
    history = deat_rb.create("pgd-1", made()).fit(
        loader(), [images_and_labels()], lr=0.05, lr_schedule="flat", epochs=9, patience=1, validate_every=2
    )
    assert (len(history.rows), history.selected) == (6, 4)
    assert history.stopped == "robust validation accuracy has not risen for 2 epochs"


def test_open_ended_run_is_a_result_after_every_epoch_and_resumes(tmp_path: Path) -> None:
    """Interrupted in the third epoch it has the files of a run of two, and goes on where it was."""

    def fit(name: str, callbacks: Any = (), **options: Any) -> RunDirectory:
        run = RunDirectory(tmp_path / name, run_config(select="best"))
        if not run.path.exists():
            RunDirectory.create(run.path, run.config)
        deat_rb.create("m-deat", normalized()).fit(
            loader(), [images_and_labels()], lr=0.05, lr_schedule="flat", ema=0.9, select="best", run=run,
            callbacks=callbacks, **options,
        )  # fmt: skip
        return run

    with pytest.raises(Interrupted, match=r"keeps 2 epochs and 1 batch of the next; deat-rb eval .* evaluates it"):
        fit("open", [Stops(5)], epochs="open")
    run = RunDirectory.open(tmp_path / "open")
    assert outcome(run) == outcome(fit("two", epochs=2))
    model = deat_rb.load_model(run.path, trust_code=True)
    assert equal(weights(model), load_tensors(run.path / "best.safetensors"))
    with pytest.raises(Interrupted, match="keeps 3 epochs and 2 batches of the next;"):
        fit("open", [Stops(3)], epochs="open", resume=True)
    assert outcome(run) == outcome(fit("three", epochs=3))


def test_open_ended_run_has_a_result_before_its_first_validation(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", run_config(select="best"))

    def fit(batches: int, resume: bool) -> None:
        deat_rb.create("pgd-1", normalized()).fit(
            loader(), [images_and_labels()], epochs="open", lr=0.05, lr_schedule="flat", select="best",
            validate_every=5, run=run, callbacks=[Stops(batches)], resume=resume,
        )  # fmt: skip

    with pytest.raises(Interrupted, match=r"keeps 2 epochs and 1 batch of the next; deat-rb eval .* evaluates it"):
        fit(5, resume=False)
    assert run.selected_epoch == run.checkpoint("last")["epoch"] == 2
    model = deat_rb.load_model(run.path, trust_code=True)
    assert equal(weights(model), load_tensors(run.path / "last.safetensors"))
    with pytest.raises(Interrupted, match="keeps 7 epochs and 1 batch of the next;"):
        fit(10, resume=True)
    assert run.selected_epoch == 5, "the only one that was validated"


@pytest.mark.parametrize(("epochs", "keeps"), [("open", "weights of epoch 1"), (9, "newest weights")])
def test_open_ended_fit_without_a_run_ends_with_its_result(
    epochs: Any, keeps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = [0.5, 0.9, 0.2, 0.9]  # of the averaged and of the raw weights after each epoch
    monkeypatch.setattr(
        "deat_rb.training.validation.validate", lambda *args, **options: Validation(0.9, script.pop(0), 3, 2)
    )
    model = made()

    class Interrupts(Callback):
        """As Ctrl-C does in the third epoch; keeps the averaged weights of the first."""

        average: dict[str, Tensor]

        def on_epoch_end(self, row: EpochStats) -> None:
            assert self.state.average is not None
            if row.epoch == 1:
                with self.state.averaged():
                    self.average = weights(model)

        def on_batch_end(self, sums: EpochAccumulator) -> None:
            if self.state.epoch == 3:
                raise KeyboardInterrupt

    interrupts = Interrupts()
    with pytest.raises(Interrupted, match=f"2 (of 9 )?epochs were trained; the model has the {keeps}"):
        deat_rb.create("pgd-1", model).fit(
            loader(), [images_and_labels()], epochs=epochs, lr=0.05, lr_schedule="flat", ema=0.5, select="best",
            callbacks=[interrupts],
        )  # fmt: skip
    assert equal(weights(model), interrupts.average) == (epochs == "open")
