"""Published results: the paper's tables and rows of RobustBench's leaderboard."""

from __future__ import annotations

from deat_rb.leaderboard.pages.published import PAPER_TABLES, REFERENCES


def test_paper_tables_agree_with_each_other() -> None:
    """Table 5 repeats the M-DEAT rows of Tables 1 to 4."""
    figures = {(table.dataset, table.arch, table.setting): {row.method: row for row in table.rows}
               for table in PAPER_TABLES if table.number < 5}  # fmt: skip
    fifth = [table for table in PAPER_TABLES if table.number == 5]
    assert [len(table.rows) for table in PAPER_TABLES] == [6, 6, 6, 13, 2, 2, 2, 2]
    for table in fifth:
        repeated = figures[table.dataset, table.arch, table.setting]["M-DEAT"]
        assert table.rows[0] == repeated._replace(fgsm=None)


def test_references_are_rows_of_robustbench() -> None:
    rows = {(reference.dataset, reference.model_name): reference for reference in REFERENCES}
    wong = rows["cifar10", "Wong2020Fast"]
    assert (wong.clean_acc, wong.autoattack_acc, wong.reported, wong.eps) == ("83.34", "43.21", "46.06", "8/255")
    assert rows["cifar10", "Wang2020Improving"].additional_data
    for reference in REFERENCES:
        assert float(reference.autoattack_acc or 101) <= float(reference.reported or 0)
        assert str(reference.footnote).startswith("From RobustBench.")
