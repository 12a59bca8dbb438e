"""StatelessAttack: modes, buffers and gradients that a call restores, nesting, and no_grad."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchattacks
from small_problems import batch_for, small_network
from torch import Tensor, nn
from torchattacks.attack import Attack
from training_problems import images_and_labels, made

from deat_rb.attacks.base import AttackMode, StatelessAttack
from deat_rb.attacks.pgd import PGD
from deat_rb.methods.registry import create
from deat_rb.methods.trainers import AttackTrainer
from deat_rb.utils.errors import DeatError


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


class Changed(nn.Module):
    """A linear network whose images or logits are changed."""

    def __init__(self, images: Callable[[Tensor], Any] = lambda x: x, logits: Callable[[Tensor], Any] = lambda x: x):
        super().__init__()
        self.change_images, self.change_logits, self.linear = images, logits, nn.Linear(48, 4)

    def forward(self, images: Tensor) -> Any:
        self.change_images(images)
        return self.change_logits(self.linear(images.flatten(1)))


CHANGED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tuple": (lambda: Changed(logits=lambda out: (out, out)), "the model returns a tuple for 2 images of 3x4x4, not a"),
    "dict": (lambda: Changed(logits=lambda out: {"logits": out}), "the model returns a dict"),
    "1-D": (
        lambda: Changed(logits=lambda out: out[:, 0]),
        r"returns logits of shape \(2,\) for 2 images .* not \(2, K\)",
    ),
    "sub_": (lambda: Changed(lambda x: x.sub_(0.5)), "the model changes its input in place .*: write its forward"),
    "a view": (lambda: Changed(lambda x: x[:, 0].zero_()), "the model changes its input in place"),
    "another size": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 4)),
        "does not accept torch.float32 images of 3x4",
    ),
}


@pytest.mark.parametrize("case", CHANGED)
@pytest.mark.parametrize("method", ["pgd-2", "free-2", "trades", "fat-2", "torchattacks", "PGD"])
def test_call_explains_a_model_that_cannot_be_attacked(case: str, method: str) -> None:
    make, message = CHANGED[case]
    model = make()
    images = IMAGES.clone()
    attack: Attack = (
        AttackTrainer(torchattacks.PGD(model)) if method == "torchattacks"
        else PGD(model) if method == "PGD" else create(method, model)
    )  # fmt: skip
    with pytest.raises(DeatError, match=message):
        attack(images, FOUR)
    assert torch.equal(images, IMAGES)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (FOUR + 1, "label 4 is out of range: labels must be 0 to 3 for 4 classes"),
        (FOUR.float(), "labels must be int64 class indices"),
        (FOUR[:, None], r"labels must be int64 .* not int64 of shape \(4, 1\)"),
        (FOUR[:3], "there are 4 images but 3 labels"),
    ],
)
def test_call_explains_invalid_labels(labels: Tensor, message: str) -> None:
    with pytest.raises(DeatError, match=message):
        PGD(Changed())(IMAGES, labels)


@pytest.mark.parametrize("method", ["pgd-2", "m-deat", "trades", "u-fgsm", "fgsm-pgi"])
def test_call_refuses_images_from_0_to_255(method: str) -> None:
    attack = create(method, made())
    images, labels = images_and_labels(4)
    with pytest.raises(DeatError, match=r"images must be in \[0, 1\], not in \[.*\]: divide by 255"):
        attack(images * 255, labels)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.1, 0.2]
    attack.set_normalization_used(mean, std)
    normalized = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert attack(normalized, labels).shape == images.shape
    with pytest.raises(DeatError, match=r"images must be in \[0, 1\]"):
        attack(normalized * 255, labels)


@pytest.mark.parametrize(
    ("classes", "make", "message"),
    [
        (3, lambda m: torchattacks.APGDT(m), "APGDT needs 4 or more classes for its loss, but the model has 3"),
        (3, lambda m: torchattacks.APGDT(m, n_classes=3), "APGDT needs 4 or more classes"),
        (3, lambda m: torchattacks.AutoAttack(m), "APGDT needs 4 or more classes"),
        (
            2,
            lambda m: torchattacks.APGD(m, loss="dlr"),
            "APGD needs 3 or more classes for its loss, but the model has 2",
        ),
        (5, lambda m: torchattacks.APGDT(m), "APGDT is for 10 classes, .* 5: create APGDT with n_classes=5"),
        (5, lambda m: torchattacks.AutoAttack(m), "APGDT is for 10 classes, .* 5: create AutoAttack with n_classes=5"),
        (
            5,
            lambda m: torchattacks.FAB(m, multi_targeted=True),
            "FAB is for 10 classes, .* create FAB with n_classes=5",
        ),
    ],
)
def test_call_explains_an_attack_for_other_numbers_of_classes(
    classes: int, make: Callable[[nn.Module], Attack], message: str
) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, classes))
    labels = model(IMAGES).argmax(dim=1)
    with pytest.raises(DeatError, match=message):
        AttackTrainer(make(model))(IMAGES, labels)


def test_call_leaves_unexplained_errors_as_they_are() -> None:
    model = Recorder(fails_at=2)
    with pytest.raises(RuntimeError, match=r"^the model fails here"):
        PGD(model, steps=3)(IMAGES, FOUR)


@pytest.mark.parametrize("method", ["PGD", "trainer"])
def test_call_refuses_what_is_no_tensor(method: str) -> None:
    images, labels = images_and_labels()
    attack: Any = PGD(made()) if method == "PGD" else create("pgd-2", made())
    with pytest.raises(DeatError, match="images and labels must be tensors, not ndarray and Tensor"):
        attack(images.numpy(), labels)
    with pytest.raises(DeatError, match="images and labels must be tensors, not Tensor and list"):
        attack(images, labels.tolist())
    with pytest.raises(DeatError, match="images or labels have no values, only shapes"):
        attack(images.to("meta"), labels)
