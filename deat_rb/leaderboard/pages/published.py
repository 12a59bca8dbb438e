"""Published results, from published.json: the paper's Tables 1 to 5 and rows of RobustBench's leaderboard.

Accuracies are in percent. None of them was measured by deat-rb.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import NamedTuple

from deat_rb.leaderboard.entry import Entry
from deat_rb.leaderboard.pages.format import dataset_title


class PaperRow(NamedTuple):
    """A row of a table: accuracies in percent (no FGSM in Table 5), and minutes of training on `PAPER_HARDWARE`."""

    method: str
    natural: float
    fgsm: float | None
    pgd100: float
    cw20: float
    minutes: float


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables, or one of the four parts of Table 5; rows are in the paper's order.

    ``arch`` is spelled as by `deat_rb.models.names.canonical_arch`; ``setting`` is ``fast`` (cyclic learning rate, half
    precision) or ``standard`` (50 epochs, multi-step).
    """

    number: int
    dataset: str
    arch: str
    setting: str
    rows: tuple[PaperRow, ...]

    @property
    def title(self) -> str:
        """Dataset, architecture and setting."""
        arch = {"preactresnet18": "PreActResNet-18", "wrn-34-10": "WRN-34-10"}[self.arch]
        return f"{dataset_title(self.dataset)}, {arch}, {self.setting} setting"


_DATA = json.loads(files(__package__).joinpath("published.json").read_text(encoding="utf-8"))

PAPER_LINK: str = _DATA["paper"]["link"]

PAPER_EPS: str = _DATA["paper"]["eps"]

PAPER_HARDWARE: str = _DATA["paper"]["hardware"]

ROBUSTBENCH_LINK: str = _DATA["robustbench_link"]

PAPER_TABLES = tuple(
    PaperTable(**{**table, "rows": tuple(PaperRow(*row) for row in table["rows"])}) for table in _DATA["tables"]
)

REFERENCES = tuple(Entry.create({**row, "kind": "published"}, row["model_name"]) for row in _DATA["references"])
"""Rows of RobustBench's leaderboard."""
