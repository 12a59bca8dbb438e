"""Small problems in closed form, on which the authors' public code was run once (tests/parity/public_code.json)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

EPS, ALPHA, STEPS = 8 / 255, 2 / 255, 5


def waves(*shape: int, frequency: float) -> Tensor:
    """Numbers in [-1, 1] that look irregular, in double precision and exact in single precision."""
    positions = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(frequency * positions * (1 + positions)).float().double().reshape(shape)


def network() -> nn.Module:
    """Convolution, BatchNorm with running statistics of its own, and 5 logits; for images 3xHxW of any size."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(16, 5),
    ).double()  # fmt: skip
    with torch.no_grad():
        for number, (name, tensor) in enumerate(model.state_dict().items(), start=1):
            if tensor.is_floating_point():
                tensor.copy_(waves(*tensor.shape, frequency=0.1 + number / 7))
            if name == "1.running_var":
                tensor.copy_(tensor.abs() + 0.5)
        model.get_parameter("5.weight").mul_(3)
    return model.train()


def batch(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Images of which many pixels lie at 0 and 1, and labels of which the network predicts some."""
    images = (0.5 + 0.7 * waves(count, 3, size, size, frequency=0.37)).clamp(0, 1)
    with torch.no_grad():
        logits: Tensor = network().eval()(images)
    labels = logits.argmax(dim=1)
    labels[::5] = (labels[::5] + 1) % 5
    return images, labels


def noise(images: Tensor, number: int) -> Tensor:
    """The noise drawn ``number``-th, in [-2, 2]."""
    return 2 * waves(*images.shape, frequency=0.53 + number / 11)


def summary(images: Tensor) -> dict[str, list[float]]:
    """Every 97th value, and each image's sum of absolute values and of values weighted by position."""
    flat = images.detach().flatten(1)
    weights = torch.arange(flat.shape[1], dtype=flat.dtype) / flat.shape[1]
    return {
        "values": flat.flatten()[::97].tolist(),
        "sums": flat.abs().sum(dim=1).tolist(),
        "weighted": (flat * weights).sum(dim=1).tolist(),
    }
