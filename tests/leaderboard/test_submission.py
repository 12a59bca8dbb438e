"""What a board takes into account when something is handed in: whose folders, whose words, whose disk."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shlex
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import made_up_board
import pytest
import torch
from board_problems import (
    NAME,
    FakeEvaluation,
    bare_state,
    cli,
    digits,
    make_checkpoint,
    make_run,
    network,
    snapshot,
    submit,
)
from PIL import Image
from torch import Tensor

from cli import main
from deat_rb.leaderboard.board import Board
from deat_rb.leaderboard.datasets import load_board_dataset
from deat_rb.leaderboard.entry import Entry, entry_files, parse_entry
from deat_rb.leaderboard.pages.index import build
from deat_rb.leaderboard.robustbench_export import export_board
from deat_rb.leaderboard.submission import SubmissionMetadata
from deat_rb.leaderboard.untrusted import MAX_JSON
from deat_rb.leaderboard.verify import verify
from deat_rb.models.spec import ModelSpec, build_model, model_spec
from deat_rb.utils.errors import DeatError

# The images


def images(folder: Path) -> Path:
    for number, place in enumerate(f"{part}/{name}" for part in ("train", "test") for name in ("cat", "dog")):
        (folder / place).mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (32, 32), (40 * number, 90 * index, 0)).save(folder / place / f"{index}.png")
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("it asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "folder"])
def test_nothing_is_looked_for_where_a_submission_says(tmp_path: Path, board: Board, name: str) -> None:
    run = make_run(tmp_path / "run", dataset=name, data_dir=str(images(tmp_path / "theirs")))
    before = snapshot(tmp_path)
    with pytest.raises(DeatError, match=f"where are the images of {name}|Give a --dataset-name"):
        submit(board, run)
    with pytest.raises(DeatError, match=r"and a board downloads nothing|has no folder|cannot be read"):
        submit(board, run, data_dir=tmp_path / "mine", **({"dataset_name": "pets"} if name == "folder" else {}))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / "train/cat/round").symlink_to(folder / "train"), "round is a link to a folder"),
        (lambda folder: (folder / "test/bird").symlink_to(folder / "test/cat"), "bird is a link to a folder"),
        (lambda folder: os.mkfifo(folder / "train/cat/2.png"), r"2\.png is no file"),
        (lambda folder: (folder / "train/cat/2.png").symlink_to("/dev/zero"), r"2\.png is no file"),
    ],
)
def test_a_folder_comes_to_an_end(tmp_path: Path, spoil: Callable[[Path], Any], sentence: str) -> None:
    folder = images(tmp_path / "pets")
    assert len(load_board_dataset("folder", data_dir=folder, image_size=32).test) == 4
    spoil(folder)
    with pytest.raises(DeatError, match=sentence):
        load_board_dataset("folder", data_dir=folder, image_size=32)


def test_images_may_be_links_to_files(tmp_path: Path) -> None:
    folder = images(tmp_path / "pets")
    (folder / "test/cat/2.png").symlink_to(folder / "test/cat/1.png")
    assert len(load_board_dataset("folder", data_dir=folder, image_size=32).test) == 5


# Other people's checkpoints


def wrapped(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in bare_state().items()}


def named(mean: str, std: str) -> dict[str, Tensor]:
    return {{"mu": mean, "sigma": std}.get(name, name): value for name, value in bare_state().items()}


@pytest.mark.parametrize(
    "state",
    [wrapped("model."), wrapped("module."), wrapped("module.model."), named("mean", "std"), network().state_dict()],
    ids=["model", "module", "both", "mean and std", "as runs have it"],
)
def test_names_as_they_are_found(tmp_path: Path, board: Board, fake: FakeEvaluation, state: dict[str, Tensor]) -> None:
    entry = submit(board, make_checkpoint(tmp_path / "x", NAME, state), data_dir=tmp_path)
    assert (entry.model, entry.weights_sha256) == (network_spec(entry), submitted_plainly(tmp_path, board))


def network_spec(entry: Entry) -> ModelSpec:
    """What the network is, with the normalisation that is in its weights."""
    mean, std = (tuple(getattr(network(), name).flatten().tolist()) for name in ("mu", "sigma"))
    return model_spec("wrn-10-1", num_classes=10, mean=mean, std=std)


def submitted_plainly(folder: Path, board: Board) -> str | None:
    return submit(board, make_checkpoint(folder / "plain", "Plain2021State"), "Plain2021State",
                  data_dir=folder).weights_sha256  # fmt: skip


def test_without_a_normalisation_images_are_taken_as_they_are(
    tmp_path: Path, board: Board, fake: FakeEvaluation
) -> None:
    state = {name: value for name, value in bare_state().items() if name not in ("mu", "sigma")}
    entry = submit(board, make_checkpoint(tmp_path / "x", NAME, state), data_dir=tmp_path)
    assert entry.model is not None
    assert (entry.model.mean, entry.model.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("spelled", ["WideResNet-10-1", "WRN-10-1", "Wide ResNet 10-1", "wideresnet_10-1"])
def test_architectures_as_they_are_spelled(tmp_path: Path, board: Board, fake: FakeEvaluation, spelled: str) -> None:
    weights = make_checkpoint(tmp_path / "x", "Al-Dujaili2018Adversarial", architecture=spelled, eps=8 / 255)
    entry = submit(board, weights, "Al-Dujaili2018Adversarial", data_dir=tmp_path)
    assert (entry.architecture, entry.eps) == (spelled, "8/255")


def test_preactresnet_under_its_other_name(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    state = {name.removeprefix("net."): value for name, value in
             build_model("preactresnet18", dataset="cifar10").state_dict().items()}  # fmt: skip
    weights = make_checkpoint(tmp_path / "x", NAME, state, architecture="ResNet-18")
    entry = submit(board, weights, data_dir=tmp_path)
    assert entry.model is not None
    assert entry.model.arch == "preactresnet18"


def test_an_architecture_that_is_given(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    weights = make_checkpoint(tmp_path / "x", NAME, architecture="a net of ours")
    with pytest.raises(DeatError, match=r"is of architecture 'a net of ours', and known are .*: deat-rb submit takes"):
        submit(board, weights, data_dir=tmp_path)
    entry = submit(board, weights, data_dir=tmp_path, arch="wrn-10-1")
    assert entry.model is not None
    assert (entry.architecture, entry.model.arch) == ("a net of ours", "wrn-10-1")
    for arch, sentence in (("os:system", "runs that module's code"), ("wrn-16-1", "of another architecture")):
        with pytest.raises(DeatError, match=sentence):
            submit(board, weights, "Other2021Name", data_dir=tmp_path, arch=arch)
    with pytest.raises(DeatError, match="--arch and --image-size are for checkpoints"):
        submit(board, make_run(tmp_path / "run"), "Other2021Name", arch="wrn-10-1")


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({**bare_state(), "fc.weight": torch.tensor(1.0)}, "no classifier linear.weight or fc.weight with a row"),
        ({**bare_state(), "mu": torch.tensor([])}, "a tensor mu that is no number for each channel"),
        ({**bare_state(), "sigma": torch.ones(3, dtype=torch.long)}, "a tensor sigma that is no number for each"),
        ({**bare_state(), "mu": torch.full((1, 3, 1, 1), torch.nan)}, "mean.0 = nan"),
        ({"w": torch.zeros(1)}, "no classifier"),
    ],
)  # fmt: skip
def test_tensors_that_are_no_network(
    tmp_path: Path, board: Board, fake: FakeEvaluation, state: dict[str, Tensor], sentence: str
) -> None:
    with pytest.raises(DeatError, match=sentence):
        submit(board, make_checkpoint(tmp_path / "x", NAME, state), data_dir=tmp_path)


@pytest.mark.parametrize("number", [10**30, 10**6 + 1, -1])
@pytest.mark.parametrize("field", ["num_classes", "image_size", "channels"])
def test_sizes_that_no_network_has(field: str, number: int) -> None:
    sizes = {"num_classes": 10, "mean": (0.0,) * 3, "std": (1.0,) * 3, field: number}
    with pytest.raises(ValueError, match=field):
        ModelSpec.model_validate({"arch": "wrn-10-1", **sizes})


def test_a_run_of_another_normalisation_than_its_weights(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    run = make_run(tmp_path / "run")
    content = json.loads((run / "config.json").read_text())
    content["network"]["mean"] = [0.5, 0.5, 0.5]
    (run / "config.json").write_text(json.dumps(content))
    with pytest.raises(DeatError, match=r"has the normalisation .* and is said to have \(0.5, .*: these are other"):
        submit(board, run)


# Networks without their weights


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "fcn_resnet50", "raft_small", "mvit_v1_b"])
def test_networks_that_do_not_classify_images_are_not_built(name: str) -> None:
    """Those of torchvision that detect would have their backbone downloaded."""
    with pytest.raises(DeatError, match=f"torchvision has no model '{name}' that classifies images"):
        model_spec(f"torchvision:{name}", num_classes=10, image_size=224).build()


# The submitter's words and the board's disk, before anything is evaluated


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"footnote": "<script>"}, "footnote: has HTML"),
        ({"link": "ftp://x"}, "link: is no address"),
        ({"external": float("nan")}, "external: is no accuracy"),
        ({"external": -1.0}, "external: is no accuracy"),
        ({"dataset_name": "../x"}, "is no name for a board"),
        ({"model_name": "x"}, "does not have the form"),
    ],
)
def test_words_are_looked_at_before_anything_is_loaded(
    tmp_path: Path, board: Board, monkeypatch: pytest.MonkeyPatch, metadata: dict[str, Any], sentence: str
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it was opened")

    monkeypatch.setattr("deat_rb.leaderboard.board.open_submission", never)
    with pytest.raises(DeatError, match=sentence):
        board.submit(tmp_path / "nothing", SubmissionMetadata(**{"model_name": NAME, **metadata}))
    with pytest.raises(DeatError, match="--sample 49 would let claims pass"):
        submit(board, tmp_path / "nothing", sample=49)


def test_what_a_run_says_is_looked_at_before_it_is_evaluated(
    tmp_path: Path, board: Board, fake: FakeEvaluation
) -> None:
    run = make_run(tmp_path / "run")
    (run / "config.json").write_text((run / "config.json").read_text().replace('"m-deat"', '"<b>mine</b>"'))
    with pytest.raises(DeatError, match="method: has HTML"):
        submit(board, run)
    assert fake.calls == []


def test_a_board_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, board: Board, fake: FakeEvaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(DeatError, match=r"the board .*file/board cannot be written: .*file is no folder"):
        submit(Board(tmp_path / "file" / "board"), run)
    submit(board, run)
    calls, real = len(fake.calls), os.access
    for shut in (tmp_path / "board", tmp_path / "board/entries", tmp_path / "board/.lock"):
        with monkeypatch.context() as patched:
            patched.setattr(os, "access", lambda path, mode, shut=shut: Path(path) != shut and real(path, mode))
            with pytest.raises(DeatError, match=f"{shut.name} is read-only, or not yours to write"):
                submit(board, run, "Wang2021Gradient_2")
    assert len(fake.calls) == calls


def test_an_entry_that_nobody_could_read_again_is_refused(tmp_path: Path, board: Board) -> None:
    row: dict[str, Any] = {f"a_long_name_of_a_column_{number}": 1.234567890123 for number in range(60)}
    entry = made_up_board.entry(metrics=(row,) * 3000, weights_file=None)
    assert len(entry.json_bytes()) > MAX_JSON
    with pytest.raises(DeatError, match=r"takes \d+ bytes, and 4194304 are allowed: its metrics.jsonl is too long"):
        board.commit(entry, None)
    assert not board.path.exists()


# Several people


def commit_other_data(path: Path, sha256: str) -> None:
    entry = made_up_board.entry(f"Doe2021Made_{sha256[0]}", data_sha256=sha256, weights_file=None)
    try:
        Board(path).commit(entry, None)
    except DeatError:
        os._exit(3)


def test_data_of_one_name_are_one_when_two_are_submitted_at_once(board: Board) -> None:
    processes = [multiprocessing.get_context("fork").Process(target=commit_other_data, args=(board.path, digit * 64))
                 for digit in "abcd"]  # fmt: skip
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert sorted(process.exitcode or 0 for process in processes) == [0, 3, 3, 3]
    assert len(board.entries()) == 1


@pytest.mark.parametrize(("mode", "files"), [(0o2775, 0o664), (0o755, 0o644), (0o700, 0o600)])
def test_files_are_as_accessible_as_the_board(
    tmp_path: Path, board: Board, fake: FakeEvaluation, mode: int, files: int
) -> None:
    """Whatever the umask: on a shared disk every member of the group replaces what another has written."""
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


def put(path: Path, text: str = "") -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.write_text(text)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda staging: put(staging, "x"), "staging is no folder"),
        (lambda staging: staging.symlink_to("/tmp"), "staging is no folder"),
        (lambda staging: put(staging / "other/x"), None),
        (lambda staging: (put(staging / "other/x"), put(staging / "complete")), None),
        (lambda staging: (put(staging / "entries/d/Linf/x.json", "{"), put(staging / "complete")), "x.json"),
    ],
)
def test_strays_where_submissions_are_put_together(
    tmp_path: Path, board: Board, fake: FakeEvaluation, spoil: Callable[[Path], Any], sentence: str | None
) -> None:
    run = make_run(tmp_path / "run")
    submit(board, run)
    spoil(board.staging)
    if sentence is None:
        submit(board, run, "Wang2021Gradient_2")
        assert not board.staging.exists()
    else:
        with pytest.raises(DeatError, match=sentence):
            submit(board, run, "Wang2021Gradient_2")
        assert len(board.entries()) == 1


# A board in which something is broken


def spoiled(tmp_path: Path) -> Path:
    path = made_up_board.write(tmp_path / "board", made_up_board.board()[:2])
    (path / "entries/digits/Linf/Broken2021Entry.json").write_text('{"venue": "\x1b[2J"')
    (path / "entries/digits/Linf/._Doe2021Made_TRADES.json").write_bytes(b"\0\5\26\7")
    return path


def test_one_broken_entry_breaks_nothing_else(tmp_path: Path) -> None:
    path = spoiled(tmp_path)
    assert next(file.name for file in entry_files(path)) == "Broken2021Entry.json"
    for arguments in (("--csv",), ("build",)):
        done = cli("leaderboard", "--board", path, *arguments)
        assert done.exit_code == 0, done.output
        assert re.search(r"^left out: .*Broken2021Entry\.json is not valid JSON", done.stderr)
        assert "\x1b" not in done.output
    assert "Doe2021Made_MTRADES" in (path / "index.html").read_text()
    with pytest.raises(DeatError, match="Broken2021Entry"):
        build(path)


def test_a_broken_entry_stops_no_submission(tmp_path: Path, fake: FakeEvaluation) -> None:
    path = spoiled(tmp_path)
    for file in path.glob("entries/digits/Linf/Doe*"):
        file.write_text(file.read_text().replace("cd" * 32, digits().fingerprint))
    assert submit(Board(path), make_run(tmp_path / "run")).dataset_note == made_up_board.NOTE


def test_a_board_of_a_newer_version(tmp_path: Path) -> None:
    content = json.loads(made_up_board.entry().json_bytes()) | {"schema_version": 2, "new_field": 1}
    with pytest.raises(DeatError, match="x is of schema version 2, and this deat-rb reads 1: update it"):
        parse_entry(json.dumps(content).encode(), "x")


def no_weights(**changes: Any) -> Entry:
    return made_up_board.entry(weights_file=None, **changes)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda path: put(path / "index.html", "<script>alert(1)</script>"), "index.html is not the page"),
        (lambda path: (path / "index.html").unlink(), "index.html is not the page"),
        (lambda path: put(path / "models/digits/Linf/Doe2021Made_A.html", "x"), "Doe2021Made_A.html is not the page"),
        (lambda path: put(path / "models/digits/Linf/Doe2021Made_B.html", "x"), "Doe2021Made_B.html belongs to no"),
        (lambda path: put(path / "entries/readme.txt"), "readme.txt belongs to no entry"),
        (lambda path: put(path / "history/digits/x"), "history/digits/x belongs to no entry"),
        (lambda path: put(path / "evil.html"), "evil.html belongs to no entry"),
        (lambda path: (path / "weights").symlink_to("/tmp"), "weights is a link"),
        (lambda path: (path / "other").symlink_to("/tmp"), "other is a link"),
        (lambda path: os.mkfifo(path / "pipe"), "pipe belongs to no entry"),
        (lambda path: (path / "models").rename(path.parent / "m") and (path / "models").symlink_to(path.parent / "m"),
         "models is a link"),
    ],
)  # fmt: skip
def test_verify_sees_pages_strays_and_links(tmp_path: Path, spoil: Callable[[Path], Any], sentence: str) -> None:
    path = made_up_board.write(tmp_path / "board", [no_weights()])
    assert verify(path, sample=0).problems == []
    build(path)
    put(path / "README.md", "Our board.")
    assert verify(path, sample=0).problems == []
    spoil(path)
    problems = verify(path, sample=0).problems
    assert [problem for problem in problems if sentence in problem], problems


def test_what_a_killed_build_has_left_is_removed_by_the_next(tmp_path: Path) -> None:
    path = made_up_board.write(tmp_path, [no_weights()])
    build(path)
    left = [path / ".index.html.0123abcd.tmp", path / "models/digits/Linf/.Doe2021Made_A.html.0123abcd.tmp"]
    for file in left:
        put(file, "<html>")
    assert [problem.rpartition("/")[2] for problem in verify(path, sample=0).problems] == [
        f"{file.name} belongs to no entry" for file in left
    ]
    build(path)
    assert verify(path, sample=0).problems == []


def test_verify_measures_enough_to_notice(tmp_path: Path) -> None:
    path = made_up_board.write(tmp_path, [no_weights()])
    for sample in (1, 49, -1):
        with pytest.raises(DeatError, match=f"--sample {sample} would let claims pass"):
            verify(path, sample=sample)


def test_verify_of_a_board_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made_up_board.write(tmp_path, [no_weights()])
    monkeypatch.setattr(os, "access", lambda *_: False)
    before = snapshot(path)
    assert verify(path, sample=0).problems == []
    assert snapshot(path) == before


# What an entry and its page say


def test_where_it_was_trained_and_evaluated(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    entry = submit(board, make_run(tmp_path / "run"), hardware="one H100")
    assert (entry.hardware, entry.versions) == ("one H100", {"torch": "2.14.1"})
    assert (entry.evaluated_on, entry.evaluated_with) == ("cpu", {"torch": "2"})
    foreign = submit(board, make_checkpoint(tmp_path / "x", "Wong2020Fast"), "Wong2020Fast", data_dir=tmp_path)
    assert (foreign.hardware, foreign.versions) == (None, {})
    assert (foreign.evaluated_on, foreign.evaluated_with) == ("cpu", {"torch": "2"})
    build(board.path)
    page = re.sub(r"<[^>]*>", "", (board.path / f"models/{entry.key}.html").read_text())
    for fact in ("trained on\none H100", "trained with\ntorch 2.14.1", "evaluated on\ncpu", "evaluated with\ntorch 2"):
        assert fact.replace("\n", "") in page.replace("\n", "")


def test_messages_move_no_cursor(tmp_path: Path) -> None:
    for target in ("\x1b[2J\x1b]0;owned\x07", "\u202egnp.json", "a\nError: none"):
        done = cli("submit", tmp_path / target, "--model-name", NAME, "--board", tmp_path / "board")
        assert done.exit_code == 2
        assert done.output.count("\n") == 1
        assert not re.search("[\x1b\x07\u202e]", done.output)


# The project's own board


def test_the_projects_own_board_is_sound_and_its_pages_are_built(tmp_path: Path) -> None:
    own = Path(__file__).parents[2] / "leaderboard"
    copy = tmp_path / "leaderboard"
    kept = {path: data for path, data in snapshot(own).items() if path != ".lock"}
    for path, data in kept.items():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).write_bytes(data if isinstance(data, bytes) else b"")
    build(copy)
    assert {path: data for path, data in snapshot(copy).items() if path != ".lock"} == kept
    assert verify(copy, sample=0).problems == []


# The documentation

DOCS = Path(__file__).parents[2] / "docs" / "leaderboard.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)


def test_the_documented_commands_exist() -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("deat-rb ")]
    assert len(lines) >= 10
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        command = main.get_command(click.Context(main), words[0])
        assert command is not None
        inner = command.get_command(click.Context(command), words[1]) if isinstance(command, click.Group) else None
        (inner or command).make_context(words[0], words[2:] if inner else words[1:])


def test_the_documented_lines_load_an_entry_through_robustbench(
    tmp_path: Path, board: Board, fake: FakeEvaluation
) -> None:
    """In an interpreter of its own, as a stranger has it."""
    submit(board, make_run(tmp_path / "run"), "Wang2021Gradient_R18")
    export_board(board.path, tmp_path / "DIR", as_dataset="cifar10")
    (block,) = blocks("python")
    shown = "import torch; print(model.eval()(torch.full((1, 3, 32, 32), 0.25)).tolist()[0])"
    done = subprocess.run([sys.executable, "-c", f"{block}\n{shown}"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(DOCS.parents[2])}, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = network()(torch.full((1, 3, 32, 32), 0.25))[0]
    assert torch.allclose(torch.tensor(json.loads(done.stdout.splitlines()[-1])), expected, atol=1e-5)
