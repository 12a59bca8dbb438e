"""Parts of a folder of images: which of its folders have the training, validation and test images."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from deat_rb.data.image_files import ImageLister, image_suffixes
from deat_rb.utils.errors import DeatError

VALIDATION = ("val", "valid", "validation")
"""Names of folders with validation images."""

LAYOUT = "train/<class>/* and test/<class>/* (or val/<class>/*, as in ImageNet)"


@dataclass(frozen=True)
class FolderLayout:
    """The folders of the parts of a dataset.

    Attributes:
        train: Folder of the training images.
        test: Folder of the test images.
        val: Folder of the validation images; None if they are to be held out of the training images.
    """

    train: Path
    test: Path
    val: Path | None = None

    def parts(self) -> dict[str, Path]:
        """Return the folders by the name of their part."""
        return {"train": self.train, "test": self.test, **({} if self.val is None else {"val": self.val})}

    @property
    def note(self) -> str:
        """A note on which folder holds the validation or test images; "" if the names say so."""
        if self.val is not None:
            return f"the validation images are those of {self.val.name}"
        return "" if self.test.name == "test" else f"the test images are those of {self.test.name}, as in ImageNet"


def folder_layout(root: Path) -> FolderLayout:
    """Return the layout of a folder with ``train`` and ``test``, ``val``, ``valid`` or ``validation``.

    With ``test`` and ``val``, ``val`` has the validation images. Without ``test``, ``val`` has the test images, as in
    ImageNet, whose test images have no public labels.

    Raises:
        DeatError: A folder is missing or cannot be read, or there are several folders of validation images.
    """
    if not _is_folder(root):
        raise DeatError(f"the folder of the images, {root}, does not exist: give its present place by --data-dir")
    validation = [name for name in VALIDATION if _is_folder(root / name)]
    if len(validation) > 1:
        raise DeatError(f"--data-dir {root} has the folders {' and '.join(validation)}: keep only one of them")
    val = root / validation[0] if validation else None
    needed = f"it must contain {LAYOUT}; deat-rb data split makes them from <class>/*"
    if not _is_folder(root / "train"):
        raise DeatError(f"--data-dir {root} has no folder train: {needed}")
    if _is_folder(root / "test"):
        return FolderLayout(root / "train", root / "test", val)
    if val is None:
        raise DeatError(f"--data-dir {root} has no folder test: {needed}")
    return FolderLayout(root / "train", val)


def is_split(root: Path, names: Collection[str]) -> bool:
    """Return whether the folders of these names in a folder are parts, not classes.

    A class beside others may be named train: it then has images of its own, not only folders.
    """
    parts = {"train", "test", *VALIDATION} & {*names}
    if parts != {"train"} or len(names) == 1:
        return bool(parts)
    train, suffixes = root / "train", image_suffixes()
    folders = ImageLister(lambda problem: None).class_names(train)
    return bool(folders) and not any(Path(name).suffix.lower() in suffixes for name in os.listdir(train))


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except PermissionError as error:
        raise DeatError(f"{path} cannot be read: {error.strerror}") from error
    except OSError:
        return False


def check_classes(files: Mapping[str, Mapping[str, object]], layout: FolderLayout) -> None:
    """Check that all parts have the same classes, and at least two.

    Args:
        files: The classes of each part, by the name of the part.
        layout: The folders of the parts.

    Raises:
        DeatError: A class is in only one part or in two folders, or there are fewer than two.
    """
    train, folders = files["train"], layout.parts()
    for name, count in Counter(unicodedata.normalize("NFC", name) for name in train).items():
        if count > 1:
            raise DeatError(f"{folders['train']} has the class '{name}' twice, in different Unicode normalization "
                            "forms (NFC, NFD): move the images into one folder")  # fmt: skip
    for part in files:
        differing = sorted(train.keys() ^ files[part].keys())
        if differing:
            composed = [unicodedata.normalize("NFC", name) for name in differing]
            spelling = (
                "" if len(set(composed)) == len(composed) else ", in different Unicode normalization forms (NFC, NFD)"
            )
            raise DeatError(
                f"the class '{differing[0]}' is in only one of {folders['train']} and {folders[part]}{spelling}: "
                "both must have the same classes"
            )
    if len(train) < 2:
        raise DeatError(
            f"{folders['train']} has {f'only one class, {min(train)}' if train else 'no classes'}: "
            "at least two are needed, each in its own folder"
        )
