"""Listing of the image files in folders."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path

from deat_rb.utils.errors import DeatError

FORMATS = {"AVIF", "BMP", "DIB", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP"}
"""Pillow formats that are read if the installed Pillow, or pillow-heif, supports them."""

SYSTEM_FOLDERS = {"@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX", "lost+found", "System Volume Information"}
"""Folders created by operating systems and network drives; they are skipped like hidden files."""


PARTS = {"train": "training", "test": "test", "val": "validation"}
"""Parts of a dataset, with the adjectives for their images."""


@cache
def readable_formats() -> tuple[str, ...]:
    """Return those `FORMATS` that can be read, in the order in which Pillow tries them."""
    from PIL import Image

    Image.init()
    with suppress(ImportError):  # unlike Pillow's own plugins, it must be registered
        import_module("pillow_heif").register_heif_opener()
    return tuple(name for name in Image.ID if name in FORMATS and name in Image.OPEN)


@cache
def image_suffixes() -> frozenset[str]:
    """Return the file suffixes, such as ``.png``, of `readable_formats`."""
    from PIL import Image

    formats = readable_formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def _raise(problem: DeatError) -> None:
    raise problem


class ImageLister:
    """Lists the image files in folders.

    Links are followed. Hidden files, `SYSTEM_FOLDERS` and files of other types are skipped. A folder that is reached
    twice, even from another folder listed by the same object, is an error.

    Args:
        report: Called with each error; listing then continues without the file or folder. By default, errors are
            raised.

    Attributes:
        left_out: Number of skipped files by reason: "hidden", "outside the class folders", or the suffix.
    """

    def __init__(self, report: Callable[[DeatError], None] = _raise) -> None:
        self.left_out: Counter[str] = Counter()
        self._report = report
        self._visited: dict[tuple[int, int], str] = {}
        self._links: set[str] = set()

    def class_names(self, root: Path) -> list[str]:
        """Return the names of the class folders in ``root``, in alphabetical order.

        Raises:
            DeatError: ``root`` cannot be read, or was listed before.
        """
        classes, others = self._scan(str(root))
        if others:
            self.left_out["outside the class folders"] += len(others)
        return classes

    def classes(self, root: Path) -> dict[str, list[str]]:
        """Return the image files ``<class>/**`` of each class, with classes and files in alphabetical order.

        Raises:
            DeatError: A folder cannot be read or is reached twice through a link, a class has no images or a name that
                is not UTF-8, a link is broken, or an image is not a regular file.
        """
        files = {}
        for name in self.class_names(root):
            check_utf8(root / name, "the class folder")
            before = self.left_out.copy()
            files[name] = self.files(root / name)
            if not files[name]:
                others = describe_left_out(self.left_out - before)
                self._report(
                    DeatError(f"the class folder {root / name} has no images{others and f' ({others})'}: add some, or "
                              "remove it")
                )  # fmt: skip
        return files

    def files(self, folder: Path) -> list[str]:
        """Return the image files ``**`` of a folder, in alphabetical order.

        Raises:
            DeatError: See `classes`.
        """
        folders = sorted(self._walk(str(folder)))
        return [os.path.join(path, name) for path, names in folders for name in names]

    def count_repeated(self, parts: Mapping[str, Mapping[str, Sequence[str]]]) -> int:
        """Count the links whose targets are listed as well, so that the same image counts more than once.

        Args:
            parts: The result of `classes` for each part, "train", "test" and "val".

        Raises:
            DeatError: A link points to an image of another part or class.
        """
        if not self._links:
            return 0
        listed = [(path, (part, name)) for part in parts for name in parts[part] for path in parts[part][name]]
        real_folder = cache(os.path.realpath)
        places = {
            os.path.join(real_folder(os.path.dirname(path)), os.path.basename(path)): (path, place)
            for path, place in listed
            if path not in self._links
        }
        repeated = 0
        for path, place in (each for each in listed if each[0] in self._links):
            first, first_place = places.setdefault(os.path.realpath(path), (path, place))
            repeated += first != path
            if place != first_place:
                names = [word for part, word in PARTS.items() if part in (place[0], first_place[0])]
                where = (
                    "in two classes" if place[0] == first_place[0] else f"in the {names[0]} and the {names[1]} images"
                )
                raise DeatError(f"{first} and {path} are the same file (through a link) {where}: remove one of them")
        return repeated

    def _walk(self, folder: str) -> Iterator[tuple[str, list[str]]]:
        """Yield each folder with the names of its image files."""
        try:
            subfolders, names = self._scan(folder)
        except DeatError as problem:
            self._report(problem)
            return
        images = []
        for name in names:
            path = os.path.join(folder, name)
            suffix = os.path.splitext(name)[1].lower()
            if suffix not in image_suffixes():
                self.left_out[suffix or "no suffix"] += 1
            elif os.path.isfile(path):
                images.append(name)
            else:
                self._report(DeatError(f"{path} is not a regular file: remove it"))
        yield folder, images
        for name in subfolders:
            yield from self._walk(os.path.join(folder, name))

    def _scan(self, folder: str) -> tuple[list[str], list[str]]:
        """Return the sorted names of a folder's visible subfolders and files; raise if it was visited before."""
        try:
            state = os.stat(folder)
            first = self._visited.setdefault((state.st_dev, state.st_ino), folder)
            if first != folder and state.st_ino:  # 0 on file systems without inode numbers
                raise DeatError(f"{folder} is the same folder as {first}, through a link: remove the link, "
                                "which would add the same images twice")  # fmt: skip
            names: tuple[list[str], list[str]] = ([], [])
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not entry.name.startswith(".") and entry.name not in SYSTEM_FOLDERS:
                        is_folder = entry.is_dir()
                        if not is_folder and entry.is_symlink():
                            if not os.path.exists(entry.path):
                                target = os.readlink(entry.path)
                                self._report(
                                    DeatError(f"{entry.path} is a broken link, since {target} does not exist: repair "
                                              "or remove it")
                                )  # fmt: skip
                                continue
                            self._links.add(entry.path)
                        names[0 if is_folder else 1].append(entry.name)
                    elif entry.is_dir(follow_symlinks=False):
                        self.left_out["hidden"] += sum(len(files) for _, _, files in os.walk(entry.path))
                    else:
                        self.left_out["hidden"] += 1
        except OSError as error:
            raise DeatError(f"{error.filename or folder} cannot be read: {error.strerror}") from error
        return sorted(names[0]), sorted(names[1])


def find_images(paths: Sequence[str | Path]) -> tuple[list[str], Counter[str], list[DeatError]]:
    """Return the image files that are given by name, by folder (with subfolders) or by a glob pattern.

    Args:
        paths: Files, folders and patterns such as ``photos/**/*.jpg``. A file given by name is returned whatever its
            suffix, even if it does not exist. An existing path is never treated as a pattern.

    Returns:
        The files without duplicates, in the order given and alphabetically within a folder or pattern; the number of
        skipped files by reason; and errors, such as broken links and subfolders that cannot be read.

    Raises:
        DeatError: A pattern matches no file, or a folder has no images.
    """
    problems: list[DeatError] = []
    left_out: Counter[str] = Counter()
    found: list[str] = []
    for path in map(str, paths):
        if not os.path.lexists(path) and glob.has_magic(path):
            matches = sorted(match for match in glob.glob(path, recursive=True) if not os.path.isdir(match))
            if not matches:
                raise DeatError(f"no file matches '{path}': check the pattern")
            images = [match for match in matches if os.path.splitext(match)[1].lower() in image_suffixes()]
            left_out.update(os.path.splitext(match)[1].lower() or "no suffix" for match in {*matches} - {*images})
            found += images
        elif os.path.isdir(path):
            lister, before = ImageLister(problems.append), len(problems)
            images = lister.files(Path(path))
            left_out += lister.left_out
            if not images and len(problems) == before:
                others = describe_left_out(lister.left_out)
                raise DeatError(
                    f"the folder {path} has no images{others and f' ({others})'}: give a folder with images"
                )
            found += images
        else:
            found.append(path)
    once: dict[str, str] = {}
    for path in found:  # patterns follow links, so that a link in a folder can lead to the same files again
        once.setdefault(os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)), path)
    return list(once.values()), left_out, problems


def describe_left_out(left_out: Counter[str]) -> str:
    """Return a summary such as "3 files skipped: .heic (2), hidden (1)", "" for none."""
    count = left_out.total()
    reasons = ", ".join(f"{reason} ({number})" for reason, number in left_out.most_common() if number)
    return f"{count} {'file' if count == 1 else 'files'} skipped: {reasons}" if count else ""


def check_utf8(path: str | Path, what: str) -> None:
    """Check that a path is valid UTF-8, because a run's JSON files cannot store others.

    Raises:
        DeatError: The path is not valid UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        readable = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise DeatError(f"{what} {readable} has a name that is not UTF-8: rename it") from None
