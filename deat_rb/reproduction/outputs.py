"""Writing a study's tables as Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deat_rb.reproduction.tables import ResultTable, as_csv, as_json, as_latex, as_markdown
from deat_rb.utils.files import write_all


def write_table(
    table: ResultTable,
    folder: Path,
    *,
    remarks: str = "",
    facts: Mapping[str, Any] | None = None,
    pictures: Mapping[str, bytes] | None = None,
) -> list[Path]:
    """Write a table as ``NAME.md``, ``NAME.tex``, ``NAME.csv`` and ``NAME.json``: all files or none.

    Args:
        table: The table.
        folder: The folder of the files.
        remarks: Markdown below the table in ``NAME.md``.
        facts: Further content of ``NAME.json``.
        pictures: Pictures to write as ``NAME.FORMAT``, by format.

    Raises:
        DeatError: A file cannot be written.
    """
    content = json.dumps({**as_json(table), **(facts or {})}, indent=2, ensure_ascii=False, allow_nan=False)
    texts = {
        "md": as_markdown(table) + remarks,
        "tex": as_latex(table),
        "csv": as_csv(table),
        "json": content + "\n",
    }
    contents = {suffix: text.encode() for suffix, text in texts.items()} | dict(pictures or {})
    files = {folder / f"{table.name}.{suffix}": data for suffix, data in contents.items()}
    write_all(files)
    return list(files)
