"""The images that a board measures on: where whoever runs it says that they are. Nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from deat_rb.data.datasets import DATASETS, Dataset, load_data
from deat_rb.data.image_folder import image_suffixes
from deat_rb.leaderboard.entry import Entry
from deat_rb.utils.errors import DeatError

EMBEDDED = "digits"
"""Comes with scikit-learn and needs no folder."""


def loader_of(entry: Entry) -> str:
    """Which of `load_data`'s loaders reads an entry's images: a folder's have a name of the board's own."""
    return entry.dataset if entry.dataset in DATASETS else "folder"


def load_board_dataset(name: str, *, data_dir: Path | None, image_size: int | None) -> Dataset:
    """Loads a data set from where it lies; arguments as for `deat_rb.data.datasets.load_data`.

    Raises:
        DeatError: It does not lie there, or is a folder that no one would get to the end of.
    """
    if name != EMBEDDED:
        if data_dir is None:
            raise DeatError(f"where are the images of {name}? Give their folder by --data-dir: a board does not look "
                            "where a submission says")  # fmt: skip
        if name == "folder":
            check_regular(data_dir)
        else:
            _check_there(name, data_dir)
    return load_data(name, data_dir=data_dir, image_size=image_size)


def check_regular(folder: Path) -> None:
    """Sees to it that images below ``train`` and ``test`` are files, and that no link leads to another folder.

    Raises:
        DeatError: There is a linked folder, or an image that is a pipe or the like, or a folder cannot be read.
    """
    left = [folder / "train", folder / "test"]
    while left:
        here = left.pop()
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    if entry.is_dir():
                        if entry.is_symlink():
                            raise DeatError(f"{entry.path} is a link to a folder, and may lead in circles: put the "
                                            "folder itself there")  # fmt: skip
                        left.append(Path(entry.path))
                    elif os.path.splitext(entry.name)[1].lower() in image_suffixes() and not entry.is_file():
                        raise DeatError(f"{entry.path} is no file: remove it")
        except OSError as error:
            raise DeatError(f"{here} cannot be read ({error.strerror}): give by --data-dir the folder that has "
                            "train/<class>/* and test/<class>/*") from None  # fmt: skip


def _check_there(name: str, folder: Path) -> None:
    from torchvision.datasets import CIFAR10, CIFAR100

    source: Any = {"cifar10": CIFAR10, "cifar100": CIFAR100}.get(name)
    if source is not None and not any((folder / part).exists() for part in (source.base_folder, source.filename)):
        raise DeatError(f"{folder} has neither {source.base_folder} nor {source.filename}, and a board downloads "
                        "nothing: give by --data-dir the folder that has one")  # fmt: skip
