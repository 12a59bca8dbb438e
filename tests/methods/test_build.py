"""Building a trainer: overrides of a row, and models that cannot be trained."""

from __future__ import annotations

from typing import Any

import pytest
from small_problems import Plane

from deat_rb.methods.registry import create
from deat_rb.methods.schedules import AccuracyThreshold, EveryDEpochs, GradientMagnitude
from deat_rb.methods.stopping import GradientRatio, RobustnessDrop
from deat_rb.training.trainer import Trainer
from deat_rb.utils.errors import DeatError


def mode_of_attack(trainer: Trainer, *, training: bool) -> bool:
    """Whether the attack on a model in train or eval mode runs in train mode."""
    trainer.model.train(training)
    trainer.crafter.enter_mode()
    return bool(trainer.model.training)


def test_create_applies_overrides() -> None:
    guided = create("m+trades", Plane(), alpha=1 / 255, steps=2, max_steps=5, gamma=1.2, attack_mode="eval")
    assert isinstance(guided.schedule, GradientMagnitude)
    assert (guided.schedule.steps, guided.schedule.max_steps, guided.schedule.gamma) == (2, 5, 1.2)
    assert guided.base_alpha == 1 / 255
    assert guided.alpha == pytest.approx(4 / 255)  # eps / r
    assert mode_of_attack(guided, training=True) is False

    friendly = create("fat-5", Plane(), tau=1, attack_mode="train", steps=8)
    assert (friendly.crafter.tau, friendly.crafter.steps) == (1, 8)
    assert mode_of_attack(friendly, training=False) is True

    every, above = create("deat-3", Plane(), every=2, max_steps=4), create("deat-40%", Plane(), threshold=0.3)
    assert isinstance(every.schedule, EveryDEpochs)
    assert isinstance(above.schedule, AccuracyThreshold)
    assert (every.schedule.every, every.schedule.max_steps, above.schedule.threshold) == (2, 4, 0.3)

    stopped = create("m+u-fgsm", Plane(), gamma=2.0, m=3, guard=0.1).stopping
    assert isinstance(stopped, GradientRatio)
    assert (stopped.gamma, stopped.m, stopped.guard) == (2.0, 3, 0.1)
    dropped = create("u-fgsm", Plane(), drop=0.3).stopping
    assert isinstance(dropped, RobustnessDrop)
    assert (dropped.drop, dropped.validation_steps) == (0.3, 5)


def test_create_ignores_overrides_that_are_none() -> None:
    trainer = create("m+pgd", Plane(), alpha=None, steps=None, max_steps=None, gamma=None, tau=None, beta=None)
    assert (trainer.steps, trainer.schedule.max_steps) == (1, 7)


def test_create_scales_alpha_with_eps_unless_given() -> None:
    for name in ("pgd-7", "fat-5", "mart"):
        assert create(name, Plane(), eps=4 / 255).base_alpha == pytest.approx(1 / 255)
    assert create("free-8", Plane(), eps=16 / 255).base_alpha == pytest.approx(16 / 255)
    assert create("u-fgsm", Plane(), eps=16 / 255).base_alpha == pytest.approx(20 / 255)
    assert create("pgd-7", Plane(), eps=4 / 255, alpha=3 / 255).base_alpha == pytest.approx(3 / 255)
    assert create("pgd-7", Plane(), eps=4 / 255).crafter.eps == 4 / 255
    assert create("pgd-7", Plane(), eps=None).crafter.eps == 8 / 255


@pytest.mark.parametrize("weights", ["balanced", [1.0, 0.0, 2.0], [1.0, float("inf")], [[1.0, 2.0]], 2.0, [None]])
def test_create_refuses_class_weights(weights: Any) -> None:
    with pytest.raises(DeatError, match=r"class_weights = .* is not a list of positive numbers: give one for each cla"):
        create("pgd-7", Plane(), class_weights=weights)


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("pgd-7", {"gamma": 1.0}, "the method pgd-7 has no parameter gamma; see deat-rb methods pgd-7"),
        ("pgd-7", {"tau": 3, "beta": 6.0}, "the method pgd-7 has no parameter beta, tau"),
        ("trades", {"max_steps": 5}, "the method trades has no parameter max_steps"),
        ("M+PGD", {"every": 3}, r"the method m\+pgd has no parameter every"),
        ("pgd-7", {"epz": 1}, "the method pgd-7 has no parameter epz"),
        ("pgd-7", {"alpha": -1.0}, "alpha = -1 is not a positive number"),
        ("pgd-7", {"alpha": 2.0}, "alpha = 2 is above 1; images are in"),
        ("standard", {"steps": 3}, "the method standard cannot use steps: it trains without attack steps; omit it"),
        ("pgd-7", {"steps": -2}, "steps = -2 is not a non-negative whole number"),
        ("pgd-7", {"eps": 8.0}, r"eps = 8 is outside \(0, 1\]"),
        ("m+pgd", {"steps": 9}, r"max_steps = 7 is below the first epoch's steps \(9\)"),
        ("m+pgd", {"gamma": 0.0}, "gamma = 0 is not a positive number"),
        ("deat-40%", {"threshold": 40}, r"threshold = 40 is outside \(0, 1\)"),
        ("free-8", {"steps": 0}, "steps = 0 is below 1; free-8 needs at least 1 step"),
        ("fat-5", {"tau": -1}, "tau = -1 is not a non-negative whole number"),
        ("pgd-7", {"eps": "8/0"}, "'8/0' divides by zero"),
        ("pgd-7", {"eps": "eight"}, "'eight' is not a number; give a fraction such as 8/255"),
        ("pgd-7", {"alpha": "two"}, "'two' is not a number"),
        ("pgd-7", {"steps": "7"}, "steps = '7' is not a whole number"),
        ("pgd-7", {"steps": 7.5}, "steps = 7.5 is not a whole number"),
        ("m+pgd", {"max_steps": "7"}, "max_steps = '7' is not a whole number"),
        ("m+pgd", {"gamma": "1.0"}, "gamma = '1.0' is not a number"),
        ("trades", {"beta": "6"}, "beta = '6' is not a number"),
        ("mart", {"label_smoothing": 0.1}, "label_smoothing = 0.1 is defined for cross-entropy and TRADES, not for"),
        ("pgd-7", {"label_smoothing": 1.0}, r"label_smoothing = 1 is not in \[0, 1\)"),
        ("pgd-7", {"label_smoothing": "0.1"}, "label_smoothing = '0.1' is not a number"),
        ("fat-5", {"tau": "3"}, "tau = '3' is not a whole number"),
        ("deat-3", {"every": 1.5}, "every = 1.5 is not a whole number"),
        ("trades", {"attack_mode": "test"}, "attack_mode = 'test' is neither 'train' nor 'eval'"),
        ("u-fgsm", {"drop": 20}, r"drop = 20 is outside \(0, 1\)"),
    ],
)
def test_create_refuses_invalid_overrides(name: str, override: dict[str, Any], message: str) -> None:
    with pytest.raises(DeatError, match=message):
        create(name, Plane(), **override)
