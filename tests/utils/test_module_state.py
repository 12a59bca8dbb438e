"""Calling a trainer never updates the model: weights, buffers, modes, gradients and requires_grad are preserved."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn
from training_problems import Snapshot, fails_at, images_and_labels, used

import deat_rb
from deat_rb.training.trainer import Trainer
from deat_rb.utils.errors import DeatError
from deat_rb.utils.module_state import preserve_modes, preserve_state

METHODS = [
    "standard", "free-3", "deat-2", "deat-40%", "m-deat", "pgd-2", "m+pgd", "u-fgsm", "m+u-fgsm",
    "n-fgsm", "m+n-fgsm", "gradalign", "amata-2-10", "yopo-2-2", "fgsm-pgi", "liet",
    "fat-2", "trades", "f+trades", "m+trades", "mart", "f+mart", "m+mart",
]  # fmt: skip
ATTACKS: dict[str, Callable[[nn.Module], Any]] = {
    "PGD": lambda model: torchattacks.PGD(model, steps=2),
    "TPGD": lambda model: torchattacks.TPGD(model, steps=2),
    "MIFGSM": lambda model: torchattacks.MIFGSM(model, steps=2),
    "DIFGSM": lambda model: torchattacks.DIFGSM(model, steps=2),
    "APGD": lambda model: torchattacks.APGD(model, steps=2),
    "FFGSM": lambda model: torchattacks.FFGSM(model),
}
CASES = [*METHODS, *ATTACKS]


def trainer_of(name: str, model: nn.Module) -> Trainer:
    if name in ATTACKS:
        return deat_rb.AttackTrainer(ATTACKS[name](model))
    # Ten steps show no more than two.
    short = {"steps": 2} if name in ("trades", "f+trades", "mart", "f+mart") else {}
    return deat_rb.create(name, model, **short)


@pytest.mark.parametrize("name", CASES)
def test_attack_call_does_not_change_a_model_in_train_mode(name: str) -> None:
    model = used()
    trainer = trainer_of(name, model)
    images, labels = images_and_labels()
    before, clean = Snapshot(model), images.clone()
    adv = trainer(images, labels)
    assert before.differences() == []
    assert torch.equal(images, clean)
    assert not adv.requires_grad
    if name == "standard":
        assert torch.equal(adv, images)
    else:
        # torchattacks' APGD returns the clean image where it does not fool the model.
        assert name == "APGD" or not torch.equal(adv, images)
        assert float((adv - images).abs().max()) <= (24 if "n-fgsm" in name else 8) / 255 + 1e-6
        assert 0 <= float(adv.min()) <= float(adv.max()) <= 1


@pytest.mark.parametrize("name", CASES)
def test_attack_call_does_not_change_a_model_in_eval_mode(name: str) -> None:
    model = used().eval()
    trainer = trainer_of(name, model)
    before = Snapshot(model)
    trainer(*images_and_labels())
    assert before.differences() == []


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_attack_call_that_raises_does_not_change_the_model(name: str, call: int) -> None:
    model = used()
    trainer = trainer_of(name, model)
    trainer.set_normalization_used([0.5, 0.5, 0.5], [0.25, 0.25, 0.25])
    images, labels = images_and_labels()
    before = Snapshot(model)
    fails_at(model, call)
    forwards = {"standard": 0, "m-deat": 1, "deat-2": 1, "deat-40%": 1, "m+pgd": 1, "u-fgsm": 1, "m+u-fgsm": 1,
                "n-fgsm": 1, "m+n-fgsm": 1, "gradalign": 1, "fgsm-pgi": 1,
                "m+mart": 1, "FFGSM": 1}  # fmt: skip
    if forwards.get(name, 2) >= call:
        with pytest.raises(RuntimeError, match="out of order"):
            trainer((images - 0.5) / 0.25, labels)
    else:
        trainer((images - 0.5) / 0.25, labels)
    assert before.differences() == []
    assert trainer._normalization_applied is True


def test_training_step_that_raises_restores_the_mode_of_each_module() -> None:
    for name in ("fat-2", "PGD"):
        model = used()
        trainer = trainer_of(name, model)
        before = Snapshot(model)
        fails_at(model, 2)
        with pytest.raises(RuntimeError, match="out of order"):
            trainer.training_step(*images_and_labels(), torch.optim.SGD(model.parameters(), lr=0.1))
        assert before.differences() == []


def test_training_step_updates_only_batchnorm_in_train_mode() -> None:
    for name in ("pgd-2", "free-3", "trades", "PGD", "TPGD"):
        model = used()
        before = Snapshot(model)
        trainer_of(name, model).training_step(*images_and_labels(), torch.optim.SGD(model.parameters(), lr=0.1))
        changed = before.differences()
        assert "value of 1.running_mean" in changed, name
        assert "value of 9.weight" in changed, name
        assert not {"value of 4.running_mean", "value of 4.num_batches_tracked", "value of 0.weight"} & set(changed)
        assert not [change for change in changed if change.startswith("mode")], name


def test_attack_in_train_mode_keeps_frozen_modules_in_eval_mode() -> None:
    """With both BatchNorms frozen each image is crafted on its own; with one alive the batch matters."""

    def alone_and_together(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        attack = deat_rb.PGD(model, start="none", steps=2)
        images, labels = images_and_labels()
        return attack(images[:1], labels[:1]), attack(images, labels)[:1]

    frozen = used()
    frozen[1].eval()
    assert torch.equal(*alone_and_together(frozen))
    assert not torch.equal(*alone_and_together(used()))


def test_preserve_state_restores_modes_buffers_gradients_and_flags() -> None:
    model = used()
    before = Snapshot(model)
    gradients = [parameter.grad for parameter in model.parameters()]

    def change_everything() -> None:
        model.train()
        model[1].eval()
        torch.autograd.backward(model(images_and_labels()[0]).sum())
        for parameter in model.parameters():
            parameter.requires_grad_(not parameter.requires_grad)
        assert len(before.differences()) > 10

    with preserve_state(model):
        change_everything()
    assert before.differences() == []

    def raising() -> None:
        with preserve_state(model):
            change_everything()
            raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        raising()
    assert before.differences() == []
    assert all(old is parameter.grad for old, parameter in zip(gradients, model.parameters(), strict=True))


def test_preserve_modes_restores_the_mode_of_each_module() -> None:
    model = used()
    before = Snapshot(model)

    def raising() -> None:
        with preserve_modes(model):
            model.eval()
            raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        raising()
    assert before.differences() == []


class Counting(nn.Module):
    """Buffers that ``forward`` assigns anew, as a plain running mean does, creates and deletes."""

    mean: Tensor
    count: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("count", None)
        self.register_buffer("first", torch.ones(1))
        self.plain = torch.zeros(3)
        self.linear = nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * images.detach().mean(dim=(0, 2, 3))
        self.plain.add_(self.mean)
        self.cached = self.mean
        self.count = torch.ones(()) if self.count is None else self.count + 1
        if hasattr(self, "first"):
            del self.first
        self.register_buffer("last", images.detach()[-1])
        logits: Tensor = self.linear(images.mean(dim=(2, 3)) - self.mean)
        return logits


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["m+trades", "free-3", "pgd-2", "fat-2", "PGD"])
def test_a_call_restores_buffers_that_forward_assigns_anew(name: str, training: bool) -> None:
    model = nn.Sequential(Counting(), nn.BatchNorm1d(4)).train(training)
    buffers = dict(model.named_buffers())
    before = {key: buffer.clone() for key, buffer in buffers.items()}
    trainer_of(name, model)(*images_and_labels())
    after = dict(model.named_buffers())
    assert list(after) == list(buffers)
    for key, buffer in after.items():
        assert buffer is buffers[key], key
        assert torch.equal(buffer, before[key]), key
    counting = model[0]
    assert isinstance(counting, Counting)
    assert counting.count is None
    assert torch.equal(counting.plain, torch.zeros(3))
    assert not hasattr(counting, "cached")


def test_preserve_state_restores_a_parameter_that_was_replaced() -> None:
    model = nn.Linear(2, 2)
    weight = model.weight
    with preserve_state(model):
        model.weight = nn.Parameter(torch.zeros(2, 2))
    assert model.weight is weight


def test_preserve_state_writes_nothing_that_did_not_change() -> None:
    model = used()
    versions = [tensor._version for tensor in (*model.buffers(), *model.parameters())]
    with preserve_state(model):
        model.eval()
        model(images_and_labels()[0])
    assert [tensor._version for tensor in (*model.buffers(), *model.parameters())] == versions


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pgd-7", "trades", "free-3", "fat-5", "PGD"])
def test_three_threads_attack_one_model_in_eval_mode(name: str) -> None:
    model = used().eval()
    batches = [images_and_labels(40, seed=seed) for seed in range(3)]
    trainer = trainer_of(name, model)
    trainer.crafter.start = "none"
    trainer.crafter.random_start = False  # torchattacks' name of it
    trainer.crafter.omega = 0.0
    alone = [trainer(*batch) for batch in batches]
    before = Snapshot(model)
    with ThreadPoolExecutor(3) as pool:
        for _ in range(10):
            for adv, expected in zip(pool.map(lambda batch: trainer(*batch), batches), alone, strict=True):
                torch.testing.assert_close(adv, expected, rtol=0, atol=0)
    assert before.differences() == []


@pytest.mark.parametrize("name", ["pgd-2", "m+trades", "free-3", "PGD"])
def test_attacks_and_training_name_inference_mode(name: str) -> None:
    model = used()
    trainer = trainer_of(name, model)
    images, labels = images_and_labels()
    with torch.no_grad():
        trainer(images, labels)
        with pytest.raises(DeatError, match=r"training needs gradients, which torch\.no_grad\(\) disables"):
            trainer.training_step(images, labels, torch.optim.SGD(model.parameters(), lr=0.1))
    with torch.inference_mode():
        with pytest.raises(DeatError, match=r"needs gradients, which torch\.inference_mode\(\) disables"):
            trainer(images, labels)
        with pytest.raises(DeatError, match=r"training needs gradients, which torch\.inference_mode\(\) disables"):
            trainer.training_step(images, labels, torch.optim.SGD(model.parameters(), lr=0.1))
        inference_images, inference_labels = images.clone(), labels.clone()
        created = used()
    trainer(inference_images, inference_labels)
    with pytest.raises(DeatError, match=r"the model was created inside torch\.inference_mode\(\)"):
        deat_rb.PGD(created)(images, labels)


class InPlace(nn.Module):
    """A network that standardizes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(images.sub_(0.5).mean(dim=(2, 3)))
        return logits


def test_trades_attack_does_not_change_images_through_a_model_that_works_in_place() -> None:
    images, labels = images_and_labels()
    before = images.clone()
    with pytest.raises(DeatError, match="the model changes its input in place"):
        deat_rb.create("trades", InPlace())(images, labels)
    assert torch.equal(images, before)


def test_three_threads_attack_one_model_that_assigns_attributes() -> None:
    """The last thread to leave restores the model; no thread takes an attribute away from another one."""
    counting = Counting()
    model = nn.Sequential(counting, nn.BatchNorm1d(4)).eval()
    counting.mean.fill_(0.5)
    batches = [images_and_labels(20, seed=seed) for seed in range(3)]
    before = Snapshot(model)
    attack = deat_rb.PGD(model, steps=3)
    with ThreadPoolExecutor(3) as pool:
        for _ in range(10):
            list(pool.map(lambda batch: attack(*batch), batches))
    assert before.differences() == []
    assert "cached" not in vars(counting)
    assert [name for name, _ in counting.named_buffers()] == ["mean", "first"]


def test_preserve_state_nested_in_one_thread_restores_at_each_exit() -> None:
    model = used()
    before = Snapshot(model)
    with preserve_state(model):
        for _ in range(2):
            with preserve_state(model):
                model.train()
                model(images_and_labels()[0])
            assert before.differences() == []
        model.eval()
    assert before.differences() == []
