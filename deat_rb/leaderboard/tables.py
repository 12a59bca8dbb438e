"""The leaderboard as terminal table, JSON, CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from deat_rb.leaderboard.ranking import PARTS, RankedEntry
from deat_rb.leaderboard.untrusted import FORMULA
from deat_rb.utils.text import printable

if TYPE_CHECKING:
    from rich.console import RenderableType


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


COLUMNS: dict[str, Callable[[RankedEntry], str]] = {
    "rank": lambda each: "" if each.rank is None else str(each.rank),
    "model": lambda each: each.entry.model_name,
    "natural": lambda each: each.entry.clean_acc or "",
    "autoattack": lambda each: each.entry.autoattack_acc or "",
    "best known": lambda each: each.entry.external or "",
    "unreliable": lambda each: "yes" if each.entry.unreliable else "",
    "pgd-100": lambda each: _number(each.entry.percent("pgd-100")),
    "cw-20": lambda each: _number(each.entry.percent("cw-20")),
    "fgsm": lambda each: _number(each.entry.percent("fgsm")),
    "examples": lambda each: "" if each.entry.n_examples is None else str(each.entry.n_examples),
    "method": lambda each: each.entry.method or "",
    "backward passes": lambda each: _number(each.entry.backward_passes, 0),
    "seconds": lambda each: _number(each.entry.train_seconds, 0),
    "extra data": lambda each: "yes" if each.entry.additional_data else "",
    "architecture": lambda each: each.entry.architecture or "",
    "venue": lambda each: each.entry.venue or "",
}

_SPARED = (
    "venue",
    "extra data",
    "seconds",
    "examples",
    "architecture",
    "fgsm",
    "cw-20",
    "method",
    "pgd-100",
    "backward passes",
)
"""What a narrow terminal does without, in this order."""

_TEXTS = {"model", "unreliable", "method", "extra data", "architecture", "venue"}


def _groups(standings: Sequence[RankedEntry]) -> list[tuple[str, str, list[RankedEntry]]]:
    """Standings that may stand in one table, under a heading, with what a reader should know of the data."""
    found = []
    for _, part in groupby(standings, key=lambda each: (each.group, each.part)):
        rows = list(part)
        entry = rows[0].entry
        heading = f"{entry.dataset}, {entry.threat_model}, eps {entry.eps}: {PARTS[rows[0].part]}"
        found.append((heading, entry.dataset_note or "", rows))
    return found


def _columns(rows: Sequence[RankedEntry]) -> dict[str, list[str]]:
    """The cells of a table by column, without columns of which nothing is known."""
    cells = {title: [cell(row) for row in rows] for title, cell in COLUMNS.items()}
    return {title: column for title, column in cells.items() if any(column)}


def as_tables(standings: Sequence[RankedEntry], width: int) -> list[RenderableType]:
    """Lays the standings out for a terminal of ``width``; whatever texts hold, they neither colour nor move anything.

    Columns for which there is no room are left out.
    """
    from rich.table import Table
    from rich.text import Text

    tables: list[RenderableType] = []
    for heading, note, rows in _groups(standings):
        table = Table(title=Text(printable(heading)), caption=Text(printable(note)) if note else None)
        columns = _columns(rows)
        for title in _SPARED:
            if _width(columns) > width:
                columns.pop(title, None)
        for title in columns:
            table.add_column(title, justify="left" if title in _TEXTS else "right", no_wrap=title != "backward passes")
        for cells in zip(*columns.values(), strict=True):
            table.add_row(*(Text(printable(cell, 120)) for cell in cells))
        tables.append(table)
    return tables


def _width(columns: dict[str, list[str]]) -> int:
    """How wide a table is in which heads are broken at spaces and cells nowhere."""
    cells = (max(len(word) for word in (*title.split(), *column)) for title, column in columns.items())
    return 1 + sum(cell + 3 for cell in cells)


def as_json(standings: Sequence[RankedEntry]) -> str:
    """All that is known of every entry but its epochs' figures, in ASCII."""
    content = [
        {"rank": each.rank, "part": each.part, **each.entry.model_dump(mode="json", exclude={"metrics"})}
        for each in standings
    ]
    return json.dumps(content, indent=2, allow_nan=False)


def as_csv(standings: Sequence[RankedEntry]) -> str:
    """One table for spreadsheets; a cell that they would take for a formula has an apostrophe before it."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    own = {
        "dataset": lambda each: each.entry.dataset,
        "threat": lambda each: each.entry.threat_model,
        "eps": lambda each: each.entry.eps,
        "part": lambda each: each.part,
    }
    columns: dict[str, Callable[[RankedEntry], str]] = {**own, **COLUMNS}
    writer.writerow(columns)
    for each in standings:
        writer.writerow(_csv_cell(cell(each)) for cell in columns.values())
    return file.getvalue()


def _csv_cell(text: str) -> str:
    text = printable(text, 2000)
    return re.sub(FORMULA, r"\1\2'", text)


def as_markdown(standings: Sequence[RankedEntry]) -> str:
    """Tables in GitHub's Markdown."""
    lines = []
    for heading, note, rows in _groups(standings):
        columns = _columns(rows)
        lines += [f"**{markdown_text(heading)}**", "", *([markdown_text(note), ""] if note else [])]
        lines.append(f"| {' | '.join(columns)} |")
        lines.append(f"|{'|'.join(':--' if title in _TEXTS else '--:' for title in columns)}|")
        lines += [f"| {' | '.join(map(markdown_text, cells))} |" for cells in zip(*columns.values(), strict=True)]
        lines.append("")
    return "\n".join(lines)


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is.

    GitHub makes links of www., of mail addresses and of @names after it has resolved escapes: a comment keeps them
    apart.
    """
    entities = printable(text, 2000).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    special = r"[\\`*_{}\[\]()#!|~$]|(?i:(?<=https)|(?<=http)|(?<=ftp)|(?<=xmpp)|(?<=mailto)):"
    escaped = re.sub(special, lambda found: f"\\{found[0]}", entities)
    return re.sub(r"(?i)(?<=\bwww)(?=\.)|(?<=@)", "<!-- -->", escaped)


_TEX = {"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
        "|": r"\textbar{}", '"': r"\char34{}", "`": r"\textasciigrave{}"}  # fmt: skip


def latex_text(text: str) -> str:
    """Text that TeX prints as it is."""
    return "".join(_TEX.get(char, char) for char in printable(text, 2000))


def as_latex(standings: Sequence[RankedEntry]) -> str:
    """Tables for a paper that uses booktabs."""
    lines = []
    for heading, note, rows in _groups(standings):
        columns = _columns(rows)
        caption = f"{heading}. {note}" if note else heading
        layout = "".join("l" if title in _TEXTS else "r" for title in columns)
        lines += [r"\begin{table}", rf"\caption{{{latex_text(caption)}}}", rf"\begin{{tabular}}{{{layout}}}"]
        lines += [r"\toprule", " & ".join(map(latex_text, columns)) + r" \\", r"\midrule"]
        lines += [" & ".join(map(latex_text, cells)) + r" \\" for cells in zip(*columns.values(), strict=True)]
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join(lines)
