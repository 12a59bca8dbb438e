"""Verification of a leaderboard: every file is checked against its entry, and every model is re-measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from deat_rb.data.datasets import Dataset
from deat_rb.evaluation.runner import Progress
from deat_rb.leaderboard.board import Board
from deat_rb.leaderboard.datasets import EMBEDDED, dataset_loader, load_board_dataset
from deat_rb.leaderboard.entry import Entry, check_board, check_place, entry_files, read_entry
from deat_rb.leaderboard.measure import SAMPLE, check_sample, compare_claim, evaluate_sample, refuse_failed
from deat_rb.leaderboard.pages.index import INDEX
from deat_rb.leaderboard.pages.model import page_of
from deat_rb.leaderboard.ranking import images_of
from deat_rb.leaderboard.weights import check_hash, load_network
from deat_rb.models.class_names import match_classes
from deat_rb.models.spec import ModelSpec
from deat_rb.utils.errors import DeatError
from deat_rb.utils.locks import HELD
from deat_rb.utils.text import printable
from deat_rb.utils.units import parse_fraction

OTHER_FILES = ("README.md", "LICENSE", ".gitignore", ".gitattributes", ".lock", f".lock{HELD}", INDEX)
"""Files in a board's folder that belong to no entry."""


@dataclass
class Verification:
    """The result of `verify`.

    Attributes:
        problems: Errors, each naming the file or entry.
        notes: Skipped checks, each with the reason.
        entries: Number of entries.
        measured: Number of models that were re-measured.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    entries: int = 0
    measured: int = 0


def verify(
    path: str | Path,
    *,
    sample: int = SAMPLE,
    data_dirs: Mapping[str, Path] | None = None,
    memory_limit: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check every file of a board, and re-measure every model on a random sample of examples.

    Args:
        path: The board.
        sample: Examples measured per model; 0 measures none.
        data_dirs: Folder of each dataset, by the board's name for it; the digits need none.
        memory_limit: Bytes that the decoded test images of a dataset may take, as for `load_data`.
        batch_size: Number of images attacked at a time.
        device: Device of the evaluation.
        progress: See `deat_rb.evaluation.evaluate.evaluate`.

    Raises:
        DeatError: There is no board, or the sample is too small.
    """
    check_board(path)
    if sample:
        check_sample(sample)
    board = Board(path)
    result = Verification()
    with board.read_locked():
        entries = _check_files(board.path, result)
    datasets: dict[tuple[str, int], Dataset] = {}
    for entry in entries:
        try:
            if entry.weights_file is None:
                result.notes.append(f"{entry.key}: the board does not store its weights")
                continue
            model = load_network(entry, board.path)
            data = _dataset(entry, data_dirs or {}, datasets, memory_limit)
            if data is not None and sample:
                num_classes = cast(ModelSpec, entry.model).num_classes
                matched = match_classes(data.classes, entry.classes or (), num_classes, source=entry.key,
                                        dataset=data.name)  # fmt: skip
                _, report = evaluate_sample(
                    model, data, cast(int, entry.n_examples), sample, parse_fraction(entry.eps),
                    norm=entry.threat_model, logit_of_class=matched.logit_of_class,
                    batch_size=batch_size, device=device, progress=progress,
                )  # fmt: skip
                compare_claim({name: 100 * each.accuracy for name, each in entry.figures.items()}, report, "the entry")
                refuse_failed(report.checks, "the model")
                result.measured += 1
            elif sample:
                result.notes.append(f"{entry.key}: not measured, because its images are missing; give --data-dir "
                                    f"{entry.dataset}=DIR")  # fmt: skip
        except DeatError as error:
            result.problems.append(f"{entry.key}: {printable(str(error), 1000)}")
    return result


def _check_files(board: Path, result: Verification) -> list[Entry]:
    """Check all files of a board, and return its valid entries."""
    entries: list[Entry] = []
    known = {board / name for name in OTHER_FILES}
    for file in entry_files(board):
        result.entries += 1
        # The other files of an invalid entry are not stray files.
        key = file.relative_to(board / "entries").with_suffix("")
        known |= {file, board / "weights" / f"{key}.safetensors", board / "models" / f"{key}.html"}
        try:
            if file.is_symlink():
                raise DeatError(f"{file} is a symlink, which boards must not contain: replace it with a copy")
            entry = read_entry(file)
            check_place(file, entry)
            known.discard(board / entry.weights_place)
            if entry.weights_file is not None:
                known.add(board / entry.weights_file)
                check_hash(board / entry.weights_file, entry)
            known.add(board / page_of(entry))
            entries.append(entry)
        except DeatError as error:
            result.problems.append(printable(str(error), 1000))
    result.problems += [*_check_history(board, known), *_check_datasets(entries), *_check_strays(board, known)]
    return entries


def _check_history(board: Path, known: set[Path]) -> Iterator[str]:
    for file in sorted(board.glob("history/*/*/*/*/*.json")):
        known.update((file, file.with_suffix(".safetensors")))
        try:
            entry = read_entry(file)
            if entry.key.split("/") != [*file.parts[-5:-2]] or file.stem != entry.model_name:
                raise DeatError(f"{file} is misplaced: it contains the entry {entry.key}; move it to "
                                f"history/{entry.key}/<number>/")  # fmt: skip
            if entry.weights_file is not None:
                check_hash(file.with_suffix(".safetensors"), entry)
        except DeatError as error:
            yield printable(str(error), 1000)


def _check_strays(board: Path, known: set[Path]) -> Iterator[str]:
    for path in sorted(board.rglob("*")):
        if path.relative_to(board).parts[0] == ".git":
            continue
        if path.is_symlink():
            yield f"{printable(str(path))} is a symlink, which boards must not contain: replace it with a copy"
        elif not path.is_dir() and path not in known:
            yield f"{printable(str(path))} belongs to no entry"


def _check_datasets(entries: list[Entry]) -> Iterator[str]:
    firsts: dict[str, Entry] = {}
    for entry in entries:
        first = firsts.setdefault(entry.dataset, entry) if entry.kind == "measured" else entry
        own, others = images_of(entry), images_of(first)
        if own.data_sha256 != others.data_sha256:
            yield f"{entry.key} was measured on different data than {first.key}"
        elif own.n_test != others.n_test:
            yield f"{entry.key} has n_test {own.n_test}, but {first.key}, with the same data, {others.n_test}"
        elif own.note != others.note:
            yield (f"{entry.key} has the dataset_note '{own.note}', but {first.key}, with the same data, "
                   f"'{others.note}': make them equal, or they are not ranked together")  # fmt: skip


def _dataset(
    entry: Entry,
    data_dirs: Mapping[str, Path],
    loaded: dict[tuple[str, int], Dataset],
    memory_limit: int | None,
) -> Dataset | None:
    """Load an entry's dataset once for all entries; return None if its folder was not given.

    Raises:
        DeatError: The loaded data differ from the entry's.
    """
    if entry.dataset != EMBEDDED and entry.dataset not in data_dirs:
        return None
    image_size = cast(ModelSpec, entry.model).image_size
    if (entry.dataset, image_size) not in loaded:
        loaded[entry.dataset, image_size] = load_board_dataset(
            dataset_loader(entry),
            data_dir=data_dirs.get(entry.dataset),
            image_size=image_size,
            memory_limit=memory_limit,
        )
    data = loaded[entry.dataset, image_size]
    if data.fingerprint != entry.data_sha256:
        raise DeatError(f"the data here (SHA-256 {data.fingerprint[:12]}...) differ from the entry's "
                        f"({str(entry.data_sha256)[:12]}...): check --data-dir")  # fmt: skip
    if len(data.test) != entry.n_test:
        raise DeatError(f"n_test is {entry.n_test}, but these data have {len(data.test)} test images: correct it")
    return data
