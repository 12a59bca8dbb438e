"""Several that change a board at once, and those that are killed while they do."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from board_problems import NAME, FakeEvaluation, make_run, snapshot, submit

from deat_rb.leaderboard.board import Board
from deat_rb.leaderboard.entry import Entry, read_entry


def _commit(path: Path, name: str, began: Any, die_at: int | None) -> None:
    """Puts an entry on the board in a process of its own, which dies at its ``die_at``-th change of the disk."""
    template = read_entry(path / f"entries/digits/Linf/{NAME}.json")
    weights = f"new weights of {name}".encode()
    entry = Entry.checked(
        {**dict(template), "model_name": name, "weights_file": f"weights/digits/Linf/{name}.safetensors",
         "weights_sha256": hashlib.sha256(weights).hexdigest(), "footnote": "New."},
        name,
    )  # fmt: skip
    if die_at is not None:
        _die_at(die_at)
    if began is not None:
        began.wait(30)
    Board(path).commit(entry, weights, replace=True)


class Killed(BaseException):
    """Stands for a kill: from then on nothing changes the disk, whatever cleans up."""


def _die_at(count: int, replaced: Any = setattr, end: Any = os._exit) -> None:
    left = [count]
    for function in ("replace", "mkdir", "unlink", "rmdir"):
        real = getattr(os, function)

        def dying(*arguments: Any, _real: Any = real, **options: Any) -> Any:
            if left[0] == 0:
                end(9)
            left[0] -= 1
            return _real(*arguments, **options)

        replaced(os, function, dying)


def _raise_killed(status: int) -> None:
    raise Killed


def _forked(*arguments: Any) -> Any:
    process = multiprocessing.get_context("fork").Process(target=_commit, args=arguments)
    process.start()
    return process


def _is_whole(board: Board) -> bool:
    """Every entry has its weights, and nothing else is there."""
    entries = board.entries()
    hashes = {entry.weights_file: entry.weights_sha256 for entry in entries}
    found = {
        str(path.relative_to(board.path)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in board.path.glob("weights/*/*/*")
    }
    return hashes == found and not (board.path / ".staging").exists()


def test_several_at_once_all_land(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    submit(board, make_run(tmp_path / "run"))
    began = multiprocessing.get_context("fork").Event()
    names = [f"Wang2021Gradient_{number}" for number in range(6)]
    processes = [_forked(board.path, name, began, None) for name in names]
    began.set()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert {entry.model_name for entry in board.entries()} == {NAME, *names}
    assert _is_whole(board)


def test_one_waits_for_the_other(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    submit(board, make_run(tmp_path / "run"))
    began = multiprocessing.get_context("fork").Event()
    process = _forked(board.path, "Wang2021Gradient_2", began, None)
    with board.locked():
        began.set()
        process.join(0.5)
        assert process.is_alive()
        assert len(board.entries()) == 1
    process.join(60)
    assert process.exitcode == 0
    assert len(board.entries()) == 2


@pytest.mark.parametrize("name", ["Wang2021Gradient_2", NAME])
def test_killed_at_any_moment(tmp_path: Path, board: Board, fake: FakeEvaluation, name: str) -> None:
    """New or replacing: at whatever change of the disk it dies, all is as it was, or the submission lands whole."""
    submit(board, make_run(tmp_path / "run"))
    before, entries_before = snapshot(board.path), board.entries()
    outcomes = []
    for moment in range(200):
        with pytest.MonkeyPatch.context() as patch:
            _die_at(moment, patch.setattr, _raise_killed)
            try:
                _commit(board.path, name, None, None)
                break
            except Killed:
                pass
        torn = board.entries()
        assert torn == entries_before or any(entry.footnote == "New." for entry in torn)
        board.recover()
        assert _is_whole(board)
        outcomes.append(any(entry.footnote == "New." for entry in board.entries()))
        assert outcomes[-1] or snapshot(board.path) == before
        _restore(board.path, before)
    assert any(entry.footnote == "New." for entry in board.entries()), "it was never let through"
    assert outcomes == sorted(outcomes), "once it is complete it lands, whatever comes after"
    assert {True, False} == set(outcomes)


def _restore(folder: Path, before: dict[str, bytes | str]) -> None:
    shutil.rmtree(folder)
    for path, data in before.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data if isinstance(data, bytes) else b"")


@pytest.mark.parametrize("moment", [0, 8, 14])
def test_a_process_that_is_really_killed(tmp_path: Path, board: Board, fake: FakeEvaluation, moment: int) -> None:
    submit(board, make_run(tmp_path / "run"))
    before = snapshot(board.path)
    process = _forked(board.path, "Wang2021Gradient_2", None, moment)
    process.join(60)
    assert process.exitcode == 9
    board.recover()
    assert _is_whole(board)
    assert len(board.entries()) == 2 or snapshot(board.path) == before
