"""StatelessAttack: modes, buffers and gradients that a call restores, nesting, and no_grad."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torchattacks
from small_problems import batch_for, small_network
from torch import Tensor, nn

from deat_rb.attacks.base import AttackMode, StatelessAttack
from deat_rb.attacks.pgd import PGD


@pytest.fixture(autouse=True)
def _own_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Recorder(nn.Module):
    """Records the modes of its modules at each forward, and fails at the ``fails_at``-th."""

    def __init__(self, fails_at: int = 0) -> None:
        super().__init__()
        self.norm, self.drop, self.out = nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Linear(3, 4)
        self.fails_at = fails_at
        self.modes: list[tuple[bool, bool, bool]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.modes.append((self.training, self.norm.training, self.drop.training))
        if len(self.modes) == self.fails_at:
            raise RuntimeError("the model fails here")
        logits: Tensor = self.out(self.drop(self.norm(images)).mean(dim=(2, 3)))
        return logits


IMAGES, FOUR = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_pgd_runs_in_the_attack_mode_and_restores_the_mode(training: bool, mode: AttackMode) -> None:
    model = Recorder().train(training)
    PGD(model, steps=2, attack_mode=mode)(IMAGES, FOUR)
    assert model.modes == [(mode == "train",) * 3] * 2
    assert all(module.training == training for module in model.modules())
    assert model.state_dict()["norm.num_batches_tracked"].item() == 0


def test_pgd_in_train_mode_keeps_frozen_modules_in_eval_mode() -> None:
    model = Recorder().train()
    model.norm.eval()
    PGD(model, steps=1)(IMAGES, FOUR)
    assert model.modes == [(True, False, True)]
    assert (model.training, model.norm.training, model.drop.training) == (True, False, True)


def test_set_model_training_mode_overrides_the_attack_mode() -> None:
    model = Recorder().eval()
    attack = PGD(model, steps=1)
    attack.set_model_training_mode(model_training=True, batchnorm_training=False, dropout_training=False)
    attack(IMAGES, FOUR)
    assert model.modes == [(True, False, False)]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_stateless_attack_restores_the_model_after_an_exception(mode: AttackMode) -> None:
    model = Recorder(fails_at=2).train()
    model.drop.eval()
    model.out.bias.requires_grad_(False)
    model.out.weight.grad = torch.full_like(model.out.weight, 2.0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attack = PGD(model, steps=3, attack_mode=mode)
    attack.set_normalization_used([0.5] * 3, [0.5] * 3)
    with pytest.raises(RuntimeError, match="the model fails here"):
        attack(IMAGES, FOUR)
    assert attack._normalization_applied is True
    assert (model.training, model.norm.training, model.drop.training) == (True, True, False)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.out.weight.grad is not None
    assert torch.equal(model.out.weight.grad, torch.full_like(model.out.weight, 2.0))
    assert model.norm.weight.grad is None
    assert not model.out.bias.requires_grad
    assert not model._forward_pre_hooks


def test_stateless_attack_restores_gradients_after_backward() -> None:
    class Careless(StatelessAttack):
        def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
            torch.autograd.backward(self.get_logits(inputs).sum())
            return inputs

    model = Recorder().train()
    Careless("Careless", model)(IMAGES, FOUR)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model.state_dict()["norm.running_mean"], torch.zeros(3))


def test_pgd_can_be_nested_in_multiattack() -> None:
    model = small_network()
    images, labels = batch_for(model)
    ours = PGD(model, steps=2, attack_mode="eval")
    ours.set_normalization_used([0.5] * 3, [0.25] * 3)
    ours.extra = torch.rand(3)  # torchattacks' base class compares a tensor with all earlier attributes, which raises
    ours.inner = PGD(model, steps=1)
    ours.set_device("cpu")
    assert list(ours._attacks) == ["inner.0"]
    ours.set_model(other := small_network())
    assert ours.inner.model is other
    multi = torchattacks.MultiAttack([torchattacks.FGSM(model), PGD(model, steps=3, attack_mode="eval")])
    robust = model(multi(images, labels)).argmax(1) == labels
    single = model(torchattacks.FGSM(model)(images, labels)).argmax(1) == labels
    assert 0 < int(robust.sum()) <= int(single.sum())


def test_pgd_works_under_no_grad() -> None:
    model = small_network()
    images, labels = batch_for(model)
    attack = PGD(model, steps=2, start="none", attack_mode="eval")
    with torch.no_grad():
        quiet = attack(images, labels)
    assert torch.equal(quiet, attack(images, labels))
