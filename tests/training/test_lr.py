"""Learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fits import fitted
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, OneCycleLR, SequentialLR
from training_problems import loader, made

import deat_rb
import deat_rb.methods
from deat_rb.training.callbacks import Callback
from deat_rb.training.lr import LR_SCHEDULES, LearningRate
from deat_rb.training.metrics import BatchStats
from deat_rb.training.state import TrainingState
from deat_rb.utils.errors import DeatError


def test_lr_schedules_by_hand() -> None:
    """Over 5 epochs of 2 batches: the rate of an epoch's second batch, at 0.1, 0.3, 0.5, 0.7 and 0.9 of the run."""
    rates = {
        "cyclic": [0.2, 0.6, 1.0, 0.6, 0.2],
        "multistep": [1, 1, 0.1, 0.1, 0.01],
        "flat": [1] * 5,
        "cosine": [(1 + math.cos(math.pi * x)) / 2 for x in (0.1, 0.3, 0.5, 0.7, 0.9)],
        # A third of the rise from 1/25 is a quarter of its height; the fall has done 0, 2/7, 4/7 and 6/7.
        "onecycle": [
            0.04 + 0.96 * 0.25,
            *(4e-6 + (1 - 4e-6) * (1 + math.cos(math.pi * x)) / 2 for x in (0, 2 / 7, 4 / 7, 6 / 7)),
        ],
    }
    assert set(rates) == set(LR_SCHEDULES)
    for name, expected in rates.items():
        history = deat_rb.create("standard", made()).fit(loader(), epochs=5, lr=0.05, lr_schedule=name)
        assert [row.lr / 0.05 for row in history.rows] == pytest.approx(expected), name


def rates_of(scheduler: LRScheduler, steps: int, key: str = "lr") -> list[float]:
    """The values that torch's scheduler sets for each of ``steps`` steps."""
    found = []
    for _ in range(steps):
        found.append(scheduler.optimizer.param_groups[0][key])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def sgd() -> SGD:
    return SGD(nn.Linear(1, 1).parameters(), lr=0.2, momentum=0.9)


def test_cosine_and_warm_up_equal_torchs_schedulers() -> None:
    """100 steps per epoch; torch's linear warm-up needs a factor above 0."""
    rate = LearningRate(0.2, "cosine", 10, warmup=2)
    optimizer = sgd()
    theirs = SequentialLR(
        optimizer, [LinearLR(optimizer, 1e-9, total_iters=200), CosineAnnealingLR(optimizer, 800)], milestones=[200]
    )
    assert [rate.at(step / 100) for step in range(1000)] == pytest.approx(rates_of(theirs, 1000), abs=1e-8)


def test_onecycle_equals_torchs_scheduler() -> None:
    """torch counts the first and the last step as the ends; over many steps that makes no difference."""
    steps, rate = 20_000, LearningRate(0.2, "onecycle", 1, momentum=0.9)
    theirs = rates_of(OneCycleLR(sgd(), max_lr=0.2, total_steps=steps), steps)
    assert [rate.at(step / steps) for step in range(steps)] == pytest.approx(theirs, abs=2e-4)
    assert max(theirs) == pytest.approx(0.2)
    momenta = rates_of(OneCycleLR(sgd(), max_lr=0.2, total_steps=steps), steps, "momentum")
    assert [rate.momentum_at(step / steps) for step in range(steps)] == pytest.approx(momenta, abs=2e-4)


def test_multistep_with_warm_up_keeps_its_halves_of_the_rest() -> None:
    rate = LearningRate(0.1, "multistep", 12, warmup=2)
    assert [rate.at(epoch) for epoch in (0, 1, 2, 6.9, 7, 9.9, 10, 11.9)] == pytest.approx(
        [0, 0.05, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )
    assert rate.momentum_at(3) is None


class Momenta(Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_fit_start(self, state: TrainingState) -> None:
        self.optimizer = state.optimizer

    def on_step_end(self, stats: BatchStats) -> None:
        for group in self.optimizer.param_groups:
            self.seen.append(group["betas"][0] if isinstance(self.optimizer, AdamW) else group["momentum"])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fit_moves_the_momentum_under_onecycle(optimizer: str) -> None:
    momenta = Momenta()
    deat_rb.create("standard", made()).fit(
        loader(2), epochs=5, lr=1e-3, lr_schedule="onecycle", optimizer=optimizer, momentum=0.8, callbacks=[momenta]
    )
    rises = 0.05 * (1 - math.cos(math.pi * 2 / 3))  # at 0.2 of the run, 2/3 of the learning rate's rise
    falls = [0.05 * (1 + math.cos(math.pi * x / 7)) for x in (1, 3, 5)]  # at 0.4, 0.6 and 0.8
    expected = [0.85, 0.85 - rises, *(0.85 - x for x in falls)]
    assert momenta.seen[::2] == momenta.seen[1::2] == pytest.approx(expected)
    constant = Momenta()
    deat_rb.create("standard", made()).fit(loader(2), epochs=1, lr=1e-3, optimizer=optimizer, callbacks=[constant])
    assert constant.seen == [0.9, 0.9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_epochs": 1}, "warmup_epochs = 1 cannot be combined with the cyclic schedule, which has its own"),
        ({"warmup_epochs": 2, "lr_schedule": "flat"}, "warmup_epochs = 2 leaves none of 2 epochs for the schedule"),
        ({"nesterov": True, "momentum": 0}, "nesterov needs a momentum above 0; omit it"),
        ({"nesterov": True, "optimizer": "adamw"}, "nesterov needs the optimizer sgd; omit it"),
        ({"lr_schedule": "onecycle", "momentum": 0.97}, "momentum = 0.97 cannot be used with the onecycle schedule"),
        ({"optimizer": "adam"}, "optimizer = 'adam' cannot be used: it should be 'sgd' or 'adamw'"),
        ({"no_decay": "norm,weights"}, "no_decay = .* unknown kind of parameter 'weights': give norm, bias or"),
        ({"grad_clip": 0}, "grad_clip = 0 cannot be used: it should be greater than 0"),
        ({"validate_every": 0}, "validate_every = 0 cannot be used: it should be greater than or equal to 1"),
        ({"warmup_epochs": float("inf")}, "warmup_epochs = inf cannot be used"),
    ],
)
def test_fit_refuses_options_that_do_not_combine(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DeatError, match=message):
        fitted(**options)


def test_validate_every_validates_some_epochs_and_the_last() -> None:
    trainer = deat_rb.create("pgd-1", made())
    history = trainer.fit(loader(), loader(1), epochs=5, lr=0.05, validate_every=2)
    validated = [row.epoch for row in history.rows if row.val_acc is not None]
    assert validated == [row.epoch for row in history.rows if row.val_forwards] == [2, 4, 5]
    assert history.selected in validated
    assert torch.tensor([row.val_seconds for row in history.rows]).bool().tolist() == [False, True, False, True, True]


def test_validate_every_still_measures_what_the_stopping_rule_needs() -> None:
    history = deat_rb.create("u-fgsm", made()).fit(loader(), loader(1), epochs=3, lr=0.05, validate_every=3)
    assert all(row.stop_robust_acc is not None for row in history.rows)
    assert [row.val_acc is None for row in history.rows] == [True, True, False]
