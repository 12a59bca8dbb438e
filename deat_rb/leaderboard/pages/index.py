"""The leaderboard's pages: ``index.html`` and a self-contained page for each model."""

from __future__ import annotations

import base64
import hashlib
import itertools
import shlex
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from deat_rb.data.datasets import CIFAR_SIZES
from deat_rb.leaderboard.entry import AttackName, Entry, check_board, read_entries
from deat_rb.leaderboard.pages.charts import Point, scatter
from deat_rb.leaderboard.pages.format import (
    MISSING,
    count,
    dataset_title,
    duration,
    name_parts,
    percent,
    web_link,
)
from deat_rb.leaderboard.pages.model import count_checks, link_of, model_content, page_of
from deat_rb.leaderboard.pages.published import (
    PAPER_EPS,
    PAPER_HARDWARE,
    PAPER_LINK,
    PAPER_TABLES,
    REFERENCES,
    ROBUSTBENCH_LINK,
    PaperTable,
)
from deat_rb.leaderboard.ranking import Group, RankedEntry, is_baseline, rank
from deat_rb.runs.defaults import default_val_size
from deat_rb.runs.options import GROUP_OF, TrainOptions, train_options
from deat_rb.runs.resolution import resolve
from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import write_all
from deat_rb.utils.options import validate
from deat_rb.utils.text import counted, new_environment

if TYPE_CHECKING:
    from jinja2 import Environment


TITLE = "Robustness leaderboard"

INDEX = "index.html"

GENERATOR = b'<meta name="generator" content="deat-rb leaderboard">'


class Cell(NamedTuple):
    """A table cell: its text, its sort key (None sorts last), and a note in small print."""

    text: str
    value: float | str | None = None
    note: str = ""


class Column(NamedTuple):
    """A column: header, sort order (``number`` or ``text``), sort direction on the first click, and CSS class."""

    title: str
    kind: str = "number"
    first: str = "descending"
    style: str = ""


RANK = Column("#", first="ascending", style="rank")

MODEL = Column("model", "text", "ascending", "name")

COLUMNS = (
    Column("natural"),
    Column("AutoAttack", style="robust"),
    Column("best known", style="robust"),
    Column("potentially unreliable", "text"),
    Column("FGSM"),
    Column("PGD\u2011100"),
    Column("CW\u201120"),
    Column("method", "text", "ascending", "text"),
    Column("backward passes", first="ascending"),
    Column("training", first="ascending"),
    Column("extra data", "text"),
    Column("architecture", "text", "ascending", "arch text"),
    Column("venue", "text", "ascending", "text"),
    Column("checks", first="ascending"),
)

EMPTY = Cell(MISSING)

AFTER_RANKED = 10**6
"""Sort key of the rank of a baseline."""

MAY_DIFFER = {"--epochs", "--name", "--output", "--data-dir", "--seed"} | {
    each.flag for each in train_options() if GROUP_OF[each.name] in ("runtime", "output")
}
"""Options of a training command with which it is still the paper's training, and the epochs, which are counted."""

ATTACKED: tuple[AttackName, ...] = ("fgsm", "pgd-100", "cw-20")


def build(board: str | Path, *, left_out: list[str] | None = None) -> Path:
    """Write the board's pages, all or none, and remove pages of models that are no longer on the board.

    Args:
        board: The folder; its entries are ``entries/<dataset>/<threat>/<model_name>.json``.
        left_out: Collects the errors of invalid entries, which then have no page.

    Returns:
        ``<board>/index.html``; the models' pages are ``models/<dataset>/<threat>/<model_name>.html`` next to it.

    Raises:
        DeatError: There is no board, the pages cannot be written, or, without ``left_out``, an entry is invalid.
    """
    from deat_rb.leaderboard.board import Board

    check_board(board)
    with Board(board).locked():
        return write_pages(board, read_entries(board, left_out=left_out))


def write_pages(board: str | Path, entries: Sequence[Entry]) -> Path:
    """Write the pages of entries that were already read; see `build`."""
    board = Path(board)
    contents = {board / page_of(entry): _render("board_model.html.j2", model_content(entry)) for entry in entries}
    contents[board / INDEX] = _render("board.html.j2", board_content(entries))
    for folder in sorted({path.parent for path in contents} - {board}):
        _make_folder(board, folder)
    write_all(contents)
    for path in board.glob("models/*/*/*.html"):
        if path not in contents and path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                generated = GENERATOR in file.read(2000)
            if generated:
                path.unlink()
    return board / INDEX


def _make_folder(board: Path, folder: Path) -> None:
    """Create a folder of the board, after checking that no name or symlink leads out of it."""
    if not folder.resolve().is_relative_to(board.resolve() / "models"):
        raise DeatError(f"{folder} leads out of the board {board}; remove the symlink")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeatError(f"cannot write to {folder}: {error.strerror or error}") from error


@cache
def _environment() -> Environment:
    from markupsafe import Markup

    environment = new_environment("deat_rb.leaderboard")
    style, script, copy = (
        environment.get_template(f"{name}.j2").render() for name in ("board.css", "board.js", "copy.js")
    )
    scripts = " ".join(f"'sha256-{_hash(text)}'" for text in (script, copy))
    policy = f"script-src {scripts}; style-src 'sha256-{_hash(style)}'"
    environment.globals.update(
        style=Markup(style),
        script=Markup(script),
        copy=Markup(copy),
        policy=Markup(f"default-src 'none'; base-uri 'none'; form-action 'none'; {policy}"),
    )
    return environment


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _render(template: str, content: dict[str, Any]) -> bytes:
    return _environment().get_template(template).render(content).encode()


def board_content(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return the variables of ``board.html.j2``."""
    groups: dict[Group, list[RankedEntry]] = defaultdict(list)
    for ranked in rank((*entries, *REFERENCES)):
        groups[ranked.group].append(ranked)
    datasets = {entry.dataset for entry in entries}
    empty = {group: all(each.entry in REFERENCES for each in rows) for group, rows in groups.items()}
    order = sorted(groups, key=lambda group: (empty[group], group[:3], str(group.images), group.subset or 0))
    measured = sum(entry.kind == "measured" for entry in entries)
    return {
        "title": TITLE,
        "summary": f"{_plural(measured, 'measured model')} on {_plural(len(datasets), 'dataset')}, "
        f"plus {_plural(len(entries) - measured + len(REFERENCES), 'published result')}",
        "methods": sorted({entry.method for entry in entries if entry.method}),
        "groups": [
            {"id": f"group-{number}", **_group_content(group, groups[group])} for number, group in enumerate(order, 1)
        ],
        "papers": [_paper_table(table, entries) for table in PAPER_TABLES],
        "paper_link": PAPER_LINK,
        "paper_eps": PAPER_EPS,
        "paper_hardware": PAPER_HARDWARE,
        "robustbench_link": ROBUSTBENCH_LINK,
    }


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _group_content(group: Group, ranked: Sequence[RankedEntry]) -> dict[str, Any]:
    entries = [each.entry for each in ranked if each.entry not in REFERENCES]
    rows = [_entry_row(each) for each in ranked]
    rows.sort(key=lambda row: (
        row["robust"] is None, row["baseline"], -(row["robust"] or 0), -(row["natural"] or 0), row["name"]
    ))  # fmt: skip
    points, left_out = [], []
    for entry in entries:
        robust, cost = entry.robust, entry.backward_passes
        if robust is None or cost is None or cost < 1:
            left_out.append(entry.model_name)
            continue
        text = f"{entry.model_name}: {percent(robust)} % robust, {count(cost)} backward passes"
        points.append(Point(cost, robust, entry.method or entry.model_name, text, link_of(entry)))
    known = [any(row["cells"][place].text != MISSING for row in rows) for place in range(len(COLUMNS))]
    titles = [column.title for column in COLUMNS]
    known[titles.index("best known")] = any(entry.external for entry in entries)  # else it repeats AutoAttack's
    known[titles.index("potentially unreliable")] = any(entry.unreliable for entry in entries)
    for row in rows:
        styled = zip(row["cells"], COLUMNS, known, strict=True)
        row["cells"] = [(cell, column.style) for cell, column, is_known in styled if is_known]
    note = f"Evaluated on {group.subset:,} test images only: listed separately, not ranked." if group.subset else ""
    return {
        "heading": f"{dataset_title(group.dataset)}, {group.conditions}",
        "columns": (RANK, MODEL, *itertools.compress(COLUMNS, known)),
        "ranked": any(each.rank is not None for each in ranked),
        "sentence": note if entries else "This board has no models of its own in this table.",
        "notes": sorted({entry.dataset_note for entry in entries if entry.dataset_note}),
        "rows": rows,
        "scatter": scatter(points) if len(points) > 1 else None,
        "left_out": ", ".join(left_out),
    }


def _entry_row(ranked: RankedEntry) -> dict[str, Any]:
    entry, autoattack = ranked.entry, ranked.entry.figures.get("autoattack")
    interval = [] if autoattack is None else [f"{100 * end:.1f}" for end in autoattack.interval]
    setting = [entry.setting or "", counted(entry.epochs, "epoch") if entry.epochs else ""]
    cells = (
        _percent_cell(entry.clean_acc),
        _percent_cell(entry.autoattack_acc, " to ".join(interval)),
        _percent_cell(entry.robust, "external" if entry.external else ""),
        _yes_or_no(entry.unreliable),
        *(_percent_cell(entry.percent(name)) for name in ATTACKED),
        Cell(entry.method or MISSING, entry.method, ", ".join(part for part in setting if part)),
        Cell(count(entry.backward_passes), entry.backward_passes),
        Cell(duration(entry.train_seconds), entry.train_seconds),
        _yes_or_no(entry.additional_data),
        Cell(entry.architecture or MISSING, entry.architecture),
        Cell(entry.venue or MISSING, entry.venue),
        _checks_cell(entry),
    )
    return {
        "kind": entry.kind,
        "rank": _rank_cell(ranked),
        "name": entry.model_name,
        "parts": name_parts(entry.model_name),
        "page": None if entry in REFERENCES else link_of(entry),
        "title": entry.name or "",
        "link": web_link(entry.link),
        "method": entry.method or "",
        "baseline": is_baseline(entry),
        "notes": [entry.footnote] if entry.footnote else [],
        "natural": cells[0].value,
        "robust": entry.robust,
        "cells": cells,
    }


def _rank_cell(ranked: RankedEntry) -> Cell:
    """Return the cell of a rank; baselines, which have none, are sorted after the ranked models."""
    if ranked.rank is None:
        return Cell(MISSING, AFTER_RANKED) if is_baseline(ranked.entry) and ranked.part == "full" else EMPTY
    return Cell(str(ranked.rank), ranked.rank)


def _percent_cell(accuracy: str | float | None, note: str = "") -> Cell:
    return Cell(percent(accuracy), None if accuracy is None else float(accuracy), note)


def _yes_or_no(value: bool | None) -> Cell:
    return EMPTY if value is None else Cell("yes", "yes") if value else Cell("no", "no")


def _checks_cell(entry: Entry) -> Cell:
    counts = count_checks(entry)
    if not counts:
        return EMPTY
    wrong = ", ".join(f"{counts[status]} {status}" for status in ("fail", "warn") if counts[status])
    return Cell(f"{counts['pass']} of {counts.total()}", 1000 * counts["fail"] + counts["warn"], wrong)


def _paper_table(table: PaperTable, entries: Sequence[Entry]) -> dict[str, Any]:
    """Return one of the paper's tables, with this board's models of the same settings and method below each row."""
    with_fgsm = table.rows[0].fgsm is not None
    rows: list[dict[str, Any]] = []
    for row in table.rows:
        accuracies = [percent(value) for value in row[1:5] if value is not None]
        rows.append({"kind": "published", "parts": [row.method], "page": None, "link": None, "note": "",
                     "figures": [*accuracies, f"{row.minutes:.1f}"]})  # fmt: skip
        rows.extend(_measured_row(entry, with_fgsm) for entry in entries if _reproduces(entry, table, row.method))
    return {"number": table.number, "title": table.title, "with_fgsm": with_fgsm, "rows": rows}


def _reproduces(entry: Entry, table: PaperTable, method: str) -> bool:
    if entry.kind != "measured" or entry.model is None or entry.threat_model != "Linf":
        return False
    if entry.additional_data is not False:
        return False
    trained = (entry.dataset, entry.model.arch, entry.setting, entry.eps, entry.method)
    return trained == (table.dataset, table.arch, table.setting, PAPER_EPS, method.lower())


def _measured_row(entry: Entry, with_fgsm: bool) -> dict[str, Any]:
    accuracies = (entry.clean_acc, *(entry.percent(name) for name in ATTACKED if with_fgsm or name != "fgsm"))
    minutes = MISSING if entry.train_seconds is None else f"{entry.train_seconds / 60:.1f}"
    subset = f"on {counted(entry.n_examples or 0, 'image')}" if entry.is_subset else None
    doubt = "potentially unreliable" if entry.unreliable else None
    notes = (entry.dataset_note, subset, *_otherwise_trained(entry), doubt, entry.footnote, entry.hardware)
    return {
        "kind": "measured",
        "name": entry.model_name,
        "parts": name_parts(entry.model_name),
        "link": None,
        "page": link_of(entry),
        "note": ", ".join(note.rstrip(".") for note in notes if note),
        "figures": [*map(percent, accuracies), minutes],
    }


def _otherwise_trained(entry: Entry) -> list[str]:
    """Return the epochs and the options of the training command that are not those of the method and setting."""
    assert entry.model is not None
    problem = {"dataset": entry.dataset, "arch": entry.model.arch, "method": entry.method, "setting": entry.setting}
    images, validation = CIFAR_SIZES[0], default_val_size(CIFAR_SIZES[0])
    split = {"train_size": images - validation, "val_size": validation}
    options = resolve(validate(TrainOptions, {**problem, **split, "device": "cpu"}))
    usual = {tuple(each.words(value)) for each in train_options() if (value := options.flat()[each.name]) is not None}
    try:
        words = shlex.split(entry.command or "")
    except ValueError:  # a claim that is no command line
        words = (entry.command or "").split()
    given: list[tuple[str, ...]] = []
    for word in words[2:]:  # after deat-rb train
        if word.startswith("--") or not given:
            given.append((word,))
        else:
            given[-1] += (word,)
    others = [" ".join(option) for option in given if option not in usual and option[0] not in MAY_DIFFER]
    epochs = entry.epochs or options.optim.epochs
    return [*([] if epochs == options.optim.epochs else [counted(epochs, "epoch")]), *others]
