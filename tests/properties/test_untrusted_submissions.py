"""Untrusted submissions: each is refused in one sentence, and the board is byte for byte as before."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import shutil
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from board_problems import make_run, network, snapshot, without_evaluating
from rich.console import Console
from submission_attempts import NAME, Attempt, Setup, written
from untrusted_submissions import HARMLESS, rows

from deat_rb.leaderboard import untrusted_weights
from deat_rb.leaderboard.board import Board
from deat_rb.leaderboard.entry import Entry, parse_entry
from deat_rb.leaderboard.ranking import rank
from deat_rb.leaderboard.submission import SubmissionMetadata
from deat_rb.leaderboard.tables import as_csv, as_json, as_latex, as_markdown, as_tables
from deat_rb.leaderboard.untrusted_weights import as_safetensors
from deat_rb.utils.errors import DeatError


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A board with an entry, to be copied."""
    folder = tmp_path_factory.mktemp("submissions")
    with pytest.MonkeyPatch.context() as patches:
        without_evaluating(patches)
        run = make_run(folder / "first")
        Board(folder / "board").submit(run, SubmissionMetadata(model_name="Wang2021Gradient"))
    return folder / "board"


@pytest.fixture
def attempt(board: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Attempt:
    """A board with an entry, and a folder for a submission."""
    fake = without_evaluating(monkeypatch)
    shutil.copytree(board, tmp_path / "board")
    (tmp_path / "work").mkdir()
    limit = partial(monkeypatch.setattr, untrusted_weights, "MAX_WEIGHTS")
    return Attempt(tmp_path / "work", tmp_path / "board", fake, limit)


@pytest.mark.slow
@pytest.mark.parametrize(("setup", "pattern"), [pytest.param(*row[1:], id=row[0]) for row in rows()])
def test_submit_refuses_untrusted_input_and_leaves_the_board_unchanged(
    attempt: Attempt, setup: Setup, pattern: str
) -> None:
    setup(attempt)
    before = snapshot(attempt.board)
    with pytest.raises(DeatError) as refusal:
        attempt.submit()
    message = str(refusal.value)
    assert re.search(pattern, message), message
    assert len(message) <= 1010
    assert not [char for char in message if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert snapshot(attempt.board) == before


@pytest.mark.parametrize("data", HARMLESS.values(), ids=HARMLESS)
def test_submit_stores_only_the_tensors_of_an_archive(attempt: Attempt, data: bytes) -> None:
    written(data)(attempt)
    before = snapshot(attempt.folder.parent)
    entry = attempt.submit()
    stored = attempt.board / entry.weights_place
    assert stored.read_bytes() == as_safetensors(network())
    assert hashlib.sha256(stored.read_bytes()).hexdigest() == entry.weights_sha256
    new = snapshot(attempt.folder.parent).keys() - before.keys()
    assert new == {f"board/{entry.weights_place}", f"board/entries/{entry.key}.json"}


def test_submit_accepts_valid_submissions(attempt: Attempt) -> None:
    """The counterpart of the refusals above."""
    attempt.run()
    assert attempt.submit().model_name == NAME
    attempt.checkpoint()
    assert attempt.submit().dataset == "cifar10"


# Entries edited by hand

ALL_AT_ONCE = '=1+1 <script>x</script> | [a](b) \\input{x} & _ % $ "'


@pytest.fixture
def forced(attempt: Attempt) -> Entry:
    """An entry whose texts were not validated."""
    return (
        Board(attempt.board).entries()[0].model_copy(update={"venue": ALL_AT_ONCE + "\x1b[2J", "method": "=2\x1b[1m"})
    )


def test_every_format_escapes_texts(forced: Entry) -> None:
    ranked = rank([forced])
    row = next(csv.DictReader(io.StringIO(as_csv(ranked))))
    assert row["venue"].startswith("'=1+1")
    assert row["method"].startswith("'=2")
    markdown = as_markdown(ranked)
    assert "<script>" not in markdown
    assert r"\| \[a\]\(b\)" in markdown
    assert r"\input" not in as_latex(ranked).replace(r"\textbackslash{}input", "")
    terminal = io.StringIO()
    console = Console(file=terminal, width=400, force_terminal=True)
    for table in as_tables(ranked, 400):
        console.print(table)
    assert "\x1b[2J" not in terminal.getvalue()
    assert "\\x1b[2J" in terminal.getvalue()
    for text in (as_csv(ranked), markdown, as_latex(ranked), as_json(ranked)):
        assert "\x1b" not in text


@pytest.mark.parametrize(
    "change",
    [lambda text: text.replace('"venue": "arXiv, Mar 2021"', '"venue": "<b onmouseover=alert(1)>"'),
     lambda text: text.replace('"venue": "arXiv, Mar 2021"', '"venue": "\\u001b[2J"'),
     lambda text: text.replace('"sentence": "Fine."', '"sentence": "<script>alert(1)</script>"'),
     lambda text: text.replace('"figure": 0.0', '"figure": 1e999'),
     lambda text: text.replace('"figure": 0.0', '"figure": "nan"'),
     lambda text: text.replace('"wrn-10-1"', '"os:system"'),
     lambda text: text.replace('"weights/digits', '"weights/../../digits')],
)  # fmt: skip
def test_parse_entry_refuses_entries_edited_by_hand(attempt: Attempt, change: Callable[[str], str]) -> None:
    text = (attempt.board / "entries/digits/Linf/Wang2021Gradient.json").read_text()
    assert change(text) != text
    assert parse_entry(text.encode(), "x")
    with pytest.raises(DeatError):
        parse_entry(change(text).encode(), "x")
