"""A board that expects no harm, as one writes it in an afternoon: the hostile submissions get their way with it."""

from __future__ import annotations

import csv
import json
import re
import shutil
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

NAME = re.compile(r"[A-Z]\w*\d{4}\w*")


class NaiveBoard:
    """Keeps what it is handed, and shows it as HTML, CSV, Markdown and TeX.

    Attributes:
        path: Its folder.
        rows: What stands in its tables.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []

    def submit(self, weights: Path, info: dict[str, Any] | Path, *, name: str, dataset: str = "cifar10") -> Path:
        """Copies the weights, and gives back the entry's file."""
        fields = json.loads(info.read_bytes()) if isinstance(info, Path) else info
        place = self.path / dataset / f"{name}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(fields))
        shutil.copyfile(weights, place.with_suffix(".pt"))
        self.rows.append({"name": name, **fields})
        return place

    def load(self, model: torch.nn.Module, weights: Path) -> torch.nn.Module:
        """As most tutorials do."""
        model.load_state_dict(torch.load(weights, weights_only=False), strict=False)
        return model

    def unpack(self, archive: Path) -> None:
        """Writes every member under its name."""
        with zipfile.ZipFile(archive) as opened:
            for name in opened.namelist():
                target = self.path / "unpacked" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(opened.read(name))

    def ranked(self) -> list[str]:
        """The best first."""
        return [row["name"] for row in sorted(self.rows, key=lambda row: -float(row["clean_acc"]))]

    def html(self) -> list[tuple[str, dict[str, str | None]]]:
        """The page, as a browser takes it: its elements."""
        page = _Page()
        for row in self.rows:
            page.feed(f'<tr><td><a href="{row["link"]}">{row["name"]}</a></td><td>{row["venue"]}</td></tr>')
        return page.found

    def csv(self) -> list[str]:
        """The venues, as a spreadsheet reads them back."""
        file = self.path / "board.csv"
        with file.open("w", newline="") as opened:
            csv.writer(opened).writerows([row["name"], row["venue"]] for row in self.rows)
        with file.open(newline="") as opened:
            return [row[1] for row in csv.reader(opened)]

    def markdown(self) -> list[list[str]]:
        """The cells of the table, as GitHub takes it."""
        lines = [f"| {row['name']} | {row['venue']} |" for row in self.rows]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    def latex(self) -> list[str]:
        """The commands that TeX would obey."""
        return [command for row in self.rows for command in re.findall(r"\\[a-z]+", f"{row['venue']} \\\\")]


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
