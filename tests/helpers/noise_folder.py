"""A folder of small noise images in three classes, and its batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deat_rb.data.batches import Batches
from deat_rb.data.datasets import Dataset, load_data
from deat_rb.data.image_folder import ImageFolder
from deat_rb.data.images import LabeledImages

SIZE = 12
TRAIN, TEST = 3 * 9, 3 * 2


def make_folder(root: Path) -> Path:
    """Write images of various sizes, PNG and JPEG: 9 training and 2 test images of each class."""
    numbers = np.random.default_rng(0)
    for part, count in (("train", 9), ("test", 2)):
        for name in ("a", "b", "c"):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                height, width = numbers.integers(SIZE, 3 * SIZE, 2)
                noise = numbers.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(noise).save(root / part / name / f"{number}.{'png' if number % 2 else 'jpg'}")
    return root


def load(folder: Path, memory_limit: int | None = 0, **options: Any) -> Dataset:
    """Load the folder; by default its images stay in their files."""
    return load_data("folder", data_dir=folder, image_size=SIZE, memory_limit=memory_limit, **options)


def batches(data: Dataset, **options: Any) -> Batches:
    return Batches(data.train, 8, shuffle=True, augmentation="crop-flip", seed=5, **options)


def epoch_of(loader: Batches, epoch: int, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    loader.set_epoch(epoch)
    return list(loader.starting_at(start))


def assert_equal(some: list[tuple[Tensor, Tensor]], others: list[tuple[Tensor, Tensor]]) -> None:
    assert len(some) == len(others)
    for (images, labels), (other_images, other_labels) in zip(some, others, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def path_of(data: LabeledImages, position: int) -> Path:
    assert isinstance(data, ImageFolder)
    return list(data.files())[position]
