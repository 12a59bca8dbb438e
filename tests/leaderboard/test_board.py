"""The board's folder: submitting, replacing, locking, permissions."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any

import made_up_board
import pytest
import torch
from board_problems import (
    NAME,
    FakeEvaluation,
    claim,
    digits,
    make_checkpoint,
    make_run,
    network,
    snapshot,
    submit,
)

from deat_rb.leaderboard.board import Board
from deat_rb.leaderboard.entry import Entry, read_entry
from deat_rb.leaderboard.pages.index import build
from deat_rb.leaderboard.ranking import rank
from deat_rb.leaderboard.untrusted import MAX_JSON
from deat_rb.leaderboard.verify import verify
from deat_rb.models.spec import build_model
from deat_rb.models.weights import load_weights
from deat_rb.utils import safe_load
from deat_rb.utils.errors import DeatError


def test_submit_writes_the_entry_and_its_weights(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    entry = submit(board, make_run(tmp_path / "run"), sample=50, footnote="Mine.")
    assert read_entry(board.path / "entries/digits/Linf/Wang2021Gradient.json") == entry
    assert (entry.clean_acc, entry.autoattack_acc, entry.reported) == ("80.00", "40.00", "40.00")
    assert (entry.n_examples, entry.n_test, entry.is_subset, entry.footnote) == (500, 500, False, "Mine.")
    assert entry.figures["pgd-100"].n_correct == 250
    assert entry.remeasured["pgd-100"].n_examples == 50
    weights = board.path / "weights/digits/Linf/Wang2021Gradient.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == entry.weights_sha256
    model = build_model("wrn-10-1", dataset="digits")
    load_weights(model, safe_load.load_tensors(weights), source="the board")
    assert torch.equal(model.eval()(torch.zeros(1, 3, 32, 32)), network()(torch.zeros(1, 3, 32, 32)))
    assert {path.name for path in board.path.iterdir()} - {".lock"} == {"entries", "weights"}


@pytest.mark.parametrize("evaluated", [True, False])
def test_submit_measures_and_ranks_a_run_in_its_own_norm(
    evaluated: bool, tmp_path: Path, board: Board, fake: FakeEvaluation
) -> None:
    linf = submit(board, make_run(tmp_path / "linf"))
    run = make_run(tmp_path / "run", evaluated=False, norm="L2")
    if evaluated:
        claim(run)
        with pytest.raises(DeatError, match="uses fp32 and Linf, not fp32 and L2"):
            submit(board, run)
        claim(run, norm="L2")
    entry = submit(board, run)
    assert fake.calls[-1]["norm"] == "L2"
    assert (entry.threat_model, entry.key) == ("L2", "digits/L2/Wang2021Gradient")
    assert read_entry(board.path / "entries/digits/L2/Wang2021Gradient.json") == entry
    assert [(ranked.entry, ranked.rank) for ranked in rank([linf, entry])] == [(entry, 1), (linf, 1)]
    assert verify(board.path, sample=50).problems == []
    assert fake.calls[-2]["norm"] == "L2"


def test_submit_takes_the_norm_of_an_exports_folder(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    shutil.copytree(make_checkpoint(tmp_path / "linf").parents[3], tmp_path / "l2")
    for kind in ("models", "model_info"):
        (tmp_path / "l2" / kind / "cifar10" / "Linf").rename(tmp_path / "l2" / kind / "cifar10" / "L2")
    for folder, norm in (("linf", "Linf"), ("l2", "L2")):
        entry = submit(board, tmp_path / folder, "Wong2020Fast", dataset="digits")
        assert (entry.threat_model, fake.calls[-1]["norm"]) == (norm, norm)


def test_submit_takes_the_norm_of_the_folder_of_an_info_that_is_given(
    tmp_path: Path, board: Board, fake: FakeEvaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = make_checkpoint(tmp_path)
    folders = {norm: tmp_path / "model_info" / "cifar10" / norm for norm in ("Linf", "L2")}
    shutil.copytree(folders["Linf"], folders["L2"])
    plain = shutil.copy(weights, tmp_path / "plain.pt")
    monkeypatch.chdir(tmp_path)
    info = folders["L2"].relative_to(tmp_path) / "Wong2020Fast.json"
    assert submit(board, Path(plain), "Rice2020L2", dataset="digits", info=info).threat_model == "L2"
    with pytest.raises(DeatError, match=r"Wong2020Fast\.json is in the folder L2, but .* in Linf: give the model_info"):
        submit(board, weights, "Rice2020Both", dataset="digits", info=info)


def test_submit_takes_the_norm_that_is_given(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    weights = make_checkpoint(tmp_path)
    plain = Path(shutil.copy(weights, tmp_path / "plain.pt"))
    described = {"arch": "wrn-10-1", "dataset": "digits", "eps": "0.5"}
    assert submit(board, plain, "Rice2020L2", norm="L2", **described).threat_model == "L2"
    assert {call["norm"] for call in fake.calls} == {"L2"}
    with pytest.raises(
        DeatError, match=r"--norm L2 contradicts .*Wong2020Fast\.json, which is in an export's folder Linf"
    ):
        submit(board, weights, norm="L2", dataset="digits")
    assert submit(board, plain, "Rice2020Lower", norm="l2", **described).threat_model == "L2"
    with pytest.raises(DeatError, match="norm 'l1'"):
        submit(board, plain, norm="l1", **described)
    with pytest.raises(DeatError, match="--norm is only for checkpoints"):
        submit(board, make_run(tmp_path / "run"), norm="Linf")


def test_submit_does_not_take_an_unknown_accuracy_for_a_claim(
    tmp_path: Path, board: Board, fake: FakeEvaluation
) -> None:
    """``deat-rb export`` without AutoAttack writes 0.00, marked as unreliable."""
    unknown: dict[str, Any] = {"clean_acc": ..., "autoattack_acc": "0.00"}
    entry = submit(board, make_checkpoint(tmp_path / "a", unreliable=True, **unknown), "Wong2020A", dataset="digits")
    assert entry.autoattack_acc != "0.00"
    with pytest.raises(DeatError, match=r"claims 0\.00 % under autoattack"):
        submit(board, make_checkpoint(tmp_path / "b", **unknown), "Wong2020B", dataset="digits")


def test_submit_leaves_out_an_external_accuracy_above_its_own_autoattack(
    tmp_path: Path, board: Board, fake: FakeEvaluation
) -> None:
    given: dict[str, Any] = {"clean_acc": ..., "autoattack_acc": ..., "external": "99.00", "footnote": "Theirs."}
    entry = submit(board, make_checkpoint(tmp_path, **given), "Wong2020Fast", dataset="digits")
    assert entry.external is None
    assert entry.footnote == (
        f"Theirs. The external accuracy of 99.00 % is left out, because AutoAttack found {entry.autoattack_acc} %."
    )
    declared = submit(board, make_run(tmp_path / "run"), external=41.0)
    assert declared.external is None
    assert declared.footnote == "The external accuracy of 41.00 % is left out, because AutoAttack found 40.00 %."


def test_submit_takes_a_command_with_a_pattern(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    entry = submit(board, make_run(tmp_path / "run"))
    command = r"deat-rb train --freeze 'conv1|layer\d'"
    assert Entry.create({**dict(entry), "command": command}, "it").command == command
    with pytest.raises(DeatError, match="has invisible characters or HTML"):
        Entry.create({**dict(entry), "command": "<script>"}, "it")


def test_submit_refuses_a_taken_name_before_evaluating(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    run = make_run(tmp_path / "run")
    submit(board, run)
    before, calls = snapshot(board.path), len(fake.calls)
    with pytest.raises(DeatError, match="the board already has digits/Linf/Wang2021Gradient"):
        submit(board, run)
    with pytest.raises(DeatError, match="differs from Wang2021GRADIENT only in letter case"):
        submit(board, run, "Wang2021GRADIENT")
    assert (snapshot(board.path), len(fake.calls)) == (before, calls)


def test_submit_moves_replaced_entries_to_the_history(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    entry = submit(board, make_run(tmp_path / "one"))
    old = snapshot(board.path)
    submit(board, make_run(tmp_path / "two", evaluated=False), replace=True, footnote="Second.")
    submit(board, make_run(tmp_path / "three"), replace=True, footnote="Third.", keep_weights=False)
    history = board.path / "history/digits/Linf/Wang2021Gradient"
    assert (history / "0001/Wang2021Gradient.json").read_bytes() == old["entries/digits/Linf/Wang2021Gradient.json"]
    weights = (history / "0001/Wang2021Gradient.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == entry.weights_sha256
    assert read_entry(history / "0002/Wang2021Gradient.json").footnote == "Second."
    assert board.entries()[0].footnote == "Third."
    assert not list(board.path.glob("weights/*/*/*")), "weights that the board no longer stores"
    assert verify(board.path, sample=0).problems == []


def test_submit_refuses_other_data_of_the_same_name(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    submit(board, make_run(tmp_path / "run"))
    path = board.path / "entries/digits/Linf/Wang2021Gradient.json"
    path.write_text(path.read_text().replace(digits().fingerprint, "c" * 64))
    with pytest.raises(DeatError, match=r"digits has different data on this board \(SHA-256 cccccccccccc,"):
        submit(board, make_run(tmp_path / "two"), "Wang2021Gradient_2")


def test_submit_to_a_merged_board_joins_the_entries_of_its_images(
    tmp_path: Path, board: Board, fake: FakeEvaluation
) -> None:
    folder: dict[str, Any] = {"data_dir": tmp_path, "dataset_name": "pets"}
    submit(board, make_run(tmp_path / "one", dataset="folder"), "Wang2021Gradient_B", dataset_note="Cats.", **folder)
    submit(board, make_run(tmp_path / "two", dataset="folder"), "Wang2021Gradient_A", **folder)
    file = board.path / "entries/pets/Linf/Wang2021Gradient_A.json"
    file.write_text(file.read_text().replace("Cats.", "Our cats."))
    other = file.with_name("Wang2021Gradient.json")
    other.write_text(file.read_text().replace("Gradient_A", "Gradient").replace(digits().fingerprint, "c" * 64))
    assert submit(
        board, make_run(tmp_path / "three", dataset="folder"), "Wang2021Gradient_C", **folder
    ).dataset_note == ("Our cats.")
    entry = submit(board, make_run(tmp_path / "four", dataset="folder"), "Wang2021Gradient_D", dataset_note="Cats.",
                   **folder)  # fmt: skip
    assert entry.dataset_note == "Cats."
    with pytest.raises(
        DeatError, match=r"--dataset-note differs from the board's note for pets, 'Our cats\.': omit it"
    ):
        submit(board, make_run(tmp_path / "five", dataset="folder"), "Wang2021Gradient_E", dataset_note="x", **folder)


def test_submit_refuses_a_read_only_board_before_evaluating(
    tmp_path: Path, board: Board, fake: FakeEvaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(DeatError, match=r"the board .*file/board cannot be written: .*file is not a folder"):
        submit(Board(tmp_path / "file" / "board"), run)
    submit(board, run)
    calls, real = len(fake.calls), os.access
    # Systems without file locks leave no .lock behind.
    for shut in filter(Path.exists, (board.path, board.path / "entries", board.path / ".lock")):
        with monkeypatch.context() as patched:
            patched.setattr(os, "access", lambda path, mode, shut=shut: Path(path) != shut and real(path, mode))
            with pytest.raises(DeatError, match=f"no permission to write .*{re.escape(shut.name)}"):
                submit(board, run, "Wang2021Gradient_2")
    assert len(fake.calls) == calls


def test_submit_ignores_other_invalid_entries(tmp_path: Path, fake: FakeEvaluation) -> None:
    path = made_up_board.write(tmp_path / "board", [made_up_board.entry(data_sha256=digits().fingerprint)])
    (path / "entries/digits/Linf/Broken2021Entry.json").write_text("{")
    assert submit(Board(path), make_run(tmp_path / "run")).dataset_note == made_up_board.NOTE


@pytest.mark.slow
def test_commit_refuses_an_entry_that_is_too_large(board: Board) -> None:
    row: dict[str, Any] = {f"a_long_name_of_a_column_{number}": 1.234567890123 for number in range(60)}
    entry = made_up_board.entry(metrics=(row,) * 3000, weights_file=None)
    assert len(entry.json_bytes()) > MAX_JSON
    with pytest.raises(DeatError, match=r"too large: \d+ bytes \(at most 4194304\), because its metrics"):
        board.commit(entry, None)
    assert not board.path.exists()


@pytest.mark.parametrize("place", ["entries/digits", "weights", "weights/digits/Linf", "history"])
def test_commit_follows_no_symlink_out_of_the_board(
    tmp_path: Path, board: Board, fake: FakeEvaluation, place: str
) -> None:
    submit(board, make_run(tmp_path / "run"))
    path = board.path / place
    if path.exists():
        path.rename(tmp_path / "outside")
    else:
        (tmp_path / "outside").mkdir()
    path.symlink_to(tmp_path / "outside")
    before = snapshot(tmp_path)
    with pytest.raises(DeatError, match=f"{path.name} is a symlink and may lead out of the board"):
        submit(board, make_run(tmp_path / "two"), replace=True)
    assert {name for name in snapshot(tmp_path).keys() - before.keys() if not name.startswith("two")} == set()


def commit(path: Path, name: str, began: Any, **changes: Any) -> None:
    """Commit an entry in a process of its own; exit with status 3 if it is refused."""
    weights = f"weights of {name}".encode()
    entry = made_up_board.entry(name, weights_sha256=hashlib.sha256(weights).hexdigest(), **changes)
    began.wait(30)
    try:
        Board(path).commit(entry, weights)
    except DeatError:
        os._exit(3)


def start(*arguments: Any, **changes: Any) -> Any:
    process = multiprocessing.get_context("fork").Process(target=commit, args=arguments, kwargs=changes)
    process.start()
    return process


def exit_codes(processes: list[Any]) -> list[int]:
    for process in processes:
        process.join(600)
    return sorted(process.exitcode for process in processes)


def test_commit_by_several_processes_loses_none(board: Board) -> None:
    began = multiprocessing.get_context("fork").Event()
    names = [f"Wang2021Gradient_{number}" for number in range(6)]
    processes = [start(board.path, name, began) for name in names]
    began.set()
    assert exit_codes(processes) == [0] * 6
    assert {entry.model_name for entry in board.entries()} == set(names)
    assert verify(board.path, sample=0).notes == []
    for entry in board.entries():
        weights = (board.path / str(entry.weights_file)).read_bytes()
        assert hashlib.sha256(weights).hexdigest() == entry.weights_sha256


def test_commit_by_several_processes_takes_one_dataset_of_a_name(board: Board) -> None:
    began = multiprocessing.get_context("fork").Event()
    processes = [start(board.path, f"Doe2021Made_{digit}", began, data_sha256=digit * 64) for digit in "abcd"]
    began.set()
    assert exit_codes(processes) == [0, 3, 3, 3]
    assert len(board.entries()) == 1


def test_commit_waits_for_the_lock(board: Board) -> None:
    began = multiprocessing.get_context("fork").Event()
    process = start(board.path, "Wang2021Gradient", began)
    with board.locked():
        began.set()
        process.join(0.5)
        assert process.is_alive()
        assert not (board.path / "entries").exists()
    assert exit_codes([process]) == [0]
    assert len(board.entries()) == 1


class Killed(BaseException):
    """Stands for a kill: nothing cleans up after it."""


@pytest.mark.parametrize("name", [NAME, "Wang2021Gradient_2"])
def test_commit_killed_at_any_rename_leaves_a_readable_board(
    tmp_path: Path, board: Board, fake: FakeEvaluation, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Entries are the old or the new ones; weights that do not match theirs are refused, and committing again mends."""
    old = submit(board, make_run(tmp_path / "run"))
    weights = b"new"
    new = Entry.create(
        {**dict(old), "model_name": name, "footnote": "New.", "weights_sha256": hashlib.sha256(weights).hexdigest(),
         "weights_file": f"weights/digits/Linf/{name}.safetensors"}, "new"
    )  # fmt: skip
    real = os.replace
    for moment in range(4 if name == NAME else 2):
        left = [moment]

        def replace(source: Any, target: Any, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            real(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", replace)
            with pytest.raises(Killed):
                board.commit(new, weights, replace=True)
        footnotes = [entry.footnote for entry in board.entries()]
        assert footnotes in ([[None], ["New."]] if name == NAME else [[None]])
    board.commit(new, weights, replace=True)
    assert new in board.entries()
    stored = (board.path / new.weights_place).read_bytes()
    assert hashlib.sha256(stored).hexdigest() == new.weights_sha256


def test_locked_removes_unfinished_files(board: Board) -> None:
    board.commit(made_up_board.entry(weights_file=None), None)
    build(board.path)
    left = [
        board.path / "entries/digits/Linf/.x.json.0123abcd.tmp",
        board.path / "models/digits/Linf/.x.html.89abcdef.tmp",
    ]
    for path in left:
        path.write_text("{")
    assert sorted(line.rpartition("/")[2] for line in verify(board.path, sample=0).problems) == []
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize(("mode", "files"), [(0o2775, 0o664), (0o755, 0o644), (0o700, 0o600)])
def test_files_have_the_permissions_of_the_board(
    tmp_path: Path, board: Board, fake: FakeEvaluation, mode: int, files: int
) -> None:
    """Whatever the umask: on a shared disk every member of the group can replace what another has written."""
    board.path.mkdir()
    board.path.chmod(mode)
    for umask in (0o077, 0o022):
        before = os.umask(umask)
        try:
            submit(board, make_run(tmp_path / f"run{umask}"), replace=True)
            build(board.path)
            assert os.umask(umask) == umask
        finally:
            os.umask(before)
        for path in board.path.rglob("*"):
            assert stat.S_IMODE(path.stat().st_mode) == (mode if path.is_dir() else files), path
