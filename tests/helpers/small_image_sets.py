"""Small sets of images: in memory, recognizable by their pixels, and in a file of extra data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deat_rb.data.batches import Batches
from deat_rb.data.images import ImageSet


def image_set(counts: tuple[int, ...]) -> ImageSet:
    """Return images whose only pixel is their position, with mixed classes."""
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    labels = labels[torch.arange(len(labels)) * 7 % len(labels)]
    return ImageSet(torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1), labels)


def positions(data: ImageSet) -> list[int]:
    return data.images.flatten().tolist()


def grids(count: int, channels: int = 3) -> ImageSet:
    """Return 5x5 images of which no two pixels are equal within an image, and none is black."""
    stream = torch.Generator().manual_seed(0)
    rows = [torch.randperm(255, generator=stream)[: channels * 25] + 1 for _ in range(count)]
    images = torch.stack(rows).view(count, channels, 5, 5)
    return ImageSet(images.to(torch.uint8), torch.arange(count) % 3)


def epoch_of(batches: Batches, epoch: int = 0) -> tuple[Tensor, Tensor]:
    batches.set_epoch(epoch)
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def write_extra(path: Path, count: int = 40, seed: int = 0) -> Path:
    """Write images of noise with the labels of digits."""
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, count)
    np.savez(path, image=images, label=labels)
    return path
