"""The leaderboard as HTML: ``index.html`` and a page for each model, which need nothing but themselves."""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from deat_rb.leaderboard.entry import Entry, check_board, read_entries
from deat_rb.leaderboard.pages.charts import Point, scatter
from deat_rb.leaderboard.pages.format import MISSING, count, duration, name_parts, percent, web_link
from deat_rb.leaderboard.pages.model import count_checks, link_of, model_content, page_of, spelled
from deat_rb.leaderboard.pages.published import (
    PAPER_EPS,
    PAPER_HARDWARE,
    PAPER_LINK,
    PAPER_TABLES,
    REFERENCES,
    ROBUSTBENCH_LINK,
    PaperTable,
    Reference,
)
from deat_rb.leaderboard.ranking import RankedEntry, rank
from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import write_all
from deat_rb.utils.text import new_environment

if TYPE_CHECKING:
    from jinja2 import Environment


TITLE = "Robustness leaderboard"

INDEX = "index.html"

GENERATOR = b'<meta name="generator" content="deat-rb leaderboard">'


class Cell(NamedTuple):
    """A table's cell.

    Attributes:
        text: What stands in it.
        value: What it is sorted by; None is always last.
        note: In small letters below.
    """

    text: str
    value: float | str | None = None
    note: str = ""


class Column(NamedTuple):
    """A column of the board.

    Attributes:
        title: Its head.
        kind: Whether it is sorted as ``number`` or as ``text``.
        first: Which way the first click sorts.
        style: The class of its cells.
    """

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
    Column("perhaps unreliable", "text"),
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


class Group(NamedTuple):
    """What may be compared: models of one table."""

    dataset: str
    threat_model: str
    eps: str
    subset: int | None

    @property
    def heading(self) -> str:
        """As the page says it."""
        part = f", {self.subset:,} test images" if self.subset else ""
        return f"{spelled(self.dataset)}, {self.threat_model}, eps {self.eps}{part}"


def build(board: str | Path, *, left_out: list[str] | None = None) -> Path:
    """Writes the board's pages: all of them or none. Pages of models that left the board are removed.

    Nothing in them depends on when or where they were made, so that they can be checked in.

    Args:
        board: The folder; its entries are ``entries/<dataset>/<threat>/<model_name>.json``.
        left_out: Told what is wrong with each entry that cannot be read, which then has no page.

    Returns:
        ``<board>/index.html``; the models' pages are ``models/<dataset>/<threat>/<model_name>.html`` beside it.

    Raises:
        DeatError: There is no board, the pages cannot be written, or, without ``left_out``, an entry cannot be read.
    """
    from deat_rb.leaderboard.board import Board

    check_board(board)
    with Board(board).locked():
        return write_pages(board, read_entries(board, left_out=left_out))


def pages(board: Path, entries: Sequence[Entry]) -> dict[Path, bytes]:
    """What `build` writes, by file."""
    models = {board / page_of(entry): _render("board_model.html.j2", model_content(entry)) for entry in entries}
    return {**models, board / INDEX: _render("board.html.j2", board_content(entries))}


def write_pages(board: str | Path, entries: Sequence[Entry]) -> Path:
    """Writes the pages of entries that were read already; see `build`."""
    board = Path(board)
    contents = pages(board, entries)
    for folder in sorted({path.parent for path in contents} - {board}):
        _make_folder(board, folder)
    for unfinished in (*board.glob(f".{INDEX}.*.tmp"), *board.glob("models/*/*/.*.html.*.tmp")):
        unfinished.unlink(missing_ok=True)  # a process was killed that wrote pages
    write_all(contents)
    for path in board.glob("models/*/*/*.html"):
        if path not in contents and path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                own = GENERATOR in file.read(2000)
            if own:
                path.unlink()
    return board / INDEX


def _make_folder(board: Path, folder: Path) -> None:
    """Makes a folder of the board, unless a name or a link leads out of it."""
    if not folder.resolve().is_relative_to(board.resolve() / "models"):
        raise DeatError(f"{folder} leads out of the board {board}; remove the link")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeatError(f"cannot write below {folder}: {error.strerror or error}") from error


@cache
def _environment() -> Environment:
    from markupsafe import Markup

    environment = new_environment("deat_rb.leaderboard")
    style, script = (environment.get_template(f"board.{kind}.j2").render() for kind in ("css", "js"))
    sources = {"script-src": script, "style-src": style}
    policy = "; ".join(f"{name} 'sha256-{_hash(text)}'" for name, text in sources.items())
    environment.globals.update(
        style=Markup(style),
        script=Markup(script),
        policy=Markup(f"default-src 'none'; base-uri 'none'; form-action 'none'; {policy}"),
    )
    return environment


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _render(template: str, content: dict[str, Any]) -> bytes:
    return _environment().get_template(template).render(content).encode()


def board_content(entries: Sequence[Entry]) -> dict[str, Any]:
    """All that ``index.html`` shows.

    Args:
        entries: The board's.
    """
    groups: dict[Group, list[RankedEntry]] = defaultdict(list)
    for standing in rank(entries):
        groups[_group_of(standing.entry)].append(standing)
    references: dict[Group, list[Reference]] = defaultdict(list)
    for reference in REFERENCES:
        references[Group(reference.dataset, reference.threat_model, reference.eps, None)].append(reference)
    order = sorted({*groups, *references}, key=lambda group: (group not in groups, group[:3], group.subset or 0))
    measured = sum(entry.kind == "measured" for entry in entries)
    datasets = {entry.dataset for entry in entries}
    return {
        "title": TITLE,
        "summary": f"{_counted(measured, 'measured model')} on {_counted(len(datasets), 'data set')}, "
        f"beside {_counted(len(entries) - measured + len(REFERENCES), 'published row')}",
        "methods": sorted({entry.method for entry in entries if entry.method}),
        "groups": [
            {"id": f"group-{number}", **_group_content(group, groups.get(group, []), references.get(group, []))}
            for number, group in enumerate(order, 1)
        ],
        "papers": [_paper(table, entries) for table in PAPER_TABLES],
        "paper_link": PAPER_LINK,
        "paper_eps": PAPER_EPS,
        "paper_hardware": PAPER_HARDWARE,
        "robustbench_link": ROBUSTBENCH_LINK,
    }


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _group_of(entry: Entry) -> Group:
    subset = entry.n_examples if entry.is_subset else None
    return Group(entry.dataset, entry.threat_model, entry.eps, subset)


def _group_content(group: Group, standings: Sequence[RankedEntry], references: Sequence[Reference]) -> dict[str, Any]:
    entries = [standing.entry for standing in standings]
    rows = [*map(_entry_row, standings), *map(_reference_row, references)]
    rows.sort(key=lambda row: (row["robust"] is None, -(row["robust"] or 0), -(row["natural"] or 0), row["name"]))
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
    known[titles.index("perhaps unreliable")] = any(entry.unreliable for entry in entries)
    for row in rows:
        styled = zip(row["cells"], COLUMNS, known, strict=True)
        row["cells"] = [(cell, column.style) for cell, column, is_known in styled if is_known]
    return {
        "heading": group.heading,
        "columns": (RANK, MODEL, *itertools.compress(COLUMNS, known)),
        "ranked": any(standing.rank is not None for standing in standings),
        "sentence": _sentence(group, entries),
        "notes": sorted({entry.dataset_note for entry in entries if entry.dataset_note}),
        "rows": rows,
        "scatter": scatter(points) if len(points) > 1 else None,
        "left_out": ", ".join(left_out),
    }


def _sentence(group: Group, entries: Sequence[Entry]) -> str:
    if not entries:
        return "This board has no model of its own here."
    return (
        f"Evaluated on {group.subset:,} images of the test set: listed apart, and without ranks."
        if group.subset
        else ""
    )


def _entry_row(standing: RankedEntry) -> dict[str, Any]:
    entry = standing.entry
    natural, autoattack = _number(entry.clean_acc), _number(entry.autoattack_acc)
    interval = entry.figures.get("autoattack")
    setting = [entry.setting or "", f"{entry.epochs} epochs" if entry.epochs else ""]
    cells = (
        Cell(percent(natural), natural),
        Cell(percent(autoattack), autoattack,
             f"{100 * interval.low:.1f} to {100 * interval.high:.1f}" if interval else ""),
        Cell(percent(entry.robust), entry.robust, "external" if entry.external else ""),
        _yes_or_no(entry.unreliable),
        *(_figure_cell(entry, name) for name in ("fgsm", "pgd-100", "cw-20")),
        Cell(entry.method or MISSING, entry.method, ", ".join(part for part in setting if part)),
        Cell(count(entry.backward_passes), entry.backward_passes),
        Cell(duration(entry.train_seconds), entry.train_seconds),
        _yes_or_no(entry.additional_data),
        Cell(entry.architecture or MISSING, entry.architecture),
        Cell(entry.venue or MISSING, entry.venue),
        _checks_cell(entry),
    )  # fmt: skip
    return {
        "kind": entry.kind,
        "rank": EMPTY if standing.rank is None else Cell(str(standing.rank), standing.rank),
        "name": entry.model_name,
        "parts": name_parts(entry.model_name),
        "page": link_of(entry),
        "title": entry.name or "",
        "link": web_link(entry.link),
        "method": entry.method or "",
        "notes": [entry.footnote] if entry.footnote else [],
        "natural": natural,
        "robust": entry.robust,
        "cells": cells,
    }


def _reference_row(reference: Reference) -> dict[str, Any]:
    robust = Cell(percent(reference.autoattack_acc), reference.autoattack_acc)
    cells = (
        Cell(percent(reference.clean_acc), reference.clean_acc),
        robust,
        robust,
        *[EMPTY] * 7,
        _yes_or_no(reference.additional_data),
        Cell(reference.architecture, reference.architecture),
        Cell(reference.venue, reference.venue),
        EMPTY,
    )
    return {
        "kind": "published",
        "rank": EMPTY,
        "name": reference.model_name,
        "parts": name_parts(reference.model_name),
        "page": None,
        "title": reference.name,
        "link": web_link(reference.link),
        "method": "",
        "notes": [" ".join(("From RobustBench.", reference.footnote or "")).strip()],
        "natural": reference.clean_acc,
        "robust": reference.autoattack_acc,
        "cells": cells,
    }


def _number(text: str | None) -> float | None:
    return None if text is None else float(text)


def _yes_or_no(value: bool | None) -> Cell:
    return EMPTY if value is None else Cell("yes", "yes") if value else Cell("no", "no")


def _figure_cell(entry: Entry, name: str) -> Cell:
    figure = entry.percent(name)
    return Cell(percent(figure), figure)


def _checks_cell(entry: Entry) -> Cell:
    counts = count_checks(entry)
    if not counts:
        return EMPTY
    wrong = ", ".join(f"{counts[status]} {status}" for status in ("fail", "warn") if counts[status])
    return Cell(f"{counts['pass']} of {counts.total()}", 1000 * counts["fail"] + counts["warn"], wrong)


def _paper(table: PaperTable, entries: Sequence[Entry]) -> dict[str, Any]:
    with_fgsm = table.rows[0].fgsm is not None
    rows: list[dict[str, Any]] = []
    for row in table.rows:
        figures = [percent(figure) for figure in row[1:5] if figure is not None]
        rows.append({"kind": "published", "parts": [row.method], "page": None, "link": None, "note": "",
                     "figures": [*figures, f"{row.minutes:.1f}"]})  # fmt: skip
        rows.extend(_beside(entry, with_fgsm) for entry in entries if _reproduces(entry, table, row.method))
    return {"number": table.number, "title": table.title, "with_fgsm": with_fgsm, "rows": rows}


def _reproduces(entry: Entry, table: PaperTable, method: str) -> bool:
    if entry.kind != "measured" or entry.model is None:
        return False
    trained = (entry.dataset, entry.model.arch, entry.setting, entry.eps, entry.method)
    return trained == (table.dataset, table.arch, table.setting, PAPER_EPS, method.lower())


def _beside(entry: Entry, with_fgsm: bool) -> dict[str, Any]:
    names = ("fgsm", "pgd-100", "cw-20") if with_fgsm else ("pgd-100", "cw-20")
    minutes = MISSING if entry.train_seconds is None else f"{entry.train_seconds / 60:.1f}"
    notes = (entry.dataset_note, f"on {entry.n_examples:,} images" if entry.is_subset else None, entry.hardware)
    return {
        "kind": "measured",
        "name": entry.model_name,
        "parts": name_parts(entry.model_name),
        "link": None,
        "page": link_of(entry),
        "note": ", ".join(note.rstrip(".") for note in notes if note),
        "figures": [percent(entry.clean_acc), *(_figure_cell(entry, name).text for name in names), minutes],
    }
