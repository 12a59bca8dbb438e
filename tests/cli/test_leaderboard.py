"""deat-rb leaderboard and deat-rb submit."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import click
import made_up_board
import pytest
from board_problems import NAME, FakeEvaluation, cli, make_run, submit
from click.testing import CliRunner

from cli import main
from deat_rb.leaderboard.board import Board
from deat_rb.leaderboard.entry import entry_files
from deat_rb.leaderboard.pages.index import build
from deat_rb.utils.errors import DeatError

DOCS = Path(__file__).parents[2] / "docs"


def test_submit_writes_an_entry(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    run = make_run(tmp_path / "run")
    done = cli("submit", run, "--board", board.path, "--model-name", NAME, "--paper", "https://example.org/1",
               "--footnote", "Mine.", "--sample", 50, "--device", "cpu")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert done.output.rstrip().endswith(f"written: {board.path}/entries/digits/Linf/Wang2021Gradient.json")
    assert board.entries()[0].link == "https://example.org/1"
    again = cli("submit", run, "--board", board.path, "--model-name", NAME)
    assert again.exit_code == 2
    assert "the board already has digits/Linf/Wang2021Gradient" in again.output
    assert cli("submit", run, "--model-name", NAME, "--sample", 0, "--board", tmp_path / "b").exit_code == 2


def test_submit_prints_no_control_characters(tmp_path: Path) -> None:
    for target in ("\x1b[2J\x1b]0;owned\x07", "\u202egnp.json", "a\nError: none"):
        done = cli("submit", tmp_path / target, "--model-name", NAME, "--board", tmp_path / "board")
        assert done.exit_code == 2
        assert done.output.count("\n") == 1
        assert not re.search("[\x1b\x07\u202e]", done.output)


def test_commands_work_in_folders_whose_names_are_not_utf8(tmp_path: Path, fake: FakeEvaluation) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    done = cli("submit", make_run(folder / "run"), "--board", folder / "board", "--model-name", NAME, "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert r"caf\udce9/board" in done.output
    for arguments in (("build",), ("verify", "--sample", 0), ("--csv",), ("export", "--robustbench", folder / "out",
                                                                       "--as-dataset", "cifar10")):  # fmt: skip
        assert cli("leaderboard", "--board", folder / "board", *arguments).exit_code == 0
    data = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9"))
    refused = cli("submit", make_run(folder / "other", dataset="folder"), "--board", folder / "board",
                  "--model-name", f"{NAME}_2", "--data-dir", data)  # fmt: skip
    assert refused.exit_code == 2
    assert "other: --dataset-name is missing" in refused.output


def test_leaderboard_prints_every_format(tmp_path: Path) -> None:
    path = made_up_board.write(tmp_path, made_up_board.board())
    table = cli("leaderboard", "--board", path, "--dataset", "digits", "--sort", "cost")
    assert (table.exit_code, "Doe2021Made_TRADES" in table.output) == (0, True)
    rows = json.loads(cli("leaderboard", "--board", path, "--json", "--dataset", "digits").output)
    assert (rows[0]["rank"], rows[0]["model_name"]) == (1, "Doe2021Made_TRADES")
    assert cli("leaderboard", "--board", path, "--csv").output.startswith("dataset,threat,eps,part,rank,model")
    assert cli("leaderboard", "--board", path, "--markdown").output.startswith("**cifar10, Linf")
    assert r"\begin{table}" in cli("leaderboard", "--board", path, "--latex").output
    nowhere = cli("leaderboard", "--board", tmp_path / "nowhere")
    assert nowhere.exit_code == 2
    assert "there is no leaderboard at" in nowhere.output


def test_leaderboard_verify_exits_with_status_1_on_problems(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    submit(board, make_run(tmp_path / "run"))
    valid = cli("leaderboard", "--board", board.path, "verify", "--sample", 50, "--device", "cpu")
    assert (valid.exit_code, valid.output.splitlines()[-1]) == (0, "1 entry, 1 re-measured, 0 problems")
    (board.path / f"entries/digits/Linf/{NAME}.json").write_text("{}")
    broken = cli("leaderboard", "verify", "--board", board.path, "--sample", 0)
    assert broken.exit_code == 1
    assert f"problem: {board.path}/entries/digits/Linf/{NAME}.json" in broken.output
    assert cli("leaderboard", "verify", "--board", board.path, "--data-dir", "x").exit_code == 2
    assert cli("leaderboard", "verify", "--board", board.path, "--sample", "-1").exit_code == 2


def test_leaderboard_leaves_out_invalid_entries(tmp_path: Path) -> None:
    path = made_up_board.write(tmp_path / "board", made_up_board.board()[:2])
    (path / "entries/digits/Linf/Broken2021Entry.json").write_text('{"venue": "\x1b[2J"')
    (path / "entries/digits/Linf/._Doe2021Made_TRADES.json").write_bytes(b"\0\5\26\7")
    assert next(file.name for file in entry_files(path)) == "Broken2021Entry.json"
    for arguments in (("--csv",), ("build",)):
        done = cli("leaderboard", "--board", path, *arguments)
        assert done.exit_code == 0, done.output
        assert re.search(r"^left out: .*Broken2021Entry\.json is not valid JSON", done.stderr)
        assert "\x1b" not in done.output
    assert "Doe2021Made_MTRADES" in (path / "index.html").read_text()
    with pytest.raises(DeatError, match="Broken2021Entry"):
        build(path)


def test_leaderboard_export_writes_robustbenchs_files(tmp_path: Path, board: Board, fake: FakeEvaluation) -> None:
    submit(board, make_run(tmp_path / "run"))
    done = cli("leaderboard", "export", "--board", board.path, "--robustbench", tmp_path / "out",
               "--as-dataset", "cifar10")  # fmt: skip
    assert (done.exit_code, done.output) == (0, f"written: cifar10/{NAME}\n")
    assert (tmp_path / f"out/models/cifar10/Linf/{NAME}.pt").is_file()
    other = cli("leaderboard", "--board", board.path, "--dataset", "cifar10", "export", "--robustbench",
                tmp_path / "other", "--as-dataset", "cifar10")  # fmt: skip
    assert (other.exit_code, "has no dataset 'cifar10'" in other.stderr) == (2, True), other.output
    own = cli("leaderboard", "--dataset", "cifar10", "export", "--dataset", "digits", "--board", board.path,
              "--robustbench", tmp_path / "own", "--as-dataset", "cifar10")  # fmt: skip
    assert own.output == f"written: cifar10/{NAME}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dataset", "digits", "verify"), "--dataset is not an option of leaderboard verify: omit it"),
        (("--sort", "rank", "build"), "--sort is not an option of leaderboard build: omit it"),
        (("--csv", "export", "--robustbench", "out"), "--csv is not an option of leaderboard export: omit it"),
    ],
)
def test_leaderboard_refuses_options_that_a_subcommand_lacks(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = cli("leaderboard", "--board", tmp_path, *arguments)
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", f"Error: {message}\n")


def without_descriptions(schema: object) -> object:
    if isinstance(schema, dict):
        return {key: without_descriptions(value) for key, value in schema.items() if key != "description"}
    return schema


def test_leaderboard_schema_is_the_documented_one() -> None:
    result = CliRunner().invoke(main, ["leaderboard", "--schema"])
    assert result.exit_code == 0
    documented = json.loads((DOCS / "schema/entry.schema.json").read_text(encoding="utf-8"))
    assert without_descriptions(json.loads(result.stdout)) == without_descriptions(documented)


def test_documented_commands_parse() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", (DOCS / "leaderboard.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("deat-rb ")]
    assert len(lines) >= 10
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        command = main.get_command(click.Context(main), words[0])
        assert command is not None
        inner = command.get_command(click.Context(command), words[1]) if isinstance(command, click.Group) else None
        (inner or command).make_context(words[0], words[2:] if inner else words[1:])
