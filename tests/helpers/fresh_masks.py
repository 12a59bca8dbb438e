"""Masks of gradients, written without knowledge of the checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deat_rb import evaluate
from deat_rb.evaluation.report import Report

EPS = 0.15


TRAINED_ON, EVALUATED = 1200, 96


class Rippled(nn.Module):
    """Adds x + a sin(2 pi f x + phase) to every pixel: it moves by 0.02 at most, its derivative by 2 pi f a = 6.7."""

    def __init__(self, inner: nn.Module, amplitude: float = 0.02, frequency: float = 53.7) -> None:
        super().__init__()
        self.inner, self.amplitude, self.frequency = inner, amplitude, frequency
        self.phase = nn.Buffer(2 * math.pi * torch.rand(8, 8, generator=torch.Generator().manual_seed(4)))

    def forward(self, images: Tensor) -> Tensor:
        ripple = torch.sin(2 * math.pi * self.frequency * images + self.phase)
        logits: Tensor = self.inner(images + self.amplitude * ripple)
        return logits


class QuarterTurn(torch.autograd.Function):
    """The identity, whose gradient is that of the image turned by 90 degrees."""

    @staticmethod
    def forward(context: object, images: Tensor) -> Tensor:
        return images.clone()

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:
        return gradient.rot90(1, (-2, -1))


class Turned(nn.Module):
    """Predicts what ``inner`` does, and back-propagates to the wrong pixels."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(QuarterTurn.apply(images))
        return logits


def surest_at_the_boundary(logits: Tensor) -> Tensor:
    """Margins m become m / (1 + m^2): the same class, but beyond 1 the surer the nearer the boundary is."""
    best = logits.topk(2, dim=1).values
    return logits / (1 + (best[:, :1] - best[:, 1:]).square())


class Modest(nn.Module):
    """Its gradient is exact, smooth and never 0, and points away from the boundary."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        return surest_at_the_boundary(self.inner(images))


class Homely(nn.Module):
    """Modest within 1.8 (in L2) of an image that it was trained on, and honest elsewhere."""

    def __init__(self, inner: nn.Module, known: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.known = nn.Buffer(known.flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        logits = self.inner(images)
        distance = torch.cdist(images.detach().flatten(1), self.known).amin(dim=1, keepdim=True)
        return torch.where(distance < 1.8, surest_at_the_boundary(logits), logits)


class BlindPart(nn.Module):
    """Three tenths of its pixels give no gradient, and count all the same."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.seen = nn.Buffer((torch.rand(8, 8, generator=torch.Generator().manual_seed(4)) > 0.3).float())

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(images * self.seen + (images * (1 - self.seen)).detach())
        return logits


@cache
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits as they are, 1x8x8, shuffled."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(bunch.images, dtype=torch.float32).div(16).unsqueeze(1)
    return images[order], torch.tensor(bunch.target)[order]


@cache
def honest() -> nn.Module:
    """A small convolutional network, trained without any defence."""
    images, labels = (part[:TRAINED_ON] for part in digits())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(12, 12, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(192, 10),
        )
        optimiser = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(6):
            for batch in torch.randperm(TRAINED_ON).split(48):
                optimiser.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimiser.step()
    return model.eval().requires_grad_(False)


@cache
def report_of(mask: str, level: str) -> Report:
    masks: dict[str, Callable[[], nn.Module]] = {
        "none": honest,
        "rippled": lambda: Rippled(honest()),
        "turned": lambda: Turned(honest()),
        "modest": lambda: Modest(honest()),
        "homely": lambda: Homely(honest(), digits()[0][:TRAINED_ON]),
        "blind part": lambda: BlindPart(honest()),
    }
    images, labels = (part[TRAINED_ON : TRAINED_ON + EVALUATED] for part in digits())
    return evaluate(masks[mask]().eval(), images, labels, attacks=("fgsm", "pgd-20"), eps=EPS, checks=level)


def flagged(report: Report) -> dict[str, str]:
    return {check.name: check.status for check in report.checks if check.status != "pass"}


MASKED = [
    ("rippled", "quick", "gradients match finite differences", 0.4),
    ("turned", "quick", "gradients match finite differences", 0.4),
    ("modest", "quick", "chance at eps 1/2", 0.4),
    ("homely", "quick", "larger eps finds no more", 0.4),
    ("homely", "full", "Square finds no more", 0.4),
    ("blind part", "quick", "gradients reach all pixels", 0.15),
]
"""Mask, level, the check that fails, and by how much more than the honest network PGD-20 leaves of it."""
