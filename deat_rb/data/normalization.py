"""Normalization constants of datasets: mean and standard deviation per channel, for images in [0, 1]."""

from __future__ import annotations

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation per channel."""

NORMALIZATION: dict[str, Normalization] = {
    "digits": ((0.3053,) * 3, (0.3236,) * 3),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
