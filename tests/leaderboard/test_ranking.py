"""A board's order, and its table for people, programs and papers."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from board_problems import NAME, FakeEvaluation, entry_of, make_run, submit
from rich.table import Table

from deat_rb.leaderboard.board import Board
from deat_rb.leaderboard.entry import Accuracy
from deat_rb.leaderboard.ranking import rank
from deat_rb.leaderboard.tables import as_csv, as_json, as_latex, as_markdown, as_tables, latex_text, markdown_text
from deat_rb.utils.errors import DeatError

LONG = "Zagoruyko2016Wide_standard_WRN-10-1"


def test_rank(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    submit(board, make_run(tmp_path / "run"))
    entry_of(board, "Better2022Known", external="39.00", backward_passes=5.0)
    entry_of(board, "Equal2022Robust")
    part = {"figures": {"natural": Accuracy.of(90, 100), "autoattack": Accuracy.of(85, 100)}, "n_examples": 100,
            "clean_acc": "90.00", "autoattack_acc": "85.00", "remeasured": {}}  # fmt: skip
    entry_of(board, "Part2022Test", **part)
    entry_of(board, "Other2022Eps", eps="51/255")
    entry_of(board, "Claimed2020Paper", kind="published", figures={}, remeasured={}, autoattack_acc="99.00")
    standings = rank(board.entries())
    found = [(each.entry.eps, each.part, each.rank, each.entry.model_name) for each in standings]
    assert found == [
        ("0.1", "full", 1, "Equal2022Robust"), ("0.1", "full", 1, "Wang2021Gradient"),
        ("0.1", "full", 3, "Better2022Known"), ("0.1", "subset", None, "Part2022Test"),
        ("0.1", "published", None, "Claimed2020Paper"), ("51/255", "full", 1, "Other2022Eps"),
    ]  # fmt: skip
    by_cost = rank(board.entries(), sort="cost", dataset="digits")
    assert (by_cost[0].rank, by_cost[0].entry.model_name) == (3, "Better2022Known")
    with pytest.raises(DeatError, match="there is no order 'costs': did you mean 'cost'"):
        rank(board.entries(), sort="costs")
    with pytest.raises(DeatError, match="the board has no entries of 'digit': did you mean 'digits'"):
        rank(board.entries(), dataset="digit")
    assert len(as_tables(standings, 200)) == 4
    rows = list(csv.DictReader(io.StringIO(as_csv(standings))))
    assert [row["rank"] for row in rows] == ["1", "1", "3", "", "", "1"]
    assert [row["rank"] for row in json.loads(as_json(standings))] == [1, 1, 3, None, None, 1]
    assert as_markdown(standings).count("**digits, Linf, eps 0.1: part of the test set, not ranked**") == 1
    assert as_latex(standings).count(r"\begin{tabular}") == 4


def test_what_is_said_of_the_data_stands_beside_the_table(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    terms: dict[str, Any] = {"data_dir": tmp_path, "dataset_name": "pets", "dataset_note": "Of our own_ cats."}
    submit(board, make_run(tmp_path / "run", dataset="folder"), **terms)
    standings = rank(board.entries())
    assert "eps 0.1: whole test set**\n\nOf our own\\_ cats.\n\n| rank" in as_markdown(standings)
    assert "whole test set. Of our own\\_ cats.}" in as_latex(standings)
    (table,) = as_tables(standings, 100)
    assert isinstance(table, Table)
    assert str(table.caption) == "Of our own_ cats."


def test_narrow_terminals_spare_columns(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    from rich.console import Console

    submit(board, make_run(tmp_path / "run"))
    entry_of(board, LONG)
    for width in (80, 100, 160):
        written = io.StringIO()
        console = Console(width=width, file=written)
        for table in as_tables(rank(board.entries()), width):
            console.print(table)
        text = written.getvalue()
        assert NAME in text
        assert "40.00" in text
        assert LONG in text
        assert "…" not in text
        assert "┳┓" not in text, "a column without room for anything"
        assert max(map(len, text.splitlines())) <= width


def test_escapes() -> None:
    assert markdown_text("a|b [c](d) <e> *f*") == r"a\|b \[c\]\(d\) &lt;e&gt; \*f\*"
    assert latex_text(r"5% of \x_{1} & ~^$#") == (
        r"5\% of \textbackslash{}x\_\{1\} \& \textasciitilde{}\textasciicircum{}\$\#"
    )
    assert markdown_text("HTTPS://evil.org ftp://x http://y mailto:a") == (
        r"HTTPS\://evil.org ftp\://x http\://y mailto\:a"
    )
    assert latex_text("?`") == r"?\textasciigrave{}", "together they are another sign"
    assert latex_text('"20') == r"\char34{}20", "\\textquotedbl is not in the fonts that a paper has by default"
    assert markdown_text("www.evil.org WWW.x a@b.org @name") == (
        "www<!-- -->.evil.org WWW<!-- -->.x a@<!-- -->b.org @<!-- -->name"
    )


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1", "'=1"),
        ("x;=1", "x;'=1"),
        ("x; +1", "x; '+1"),
        ("\uff1d1", "'\uff1d1"),
        ("a = b", "a = b"),
        ("a-b", "a-b"),
    ],
)
def test_cells_of_a_spreadsheet(tmp_path: Path, board: Board, fake: FakeEvaluation, text: str, cell: str) -> None:
    submit(board, make_run(tmp_path / "run"))
    forced = board.entries()[0].model_copy(update={"venue": text})
    assert next(csv.DictReader(io.StringIO(as_csv(rank([forced])))))["venue"] == cell
