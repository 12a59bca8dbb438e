"""A plain, an honestly robust and many deceptive networks on scikit-learn's digits in their own 8x8.

The deceptive ones wrap a network and hide its adversarial examples from white-box attacks.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import deat_rb

EPS = 0.2
TEST = slice(1597, 1797)


@cache
def digits() -> tuple[Tensor, Tensor]:
    """All 1,797 images 1x8x8 in [0, 1], and their labels."""
    bunch = load_digits()
    return torch.from_numpy(bunch.images).float()[:, None] / 16, torch.from_numpy(bunch.target).long()


def held_out(count: int) -> tuple[Tensor, Tensor]:
    """Those that no network here was trained on."""
    images, labels = digits()
    return images[TEST][:count], labels[TEST][:count]


def _network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def _trained(method: str, epochs: int, **options: Any) -> nn.Module:
    images, labels = digits()
    images, labels = images[: TEST.start], labels[: TEST.start]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _network()
        trainer = deat_rb.create(method, model, eps=EPS, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        model.train()
        for _ in range(epochs):
            for rows in torch.randperm(len(images)).split(64):
                trainer.training_step(images[rows], labels[rows], optimizer)
    return model.eval()


@cache
def plain() -> nn.Module:
    """Trained without an attack: 0 % robust."""
    return _trained("standard", 8)


@cache
def robust() -> nn.Module:
    """Trained against PGD."""
    return _trained("pgd-3", 12, alpha=0.1)


class _Around(nn.Module):
    """A wrapper of a network, which is called as ``self.net``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.inside = net

    def net(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inside(images)
        return logits


class Saturated(_Around):
    """Logits so far apart that the cross-entropy's gradient underflows to zero."""

    def __init__(self, net: nn.Module, scale: float = 1e3) -> None:
        super().__init__(net)
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * self.net(images)


class Quantised(_Around):
    """Rounds its input to a few grey values, through which no gradient comes."""

    def __init__(self, net: nn.Module, levels: int = 8) -> None:
        super().__init__(net)
        self.levels = levels

    def forward(self, images: Tensor) -> Tensor:
        return self.net((images * self.levels).round() / self.levels)


class Noisy(_Around):
    """Adds fresh noise to its input on every call, in eval mode as well."""

    def __init__(self, net: nn.Module, std: float = 0.1) -> None:
        super().__init__(net)
        self.std = std

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images + self.std * torch.randn_like(images))


class Probabilities(_Around):
    """Ends in a softmax."""

    def __init__(self, net: nn.Module, sharpness: float = 1.0) -> None:
        super().__init__(net)
        self.sharpness = sharpness

    def forward(self, images: Tensor) -> Tensor:
        return (self.sharpness * self.net(images)).softmax(dim=1)


class Detached(_Around):
    """Cuts the graph at its input."""

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.detach())


class Decoy(_Around):
    """Classifies without a gradient; the one that there is comes from an unrelated linear map of no weight."""

    map: Tensor

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.register_buffer("map", torch.randn(64, 10, generator=torch.Generator().manual_seed(1)))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.detach()) + 1e-4 * images.flatten(1) @ self.map


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, images: Tensor) -> Tensor:
        return images.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


class Reversed(_Around):
    """Has a gradient of the opposite sign."""

    def forward(self, images: Tensor) -> Tensor:
        return self.net(_Reversed.apply(images))


class Shattered(_Around):
    """Adds a ripple, too small to matter and so steep that it is all of the gradient."""

    def __init__(self, net: nn.Module, height: float = 0.02, frequency: float = 5e3) -> None:
        super().__init__(net)
        self.height, self.frequency = height, frequency

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images + self.height * torch.sin(self.frequency * images))


class NotANumber(_Around):
    """Has the derivative of a square root at zero, which is not finite."""

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images + (0 * images).sqrt())


class StuckInTraining(_Around):
    """Ignores eval(), so that BatchNorm keeps updating its statistics."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(copy.deepcopy(net))
        self.train()

    def train(self, mode: bool = True) -> StuckInTraining:
        super().train(True)
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


class BatchStatistics(_Around):
    """Subtracts the batch mean, so that predictions depend on the other images."""

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images - 0.5 * images.mean(dim=0) + 0.15)


class WantsNormalised(_Around):
    """Expects normalized images."""

    def __init__(self, net: nn.Module, mean: float = 0.5, std: float = 0.5) -> None:
        super().__init__(net)
        self.mean, self.std = mean, std

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images * self.std + self.mean)


class Learning(_Around):
    """Changes a buffer with every call."""

    calls: Tensor

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.net(images)


class LooksWhetherAttacked(_Around):
    """Uses another network when a gradient is requested."""

    def __init__(self, net: nn.Module, other: nn.Module) -> None:
        super().__init__(net)
        self.other = other

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.other(images) if images.requires_grad else self.net(images)
        return logits
