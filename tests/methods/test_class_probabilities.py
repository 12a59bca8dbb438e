"""Training with class probabilities as labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchattacks
from small_problems import Plane, plane_images
from torch.optim import SGD
from training_problems import Snapshot, images_and_labels, made

import deat_rb
import deat_rb.methods
from deat_rb.utils.errors import DeatError

EPS = 8 / 255


@pytest.mark.parametrize(
    "name", ["standard", "free-2", "m-deat", "pgd-2", "n-fgsm", "trades", "gradalign", "yopo-2-2", "awp"]
)
def test_class_probabilities_of_one_class_train_as_that_class(name: str) -> None:
    images, labels = images_and_labels(8)
    outcomes = []
    for given in (labels, torch.eye(4)[labels]):
        model = made()
        options: dict[str, Any] = {"steps": 1, "awp": 0.01} if name == "awp" else {}
        trainer = deat_rb.create("trades" if name == "awp" else name, model, **options)
        trainer.check_soft_labels()
        torch.manual_seed(0)
        stats = trainer.training_step(images, given, SGD(model.parameters(), lr=0.1))
        outcomes.append((stats, model.state_dict()))
    (hard, weights), (soft, others) = outcomes
    assert int(soft.correct) == int(hard.correct)
    torch.testing.assert_close(soft.loss, hard.loss)
    torch.testing.assert_close(soft.l_x, hard.l_x, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(others, weights, rtol=1e-4, atol=1e-5)


def test_class_probabilities_by_hand() -> None:
    # A row between both classes: the gradient of a plane's loss is (sigmoid(m) - 0.75) w, of L1 norm 10 |...|.
    images, _, _ = plane_images()
    model, share = Plane(), torch.tensor([[0.75, 0.25]]).repeat(8, 1)
    trainer = deat_rb.create("free-1", model, eps=0.1)
    stats = trainer.training_step(images, share, SGD(model.parameters(), lr=0.0))
    margins = images.flatten(1) @ torch.tensor([1.0, -2.0, 3.0, -4.0]) + 1
    assert float(stats.l_x) == pytest.approx(float(10 * (torch.sigmoid(margins) - 0.75).abs().sum()), rel=1e-5)
    assert int(stats.correct) == int((margins > 0).sum()), "those predicted as the class with the larger share"


@pytest.mark.parametrize(
    ("trainer", "part"),
    [
        (lambda model: deat_rb.create("mart", model), "the loss mart"),
        (lambda model: deat_rb.create("liet", model), "the loss nls"),
        (lambda model: deat_rb.create("fat-2", model), "a friendly attack, which stops early at a misclassification,"),
        (lambda model: deat_rb.create("deat-40%", model), "a schedule by training accuracy"),
        (lambda model: deat_rb.AttackTrainer(torchattacks.PGD(model)), "the attack PGD"),
        (lambda model: deat_rb.AttackTrainer(deat_rb.PGD(model, loss="margin")), "the attack PGD on margin"),
    ],
)
def test_class_probabilities_are_refused_before_training(trainer: Any, part: str) -> None:
    images, labels = images_and_labels()
    model = made()
    before = Snapshot(model)
    with pytest.raises(DeatError, match=rf"^batch 1 of epoch 1: the labels are class probabilities, but {part} needs"):
        trainer(model).fit([(images, torch.eye(4)[labels])], epochs=1)
    assert before.differences() == []


def test_class_probabilities_are_refused_by_a_training_step_that_does_not_take_them() -> None:
    with pytest.raises(DeatError, match="but the training step of PriorGuidedTrainer needs one class per image"):
        deat_rb.create("fgsm-pgi", made()).check_soft_labels()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: 2 * rows, "class probabilities must be 0 or more and add up to 1 for each image"),
        (lambda rows: rows - torch.tensor([0.5, -0.5, 0, 0]), "class probabilities must be 0 or more"),
        (lambda rows: torch.nan * rows, "class probabilities must be 0 or more"),
        (lambda rows: rows[:, :3] + 1 / 3 * rows[:, 3:], "labels of 3 class probabilities do not fit 4 classes"),
    ],
)
def test_class_probabilities_must_be_probabilities(change: Any, message: str) -> None:
    images, labels = images_and_labels()
    with pytest.raises(DeatError, match=message):
        deat_rb.create("pgd-1", made()).fit([(images, change(torch.eye(4)[labels]))], epochs=1)
    with pytest.raises(DeatError, match="labels must be int64 class indices"):
        deat_rb.create("pgd-1", made()).fit([(images, labels)], [(images, torch.eye(4)[labels])], epochs=1)
