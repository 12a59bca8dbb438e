"""Splits of a folder of images into training and test images."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from deat_rb.data.folder_info import inspect
from deat_rb.data.folder_layout import VALIDATION, is_split
from deat_rb.data.image_files import ImageLister
from deat_rb.data.statistics import Progress
from deat_rb.utils.errors import DeatError, UnwritableError
from deat_rb.utils.seeding import generator


@dataclass(frozen=True)
class Split:
    """Result of `split_folder`.

    Attributes:
        output: The folder with ``train`` and ``test``.
        counts: Number of training and of test images of each class.
        groups: Number of groups of images that were kept together.
        identical: Number of images that are identical to another one, and are therefore in the same part.
        left_out: Number of skipped files by reason, as of `ImageLister`.
    """

    output: Path
    counts: dict[str, tuple[int, int]]
    groups: int
    identical: int
    left_out: Counter[str]


def split_folder(
    root: str | Path,
    output: str | Path | None = None,
    *,
    test: float = 0.2,
    seed: int = 0,
    by_group: str | None = None,
    copy: bool = False,
    progress: Progress | None = None,
) -> Split:
    """Split a folder ``<class>/**`` into ``train/<class>/**`` and ``test/<class>/**`` of links or copies.

    The split is stratified: the share of test images is about the same in each class. Images with identical pixels are
    put into the same part. The original files are neither moved nor changed.

    Args:
        root: The folder.
        output: The new folder; by default ``root`` with ``-split`` appended.
        test: Share of test images, above 0 and below 1. Each class has at least one training and one test image.
        seed: Seed of the split; the same files and seed give the same split.
        by_group: Regular expression, searched in each path relative to ``root`` (with slashes). Images whose first
            group (or whole match, if the expression has no group) is equal, such as those of one patient or one
            burst, are put into the same part.
        copy: Whether to copy the files; by default, symbolic links to them are created.
        progress: Called with the number of decoded images and the total.

    Raises:
        DeatError: An argument is invalid, a file cannot be read, or a class cannot be split. Nothing is written then.
    """
    root = Path(root)
    output = Path(f"{os.path.abspath(root)}-split") if output is None else Path(output)
    files, left_out = _files_to_split(root, output, test)
    named = [(label, path) for label, paths in enumerate(files.values()) for path in paths]
    relative = [Path(path).relative_to(root).as_posix() for _, path in named]
    keys = [relative] if by_group is None else [_group_keys(relative, by_group)]
    digests = []
    for image in inspect([path for _, path in named], progress):
        if isinstance(image, DeatError):
            raise DeatError(f"{image}; deat-rb data info {root} lists all problems")
        digests.append(image.digest)
    groups = _joined([*keys, digests])
    labels = [label for label, _ in named]
    chosen = _choose(groups, labels, list(files), test, seed, by_group)
    in_test = [False] * len(named)
    for group in chosen:
        for position in groups[group]:
            in_test[position] = True
    _write(output, [(name, path, is_test) for name, (_, path), is_test in zip(relative, named, in_test, strict=True)],
           copy=copy)  # fmt: skip
    counted = Counter(zip(labels, in_test, strict=True))
    same = Counter(digests)
    return Split(
        output=output,
        counts={name: (counted[label, False], counted[label, True]) for label, name in enumerate(files)},
        groups=len(groups),
        identical=sum(count for count in same.values() if count > 1),
        left_out=left_out,
    )


def _files_to_split(root: Path, output: Path, test: float) -> tuple[dict[str, list[str]], Counter[str]]:
    """Check the arguments; return the files of each class, and the number of skipped files by reason."""
    if not 0 < test < 1:
        raise DeatError(f"--test {test:g} is invalid: give a share above 0 and below 1, such as 0.2")
    if not root.is_dir():
        raise DeatError(f"{root} does not exist or is not a folder: give a folder of images in <class>/*")
    new, old = Path(os.path.realpath(output)), Path(os.path.realpath(root))
    if new.is_relative_to(old) or old.is_relative_to(new):
        raise DeatError(f"--output {output} and {root} must not contain each other: give another folder")
    if os.path.lexists(output):
        raise DeatError(f"--output {output} already exists: remove it, or give another folder")
    if not output.absolute().parent.is_dir():
        raise DeatError(f"--output {output} is in a folder that does not exist: create {output.parent}")
    names = ImageLister().class_names(root)
    if is_split(root, names):
        part = next(name for name in ("train", "test", *VALIDATION) if name in names)
        raise DeatError(f"{root} has the folder {part}, so it is already split: give a folder with <class>/*, such as "
                        f"{root / part}, or rename {part} if it is a class")  # fmt: skip
    lister = ImageLister()
    files = lister.classes(root)
    if len(files) < 2:
        raise DeatError(f"{root} has {len(files)} class folders: at least two are needed")
    return files, lister.left_out


def _group_keys(relative: Sequence[str], pattern: str) -> list[str]:
    """Return the group of each path.

    Raises:
        DeatError: The pattern is not a regular expression, or does not match a path.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise DeatError(f"--by-group '{pattern}' is not a regular expression: {error}") from None
    keys = []
    for name in relative:
        match = compiled.search(name)
        key = match and (match[1] if compiled.groups else match[0])
        if not key:
            raise DeatError(f"--by-group '{pattern}' finds no group in '{name}': give a regular expression whose first "
                            "group is the name shared by images that belong together")  # fmt: skip
        keys.append(key)
    return keys


def _joined(keys: Sequence[Sequence[str]]) -> list[list[int]]:
    """Group items that share any of their keys, directly or through other items; return lists of indices."""
    count = len(keys[0])
    parent = list(range(count))

    def find(item: int) -> int:
        while parent[item] != item:
            parent[item] = item = parent[parent[item]]
        return item

    for values in keys:
        first: dict[str, int] = {}
        for item, value in enumerate(values):
            parent[find(item)] = find(first.setdefault(value, item))
    groups: dict[int, list[int]] = {}
    for item in range(count):
        groups.setdefault(find(item), []).append(item)
    return list(groups.values())


def _choose(
    groups: Sequence[Sequence[int]],
    labels: Sequence[int],
    names: Sequence[str],
    share: float,
    seed: int,
    by_group: str | None,
) -> set[int]:
    """Choose groups of test images.

    In random order, a group is chosen if that brings the numbers of test images of its classes closer to their targets,
    in the sum of squared relative distances. A class that then has no test (or no training) images gets its smallest
    group that can be moved.

    Raises:
        DeatError: A class has no two groups that can be put into different parts.
    """
    sizes = [Counter(labels[position] for position in group) for group in groups]
    totals = Counter(labels)
    target = {label: min(max(int(share * total + 0.5), 1), max(total - 1, 1)) for label, total in totals.items()}
    missing: Counter[int] = Counter(target)
    chosen: set[int] = set()

    def move(group: int) -> None:
        if group in chosen:
            chosen.remove(group)
            missing.update(sizes[group])
        else:
            chosen.add(group)
            missing.subtract(sizes[group])

    order = torch.randperm(len(groups), generator=generator(seed, "data-split")).tolist()
    for group in order:
        gain = sum(
            (missing[label] ** 2 - (missing[label] - size) ** 2) / target[label] ** 2
            for label, size in sizes[group].items()
        )
        if gain > 0:
            move(group)

    def in_part(label: int, is_test: bool) -> int:
        in_test = target[label] - missing[label]
        return in_test if is_test else totals[label] - in_test

    for is_test in (True, False):
        for label in totals:
            if in_part(label, is_test):
                continue
            movable = [
                group
                for group in order
                if label in sizes[group]
                and all(in_part(other, not is_test) > size for other, size in sizes[group].items())
            ]
            if not movable:
                reason = "has only one image" if totals[label] == 1 else (
                    "has only images that belong together" + (f" by --by-group '{by_group}'" if by_group else
                                                              " because their pixels are identical"))  # fmt: skip
                raise DeatError(f"the class '{names[label]}' {reason}, which cannot be split: add images, or remove it")
            move(min(movable, key=lambda group: sum(sizes[group].values())))
    return chosen


def _write(output: Path, files: Sequence[tuple[str, str, bool]], *, copy: bool) -> None:
    """Create the folder, first under a temporary name, so that it is complete or does not exist."""
    scratch = Path(tempfile.mkdtemp(dir=output.absolute().parent, prefix=f".{output.name}."))
    try:
        for name, source, is_test in files:
            place = scratch / ("test" if is_test else "train") / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if copy:
                shutil.copy2(source, place)
            else:
                folder, name_there = os.path.split(source)
                place.symlink_to(Path(os.path.realpath(folder), name_there))  # not abspath: folder may be LINK/..
        scratch.chmod(0o755)
        scratch.rename(output)
    except OSError as error:
        advice = "" if copy else "; use --copy where links are not supported"
        raise UnwritableError(f"{output} cannot be written: {error.strerror or error}{advice}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
