"""Warm-up of the radius."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchattacks
from fits import equal, weights
from resumed_runs import Stops, outcome
from small_runs import planned
from training_problems import Positioned, images_and_labels, made, normalized, run_config

import deat_rb
from deat_rb.methods.describe import describe
from deat_rb.runs.directory import RunDirectory
from deat_rb.runs.train import resume, train
from deat_rb.training import validation
from deat_rb.training.callbacks import Callback
from deat_rb.training.history import History
from deat_rb.training.metrics import BatchStats
from deat_rb.utils.errors import DeatError, Interrupted

DATA = Positioned([images_and_labels(4)] * 2)


@pytest.mark.parametrize(
    "name", ["pgd-2", "free-2", "m-deat", "n-fgsm", "fat-2", "trades", "fgsm-pgi", "liet", "torchattacks"]
)
def test_eps_and_alpha_rise_together_and_validation_is_at_the_full_eps(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches per epoch: the shares 0, 1/4, 1/2, 3/4 in the two epochs of the warm-up, then 1."""
    if name == "torchattacks":
        attack = torchattacks.PGD(made(), eps=0.1, alpha=0.04, steps=2)
        trainer: Any = deat_rb.AttackTrainer(attack, eps_warmup=2)
    else:
        trainer = deat_rb.create(name, made(), eps=0.1, eps_warmup=2)
    seen: list[tuple[float, float]] = []
    step, validated = trainer.training_step, []

    def watched(*args: Any) -> BatchStats:
        base = trainer.schedule.alpha(trainer.base_alpha, 0.1)
        seen.append((trainer.crafter.eps / 0.1, trainer.crafter.alpha / base))
        stats: BatchStats = step(*args)
        return stats

    validate = validation.validate

    def at(*args: Any, eps: float, **options: Any) -> validation.Validation:
        validated.append(eps)
        return validate(*args, eps=eps, **options)

    trainer.__dict__["training_step"] = watched
    monkeypatch.setattr(validation, "validate", at)
    rows = trainer.fit(DATA, [images_and_labels(4)], epochs=3, lr=1e-3).rows
    first = 1e-6 if name == "torchattacks" else 0  # whose L2 attacks divide by the radius
    assert seen == [pytest.approx((share, share)) for share in (first, 0.25, 0.5, 0.75, 1, 1)]
    assert validated == [0.1] * 3
    assert [row.eps for row in rows] == pytest.approx([0.025, 0.075, 0.1])
    assert trainer.eps == 0.1
    assert trainer.crafter.eps == 0.1


def test_the_radius_of_an_epoch_is_its_last_batchs_after_an_interruption_in_validation(tmp_path: Path) -> None:
    class StopsAtValidation(Callback):
        def on_validation_start(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(planned(eps_warmup=2), output=tmp_path, name="run", callbacks=[StopsAtValidation()])
    _, history = resume(tmp_path / "run", {}, trust_code=True)
    assert [row.eps for row in history.rows] == pytest.approx([0.025, 0.075])


def test_the_first_batch_is_trained_on_clean_images() -> None:
    """The only epoch has one batch, at the radius 0, so that FREE-1, which draws no noise, is standard training."""
    models = [made(), made()]
    for trainer in (deat_rb.create("standard", models[0]), deat_rb.create("free-1", models[1], eps_warmup=1)):
        trainer.fit([images_and_labels(4)], epochs=1, lr=0.1, lr_schedule="flat")
    assert equal(weights(models[0]), weights(models[1]))


def test_no_warm_up_changes_nothing() -> None:
    models = []
    for options in ({}, {"eps_warmup": 0}):
        models.append(made())
        rows = deat_rb.create("pgd-2", models[-1], **options).fit(DATA, epochs=1, lr=0.1).rows
        assert rows[0].eps is None
    assert equal(weights(models[0]), weights(models[1]))


def test_describe_says_how_eps_rises() -> None:
    assert describe("pgd-7", eps_warmup=5).attack.endswith(", uniform start, eps and alpha from 0 over 5 epochs")


@pytest.mark.parametrize(
    ("name", "warmup", "message"),
    [
        ("pgd-7", -1, "eps_warmup = -1 is not a non-negative whole number of epochs"),
        ("pgd-7", 1.5, "eps_warmup = 1.5 is not a whole number"),
        (
            "standard",
            3,
            "the method standard cannot use eps_warmup: it trains without attack steps; omit it, or choose another "
            "method, such as pgd-7, n-fgsm or trades$",
        ),
    ],
)
def test_create_refuses_a_warm_up(name: str, warmup: Any, message: str) -> None:
    with pytest.raises(DeatError, match=message):
        deat_rb.create(name, made(), eps_warmup=warmup)


def test_torchattacks_l2_attacks_warm_up() -> None:
    """They divide by the radius, so that it must not be exactly 0 in the first batch."""
    model = made()
    history = deat_rb.AttackTrainer(torchattacks.PGDL2(model, steps=1), eps_warmup=1).fit(DATA, epochs=1, lr=0.1)
    assert history.rows[0].updates == len(DATA)


def test_eps_is_restored_if_a_step_fails() -> None:
    trainer = deat_rb.create("pgd-2", made(), eps=0.1, eps_warmup=2)

    def fails(*args: Any) -> BatchStats:
        raise RuntimeError(f"stop at {trainer.eps:g}")

    trainer.__dict__["training_step"] = fails
    with pytest.raises(RuntimeError, match="stop at 0"):
        trainer.fit(DATA, epochs=1, lr=0.1)
    assert trainer.crafter.eps == 0.1


def with_l_x(method: str, l_x: list[float], **options: Any) -> History:
    """Train as many epochs as there are values, which are the epochs' l_X."""
    trainer, script = deat_rb.create(method, made(), **options), list(l_x)
    step = trainer.training_step

    def scripted(*args: Any) -> BatchStats:
        return replace(step(*args), l_x=torch.tensor(script.pop(0)))

    trainer.__dict__["training_step"] = scripted
    return trainer.fit([images_and_labels(4)], epochs=len(l_x), lr=1e-3, lr_schedule="flat")


@pytest.mark.parametrize("method", ["m+u-fgsm", "m+n-fgsm"])
def test_a_surge_of_l_x_ends_training_only_after_the_warm_up(method: str) -> None:
    """R is (5710 - 2570) / 2 = 1570 and then (8880 - 3600) / 2 = 2640, more than 1.5 times that: m = 2 is epoch 7."""
    surge = [2570.0, 3600.0, 5710.0, 8880.0]
    history = with_l_x(method, [*surge, 9000.0, *surge, 9000.0], eps_warmup=5)
    assert (len(history.rows), history.selected) == (9, 7)


def test_a_guided_schedule_begins_after_the_warm_up() -> None:
    """The second step comes after epoch 4, the threshold 1.01 * 40 = 40.4 after epoch 5; 41 in epoch 7 exceeds it."""
    history = with_l_x("m+pgd", [1.0, 10.0, 100.0, 50.0, 40.0, 40.3, 41.0, 41.0], eps_warmup=3)
    assert history.steps == [1, 1, 1, 1, 2, 2, 2, 3]


def test_step_bounds_of_a_guided_schedule_begin_after_the_warm_up() -> None:
    trainer = deat_rb.create("m+pgd", made(), eps_warmup=3)
    assert trainer.step_bounds(6) == [(1, 1)] * 4 + [(2, 2), (2, 3)]
    assert trainer.step_bounds(2) == [(1, 1)] * 2
    assert deat_rb.create("deat-2", made(), eps_warmup=3).step_bounds(4) == [(1, 1), (1, 1), (2, 2), (2, 2)]


@pytest.mark.parametrize(
    ("robust", "epochs"),
    [([0.5] * 12, 8), ([0.9, 0.1, 0.1, 0.1, 0.1, 0.2, 0.3, 0.2, 0.3, 0.9], 9)],
)
def test_patience_begins_after_the_warm_up(robust: list[float], epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2 epochs: the first to be compared is epoch 6, so that epoch 8, or 2 after the best one, is the last."""
    script = list(robust)
    monkeypatch.setattr(
        validation, "validate", lambda *args, **options: validation.Validation(0.9, script.pop(0), 3, 2)
    )
    history = deat_rb.create("pgd-1", made(), eps_warmup=5).fit(
        DATA, [images_and_labels(4)], epochs=12, lr=1e-3, lr_schedule="flat", patience=2
    )
    assert len(history.rows) == epochs
    assert history.stopped == "robust validation accuracy has not risen for 2 epochs"


def test_a_run_resumed_in_and_after_the_warm_up_equals_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches per epoch: the interruptions are in epoch 2, which is in the warm-up, and in epoch 4."""
    monkeypatch.setattr(validation, "validate", lambda *args, **options: validation.Validation(0.9, 0.5, 3, 2))

    def fit(run: RunDirectory, callbacks: Sequence[Callback] = ()) -> History:
        return deat_rb.create("m+pgd", normalized(), eps_warmup=2, gamma=0.01).fit(
            DATA, [images_and_labels(4)], run=run, resume=True, callbacks=callbacks, epochs=9, patience=2, lr=0.05
        )

    whole, pieces = (RunDirectory.create(tmp_path / name, run_config()) for name in ("whole", "pieces"))
    assert fit(whole).steps == [1, 1, 1, 2, 2]
    for batches in (3, 4):
        with pytest.raises(Interrupted):
            fit(pieces, [Stops(batches)])
    fit(pieces)
    assert outcome(pieces) == outcome(whole)
