"""The leaderboard as terminal, CSV, Markdown and LaTeX tables."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import made_up_board
import pytest
from board_problems import NAME, FakeEvaluation, entry_of, make_run, submit
from rich.console import Console
from rich.table import Table

from deat_rb.leaderboard.board import Board
from deat_rb.leaderboard.ranking import rank
from deat_rb.leaderboard.tables import as_csv, as_json, as_latex, as_markdown, as_tables, latex_text, markdown_text

LONG = "Zagoruyko2016Wide_standard_WRN-10-1"


def test_tables_show_the_datasets_note(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    metadata: dict[str, Any] = {"data_dir": tmp_path, "dataset_name": "pets", "dataset_note": "Of our own_ cats."}
    submit(board, make_run(tmp_path / "run", dataset="folder"), **metadata)
    ranked = rank(board.entries())
    assert "eps 0.1: whole test set, accuracies in %**\n\nOf our own\\_ cats.\n\n| rank" in as_markdown(ranked)
    assert "whole test set, accuracies in \\%. Of our own\\_ cats.}" in as_latex(ranked)
    (table,) = as_tables(ranked, 100)
    assert isinstance(table, Table)
    assert str(table.caption) == "Of our own_ cats."


def test_as_tables_drops_columns_on_narrow_terminals(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
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
        assert "┳┓" not in text, "an empty column"
        assert max(map(len, text.splitlines())) <= width


def test_markdown_text_and_latex_text_escape() -> None:
    assert markdown_text("a|b [c](d) <e> *f*") == r"a\|b \[c\]\(d\) &lt;e&gt; \*f\*"
    assert latex_text(r"5% of \x_{1} & ~^$#") == (
        r"5\% of \textbackslash{}x\_\{1\} \& \textasciitilde{}\textasciicircum{}\$\#"
    )
    assert markdown_text("HTTPS://evil.org ftp://x http://y mailto:a") == (
        r"HTTPS\://evil.org ftp\://x http\://y mailto\:a"
    )
    assert latex_text("?`") == r"?\textasciigrave{}", "a ligature in TeX"
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
def test_as_csv_defuses_formulas(tmp_path: Path, board: Board, fake: FakeEvaluation, text: str, cell: str) -> None:
    submit(board, make_run(tmp_path / "run"))
    forced = board.entries()[0].model_copy(update={"venue": text})
    assert next(csv.DictReader(io.StringIO(as_csv(rank([forced])))))["venue"] == cell


def test_every_format_has_a_table_for_each_group() -> None:
    ranked = rank(made_up_board.board())
    assert len(as_tables(ranked, 200)) == 4
    assert as_markdown(ranked).count("**digits, Linf, eps 0.1, 200 test images: part of the test set, not ranked,") == 1
    assert as_latex(ranked).count(r"\begin{tabular}") == 4
    rows = list(csv.DictReader(io.StringIO(as_csv(ranked))))
    ranks = [each.rank for each in ranked]
    assert [row["rank"] for row in rows] == ["" if each is None else str(each) for each in ranks]
    content = json.loads(as_json(ranked))
    assert [row["rank"] for row in content] == ranks
    assert content[0]["figures"]["natural"]["accuracy"] == 0.799  # 7990 of 10000
    assert content[0]["clean_acc"] == "79.90"


def test_as_latex_is_a_labelled_booktabs_table() -> None:
    text = as_latex(rank(made_up_board.board(), dataset="digits"))
    assert text.startswith(r"% needs \usepackage{booktabs}")
    assert re.findall(r"\\label{(.*)}", text) == ["tab:digits-Linf-0.1-full", "tab:digits-Linf-0.1-subset-200"]
    assert text.count(r"\centering") == 2
    assert r"\textbf{99.60}" in text, "the best natural accuracy"
    assert r"\textbf{81.40}" in text, "the best under AutoAttack"


def test_tables_of_subsets_of_different_sizes_are_apart() -> None:
    sizes = {"A": (20, 50), "B": (51, 300)}
    ranked = rank([made_up_board.entry(f"Doe2021Made_{name}", correct=(count,) * 5, n_examples=size)
                   for name, (count, size) in sizes.items()])  # fmt: skip
    assert [str(table.title) for table in as_tables(ranked, 80) if isinstance(table, Table)] == [
        f"digits, Linf, eps 0.1, {size} test images: part of the test set, not ranked, accuracies in %"
        for size in (50, 300)
    ]
    assert "textbf" not in as_latex(ranked)


def test_tables_of_different_images_of_one_name_are_apart() -> None:
    entries = [made_up_board.entry("Doe2021Made_A"), made_up_board.entry("Doe2021Made_B", data_sha256="ef" * 32),
               made_up_board.entry("Doe2021Made_C", dataset_note="Another note.")]  # fmt: skip
    text = as_latex(rank(entries))
    assert re.findall(r"\\label{tab:(.*)}", text) == [f"digits-Linf-0.1-full{each}" for each in ("", "-2", "-3")]
    assert text.count("data cdcdcdcdcdcd of 500 images") == 2
    rows = list(csv.DictReader(io.StringIO(as_csv(rank(entries)))))
    assert {(row["test images"], row["data"]) for row in rows} == {("500", "cd" * 32), ("500", "ef" * 32)}


def test_extra_data_are_yes_no_or_unknown() -> None:
    entries = [made_up_board.entry(f"Doe2021Made_{name}", additional_data=known)
               for name, known in (("A", True), ("B", False), ("C", None))]  # fmt: skip
    assert [row["extra data"] for row in csv.DictReader(io.StringIO(as_csv(rank(entries))))] == ["yes", "no", ""]
