"""The dataset that a board measures on: from the folder the board's owner names, never downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from deat_rb.data.datasets import DATASETS, Dataset, load_data
from deat_rb.data.images import interleave_classes
from deat_rb.leaderboard.entry import Entry
from deat_rb.utils.errors import DeatError

EMBEDDED = "digits"
"""Comes with scikit-learn and needs no folder."""


def dataset_loader(entry: Entry) -> str:
    """Return the `load_data` name of an entry's dataset; image folders have a name of the board's own."""
    return entry.dataset if entry.dataset in DATASETS else "folder"


def first_test_examples(data: Dataset, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the first test images, (N, C, H, W), and labels (N,), in the order of `EvalTarget.examples`.

    Raises:
        DeatError: There are fewer than ``count``.
    """
    test = interleave_classes(data.test)
    count = len(test) if count is None else count
    if not 1 <= count <= len(test):
        raise DeatError(f"--n-examples {count} is not possible (1 to {len(test)} test images)")
    return test.first(count).tensors()


def load_board_dataset(name: str, *, data_dir: Path | None, image_size: int | None) -> Dataset:
    """Load a dataset from where it lies; arguments as for `deat_rb.data.datasets.load_data`.

    Raises:
        DeatError: It is not there.
    """
    if name != EMBEDDED and data_dir is None:
        raise DeatError(f"--data-dir is missing: give the folder of {name}; a board does not use the path in a "
                        "submission")  # fmt: skip
    if name not in (EMBEDDED, "folder"):
        from torchvision.datasets import CIFAR10, CIFAR100

        source: Any = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
        if not any((Path(str(data_dir)) / part).exists() for part in (source.base_folder, source.filename)):
            raise DeatError(f"{data_dir} has neither {source.base_folder} nor {source.filename}, and a board downloads "
                            "nothing: give the right folder by --data-dir")  # fmt: skip
    return load_data(name, data_dir=data_dir, image_size=image_size)


def load_entry_data(entry: Entry, data_dir: Path | None) -> Dataset:
    """Load the dataset that an entry was measured on.

    Raises:
        DeatError: It is an image folder and ``data_dir`` is missing, or it cannot be loaded.
    """
    loader = dataset_loader(entry)
    if loader == "folder" and data_dir is None:
        raise DeatError(f"--data-dir is missing: give the folder of {entry.dataset}")
    return load_data(loader, data_dir=data_dir, image_size=None if entry.model is None else entry.model.image_size)
