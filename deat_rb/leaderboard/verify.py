"""Is a leaderboard what it says? Every file is read, hashed and held against its entry, and every model measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from deat_rb.data.datasets import Dataset
from deat_rb.data.images import interleave_classes
from deat_rb.evaluation.runner import Progress
from deat_rb.leaderboard.board import Board
from deat_rb.leaderboard.datasets import EMBEDDED, load_board_dataset, loader_of
from deat_rb.leaderboard.entry import Entry, check_board, entry_files, read_entry
from deat_rb.leaderboard.measure import SAMPLE, check_sample, compare_claim, refuse_failed, sampled
from deat_rb.leaderboard.pages.index import INDEX, pages
from deat_rb.leaderboard.untrusted import read_limited
from deat_rb.leaderboard.weights import check_hash, load_network
from deat_rb.models.spec import ModelSpec
from deat_rb.utils.errors import DeatError
from deat_rb.utils.text import printable
from deat_rb.utils.units import parse_fraction

BESIDE = ("README.md", "LICENSE", ".gitignore", ".gitattributes", ".lock")
"""Files that a board's folder may have besides its own."""

ASIDE = (".git", ".staging")


@dataclass
class Verification:
    """What `verify` found.

    Attributes:
        problems: What is wrong, each with where.
        notes: What could not be looked at, and why.
        entries: How many entries there are.
        measured: How many models were measured again.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    entries: int = 0
    measured: int = 0


@dataclass(frozen=True)
class _Model:
    model: nn.Module
    data: Dataset

    def examples(self, count: int | None = None) -> tuple[Tensor, Tensor]:
        test = interleave_classes(self.data.test)
        return test.first(len(test) if count is None else count).tensors()


def verify(
    path: str | Path,
    *,
    sample: int = SAMPLE,
    data_dirs: Mapping[str, Path] | None = None,
    batch_size: int = 128,
    device: str | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Looks at every file of a board, and measures some examples of every model again.

    Args:
        path: The board.
        sample: How many examples of each model are measured, drawn anew each time; 0 measures none.
        data_dirs: Where data sets are; the digits need none.
        batch_size: How many images are attacked together.
        device: Where to evaluate.
        progress: See `deat_rb.evaluation.evaluate.evaluate`.

    Raises:
        DeatError: There is no board, or the sample is too small.
    """
    check_board(path)
    if sample:
        check_sample(sample)
    board = Board(path)
    found = Verification()
    with board.read_locked():
        entries = _of_files(board.path, found)
    loaded: dict[tuple[str, int], Dataset] = {}
    for entry in entries:
        try:
            options: dict[str, object] = {"batch_size": batch_size, "device": device, "progress": progress}
            found.measured += _measured(board.path, entry, sample, data_dirs or {}, loaded, found.notes, options)
        except DeatError as error:
            found.problems.append(f"{entry.key}: {printable(str(error), 1000)}")
    return found


def _of_files(board: Path, found: Verification) -> list[Entry]:
    """Looks at everything that lies in the board, and gives back the entries that are sound."""
    entries, known = [], {board / name for name in BESIDE}
    for file in entry_files(board):
        found.entries += 1
        known.add(file)
        try:
            entries.append(_read(file, board / "entries", board))
        except DeatError as error:
            found.problems.append(printable(str(error), 1000))
    known |= {board / entry.weights_file for entry in entries if entry.weights_file}
    all_read = len(entries) == found.entries
    if not all_read:  # whose weights and pages are whose cannot be said, and there is a problem already
        known |= {*board.glob("weights/*/*/*.safetensors"), *board.glob("models/*/*/*.html"), board / INDEX}
    found.problems += [*_of_history(board, known), *_of_data(entries)]
    if all_read:
        found.problems += _of_pages(board, entries, known)
    found.problems += _strays(board, known)
    return entries


def _read(file: Path, entries: Path, weights: Path | None) -> Entry:
    """Reads an entry that lies where it belongs, with its weights if it has some."""
    if any(path.is_symlink() for path in (file, *file.parents[:3])):
        raise DeatError(f"{file} is a link, or lies behind one: a board has none")
    entry = read_entry(file)
    if file != entries / f"{entry.key}.json":
        raise DeatError(f"{file} is the entry of {entry.key}, and lies in the wrong place")
    if weights is not None and entry.weights_file is not None:
        check_hash(weights / entry.weights_file, entry)
    return entry


def _of_history(board: Path, known: set[Path]) -> Iterator[str]:
    for file in sorted(board.glob("history/*/*/*/*/*.json")):
        known.update((file, file.with_suffix(".safetensors")))
        try:
            entry = read_entry(file)
            if file.parts[-5:-1] != (*entry.key.split("/"), file.parent.name) or file.stem != entry.model_name:
                raise DeatError(f"{file} is the entry of {entry.key}, and lies in the wrong place")
            if entry.weights_file is not None:
                check_hash(file.with_suffix(".safetensors"), entry)
        except DeatError as error:
            yield printable(str(error), 1000)


def _of_pages(board: Path, entries: list[Entry], known: set[Path]) -> Iterator[str]:
    """Holds the pages, where there are some, against what the entries give."""
    expected = pages(board, entries)
    known.update(expected)
    if not any(path.exists() for path in expected):
        return
    for path, content in expected.items():
        try:
            same = read_limited(path, len(content)) == content
        except DeatError:
            same = False
        if not same:
            yield f"{path} is not the page that the entries give: deat-rb leaderboard build writes it anew"


def _strays(board: Path, known: set[Path]) -> Iterator[str]:
    """Files and links that belong to no entry."""
    for path in sorted(board.rglob("*")):
        if any(part in ASIDE for part in path.relative_to(board).parts[:1]):
            continue
        if path.is_symlink():
            yield f"{printable(str(path))} is a link: a board has none"
        elif not path.is_dir() and path not in known:
            yield f"{printable(str(path))} belongs to no entry"


def _of_data(entries: list[Entry]) -> Iterator[str]:
    known: dict[str, Entry] = {}
    for entry in entries:
        if entry.data_sha256 is not None:
            first = known.setdefault(entry.dataset, entry)
            if first.data_sha256 != entry.data_sha256:
                yield f"{entry.key} was measured on other data than {first.key}"


def _measured(
    board: Path,
    entry: Entry,
    sample: int,
    data_dirs: Mapping[str, Path],
    loaded: dict[tuple[str, int], Dataset],
    notes: list[str],
    options: dict[str, object],
) -> int:
    """Measures a model again, and says how many that were: one or none."""
    if entry.weights_file is None:
        notes.append(f"{entry.key}: the board does not hold its weights")
        return 0
    spec = cast(ModelSpec, entry.model)
    model = load_network(entry, board)
    if not sample:
        return 0
    if entry.dataset != EMBEDDED and entry.dataset not in data_dirs:
        notes.append(f"{entry.key}: not measured, as its images are not at hand; give --data-dir {entry.dataset}=DIR")
        return 0
    key = (entry.dataset, spec.image_size)
    if key not in loaded:
        loaded[key] = load_board_dataset(
            loader_of(entry), data_dir=data_dirs.get(entry.dataset), image_size=spec.image_size
        )
    data = loaded[key]
    if data.fingerprint != entry.data_sha256 or len(data.test) != entry.n_test:
        raise DeatError(f"the data at hand (SHA-256 {data.fingerprint[:12]}...) are not those of the entry "
                        f"({str(entry.data_sha256)[:12]}...)")  # fmt: skip
    _, report = sampled(_Model(model, data), cast(int, entry.n_examples), sample, parse_fraction(entry.eps), **options)
    stated = {str(attack): 100 * figure.accuracy for attack, figure in entry.figures.items()}
    compare_claim(stated, report, "the entry")
    refuse_failed(report.checks, "the model")
    return 1
