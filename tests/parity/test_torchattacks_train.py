"""Calling a trainer crafts what torchattacks does at the same seed: bit for bit where the operations are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor
from training_problems import images_and_labels, made

import deat_rb

EPS = 8 / 255
SIZES = [4, 7, 32]


def crafted(attack: Any, count: int, double: bool = False) -> Tensor:
    images, labels = images_and_labels(count, size=9)
    torch.manual_seed(17)
    adv: Tensor = attack(images.double() if double else images, labels)
    assert float((adv - images).abs().max()) > EPS / 4
    return adv


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("training", [True, False])
def test_pgd_7_is_pgd(count: int, training: bool) -> None:
    model = made().train(training)
    trainer = deat_rb.create("pgd-7", model, attack_mode="eval")
    theirs = torchattacks.PGD(model, eps=EPS, alpha=2 / 255, steps=7)
    assert torch.equal(crafted(trainer, count), crafted(theirs, count))


@pytest.mark.parametrize("eps", [4 / 255, 0.1])
def test_other_radii_and_steps(eps: float) -> None:
    trainer = deat_rb.create("pgd-3", made(), eps=eps, alpha=eps / 3, attack_mode="eval")
    assert torch.equal(crafted(trainer, 7), crafted(torchattacks.PGD(made(), eps=eps, alpha=eps / 3, steps=3), 7))


@pytest.mark.parametrize("count", SIZES)
def test_u_fgsm_is_ffgsm(count: int) -> None:
    """Bit for bit once ours has drawn the normal noise that theirs draws first and throws away."""
    trainer = deat_rb.create("u-fgsm", made(), attack_mode="eval")
    images, labels = images_and_labels(count, size=9)
    theirs = torchattacks.FFGSM(made(), eps=EPS, alpha=10 / 255)
    torch.manual_seed(17)
    torch.randn_like(images)
    adv = trainer(images, labels)
    assert torch.equal(adv, crafted(theirs, count))


@pytest.mark.parametrize("count", SIZES)
def test_trades_is_tpgd(count: int) -> None:
    """In double precision: near its start KL's gradient is rounding noise, and the two write KL differently."""
    trainer = deat_rb.create("trades", made().double(), attack_mode="eval")
    theirs = torchattacks.TPGD(made().double(), eps=EPS, alpha=2 / 255, steps=10)
    ours = crafted(trainer, count, double=True)
    assert float((ours - crafted(theirs, count, double=True)).abs().max()) < 1e-12


@pytest.mark.parametrize("name", ["PGD", "TPGD", "MIFGSM", "DIFGSM", "APGD", "FFGSM"])
def test_a_trainer_around_torchattacks_gives_its_very_images(name: str) -> None:
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


def test_guided_pgd_is_pgd_at_the_steps_it_has() -> None:
    """alpha* = max(2/255, eps / 3) with three steps."""
    trainer = deat_rb.create("m+pgd", made(), attack_mode="eval")
    trainer.steps = 3
    theirs = torchattacks.PGD(made(), eps=EPS, alpha=EPS / 3, steps=3)
    assert torch.equal(crafted(trainer, 7), crafted(theirs, 7))
