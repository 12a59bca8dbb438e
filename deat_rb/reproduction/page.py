"""HTML page of a reproduction: tables, figures, tested claims, costs, and the source of every number."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deat_rb.reproduction.experiments import Setup
from deat_rb.reproduction.reproduce import Outcome
from deat_rb.reproduction.results import MINUTES, PASSES, RunResult
from deat_rb.reproduction.tables import Row, heading, mean_text, published_text, spelled
from deat_rb.utils.text import new_environment

SHORT = {"holds": "holds", "does not hold": "not", "undecided": "open"}
"""CSS classes of outcomes."""


def render_index(outcomes: Sequence[Outcome], setup: Setup, folder: Path) -> bytes:
    """Render the self-contained page ``index.html``.

    Args:
        outcomes: The targets, in the paper's order.
        setup: Scale, data, networks and seeds of the runs.
        folder: The folder of the page, to which links are relative.
    """
    runs = {run.name: run for each in outcomes for row in each.table.rows for run in row.runs}
    done = [run for run in runs.values() if run.status == "done"]
    verdicts = [verdict for each in outcomes for verdict in each.verdicts]
    template = new_environment("deat_rb.reproduction").get_template("index.html.j2")
    text = template.render(
        scale=setup.scale,
        scale_title=setup.own.title,
        targets=[_target(each, folder) for each in outcomes],
        counts=[
            (f"{len(done)} of {len(runs)}", "runs are done"),
            (str(sum(run.status == "failed" for run in runs.values())), "runs failed"),
            (f"{sum(run.values.get(PASSES, 0) for run in done):,.0f}", "backward passes"),
            (f"{sum(run.values.get(MINUTES, 0) for run in done):,.0f}", "minutes of training"),
        ],
        claims=[(outcome, SHORT[outcome], sum(each.outcome == outcome for each in verdicts)) for outcome in SHORT],
        hardware=list(dict.fromkeys(run.hardware for run in done)),
        commits=list(dict.fromkeys(run.commit for run in done if run.commit)),
    )
    return text.encode()


def _target(outcome: Outcome, folder: Path) -> dict[str, Any]:
    table = outcome.table
    picture = outcome.pictures.get("png")
    return {
        "name": outcome.name,
        "title": outcome.title,
        "differences": outcome.differences,
        "note": outcome.note,
        "is_figure": outcome.is_figure,
        "picture": base64.b64encode(picture).decode() if picture else "",
        "has_published": any(row.published for row in table.rows),
        "headings": [heading(column) for column in table.columns],
        "rows": [
            {
                "label": row.label,
                "cells": [(mean_text(row.value(column), column), published_text(row, column))
                          for column in table.columns],
                "unfinished": row.unfinished,
                "runs": [_run(run, row, outcome, folder) for run in row.runs],
            }
            for row in table.rows
        ],
        "verdicts": [{"text": each.text, "outcome": each.outcome, "short": SHORT[each.outcome], "detail": each.detail}
                     for each in outcome.verdicts],
        "files": [f"{outcome.name}.{suffix}" for suffix in ("md", "tex", "csv", "json", *outcome.pictures)],
    }  # fmt: skip


def _run(run: RunResult, row: Row, outcome: Outcome, folder: Path) -> dict[str, Any]:
    page = run.page.relative_to(folder).as_posix() if run.page is not None else ""
    return {
        "name": run.name,
        "row": row.label,
        "seed": run.seed,
        "status": run.status,
        "reason": run.reason,
        "page": page,
        "cells": [_value_text(run, column) for column in outcome.table.columns],
        "commit": run.commit,
        "hardware": run.hardware,
        "finished": run.finished,
        "commands": run.commands,
    }


def _value_text(run: RunResult, column: str) -> str:
    return spelled(run.values[column], column) if column in run.values else "-"
