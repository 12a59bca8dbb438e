"""Small residual networks for 8x8 images enlarged to 32x32, such as the digits.

They train within seconds on one core, to try out methods: ``--arch deat_rb.models.small:narrow``.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class _Block(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False) if inputs != outputs else None

    def forward(self, features: Tensor) -> Tensor:
        """Return features (N, C', H', W') of features (N, C, H, W)."""
        active = functional.relu(self.norm1(features))
        past = features if self.shortcut is None else self.shortcut(active)
        residual: Tensor = self.conv2(functional.relu(self.norm2(self.conv1(active))))
        return residual + past


class _SmallResNet(nn.Sequential):
    """4x4 average pooling, a convolution, two residual blocks with stride 2, and a linear layer."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__(
            nn.AvgPool2d(4),
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            _Block(width, width, 1),
            _Block(width, 2 * width, 2),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, num_classes),
        )


def narrow(num_classes: int) -> nn.Module:
    """Return a network with 12 channels in its first block (11,000 parameters)."""
    return _SmallResNet(num_classes, 12)


def wide(num_classes: int) -> nn.Module:
    """Return a network with 20 channels in its first block (31,000 parameters)."""
    return _SmallResNet(num_classes, 20)
