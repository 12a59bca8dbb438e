"""Adversarial weight perturbation; tests/parity holds it against its public code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from training_problems import images_and_labels, made

import deat_rb
from deat_rb.methods.weight_perturbation import WeightPerturbation
from deat_rb.training.engine import Engine
from deat_rb.training.metrics import BatchStats
from deat_rb.utils.distributed import World
from deat_rb.utils.errors import DeatError


def test_add_moves_each_weight_by_gamma_times_its_norm_along_the_gradient() -> None:
    """||w|| = 5, ||g|| = 10: 0.1 * 5 * g / 10 = 0.05 g. A gradient that is zero or not finite moves nothing."""
    weights = [torch.tensor([[3.0, 4.0]], requires_grad=True) for _ in range(3)]
    gradients = [torch.tensor([[6.0, -8.0]]), torch.zeros(1, 2), torch.tensor([[1.0, torch.inf]])]
    awp = WeightPerturbation(0.1)
    awp.add(weights, gradients)
    torch.testing.assert_close(weights[0].detach(), torch.tensor([[3.3, 3.6]]))
    for weight in weights[1:]:
        assert weight.tolist() == [[3, 4]]
    for _ in range(2):  # the second time there is nothing to remove
        awp.remove()
        torch.testing.assert_close(weights[0].detach(), torch.tensor([[3.0, 4.0]]))


def test_weights_are_the_trainable_ones_of_convolutions_and_linear_layers() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[3].weight.requires_grad_(False)
    found = WeightPerturbation.weights(model)
    assert [id(weight) for weight in found] == [id(model[0].weight), id(model[2].weight)]
    with pytest.raises(DeatError, match=r"awp perturbs trainable parameters .* the model has none: train without awp"):
        WeightPerturbation.weights(nn.Sequential(nn.BatchNorm2d(2)))


def step(name: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[nn.Module, BatchStats, dict[str, Any]]:
    """Train on a batch with learning rate 0; return the model, the statistics and the state at the update's forward."""
    model = made().double().train()
    trainer = deat_rb.create(name, model, steps=2, **options)
    at_update: dict[str, Any] = {}
    update = type(trainer)._forward_losses

    def seen(self: Any, called: nn.Module, *args: Any) -> Any:
        at_update.update({key: value.clone() for key, value in model.state_dict().items()})
        return update(self, called, *args)

    images, labels = images_and_labels()
    torch.manual_seed(0)
    with monkeypatch.context() as patched:
        patched.setattr(type(trainer), "_forward_losses", seen)
        stats = trainer.training_step(images.double(), labels, SGD(model.parameters(), lr=0.0))
    return model, stats, at_update


def test_gradients_are_averaged_over_ranks_without_their_own_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank halves fp16's scale when its own gradients overflow."""
    averaged: list[list[torch.Tensor]] = []
    monkeypatch.setattr(World, "average", lambda self, tensors: averaged.append([each.clone() for each in tensors]))
    for halvings in (0, 3):
        torch.manual_seed(0)
        model, engine = made().train(), Engine("cpu", "fp16")
        assert isinstance(engine.loss_scale, torch.Tensor)
        engine.loss_scale.mul_(2.0**-halvings)
        trainer = deat_rb.create("pgd-2", model, awp=0.05)
        trainer.training_step(*images_and_labels(), SGD(model.parameters(), lr=0.0), engine)
    for first, second in zip(*averaged, strict=True):
        torch.testing.assert_close(first, second, rtol=0.05, atol=1e-3 * float(first.abs().max()))


@pytest.mark.parametrize("name", ["pgd-2", "trades", "mart", "fat-2"])
def test_awp_perturbs_weights_for_the_update_and_leaves_batchnorm_as_it_is(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _, before = step(name, monkeypatch)
    model, stats, perturbed = step(name, monkeypatch, awp=0.05)
    moved = 0
    for key, value in model.state_dict().items():
        change = perturbed[key].double() - before[key].double()
        if key.endswith("weight") and value.dim() > 1:
            assert float(change.norm()) == pytest.approx(0.05 * float(value.norm()), rel=1e-9), key
            torch.testing.assert_close(value, before[key])
            moved += 1
        else:
            # In particular BatchNorm's statistics and their counter before the update.
            assert float(change.abs().max()) == 0, key
    assert moved >= 2
    counters = [key for key in model.state_dict() if key.endswith("num_batches_tracked")]
    assert counters
    for key in counters:
        assert model.state_dict()[key] == plain.state_dict()[key]
    assert float(stats.loss) > 0


def test_fit_does_not_count_the_pass_of_awp_in_batchnorm() -> None:
    """TRADES: for each of two batches 1 + 2 forward passes in the attack and 2 in the update; `made` forwards once."""
    model = made()
    deat_rb.create("trades", model, steps=2, awp=0.01).fit([images_and_labels()] * 2, epochs=1, lr=1e-3)
    counts = {int(value) for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    assert counts == {1 + 2 * (3 + 2)}


def test_awp_increases_the_loss_of_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [float(step("trades", monkeypatch, **awp)[1].loss) for awp in ({}, {"awp": 0.01}, {"awp": 0.02})]
    assert losses == sorted(losses)
    assert losses[0] < losses[2]


def test_the_averaged_weights_do_not_include_the_perturbation() -> None:
    model = made()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    deat_rb.create("pgd-2", model, awp=0.5).fit([images_and_labels()], epochs=2, lr=1e-12, ema=0.5)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), before[name], rtol=1e-5, atol=1e-6)


def test_the_perturbation_is_removed_if_the_update_fails() -> None:
    model = made()
    trainer = deat_rb.create("pgd-2", model, awp=0.5)
    before = [weight.detach().clone() for weight in model.parameters()]
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        trainer.training_step(*images_and_labels(), optimizer)
    for weight, value in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(weight.detach(), value)


@pytest.mark.parametrize("name", ["free-8", "deat-3", "m-deat", "yopo-5-3"])
def test_awp_is_refused_where_a_pass_serves_attack_and_update(name: str) -> None:
    with pytest.raises(DeatError, match=f"{name} cannot use awp: each of its passes serves both attack and update"):
        deat_rb.create(name, made(), awp=0.01)


@pytest.mark.parametrize("option", [{"awp": 0.01}, {"awp_warmup": 2}])
def test_gradalign_says_why_it_refuses_awp(option: dict[str, Any]) -> None:
    reason = "its penalty compares two gradients, which AWP would take at different weights"
    with pytest.raises(DeatError, match=f"gradalign cannot use {next(iter(option))}: {reason}; omit it, or choose an"):
        deat_rb.create("gradalign", made(), **option)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"awp": 0.0}, r"awp = 0 is outside \(0, 1\)"),
        ({"awp": 1.0}, r"awp = 1 is outside \(0, 1\)"),
        ({"awp": float("nan")}, r"awp = nan is outside \(0, 1\)"),
        ({"awp": "much"}, "awp = 'much' is not a number"),
        ({"awp": 0.01, "awp_warmup": -1}, "awp_warmup = -1 is not a non-negative whole number of epochs"),
        ({"awp": 0.01, "awp_warmup": 1.5}, "awp_warmup = 1.5 is not a whole number"),
        ({"awp_warmup": 2}, "awp_warmup has no effect without awp"),
    ],
)
def test_awp_refuses_what_is_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DeatError, match=message):
        deat_rb.create("trades", made(), **options)
