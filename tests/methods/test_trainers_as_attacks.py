"""Trainers used as torchattacks attacks: nesting, saving, normalization, modes and devices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchattacks
from torch import Tensor, nn
from training_problems import Snapshot, images_and_labels, made, normalized, used

import deat_rb
import deat_rb.methods
from deat_rb.training.trainer import Trainer

EPS = 8 / 255


def trainers(model: nn.Module) -> list[Trainer]:
    return [
        deat_rb.create("pgd-2", model),
        deat_rb.create("free-2", model),
        deat_rb.create("m+trades", model),
        deat_rb.AttackTrainer(torchattacks.PGD(model, steps=2)),
    ]


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("first", [True, False])
def test_multiattack_takes_trainers(which: int, first: bool) -> None:
    """MultiAttack itself puts modules into one mode; it must not leave an eval model in train mode, or changed."""
    model = made().eval()
    trainer, other = trainers(model)[which], torchattacks.PGD(model, steps=2)
    images, labels = images_and_labels()
    before = Snapshot(model)
    adv = torchattacks.MultiAttack([trainer, other] if first else [other, trainer])(images, labels)
    assert before.differences() == []
    assert float((adv - images).abs().max()) <= EPS + 1e-6


def test_trainer_save_writes_adversarial_examples(tmp_path: Path) -> None:
    model = used()
    images, labels = images_and_labels(8)
    for trainer in trainers(model):
        before = Snapshot(model)
        path = tmp_path / f"{trainer.attack}.pt"
        trainer.save([(images[:4], labels[:4]), (images[4:], labels[4:])], path, verbose=False)
        saved = torch.load(path, weights_only=True)
        assert saved["adv_inputs"].shape == images.shape
        assert 0 < float((saved["adv_inputs"] - images).abs().max()) <= EPS + 1e-6
        assert torch.equal(saved["labels"], labels)
        assert before.differences() == [], "frozen modules stay frozen"


@pytest.mark.parametrize("name", ["pgd-2", "trades", "u-fgsm", "deat-2", "free-2", "torchattacks"])
def test_trainer_with_normalization_used_gives_the_same_images(name: str) -> None:
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    offset, scale = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)
    images, labels = images_and_labels()
    model = normalized().double().eval()

    def trainer(net: nn.Module) -> Trainer:
        if name == "torchattacks":
            return deat_rb.AttackTrainer(torchattacks.PGD(net, steps=2))
        return deat_rb.create(name, net)

    images = images.double()
    torch.manual_seed(4)
    expected = trainer(model)(images, labels)
    outside = trainer(model.net)
    outside.set_normalization_used(mean, std)
    for _ in range(2):
        torch.manual_seed(4)
        adv = outside((images - offset) / scale, labels)
        assert torch.allclose(adv * scale + offset, expected, atol=1e-6)
        assert float((adv * scale + offset - images).abs().max()) > 0.01


def test_set_model_training_mode_reaches_the_attack() -> None:
    """In eval mode an example does not depend on its batch; in train mode it does, unless BatchNorm is in eval mode."""
    images, labels = images_and_labels()
    for trainer in (deat_rb.create("trades", made(), steps=2), deat_rb.create("deat-2", made(), steps=2),
                    deat_rb.AttackTrainer(torchattacks.PGD(made(), steps=2))):  # fmt: skip

        def alone(trainer: Trainer = trainer) -> bool:
            crafted = []
            for others in (images[1:], images[1:].flip(0)):
                torch.manual_seed(6)
                crafted.append(trainer(torch.cat([images[:1], others]), labels)[0])
            return torch.equal(*crafted)

        trainer.set_model_training_mode(False)
        assert alone()
        trainer.set_model_training_mode(True, batchnorm_training=True, dropout_training=False)
        assert not alone()
        trainer.set_model_training_mode(True, batchnorm_training=False, dropout_training=False)
        assert alone()


def test_set_device_and_set_model_reach_the_attack() -> None:
    for trainer in trainers(made()):
        trainer.set_device("meta")
        assert trainer.crafter.device == "meta"
        other = made(1)
        trainer.set_model(other)
        assert trainer.crafter.model is other


def test_trainer_attributes_may_be_tensors() -> None:
    for trainer in trainers(made()):
        values = [torch.ones(2), torch.zeros(2)]
        trainer.extra = values
        trainer.extra = values[:]
        assert list(trainer._attacks) == ["crafter.0"]


def test_trainer_repr_is_one_line() -> None:
    for trainer in trainers(made()):
        trainer.fit([images_and_labels()], epochs=1, lr=0.01)
        text = repr(trainer)
        assert text.startswith(trainer.attack)
        assert "steps=" in text
        assert "tensor" not in text
        assert len(text) < 1500


@pytest.mark.parametrize("name", ["free-1", "fgsm-pgi"])
def test_a_call_ascends_the_smoothed_loss_as_training_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of eps along the sign of torch's own smoothed cross-entropy, from the clean images."""
    images, labels = images_and_labels(12)
    model = made().eval()
    trainer = deat_rb.create(name, model, eps=0.1, alpha=0.1, label_smoothing=0.8)
    monkeypatch.setattr(trainer, "fresh_start", lambda images, labels: images, raising=False)
    point = images.clone().requires_grad_()
    nn.CrossEntropyLoss(label_smoothing=0.8)(model(point), labels).backward()
    assert point.grad is not None
    expected = (images + 0.1 * point.grad.sign()).clamp(0, 1)
    assert torch.allclose(trainer(images, labels), expected, atol=1e-6)


def test_a_call_takes_the_steps_of_a_replayed_batch() -> None:
    """At a rate of 0 the weights stay, so that both replays attack one network; a second step of 0.06 is cut at 0.1."""
    images, labels = images_and_labels(12)
    model = made()
    model[8] = nn.Identity()  # its dropout would differ between the two
    trainer = deat_rb.create("free-2", model, eps=0.1, alpha=0.06, label_smoothing=0.8)
    called = trainer(images, labels)
    trainer.training_step(images, labels, torch.optim.SGD(model.parameters(), lr=0.0))
    carried = trainer.tensors()["carried"]  # by the second replay's gradient, too
    assert torch.allclose(called - images, carried, atol=1e-6)
    assert float((carried.abs() > 0.09).float().mean()) > 0.1


class LeavesGraph(torchattacks.FGSM):
    """Returns images with a graph, as torchattacks' APGD does, which the update's backward must not traverse."""

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        adv: Tensor = super().forward(images, labels)
        return adv * torch.ones((), requires_grad=True)


def test_adversarial_examples_carry_no_graph() -> None:
    crafted: Tensor = deat_rb.AttackTrainer(LeavesGraph(made())).craft(*images_and_labels())[0]
    assert not crafted.requires_grad
