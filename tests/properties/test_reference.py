"""Trainers against the plain loops of `reference_loops`: the same weights after training on the same batches."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from reference_cases import (
    CASES,
    LR,
    SIZES,
    assert_same_state,
    assert_trains_as_the_reference_loop,
    backward_and_step,
    batches,
    network,
    seed_batch,
    sgd,
)
from reference_loops import (
    PATIENCE,
    magnitude_rule,
    mart_loss,
    ratio_rule,
    robustness_rule,
    run,
    trades_loss,
)
from reference_step import kl
from torch import Tensor, nn

import deat_rb
import deat_rb.methods
from deat_rb.training.metrics import EpochStats


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), CASES)
def test_training_step_equals_the_reference_loop(name: str, steps: int | None) -> None:
    assert_trains_as_the_reference_loop(name, steps)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["free-2", "deat-2", "deat-40%", "m-deat", "m+pgd", "m+trades", "m+mart", "amata-2-6"])
def test_schedules_equal_the_reference_loop(name: str) -> None:
    """Nine epochs of the schedule, with gamma so low that r rises more than once, for M+PGD up to its bound."""
    expected, actual = network(), network()
    data = batches((6, 3))
    trace = run(name, expected, [data] * 9, lr=0.005, seed_batch=seed_batch, gamma=0.7)
    if name != "free-2":
        assert len({epoch.steps for epoch in trace}) > 2

    guided = {"gamma": 0.7} if name.startswith("m") else {}
    trainer = deat_rb.create(name, actual, eps=8 / 255, **guided)
    trainer.schedule.begin(len(trace))
    optimizer = sgd(actual, lr=0.005)
    for t, epoch in enumerate(trace):
        assert trainer.steps == epoch.steps, t
        done = backward_and_step(trainer, data, t, optimizer)
        l_x = sum(float(stats.l_x) for stats in done)
        assert l_x == pytest.approx(epoch.l_x, rel=1e-6)
        accuracy = sum(int(stats.correct) for stats in done) / epoch.examples
        trainer.schedule.update(EpochStats(epoch=t + 1, l_x=l_x, train_acc=accuracy))
        trainer.apply_schedule()
    assert_same_state(actual, expected)


def test_perturbations_from_epoch_to_epoch_equal_the_reference_loop() -> None:
    """The weight of LIET's penalty, and FGSM-PGI's perturbations, which are reset in the 41st epoch."""
    for name, epochs in (("liet", 3), ("fgsm-pgi", 42)):
        expected, actual = network(), network()
        data = batches((6, 3))
        trace = run(name, expected, [data] * epochs, lr=0.005, seed_batch=seed_batch)
        trainer = deat_rb.create(name, actual, eps=8 / 255)
        optimizer = sgd(actual, lr=0.005)
        for t, epoch in enumerate(trace):
            done = backward_and_step(trainer, data, t, optimizer, epochs)
            assert sum(float(stats.loss) for stats in done) == pytest.approx(epoch.loss, rel=1e-6), (name, t)
        assert_same_state(actual, expected)


def test_stopping_rules_equal_the_reference() -> None:
    """On random walks; Algorithm 5 has two ratios to compare from epoch m + 2 on."""
    draw = torch.Generator().manual_seed(3)
    verdicts = set()
    for _ in range(40):
        l_x = (torch.randn(12, generator=draw) * 0.15).cumsum(0).exp().tolist()
        accuracies = torch.rand(12, generator=draw).tolist()
        ratio, drop = deat_rb.methods.GradientRatio(m=2, gamma=1.5), deat_rb.methods.RobustnessDrop()
        for t in range(12):
            stats = EpochStats(epoch=t + 1, l_x=l_x[t], stop_robust_acc=accuracies[t])
            surged, dropped = ratio.update(stats) is not None, drop.update(stats) is not None
            assert dropped == robustness_rule(accuracies[: t + 1])
            if t >= 3:
                assert surged == ratio_rule(l_x[: t + 1])
                verdicts.add((surged, dropped))
    assert len(verdicts) == 4


# The reference itself, by hand.


def test_reference_fat_stops_some_examples_early() -> None:
    for name, most in (("fat-5", 5), ("f+trades", 10), ("f+mart", 10)):
        (epoch,) = run(name, network(), [batches()], lr=LR, seed_batch=seed_batch)
        crafting = epoch.backwards / len(SIZES) - 1
        assert PATIENCE + 1 < crafting < most - 0.1


def test_reference_losses_by_hand() -> None:
    clean = torch.tensor([[0.5, 0.25, 0.25]]).log()
    adversarial = torch.tensor([[0.25, 0.5, 0.25]]).log()
    label = torch.tensor([0])
    divergence = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert kl(clean, adversarial).item() == pytest.approx(divergence)
    assert kl(clean, clean).item() == 0
    assert trades_loss(clean, adversarial, label).item() == pytest.approx(math.log(2) + 6 * divergence)
    boosted = math.log(4) - math.log(0.5001)
    assert mart_loss(clean, adversarial, label).item() == pytest.approx(boosted + 6 * divergence * 0.5, rel=1e-5)


class Scale(nn.Module):
    """Logits (w x, 0) of one pixel x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        pixel = images.flatten(1)
        return torch.cat([self.w * pixel, torch.zeros_like(pixel)], 1)


def test_reference_replays_by_hand() -> None:
    """FREE-2 on log(1 + exp(w x)): delta moves with the first w's gradient, the second update is at x + eps."""
    model, eps, decay = Scale(), 8 / 255, 5e-4
    data = [(torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64), torch.tensor([1]))]
    (epoch,) = run("free-2", model, [data], lr=LR, seed_batch=seed_batch)

    def sigmoid(z: float) -> float:
        return 1 / (1 + math.exp(-z))

    first = 0.5 * sigmoid(0.5) + decay
    w = 1 - LR * first
    x = 0.5 + eps
    second = 0.9 * first + x * sigmoid(w * x) + decay * w
    assert model.w.item() == pytest.approx(w - LR * second, abs=1e-15)
    assert epoch.l_x == pytest.approx(w * sigmoid(w * x))
    assert (epoch.backwards, epoch.forwards, epoch.updates, epoch.correct) == (2, 2, 2, 0)


def test_reference_rules_by_hand() -> None:
    def steps(*l_x: float) -> list[int]:
        return [magnitude_rule(l_x[:t], start=1, gamma=1.1, bound=4) for t in range(len(l_x) + 1)]

    assert steps(9, 10, 11, 11.2, 12, 12.4, 99) == [1, 2, 2, 2, 3, 3, 4, 4]
    assert not ratio_rule([5, 4, 3, 2.5])
    assert not ratio_rule([10, 10, 10, 10.1])
    assert not ratio_rule([10, 11, 12, 13])
    assert not ratio_rule([10, 10, 10.2, 18])
    assert ratio_rule([10, 10, 10.2, 18.1])
    assert not robustness_rule([0.4])
    assert not robustness_rule([0.4, 0.21])
    assert robustness_rule([0.4, 0.19])


@pytest.mark.parametrize(
    ("name", "steps", "backwards"),
    [
        ("deat-1", [1, 2, 3, 4], [1, 2, 3, 4]),
        ("deat-2", [1, 1, 2, 2], [1, 1, 2, 2]),
        ("free-4", [4, 4, 4, 4], [4, 4, 4, 4]),
        ("pgd-3", [3, 3, 3, 3], [4, 4, 4, 4]),
        ("u-fgsm", [1, 1, 1, 1], [2, 2, 2, 2]),
        ("amata-2-10", [2, 4, 6, 8], [3, 5, 7, 9]),
    ],
)
def test_reference_schedules_and_costs(name: str, steps: list[int], backwards: list[int]) -> None:
    trace = run(name, network(), [batches((4, 3))] * 4, lr=LR, seed_batch=seed_batch)
    assert [epoch.steps for epoch in trace] == steps
    assert [epoch.backwards / 2 for epoch in trace] == backwards


def test_reference_accuracy_rule_by_hand() -> None:
    trace = run("deat-40%", network(), [batches()] * 4, lr=LR, seed_batch=seed_batch)
    raised = [later.steps - epoch.steps for epoch, later in itertools.pairwise(trace)]
    assert raised == [int(epoch.accuracy > 0.4) for epoch in trace[:-1]]
    assert {0, 1} == set(raised)
