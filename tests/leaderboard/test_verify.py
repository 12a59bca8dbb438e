"""Verification of a board: its files, and its models."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_up_board
import pytest
from board_problems import NAME, FakeEvaluation, make_run, snapshot, submit
from jsonschema import Draft202012Validator

from deat_rb.evaluation.report import Check
from deat_rb.leaderboard.board import Board
from deat_rb.leaderboard.pages.index import build
from deat_rb.leaderboard.verify import verify
from deat_rb.utils.errors import DeatError


def put(path: Path, text: str = "") -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.write_text(text)


def natural_only(path: Path, **changes: Any) -> dict[str, Any]:
    """The content of an entry's file, changed and with no accuracy under attack."""
    content = json.loads(path.read_text())
    return {**content, "figures": {"natural": content["figures"]["natural"]}, "reported": None, **changes}


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda entry, weights: weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1"),           "restore the file"),
    (lambda entry, weights: weights.unlink(),                                                          "cannot read"),
    (lambda entry, weights: entry.unlink(),                                        r"weights/.* belongs to no entry"),
    (lambda entry, weights: entry.write_text(entry.read_text()[:100]),                             "is not valid JSON"),
    (lambda entry, weights: entry.write_text(entry.read_text().replace('"n_correct": 400', '"n_correct": 501')),
     "figures.natural: n_correct 501 is greater than n_examples 500"),
    (lambda entry, weights: entry.write_text(json.dumps(natural_only(entry, external="80.00"))),
     "external 80.00 needs an accuracy under AutoAttack"),
    (lambda entry, weights: entry.rename(entry.with_stem("Wang2021Other")),                            "is misplaced"),
    (lambda entry, weights: entry.with_suffix(".txt").write_text("?"),                       "txt belongs to no entry"),
    (lambda entry, weights: entry.with_name("Wang2022Link.json").symlink_to(entry),                     "is a symlink"),
    (lambda entry, weights: weights.with_name("Wang2022Link.safetensors").symlink_to(entry),            "is a symlink"),
])  # fmt: skip
def test_verify_names_what_is_wrong_and_where(
    tmp_path: Path, board: Board, fake: FakeEvaluation, spoil: Any, message: str
) -> None:
    submit(board, make_run(tmp_path / "run"))
    valid = verify(board.path, sample=50)
    assert (valid.problems, valid.notes, valid.entries, valid.measured) == ([], [], 1, 1)
    spoil(*(board.path / kind / f"digits/Linf/{NAME}{suffix}" for kind, suffix in
            (("entries", ".json"), ("weights", ".safetensors"))))  # fmt: skip
    problems = " ".join(verify(board.path, sample=50).problems)
    assert re.search(message, problems), problems
    assert NAME in problems or "Wang2022Link" in problems


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(lambda path: put(path / "models/digits/Linf/Doe2021Made_B.html", "x"), "Doe2021Made_B.html belongs to no entry"),
     (lambda path: put(path / "entries/readme.txt"), "readme.txt belongs to no entry"),
     (lambda path: put(path / "history/digits/x"), "history/digits/x belongs to no entry"),
     (lambda path: put(path / "evil.html"), "evil.html belongs to no entry"),
     (lambda path: (path / "weights").symlink_to("/tmp"), "weights is a symlink"),
     (lambda path: (path / "other").symlink_to("/tmp"), "other is a symlink"),
     (lambda path: os.mkfifo(path / "pipe"), "pipe belongs to no entry"),
     (lambda path: (path / "models").rename(path.parent / "m") and (path / "models").symlink_to(path.parent / "m"),
      "models is a symlink")],
)  # fmt: skip
def test_verify_names_strays_and_symlinks(tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    path = made_up_board.write(tmp_path / "board", [made_up_board.entry(weights_file=None)])
    assert verify(path, sample=0).problems == []
    build(path)
    put(path / "README.md", "Our board.")
    assert verify(path, sample=0).problems == []
    spoil(path)
    problems = verify(path, sample=0).problems
    assert [problem for problem in problems if message in problem], problems


def test_verify_measures_again(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    submit(board, make_run(tmp_path / "run"))
    fake.shares["pgd-100"] = 0.1
    (problem,) = verify(board.path, sample=500).problems
    assert problem.startswith("digits/Linf/Wang2021Gradient: the entry claims 50.00 % under pgd-100, but the bo")
    fake.shares["pgd-100"] = 0.5
    fake.checks = (Check(name="deterministic", status="fail", figure=9.0, sentence="It draws."),)
    (problem,) = verify(board.path, sample=100).problems
    assert "the model fails the check 'deterministic': It draws." in problem


def test_verify_notes_missing_datasets(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    run = make_run(tmp_path / "run", evaluated=False, dataset="folder")
    submit(board, run, data_dir=tmp_path, dataset_name="pets")
    assert verify(board.path, sample=50).notes == [
        "pets/Linf/Wang2021Gradient: not measured, because its images are missing; give --data-dir pets=DIR"
    ]
    assert verify(board.path, sample=50, data_dirs={"pets": tmp_path}).measured == 1


def test_verify_hashes_the_history(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    submit(board, make_run(tmp_path / "one"))
    submit(board, make_run(tmp_path / "two"), replace=True)
    weights = board.path / f"history/digits/Linf/{NAME}/0001/{NAME}.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\7")
    assert [problem for problem in verify(board.path, sample=0).problems if "0001" in problem and "SHA" in problem]


@pytest.mark.parametrize("sample", [1, 49, -1])
def test_verify_refuses_samples_that_are_too_small(tmp_path: Path, sample: int) -> None:
    path = made_up_board.write(tmp_path, [made_up_board.entry(weights_file=None)])
    with pytest.raises(DeatError, match=f"--sample {sample} is too small to detect wrong claims"):
        verify(path, sample=sample)


def test_verify_reads_a_read_only_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made_up_board.write(tmp_path, [made_up_board.entry(weights_file=None)])
    monkeypatch.setattr(os, "access", lambda *_: False)
    before = snapshot(path)
    assert verify(path, sample=0).problems == []
    assert snapshot(path) == before


@pytest.mark.parametrize(
    ("other", "message"),
    [({"data_sha256": "ef" * 32}, "Made_B was measured on different data than digits/Linf/Doe2021Made_A"),
     ({"n_test": 50, "n_examples": 50, "correct": (49, 43, 41, 40, 40)},
      "Made_B has n_test 50, but digits/Linf/Doe2021Made_A, with the same data, 500"),
     ({"dataset_note": "Another note."}, "Made_B has the dataset_note 'Another note.', but digits/Linf/Doe2021Made_A")],
)  # fmt: skip
def test_verify_names_entries_of_other_images(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    entries = [made_up_board.entry(f"Doe2021Made_{name}", weights_file=None, **changes)
               for name, changes in (("A", {}), ("B", other))]  # fmt: skip
    (problem,) = verify(made_up_board.write(tmp_path, entries), sample=0).problems
    assert message in problem


def test_verify_names_a_wrong_size_of_the_test_set(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    submit(board, make_run(tmp_path / "run", n=100))
    assert verify(board.path, sample=0).problems == []
    file = board.path / f"entries/digits/Linf/{NAME}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"n_test": 100}))
    for sample in (0, 50):
        (problem,) = verify(board.path, sample=sample).problems
        assert "n_test is 100, but these data have 500 test images" in problem


OWN = Path(__file__).parents[2]


def test_the_projects_own_entries_fit_the_documented_schema() -> None:
    schema = Draft202012Validator(json.loads((OWN / "docs/schema/entry.schema.json").read_text(encoding="utf-8")))
    entries = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(OWN.glob("leaderboard/entries/*/*/*"))]
    assert len(entries) == 9
    assert [error.message for entry in entries for error in schema.iter_errors(entry)] == []
    nonsense = {"eps": "banana", "weights_sha256": "x", "submitted": "2026-99-99", "model_name": "x", "dataset": "X",
                "external": "100.99", "schema_version": True}  # fmt: skip
    refused = {error.path[0] for error in schema.iter_errors(entries[0] | nonsense)}
    assert refused == set(nonsense)


def test_the_projects_own_board_is_valid_and_its_pages_are_built(tmp_path: Path) -> None:
    own = {path: data for path, data in snapshot(OWN / "leaderboard").items() if path != ".lock"}
    for path, data in own.items():
        assert isinstance(data, bytes)
        put(tmp_path / path)
        (tmp_path / path).write_bytes(data)
    build(tmp_path)
    assert {path: data for path, data in snapshot(tmp_path).items() if path != ".lock"} == own
    assert verify(tmp_path, sample=0).problems == []
