"""Ranking of entries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import made_up_board
import pytest
from board_problems import FakeEvaluation, entry_of, make_run, submit

from deat_rb.leaderboard.board import Board
from deat_rb.leaderboard.entry import Accuracy
from deat_rb.leaderboard.ranking import rank
from deat_rb.utils.errors import DeatError


def test_rank_orders_by_robust_accuracy_within_a_group(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    submit(board, make_run(tmp_path / "run"))
    entry_of(board, "Better2022Known", external="39.00", backward_passes=5.0)
    entry_of(board, "Equal2022Robust")
    figures = {attack: Accuracy(n_correct=85, n_examples=100) for attack in ("natural", "autoattack")}
    entry_of(board, "Part2022Test", figures=figures, n_examples=100, remeasured={})
    natural = {"natural": Accuracy(n_correct=500, n_examples=500)}
    entry_of(board, "Without2022Autoattack", figures=natural, remeasured={}, reported=None)
    entry_of(board, "Other2022Eps", eps="51/255")
    entry_of(board, "Claimed2020Paper", kind="published", figures={}, remeasured={}, autoattack_acc="99.00")
    ranked = rank(board.entries())
    rows = [(each.entry.eps, each.part, each.rank, each.entry.model_name) for each in ranked]
    assert rows == [
        ("0.1", "full", 1, "Equal2022Robust"), ("0.1", "full", 1, "Wang2021Gradient"),
        ("0.1", "full", 3, "Better2022Known"), ("0.1", "full", None, "Without2022Autoattack"),
        ("0.1", "subset", None, "Part2022Test"),
        ("0.1", "published", None, "Claimed2020Paper"), ("51/255", "full", 1, "Other2022Eps"),
    ]  # fmt: skip
    by_cost = rank(board.entries(), sort="cost", dataset="digits")
    assert (by_cost[0].rank, by_cost[0].entry.model_name) == (3, "Better2022Known")
    with pytest.raises(DeatError, match="--sort costs is unknown: did you mean 'cost'"):
        rank(board.entries(), sort="costs")
    with pytest.raises(DeatError, match="the board has no dataset 'digit': did you mean 'digits'"):
        rank(board.entries(), dataset="digit")


def test_rank_counts_instead_of_rounding() -> None:
    """54.002 % and 54.004 % are both 54.00 %."""
    size: dict[str, Any] = {"n_examples": 50_000, "n_test": 50_000}
    entries = [made_up_board.entry(f"Doe2021Made_{name}", correct=(27_001,) * 4 + (count,), **size)
               for name, count in (("A", 27_000), ("B", 27_001))]  # fmt: skip
    assert [(each.rank, each.entry.model_name[-1]) for each in rank(entries)] == [(1, "B"), (2, "A")]


@pytest.mark.parametrize(
    "other", [{"data_sha256": "ef" * 32}, {"n_test": 501, "n_examples": 501}, {"dataset_note": "Another note."}]
)
def test_rank_compares_only_entries_of_the_same_images(other: dict[str, Any]) -> None:
    entries = [made_up_board.entry("Doe2021Made_A"), made_up_board.entry("Doe2021Made_B", **other)]
    (first, second) = rank(entries)
    assert first.group != second.group
    assert (first.rank, second.rank) == (1, 1)
    assert len({each.group for each in rank([entries[0], entries[0]])}) == 1
