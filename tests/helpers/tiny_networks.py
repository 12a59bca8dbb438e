"""Networks of a few parameters that a test names as ``tiny_networks:Class``."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Mean(nn.Module):
    """Logits for three classes: three times the mean of each channel, so that a red image is of class 0."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((num_classes,), 3.0))

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3)) * self.scale


class Bright(nn.Module):
    """Takes grey images for class 0 if they are brighter than 1/2, for class 1 if they are not."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(0.5))

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[1] == 1
        grey = images.mean(dim=(1, 2, 3))
        return torch.stack([grey, self.threshold.expand(len(grey))], dim=1)


class Strided(nn.Module):
    """A convolution of stride 4, BatchNorm and a linear layer for 3x32x32 images; 2,282 parameters for 10 classes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 5, stride=4)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * 7 * 7, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.bn(self.conv(images)).relu().flatten(1))
        return logits
