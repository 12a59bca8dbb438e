"""AutoAttack with fewer iterations, for both sides of a comparison, so that it can be of hundreds of images."""

from __future__ import annotations

from typing import Any

import pyautoattack
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from deat_rb.attacks.autoattack import parts_for
from deat_rb.attacks.functional import logits_and_gradient
from deat_rb.utils import seeding


def shorten(monkeypatch: pytest.MonkeyPatch, *, iterations: int, queries: int) -> None:
    """Limit iterations, and queries of Square, of all AutoAttack suites created from now on."""

    class Short(pyautoattack.AutoAttack):
        def _set_version(self, version: str = "standard") -> None:
            super()._set_version(version)
            for attack in (self.apgd, self.apgd_targeted):
                attack.n_iter = iterations
                attack.n_iter_2 = max(int(0.22 * iterations), 1)
                attack.n_iter_min = max(int(0.06 * iterations), 1)
                attack.size_decr = max(int(0.03 * iterations), 1)
            self.fab.n_iter = iterations
            self.square.n_queries = queries

    monkeypatch.setattr(pyautoattack, "AutoAttack", Short)


def theirs(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    version: str,
    eps: float,
    batch_size: int,
    seed: int,
    norm: str = "Linf",
) -> Tensor:
    """Return which examples are correct after pyautoattack's own evaluation, with our stages and targets."""
    classes = int(model(images[:1]).shape[1])
    suite: Any = pyautoattack.AutoAttack(model, norm=norm, eps=eps, seed=seed,
                                         version="standard" if version == "square" else version)  # fmt: skip
    if version == "square":
        suite.version, suite.attacks_to_run = "custom", ["square"]
    else:
        suite.attacks_to_run = list(parts_for(classes, version)[0])
    suite.apgd_targeted.n_target_classes = suite.fab.n_target_classes = min(9, classes - 1)
    with seeding.preserved():
        _, predicted = suite.run_standard_evaluation(images, labels, batch_size=batch_size)
    model.zero_grad()
    correct: Tensor = predicted == labels
    return correct


def robust_network(classes: int, eps: float) -> tuple[nn.Module, Tensor, Tensor]:
    """A network trained for seconds against FGSM on the digits below ``classes``, and 200 images that it never saw."""
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
            rows = torch.randint(200, len(images), (128,))
            start = (images[rows] + torch.empty(128, 1, 8, 8).uniform_(-eps, eps)).clamp(0, 1)
            _, gradient = logits_and_gradient(model, start, labels[rows], nn.CrossEntropyLoss(reduction="none"))
            optimizer.zero_grad()
            adv = (start + eps * gradient.sign()).clamp(0, 1)
            torch.autograd.backward(nn.functional.cross_entropy(model(adv), labels[rows]))
            optimizer.step()
    return model.eval(), images[:200], labels[:200]
