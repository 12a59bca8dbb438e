"""Datasets of a board, loaded from a folder given by the board's owner and never downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deat_rb.data.datasets import DATASETS, Dataset, load_data
from deat_rb.leaderboard.entry import Entry
from deat_rb.utils.errors import DeatError

EMBEDDED = "digits"
"""Dataset that comes with scikit-learn and needs no folder."""


def dataset_loader(entry: Entry) -> str:
    """Return the `load_data` name of an entry's dataset: ``folder`` if its name is the board's own."""
    return entry.dataset if entry.dataset in DATASETS else "folder"


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
