"""AutoAttack's verdicts are those of pyautoattack's own evaluation, example for example."""

from __future__ import annotations

import pyautoattack
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from deat_rb import randomness
from deat_rb.evaluate import evaluate
from deat_rb.whitebox import logits_and_gradient


def robust_network(classes: int, eps: float) -> tuple[nn.Module, Tensor, Tensor]:
    """A network trained for seconds against FGSM on the digits below ``classes``, and test images of them, 1x8x8."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    images, labels = images[labels < classes], labels[labels < classes]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(192, classes)
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(60):
            rows = torch.randint(100, len(images), (128,))
            start = (images[rows] + torch.empty(128, 1, 8, 8).uniform_(-eps, eps)).clamp(0, 1)
            _, gradient = logits_and_gradient(model, start, labels[rows], nn.CrossEntropyLoss(reduction="none"))
            optimizer.zero_grad()
            adv = (start + eps * gradient.sign()).clamp(0, 1)
            torch.autograd.backward(nn.functional.cross_entropy(model(adv), labels[rows]))
            optimizer.step()
    return model.eval(), images[:100], labels[:100]


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "count", "eps"), [(10, 6, 0.15), (4, 10, 0.2)])
def test_verdicts_are_those_of_run_standard_evaluation(classes: int, count: int, eps: float) -> None:
    model, images, labels = robust_network(classes, eps)
    images, labels = images[:count], labels[:count]
    report = evaluate(model, images, labels, attacks="autoattack", eps=eps, batch_size=5, seed=3)

    suite = pyautoattack.AutoAttack(model, eps=eps, seed=3)
    suite.apgd_targeted.n_target_classes = suite.fab.n_target_classes = min(9, classes - 1)
    with randomness.preserved():
        _, predicted = suite.run_standard_evaluation(images, labels, batch_size=5)
    model.zero_grad()

    assert report.verdicts["autoattack"].tolist() == (predicted == labels).tolist()
    left = [int(note.split()[0]) for note in report.results["autoattack"].notes if " correct after " in note]
    assert report.results["natural"].n_correct > left[-1] > 0
    assert classes == 10 or left[-1] > 5, "every part should have two batches to attack"
