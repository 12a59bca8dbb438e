"""Export of a leaderboard's models in RobustBench's format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from deat_rb.leaderboard.board import Board
from deat_rb.leaderboard.entry import Entry, RobustBenchInfo, check_board
from deat_rb.leaderboard.weights import load_network
from deat_rb.models.spec import ModelSpec, robustbench_class
from deat_rb.robustbench.format import (
    NOTES,
    SPELLED,
    UNKNOWN_DATA,
    ExportPaths,
    check_export_dataset,
    eps_note,
    model_source,
    robustbench_weights,
)
from deat_rb.utils import compat
from deat_rb.utils.errors import DeatError, did_you_mean
from deat_rb.utils.files import write_all

_OPTIONAL = {"external", "unreliable", "footnote"}


@dataclass(frozen=True)
class Exported:
    """The result of `export_board`.

    Attributes:
        names: The exported models, each as ``<dataset>/<name>``.
        left_out: Reason for each entry that cannot be exported.
    """

    names: tuple[str, ...]
    left_out: tuple[str, ...]


def export_board(
    path: str | Path, output: str | Path, *, dataset: str | None = None, as_dataset: str | None = None
) -> Exported:
    """Write ``model_info/`` and ``models/`` as robustbench reads them, and ``pull_request/`` for its model zoo.

    Args:
        path: The board.
        output: Folder for the export; existing files are replaced.
        dataset: Dataset to export, by the board's name; by default all.
        as_dataset: RobustBench dataset under which entries of other datasets are exported, with a footnote. By default
            these are left out.

    Raises:
        DeatError: There is no board, two entries would get the same name, or nothing can be exported.
    """
    if as_dataset is not None:
        check_export_dataset(as_dataset)
    board = Board(path)
    contents: dict[Path, bytes] = {}
    names: list[str] = []
    left_out: list[str] = []
    check_board(path)
    with board.read_locked():
        entries = board.entries(left_out=left_out)
    if dataset is not None:
        known = {entry.dataset for entry in entries}
        if dataset not in known:
            raise DeatError(f"the board {path} has no dataset '{dataset}': {did_you_mean(dataset, known)}")
        entries = tuple(entry for entry in entries if entry.dataset == dataset)
    for entry in entries:
        stands_for = entry.dataset if entry.dataset in compat.DATASETS else as_dataset
        reason = _refusal(entry, stands_for)
        if reason is not None:
            left_out.append(f"{entry.key}: {reason}")
            continue
        paths = ExportPaths.below(Path(output), str(stands_for), entry.model_name, entry.threat_model)
        if paths.weights in contents:
            raise DeatError(f"{entry.key} and another entry would both be exported as {stands_for}/"
                            f"{entry.model_name}: export one dataset at a time with --dataset")  # fmt: skip
        contents |= _files(board.path, entry, str(stands_for), paths)
        names.append(f"{stands_for}/{entry.model_name}")
    if not names:
        raise DeatError(f"nothing on the board {path} can be exported: {left_out[0] if left_out else 'it is empty'}")
    for file in contents:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DeatError(f"cannot write to {output}: {error.strerror or error}") from error
    write_all(contents)
    return Exported(tuple(names), tuple(left_out))


def _refusal(entry: Entry, dataset: str | None) -> str | None:
    if entry.weights_file is None or entry.model is None:
        return "the board does not store its weights"
    if dataset is None:
        return f"RobustBench has no dataset {entry.dataset}; export it under another with --as-dataset"
    try:
        robustbench_class(entry.model)
    except DeatError as error:
        return str(error)
    if entry.model.num_classes != compat.DATASETS[dataset]:
        return f"it has {entry.model.num_classes} classes, but {dataset} has {compat.DATASETS[dataset]}"
    if None in (entry.clean_acc, entry.reported, entry.autoattack_acc):
        return "it lacks an accuracy, so RobustBench would rank it wrongly"
    return None


def _files(board: Path, entry: Entry, dataset: str, paths: ExportPaths) -> dict[Path, bytes]:
    return {
        paths.weights: robustbench_weights(load_network(entry, board)),
        paths.source: model_source(
            entry.model_name, dataset, cast(ModelSpec, entry.model), entry.threat_model
        ).encode(),
        paths.info: json.dumps(robustbench_info(entry, dataset), indent=2, ensure_ascii=False).encode() + b"\n",
    }


def robustbench_info(entry: Entry, dataset: str) -> dict[str, Any]:
    """Return the fields of RobustBench's ``model_info``."""
    fields = {name: getattr(entry, name) for name in RobustBenchInfo.model_fields}
    notes = [entry.footnote or ""]
    if dataset != entry.dataset:
        own = entry.dataset_note or SPELLED.get(entry.dataset, entry.dataset)
        notes.append(NOTES["data"].format(own=f"{entry.dataset} ({own})", dataset=SPELLED[dataset]))
    if entry.is_subset:
        notes.append(NOTES["subset"].format(count=f"{entry.n_examples} of {entry.n_test}"))
    notes.append(eps_note(entry.eps, entry.threat_model))
    if entry.additional_data is None:
        notes.append(UNKNOWN_DATA)
    fields |= {"dataset": dataset, "footnote": " ".join(note for note in notes if note) or None}
    defaults = {"additional_data": False, "number_forward_passes": 1}
    return {
        name: defaults.get(name, "") if value is None else value
        for name, value in fields.items()
        if value is not None or name not in _OPTIONAL
    }
