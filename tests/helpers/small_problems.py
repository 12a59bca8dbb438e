"""Networks and images for tests of attacks, and a plain PGD as a reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Plane(nn.Module):
    """Logits (w.x + 1, 0) of images 1x2x2 with w = (1, -2, 3, -4): class 0's margin is w.x + 1."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[1.0, -2.0, 3.0, -4.0], [0.0, 0.0, 0.0, 0.0]]))
            self.linear.bias.copy_(torch.tensor([1.0, 0.0]))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(images.flatten(1))
        return logits


def plane_images() -> tuple[Tensor, Tensor, Tensor]:
    """Images for which, at eps 0.1, everything is known.

    The margin at (.5, .5, .5, .5) is 0 and the best perturbation takes 0.1 * |w|_1 = 1.0 off class 0's margin, where
    [0, 1] leaves room for it.
    """
    images = torch.tensor(
        [
            [0.5, 0.5, 0.8, 0.5],  # margin 0.9: misclassified
            [0.5, 0.5, 0.9, 0.5],  # margin 1.2: robust
            [0.5, 0.1, 0.5, 0.5],  # margin 0.8: misclassified
            [0.5, 0.5, 0.1, 0.5],  # margin -1.2 for class 1: robust
            [0.5, 0.5, 0.2, 0.5],  # margin -0.9 for class 1: misclassified
            [0.5, 0.5, 0.9, 0.5],  # labeled 1: wrong without any attack
            [0.0, 1.0, 1.0, 0.6],  # margin -0.4: class 1
            [0.0, 1.0, 1.0, 0.3],  # margin 0.8, and only w_3 and w_4 find room (1 and 2 are at their ends): loses 0.7
        ]
    ).view(8, 1, 2, 2)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])
    robust = torch.tensor([False, True, False, True, False, False, False, True])
    return images, labels, robust


def small_network() -> nn.Sequential:
    """BatchNorm, dropout and convolutions for 5 classes, with running statistics that are not the initial ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(24, 5),
        )
        model(torch.rand(32, 3, 8, 8))
        return model.eval()


def batch_for(model: nn.Module) -> tuple[Tensor, Tensor]:
    """48 images 3x8x8, labelled as ``model`` sees them, but for 8."""
    images = torch.rand(48, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    labels[::6] = (labels[::6] + 1) % 5
    return images, labels


def plain_pgd(
    model: nn.Module, images: Tensor, labels: Tensor, start: Tensor, eps: float, alpha: float, steps: int, margin: bool
) -> Tensor:
    """Every iterate of every example, without leaving, and the first that is misclassified (steps + 1 for none)."""
    adv, first = start, torch.full_like(labels, steps + 1)
    for step in range(steps + 1):
        adv = adv.detach().requires_grad_()
        logits = model(adv)
        wrong = logits.argmax(1) != labels
        first = torch.where(wrong & (first > steps), step, first)
        if margin:
            others = logits.clone()
            others[torch.arange(len(labels)), labels] = -1e9
            loss = (others.max(1).values - logits[torch.arange(len(labels)), labels]).sum()
        else:
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        gradient = torch.autograd.grad(loss, adv)[0]
        adv = images + torch.clamp(adv.detach() + alpha * gradient.sign() - images, -eps, eps)
        adv = torch.clamp(adv, 0, 1)
    return first


class AttackingCollate:
    """A collate function that attacks in the worker."""

    def __init__(self, attack: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.attack = attack

    def __call__(self, items: list[tuple[Tensor, Tensor]]) -> Tensor:
        images, labels = (torch.stack(tensors) for tensors in zip(*items, strict=True))
        return self.attack(images, labels)
