"""Tables of means over seeds, as text, Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deat_rb.reproduction.results import EPOCHS, MINUTES, PASSES, Mean, RunResult, by_label, mean_of
from deat_rb.utils.text import csv_text, new_table

if TYPE_CHECKING:
    from rich.table import Table

HEADINGS = {
    "natural": "natural, %",
    "fgsm": "FGSM, %",
    "autoattack": "AutoAttack, %",
    PASSES: "backward passes",
    MINUTES: "minutes",
    EPOCHS: "epochs",
}
"""Headings of columns; other attacks have their names, such as ``PGD-100, %``."""

DIGITS = {PASSES: 0, MINUTES: 2, EPOCHS: 1}
"""Decimals of columns; accuracies have 2."""


def heading(column: str) -> str:
    """Return the heading of a column."""
    return HEADINGS.get(column, f"{column.upper() if re.fullmatch(r'(pgd|cw)-.*', column) else column}, %")


@dataclass(frozen=True)
class Published:
    """A published result: its mean and, if published, its standard deviation."""

    mean: float
    deviation: float | None = None


@dataclass(frozen=True)
class Row:
    """A row: the runs of one setting.

    Attributes:
        label: Its name.
        runs: Its runs, one per seed.
        published: Published values by column.
    """

    label: str
    runs: tuple[RunResult, ...]
    published: Mapping[str, Published] = field(default_factory=dict)

    def value(self, column: str) -> Mean | None:
        """Return the mean of a column over the runs that are done; None if one of them lacks it."""
        return mean_of([run for run in self.runs if run.status == "done"], column)

    @property
    def unfinished(self) -> list[str]:
        """Sentences about runs that are not done."""
        sentences = [f"seed {run.seed} failed: {run.reason}" for run in self.runs if run.status == "failed"]
        waiting = [str(run.seed) for run in self.runs if run.status not in ("done", "failed")]
        if waiting:
            sentences.append(f"seed{'s' if len(waiting) > 1 else ''} {', '.join(waiting)}: not done")
        return sentences


@dataclass(frozen=True)
class ResultTable:
    """A table of results.

    Attributes:
        name: Name of its files, without suffix.
        title: Title.
        columns: Columns, in order: attacks and costs.
        rows: Rows, in order.
        notes: Sentences below the title.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, results: Sequence[RunResult], *, name: str, title: str, notes: Sequence[str] = ()) -> ResultTable:
        """Return the table of results by label: all attacks, then backward passes, minutes and epochs."""
        costs = (PASSES, MINUTES, EPOCHS)
        attacks = dict.fromkeys(column for each in results for column in each.values if column not in costs)
        rows = tuple(Row(label, tuple(runs)) for label, runs in by_label(results).items())
        return cls(name, title, (*attacks, *costs), rows, tuple(notes))


def spelled(value: float, column: str) -> str:
    """Return a value with a column's number of decimals."""
    return f"{value:,.{DIGITS.get(column, 2)}f}"


def mean_text(mean: Mean | None, column: str, plus_minus: str = " ± ") -> str:
    """Return a mean and its deviation, such as ``43.20 ± 0.41``; ``-`` if there is none."""
    if mean is None:
        return "-"
    return spelled(mean.mean, column) + ("" if mean.deviation is None else plus_minus + spelled(mean.deviation, column))


def published_text(row: Row, column: str, plus_minus: str = " ± ") -> str:
    """Return the published value and the difference from it, such as ``43.38 (-0.18)``; empty if there is none."""
    known = row.published.get(column)
    if known is None:
        return ""
    digits = 1 if column in DIGITS else 2  # as the paper prints them
    text = f"{known.mean:.{digits}f}"
    text += "" if known.deviation is None else f"{plus_minus}{known.deviation:.1f}"
    value = row.value(column)
    return text if value is None else f"{text} ({_signed(value.mean - known.mean, column)})"


def _signed(value: float, column: str) -> str:
    return f"{value:+,.{DIGITS.get(column, 2)}f}"


def seeds_text(row: Row) -> str:
    """Return how many of a row's runs are done, such as ``2 of 3``."""
    done = sum(run.status == "done" for run in row.runs)
    return str(done) if done == len(row.runs) else f"{done} of {len(row.runs)}"


def images_text(results: Sequence[RunResult]) -> str:
    """Return how many test images each attack was measured on; empty before a run is done.

    It is ``Test images: 1,000 (natural, FGSM), 200 (AutoAttack).``, or ``Test images: 1,000.`` if all have the same.
    """
    counts: dict[str, set[int]] = {}
    for each in results:
        for attack, count in each.images.items():
            counts.setdefault(attack, set()).add(count)
    attacks: dict[str, list[str]] = {}
    for attack, found in counts.items():  # several if rows have different datasets
        text = f"{min(found):,}" + (f" to {max(found):,}" if len(found) > 1 else "")
        attacks.setdefault(text, []).append(heading(attack).removesuffix(", %"))
    parts = [f"{text} ({', '.join(names)})" for text, names in attacks.items()] if len(attacks) > 1 else [*attacks]
    return f"Test images: {', '.join(parts)}." if parts else ""


def as_rich(table: ResultTable) -> Table:
    """Return a table for the terminal."""
    from rich.markup import escape

    shown = new_table(escape(table.title))
    shown.add_column("", overflow="fold")
    shown.add_column("seeds", justify="right")
    for column in table.columns:
        shown.add_column(escape(heading(column)), justify="right")
    for row in table.rows:
        cells = []
        for column in table.columns:
            published = published_text(row, column)
            cells.append(mean_text(row.value(column), column, " ±") + (f"\n{published}" if published else ""))
        shown.add_row(escape(row.label), seeds_text(row), *cells)
    return shown


def unfinished_lines(table: ResultTable) -> list[str]:
    """Return sentences about all runs that are not done."""
    return [f"{row.label}, {sentence}" for row in table.rows for sentence in row.unfinished]


def as_markdown(table: ResultTable) -> str:
    """Return a table as Markdown; a published value and the difference from it are below the mean."""
    has_published = any(row.published for row in table.rows)
    lines = [f"## {table.title}", ""]
    lines += [line for note in table.notes for line in (note, "")]
    if has_published:
        lines += ["Below each mean: the paper's value and, in parentheses, the difference from it.", ""]
    lines.append("| " + " | ".join(["", "seeds", *map(heading, table.columns)]) + " |")
    lines.append("|---|" + "---:|" * (len(table.columns) + 1))
    for row in table.rows:
        cells = []
        for column in table.columns:
            published = published_text(row, column)
            cells.append(mean_text(row.value(column), column) + (f"<br>{published}" if published else ""))
        lines.append("| " + " | ".join([_in_markdown(row.label), seeds_text(row), *cells]) + " |")
    lines += [""] + [f"- {_in_markdown(line)}" for line in unfinished_lines(table)]
    return "\n".join(lines).rstrip() + "\n"


def _in_markdown(text: str) -> str:
    return re.sub(r"([|<>*_`\[\]\\])", r"\\\1", text)


def as_latex(table: ResultTable) -> str:
    """Return a table as LaTeX, for the package booktabs."""
    lines = [f"% {note}" for note in (table.title, *table.notes, *unfinished_lines(table))]
    lines += [rf"\begin{{tabular}}{{lr{'r' * len(table.columns)}}}", r"\toprule"]
    headings = ["", "seeds", *(_in_latex(heading(column)) for column in table.columns)]
    lines += [" & ".join(headings) + r" \\", r"\midrule"]
    for row in table.rows:
        cells = [mean_text(row.value(column), column, r" $\pm$ ") for column in table.columns]
        lines.append(" & ".join([_in_latex(row.label), seeds_text(row), *cells]) + r" \\")
        if row.published:
            published = [published_text(row, column, r" $\pm$ ") for column in table.columns]
            small = [rf"{{\footnotesize {cell}}}" if cell else "" for cell in published]
            lines.append(" & ".join([r"{\footnotesize paper}", "", *small]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _in_latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return re.sub(r"[&%$#_{}~^\\]", lambda match: special.get(match[0], rf"\{match[0]}"), text)


def as_csv(table: ResultTable) -> str:
    """Return a table as CSV: mean, deviation and published value of each column, and the notes in each row."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [f"{column}{suffix}" for column in table.columns for suffix in ("", " deviation", " published")]
    writer.writerow(["row", "seeds", *names, "note"])
    for row in table.rows:
        cells: list[Any] = [csv_text(row.label), sum(run.status == "done" for run in row.runs)]
        for column in table.columns:
            mean, known = row.value(column), row.published.get(column)
            cells += [
                "" if mean is None else repr(mean.mean),
                "" if mean is None or mean.deviation is None else repr(mean.deviation),
                "" if known is None else known.mean,
            ]
        writer.writerow([*cells, " ".join([*table.notes, *row.unfinished])])
    return text.getvalue()


def as_json(table: ResultTable) -> dict[str, Any]:
    """Return a table as JSON values: per row the means, the published values, and each run.

    Times are only in ``times`` and ``minutes``; all other values do not depend on interruptions of the runs.
    """
    return {
        "name": table.name,
        "title": table.title,
        "notes": list(table.notes),
        "columns": list(table.columns),
        "rows": [
            {
                "label": row.label,
                "means": {column: _mean_json(row.value(column)) for column in table.columns},
                "published": {column: {"mean": known.mean, "deviation": known.deviation}
                              for column, known in row.published.items()},
                "runs": [_run_json(run) for run in row.runs],
            }
            for row in table.rows
        ],
    }  # fmt: skip


def _mean_json(mean: Mean | None) -> dict[str, Any] | None:
    return None if mean is None else {"mean": mean.mean, "deviation": mean.deviation, "count": mean.count}


def _run_json(run: RunResult) -> dict[str, Any]:
    return {
        "run": run.name,
        "seed": run.seed,
        "status": run.status,
        "reason": run.reason,
        "values": run.values,
        "commands": list(run.commands),
        "commit": run.commit,
        "hardware": run.hardware,
        "times": {"finished": run.finished},
    }
