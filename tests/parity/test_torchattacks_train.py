"""Called as attacks, trainers and PGD equal torchattacks' at the same seed, bit for bit where the operations agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn
from training_problems import images_and_labels, made

import deat_rb

EPS = 8 / 255
SIZES = [4, 7, 32]


def adversarial(attack: Any, count: int, double: bool = False) -> Tensor:
    images, labels = images_and_labels(count, size=9)
    torch.manual_seed(17)
    adv: Tensor = attack(images.double() if double else images, labels)
    assert float((adv - images).abs().max()) > EPS / 4
    return adv


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("training", [True, False])
def test_create_pgd_7_equals_torchattacks_pgd(count: int, training: bool) -> None:
    model = made().train(training)
    trainer = deat_rb.create("pgd-7", model, attack_mode="eval")
    theirs = torchattacks.PGD(model, eps=EPS, alpha=2 / 255, steps=7)
    assert torch.equal(adversarial(trainer, count), adversarial(theirs, count))


@pytest.mark.parametrize("eps", [4 / 255, 0.1])
def test_create_pgd_equals_torchattacks_pgd_at_other_eps(eps: float) -> None:
    trainer = deat_rb.create("pgd-3", made(), eps=eps, alpha=eps / 3, attack_mode="eval")
    assert torch.equal(
        adversarial(trainer, 7), adversarial(torchattacks.PGD(made(), eps=eps, alpha=eps / 3, steps=3), 7)
    )


@pytest.mark.parametrize("count", SIZES)
def test_create_u_fgsm_equals_torchattacks_ffgsm(count: int) -> None:
    """Bit for bit after drawing the normal noise that theirs draws first and discards."""
    trainer = deat_rb.create("u-fgsm", made(), attack_mode="eval")
    images, labels = images_and_labels(count, size=9)
    theirs = torchattacks.FFGSM(made(), eps=EPS, alpha=10 / 255)
    torch.manual_seed(17)
    torch.randn_like(images)
    adv = trainer(images, labels)
    assert torch.equal(adv, adversarial(theirs, count))


@pytest.mark.parametrize("count", SIZES)
def test_create_trades_equals_torchattacks_tpgd(count: int) -> None:
    """In double precision: near its start KL's gradient is rounding noise, and the two write KL differently."""
    trainer = deat_rb.create("trades", made().double(), attack_mode="eval")
    trainer.crafter.clamp_start = True  # TPGD clamps its start, which TRADES' public code does not
    theirs = torchattacks.TPGD(made().double(), eps=EPS, alpha=2 / 255, steps=10)
    ours = adversarial(trainer, count, double=True)
    assert float((ours - adversarial(theirs, count, double=True)).abs().max()) < 1e-12


@pytest.mark.parametrize("name", ["PGD", "TPGD", "MIFGSM", "DIFGSM", "APGD", "FFGSM"])
def test_attack_trainer_returns_the_images_of_its_torchattacks_attack(name: str) -> None:
    model = made().eval()
    images, _ = images_and_labels(7, size=9)
    with torch.no_grad():
        labels = model(images).argmax(dim=1)  # APGD attacks what is classified correctly only
    alone = getattr(torchattacks, name)(model, eps=0.3)
    trainer = deat_rb.AttackTrainer(getattr(torchattacks, name)(model, eps=0.3))
    torch.manual_seed(17)
    expected = alone(images, labels)
    torch.manual_seed(17)
    assert torch.equal(trainer(images, labels), expected)
    assert float((expected - images).abs().max()) > EPS / 4


def test_create_m_pgd_equals_torchattacks_pgd_of_as_many_steps() -> None:
    """alpha* = max(2/255, eps / 3) with three steps."""
    trainer = deat_rb.create("m+pgd", made(), attack_mode="eval")
    trainer.steps = 3
    theirs = torchattacks.PGD(made(), eps=EPS, alpha=EPS / 3, steps=3)
    assert torch.equal(adversarial(trainer, 7), adversarial(theirs, 7))


def accuracy_under(attack: Any, model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> float:
    """Accuracy of the model in eval mode on adversarial examples generated in batches."""
    torch.manual_seed(3)
    adv = torch.cat(
        [attack(images[at : at + batch_size], labels[at : at + batch_size]) for at in range(0, len(images), batch_size)]
    )
    with torch.no_grad():
        return float((model(adv).argmax(dim=1) == labels).float().mean())


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A network with BatchNorm in eval mode, trained on 200 images of 4 classes, and these images."""
    images, labels = images_and_labels(200)
    model = made()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(images), labels))
        optimizer.step()
    return model.eval(), images, labels


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 8, 200])
@pytest.mark.parametrize("trainer", [False, True])
def test_pgd_on_an_eval_model_is_as_strong_as_torchattacks_at_every_batch_size(
    trained: tuple[nn.Module, Tensor, Tensor], batch_size: int, trainer: bool
) -> None:
    model, images, labels = trained
    if batch_size == 1:
        images, labels = images[:60], labels[:60]
    sizes: dict[str, Any] = {"eps": 0.12, "alpha": 0.03, "steps": 5}
    ours = deat_rb.create("pgd-5", model, **sizes) if trainer else deat_rb.PGD(model, **sizes)
    theirs = torchattacks.PGD(model, **sizes)
    accuracy = accuracy_under(ours, model, images, labels, batch_size)
    assert accuracy == accuracy_under(theirs, model, images, labels, batch_size)
    assert 0 < accuracy < 0.95
    # In train mode a single image is classified by its own statistics, and the attack means nothing to the model.
    if batch_size == 1:
        weak = deat_rb.PGD(model, **sizes, attack_mode="train")
        assert accuracy_under(weak, model, images, labels, batch_size) > accuracy


@pytest.mark.parametrize("training", [True, False])
def test_multiattack_of_deat_rb_attacks_equals_that_of_torchattacks(
    trained: tuple[nn.Module, Tensor, Tensor], training: bool
) -> None:
    model, images, labels = trained
    theirs = torchattacks.MultiAttack([torchattacks.FGSM(model, eps=EPS), torchattacks.PGD(model, eps=EPS, steps=7)])
    ours = torchattacks.MultiAttack([torchattacks.FGSM(model, eps=EPS), deat_rb.create("pgd-7", model, eps=EPS)])
    model.train(training)
    try:
        torch.manual_seed(3)
        expected = theirs(images[:40], labels[:40])
        torch.manual_seed(3)
        assert torch.equal(ours(images[:40], labels[:40]), expected)
        assert model.training == training
    finally:
        model.eval()


def test_pgd_follows_the_mode_of_the_model_unless_attack_mode_says_otherwise() -> None:
    model, (images, labels) = made(), images_and_labels(6)
    adv = {}
    for training in (True, False):
        for mode in (None, "train", "eval"):
            model.train(training)
            model[8].eval()  # no dropout, so that train mode is deterministic
            adv[training, mode] = deat_rb.PGD(model, start="none", steps=2, attack_mode=mode)(images, labels)
    assert torch.equal(adv[True, None], adv[True, "train"])
    assert torch.equal(adv[False, None], adv[False, "eval"])
    assert torch.equal(adv[True, "eval"], adv[False, "eval"])
    assert not torch.equal(adv[True, "train"], adv[True, "eval"])
