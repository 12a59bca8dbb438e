"""Writing a study's tables as Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import json
from pathlib import Path

from deat_rb.reproduction.tables import ResultTable, as_csv, as_json, as_latex, as_markdown
from deat_rb.utils.files import write_all


def write_table(table: ResultTable, folder: Path) -> list[Path]:
    """Write a table as ``NAME.md``, ``NAME.tex``, ``NAME.csv`` and ``NAME.json``: all files or none.

    Raises:
        DeatError: A file cannot be written.
    """
    contents = {
        "md": as_markdown(table),
        "tex": as_latex(table),
        "csv": as_csv(table),
        "json": json.dumps(as_json(table), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    files = {folder / f"{table.name}.{suffix}": text.encode() for suffix, text in contents.items()}
    write_all(files)
    return list(files)
