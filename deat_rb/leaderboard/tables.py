"""The leaderboard as terminal tables, JSON, CSV, Markdown and LaTeX.

Strings in entries are already plain text; every format still escapes them, in case an entry was edited by hand.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from deat_rb.leaderboard.ranking import PARTS, RankedEntry
from deat_rb.utils.text import csv_text, printable

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
    "extra data": lambda each: {True: "yes", False: "no", None: ""}[each.entry.additional_data],
    "architecture": lambda each: each.entry.architecture or "",
    "venue": lambda each: each.entry.venue or "",
}

_DROPPED_FIRST = ("venue", "extra data", "seconds", "examples", "architecture", "fgsm", "cw-20", "method", "pgd-100",
                  "backward passes")  # fmt: skip
"""Columns dropped on a narrow terminal, in this order."""

_TEXT_COLUMNS = {"model", "unreliable", "method", "extra data", "architecture", "venue"}


def _groups(ranked: Sequence[RankedEntry]) -> list[tuple[str, str, list[RankedEntry]]]:
    """Split ranked entries into tables, each with a heading and the dataset's note."""
    groups = []
    for _, part in groupby(ranked, key=lambda each: (each.group, each.part)):
        rows = list(part)
        group = rows[0].group
        heading = f"{group.dataset}, {group.conditions}: {PARTS[rows[0].part]}, accuracies in %"
        groups.append((heading, rows[0].entry.dataset_note or "", rows))
    return groups


def _columns(rows: Sequence[RankedEntry]) -> dict[str, list[str]]:
    """Return a table's cells by column, without empty columns."""
    cells = {title: [cell(row) for row in rows] for title, cell in COLUMNS.items()}
    return {title: column for title, column in cells.items() if any(column)}


def as_tables(ranked: Sequence[RankedEntry], width: int) -> list[RenderableType]:
    """Render tables for a terminal of ``width`` characters; columns that do not fit are dropped."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    tables: list[RenderableType] = []
    for heading, note, rows in _groups(ranked):
        table = Table(title=Text(printable(heading)), caption=Text(printable(note)) if note else None,
                      box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title_justify="left",
                      caption_justify="left")  # fmt: skip
        columns = _columns(rows)
        for title in _DROPPED_FIRST:
            if _width(columns) > width:
                columns.pop(title, None)
        for title in columns:
            table.add_column(title, justify="left" if title in _TEXT_COLUMNS else "right",
                             no_wrap=title != "backward passes")  # fmt: skip
        for cells in zip(*columns.values(), strict=True):
            table.add_row(*(Text(printable(cell, 120)) for cell in cells))
        tables.append(table)
    return tables


def _width(columns: dict[str, list[str]]) -> int:
    """Return the width of a table whose headers wrap at spaces and whose cells do not wrap."""
    cells = (max(len(word) for word in (*title.split(), *column)) for title, column in columns.items())
    return sum(cell + 2 for cell in cells)


def as_json(ranked: Sequence[RankedEntry]) -> str:
    """Return all fields of every entry except its metrics, with accuracies and intervals, as ASCII JSON."""
    content = []
    for each in ranked:
        fields = each.entry.model_dump(mode="json", exclude={"metrics"})
        for name in ("figures", "remeasured"):
            for attack, accuracy in getattr(each.entry, name).items():
                low, high = accuracy.interval
                fields[name][attack] |= {"accuracy": accuracy.accuracy, "low": low, "high": high}
        content.append({"rank": each.rank, "part": each.part, **fields})
    return json.dumps(content, indent=2, allow_nan=False)


def as_csv(ranked: Sequence[RankedEntry]) -> str:
    """Return one CSV table; an apostrophe is inserted before text that a spreadsheet would read as a formula."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("dataset", "threat", "eps", "part", *COLUMNS, "test images", "data"))
    for each in ranked:
        entry = each.entry
        cells = [entry.dataset, entry.threat_model, entry.eps, each.part, *(cell(each) for cell in COLUMNS.values())]
        cells += [str(entry.n_test or ""), entry.data_sha256 or ""]
        writer.writerow(map(csv_text, cells))
    return file.getvalue()


def as_markdown(ranked: Sequence[RankedEntry]) -> str:
    """Return tables in GitHub's Markdown."""
    lines = []
    for heading, note, rows in _groups(ranked):
        columns = _columns(rows)
        lines += [f"**{markdown_text(heading)}**", "", *([markdown_text(note), ""] if note else [])]
        lines.append(f"| {' | '.join(columns)} |")
        lines.append(f"|{'|'.join(':--' if title in _TEXT_COLUMNS else '--:' for title in columns)}|")
        lines += [f"| {' | '.join(map(markdown_text, cells))} |" for cells in zip(*columns.values(), strict=True)]
        lines.append("")
    return "\n".join(lines)


def markdown_text(text: str) -> str:
    """Escape text for Markdown.

    GitHub autolinks ``www.``, e-mail addresses and @mentions even if escaped; an empty HTML comment inside them
    prevents that.
    """
    entities = printable(text, 2000).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    special = r"[\\`*_{}\[\]()#!|~$]|(?i:(?<=https)|(?<=http)|(?<=ftp)|(?<=xmpp)|(?<=mailto)):"
    escaped = re.sub(special, lambda match: f"\\{match[0]}", entities)
    return re.sub(r"(?i)(?<=\bwww)(?=\.)|(?<=@)", "<!-- -->", escaped)


_TEX = {"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
        "|": r"\textbar{}", '"': r"\char34{}", "`": r"\textasciigrave{}"}  # fmt: skip


def latex_text(text: str) -> str:
    """Escape text for TeX."""
    return "".join(_TEX.get(char, char) for char in printable(text, 2000))


def as_latex(ranked: Sequence[RankedEntry]) -> str:
    r"""Return booktabs tables, each with a ``\label``; the best value of each accuracy is bold."""
    lines = [r"% needs \usepackage{booktabs}"]
    labels: list[str] = []
    for heading, note, rows in _groups(ranked):
        columns = {title: [latex_text(cell) for cell in column] for title, column in _columns(rows).items()}
        for title in _ACCURACIES & columns.keys():
            best = max((cell for cell in columns[title] if cell), key=float)
            columns[title] = [rf"\textbf{{{cell}}}" if cell == best and len(rows) > 1 else cell
                              for cell in columns[title]]  # fmt: skip
        group, caption = rows[0].group, f"{heading}. {note}" if note else heading
        parts = (group.dataset, group.threat_model, group.eps, rows[0].part, str(group.subset or ""))
        label = re.sub(r"[^a-zA-Z0-9.]+", "-", "-".join(filter(None, parts)))
        labels.append(label)
        label += f"-{labels.count(label)}" if labels.count(label) > 1 else ""
        layout = "".join("l" if title in _TEXT_COLUMNS else "r" for title in columns)
        lines += [r"\begin{table}", r"\centering", rf"\caption{{{latex_text(caption)}}}", rf"\label{{tab:{label}}}"]
        lines += [rf"\begin{{tabular}}{{{layout}}}", r"\toprule", " & ".join(map(latex_text, columns)) + r" \\"]
        lines += [r"\midrule", *(" & ".join(cells) + r" \\" for cells in zip(*columns.values(), strict=True))]
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join(lines)


_ACCURACIES = {"natural", "autoattack", "best known", "pgd-100", "cw-20", "fgsm"}
