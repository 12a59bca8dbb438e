"""Facts about a folder of images: sizes, modes, classes, duplicates, and what training skips or refuses."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deat_rb.data.folder_layout import FolderLayout, check_classes, folder_layout, is_split
from deat_rb.data.image_files import ImageLister
from deat_rb.data.image_folder import decoding_pool, open_image
from deat_rb.data.statistics import Progress
from deat_rb.utils.errors import DeatError

RARE = 10
"""A class is rare if it has fewer than 1/10 as many training images as the most frequent class."""


def rare_classes(counts: dict[str, int]) -> list[str]:
    """Return the names of the classes with less than 1/`RARE` of the images of the most frequent one."""
    return [name for name, count in counts.items() if RARE * count < max(counts.values())]


@dataclass(frozen=True)
class ImageInfo:
    """Properties of an image.

    Attributes:
        size: Width and height in pixels, after the EXIF orientation is applied.
        mode: Pillow's mode, such as RGB or L.
        format: Format of the file, such as JPEG.
        turned: Whether the EXIF orientation rotates or mirrors it.
        transparent: Whether it has transparent pixels, which are composited on white.
        digest: SHA-256 of its size and RGB pixels.
    """

    size: tuple[int, int]
    mode: str
    format: str
    turned: bool
    transparent: bool
    digest: str


@dataclass
class PartInfo:
    """Properties of the images of one part of a folder.

    Attributes:
        folder: The folder of the part.
        classes: Number of images per class.
        bytes: Total size of the files.
        widths: Width of each image in pixels, after its EXIF orientation is applied.
        heights: Height of each image in pixels.
        modes: Number of images by Pillow's mode, such as RGB or L.
        formats: Number of images by format, such as JPEG.
        turned: Number of images whose EXIF orientation rotates or mirrors them.
        transparent: Number of images with transparent pixels, which are composited on white.
    """

    folder: str
    classes: dict[str, int]
    bytes: int = 0
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    modes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    turned: int = 0
    transparent: int = 0

    def __len__(self) -> int:
        return sum(self.classes.values())


@dataclass
class FolderInfo:
    """Contents and problems of a folder of images.

    Attributes:
        parts: Properties of ``train``, ``test`` and ``val``, or of ``all`` images if the folder is not split.
        rare: Classes with less than a tenth of the training images of the most frequent class.
        duplicates: Groups of files with identical pixels, as (part, class, path relative to the folder).
        skipped: Number of skipped files by reason.
        problems: Reasons why training would refuse the folder; empty if it would not.
        note: Which folder holds the validation or test images, if its name differs; may be empty.
    """

    parts: dict[str, PartInfo]
    rare: list[str]
    duplicates: list[list[tuple[str, str, str]]]
    skipped: dict[str, int]
    problems: list[str]
    note: str = ""

    def across_parts(self) -> list[list[tuple[str, str, str]]]:
        """Return the duplicates with files in several parts, such as training and test images."""
        return [group for group in self.duplicates if len({part for part, _, _ in group}) > 1]

    def across_classes(self) -> list[list[tuple[str, str, str]]]:
        """Return the duplicates with files of several classes."""
        return [group for group in self.duplicates if len({name for _, name, _ in group}) > 1]


def folder_info(root: str | Path, *, progress: Progress | None = None) -> FolderInfo:
    """Decode all images of a folder and describe it.

    Args:
        root: A folder as for ``--dataset folder``, or a folder ``<class>/**`` that is not split yet.
        progress: Called with the number of decoded images and the total.

    Raises:
        DeatError: The folder does not exist or cannot be read, or contains no folders.
    """
    root = Path(root)
    if not root.is_dir():
        raise DeatError(f"{root} does not exist or is not a folder: give a folder of images")
    problems: list[str] = []
    lister = ImageLister(lambda problem: problems.append(str(problem)))
    names = ImageLister(lambda problem: None).class_names(root)  # beside train and test, a broken link does no harm
    layout = folder_layout(root) if "train" in names and is_split(root, names) else None
    folders = {"all": root} if layout is None else layout.parts()
    files = {part: lister.classes(folder) for part, folder in folders.items()}
    if not any(files.values()):
        raise DeatError(
            f"{root} has no class folders: it must contain <class>/*, or train/<class>/* and test/<class>/*"
        )
    _check(files, layout, lister, problems)
    named = [(part, name, path) for part in files for name, paths in files[part].items() for path in paths]
    parts = {part: PartInfo(str(folders[part]), dict.fromkeys(files[part], 0)) for part in files}
    same: dict[str, list[tuple[str, str, str]]] = {}
    for (part, name, path), image in zip(named, inspect([each[2] for each in named], progress), strict=True):
        if isinstance(image, DeatError):
            problems.append(str(image))
            continue
        _add(parts[part], name, path, image)
        same.setdefault(image.digest, []).append((part, name, os.path.relpath(path, root)))
    train = next(iter(parts.values()))
    return FolderInfo(
        parts=parts,
        rare=rare_classes(train.classes) if train.classes else [],
        duplicates=[group for group in same.values() if len(group) > 1],
        skipped=dict(lister.left_out.most_common()),
        problems=problems,
        note="" if layout is None else layout.note,
    )


def _check(
    files: dict[str, dict[str, list[str]]], layout: FolderLayout | None, lister: ImageLister, problems: list[str]
) -> None:
    """Append problems with links and classes to ``problems``."""
    try:
        lister.count_repeated(files)
    except DeatError as error:
        problems.append(str(error))
    try:
        if layout is not None:
            check_classes(files, layout)
        elif len(files["all"]) < 2:
            raise DeatError(f"there is only one class, {min(files['all'])}: at least two are needed")
    except DeatError as error:
        problems.append(str(error))


def _add(part: PartInfo, name: str, path: str, image: ImageInfo) -> None:
    part.classes[name] += 1
    part.bytes += os.path.getsize(path)
    part.widths.append(image.size[0])
    part.heights.append(image.size[1])
    part.modes[image.mode] += 1
    part.formats[image.format] += 1
    part.turned += image.turned
    part.transparent += image.transparent


def inspect(files: Sequence[str], progress: Progress | None = None) -> Iterator[ImageInfo | DeatError]:
    """Decode image files with threads; yield the properties of each, in order, or why it cannot be read."""
    with decoding_pool() as pool:
        try:
            for number, image in enumerate(pool.map(_inspect, files), 1):
                yield image
                if progress is not None:
                    progress(number, len(files))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _inspect(path: str) -> ImageInfo | DeatError:
    try:
        image = open_image(Path(path))
    except DeatError as error:
        return error
    digest = hashlib.sha256(repr(image.rgb.size).encode() + image.rgb.tobytes()).hexdigest()
    return ImageInfo(image.rgb.size, image.mode, image.format, image.turned, image.transparent, digest)
