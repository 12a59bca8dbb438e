"""Datasets of a board, loaded from a folder given by the board's owner and never downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deat_rb.data.datasets import DATASETS, Dataset, load_data
from deat_rb.data.images import ImageSet, LabeledImages
from deat_rb.leaderboard.entry import Entry
from deat_rb.utils.errors import DeatError

EMBEDDED = "digits"
"""Dataset that comes with scikit-learn and needs no folder."""


def dataset_loader(entry: Entry) -> str:
    """Return the `load_data` name of an entry's dataset: ``folder`` if its name is the board's own."""
    return entry.dataset if entry.dataset in DATASETS else "folder"


def first_test_examples(
    data: Dataset, count: int | None = None, *, logit_of_class: Sequence[int] = ()
) -> tuple[Tensor | LabeledImages, Tensor]:
    """Return the first test images and labels (N,), as `EvalTarget.test_images` does.

    Args:
        data: The dataset.
        count: Number of images; by default all.
        logit_of_class: See `deat_rb.models.class_names.match_classes`.

    Raises:
        DeatError: ``count`` is less than 1 or more than the number of test images.
    """
    test = data.test
    count = len(test) if count is None else count
    if not 1 <= count <= len(test):
        raise DeatError(f"--n-examples {count} is out of range: give 1 to {len(test)}")
    return images_and_logits(test.first(count), logit_of_class)


def images_and_logits(images: LabeledImages, logit_of_class: Sequence[int]) -> tuple[Tensor | LabeledImages, Tensor]:
    """Return images as float32 (N, C, H, W), or unchanged if stored in files, and labels as logit indices (N,)."""
    labels = torch.tensor(logit_of_class)[images.labels] if logit_of_class else images.labels
    return images.tensors()[0] if isinstance(images, ImageSet) else images, labels


def load_board_dataset(
    name: str, *, data_dir: Path | None, image_size: int | None, memory_limit: int | None = None
) -> Dataset:
    """Load the test part of a dataset without downloading it; arguments as for `deat_rb.data.datasets.load_data`.

    Raises:
        DeatError: ``data_dir`` is missing or does not contain the dataset.
    """
    if name != EMBEDDED and data_dir is None:
        raise DeatError(f"--data-dir is missing: give the folder of {name}; paths in submissions are not used")
    if name not in (EMBEDDED, "folder"):
        from torchvision.datasets import CIFAR10, CIFAR100

        source: Any = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
        if not any((Path(str(data_dir)) / part).exists() for part in (source.base_folder, source.filename)):
            raise DeatError(f"{data_dir} has neither {source.base_folder} nor {source.filename}, and data for boards "
                            "are not downloaded: give the right folder with --data-dir")  # fmt: skip
    return load_data(name, data_dir=data_dir, image_size=image_size, memory_limit=memory_limit, test_only=True)


def load_entry_data(entry: Entry, data_dir: Path | None, memory_limit: int | None = None) -> Dataset:
    """Load the dataset that an entry was measured on; arguments as for `deat_rb.data.datasets.load_data`.

    Raises:
        DeatError: ``data_dir`` is missing for an image folder, or the dataset cannot be loaded.
    """
    loader = dataset_loader(entry)
    if loader == "folder" and data_dir is None:
        raise DeatError(f"--data-dir is missing: give the folder of {entry.dataset}")
    size = None if entry.model is None else entry.model.image_size
    return load_data(loader, data_dir=data_dir, image_size=size, memory_limit=memory_limit, test_only=True)
