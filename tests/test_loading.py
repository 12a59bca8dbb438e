"""The networks that a board holds, loaded and evaluated where they lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from board_problems import make_run, network, without_evaluating
from click.testing import CliRunner, Result

import deat_rb
from deat_rb.cli import main
from deat_rb.leaderboard.board import Board
from deat_rb.leaderboard.submission import SubmissionMetadata
from deat_rb.utils.errors import DeatError


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of an entry of an untrained network."""
    with monkeypatch.context() as patched:
        without_evaluating(patched)
        Board(tmp_path / "board").submit(make_run(tmp_path / "run"), SubmissionMetadata(model_name="Wang2021Gradient"))
    return tmp_path / "board" / "entries" / "digits" / "Linf" / "Wang2021Gradient.json"


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, arguments)], prog_name="deat-rb")


def test_the_network_is_the_one_that_was_submitted(entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(2, 3, 32, 32)
    loaded = deat_rb.load_model(entry)
    assert not loaded.training
    assert torch.equal(loaded(images), network()(images))
    monkeypatch.chdir(entry.parents[3])
    assert torch.equal(deat_rb.load_model("entries/digits/Linf/Wang2021Gradient.json")(images), network()(images))


def test_it_is_evaluated_on_its_data_at_its_eps(entry: Path, tmp_path: Path) -> None:
    result = evaluate(entry, "--attacks", "fgsm", "--n-examples", 8, "--checks", "none", "--json", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["eps"] == pytest.approx(0.1)
    assert report["provenance"]["entry"] == "digits/Linf/Wang2021Gradient"
    assert report["provenance"]["weights_sha256"] == json.loads(entry.read_text())["weights_sha256"]


def test_other_weights_than_the_entry_says_are_refused(entry: Path) -> None:
    weights = entry.parents[3] / "weights" / "digits" / "Linf" / "Wang2021Gradient.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DeatError, match=r"Wang2021Gradient\.safetensors has the SHA-256 \w{12}\.\.\., and its entry"):
        deat_rb.load_model(entry)


def test_damaged_weights_are_named_as_they_lie_in_the_board(entry: Path) -> None:
    weights = entry.parents[3] / "weights" / "digits" / "Linf" / "Wang2021Gradient.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(DeatError, match=f"^{weights} is truncated"):
        deat_rb.load_model(entry)


def test_an_entry_of_a_board_without_its_weights(entry: Path) -> None:
    content = json.loads(entry.read_text()) | {"weights_file": None}
    entry.write_text(json.dumps(content))
    with pytest.raises(DeatError, match="the board does not hold the weights of digits/Linf/Wang2021Gradient"):
        deat_rb.load_model(entry)


def test_an_entry_that_was_taken_out_of_its_board(entry: Path, tmp_path: Path) -> None:
    (tmp_path / "lost.json").write_bytes(entry.read_bytes())
    with pytest.raises(DeatError, match=r"lost\.json is the entry of digits/Linf/Wang2021Gradient, and lies in the wr"):
        deat_rb.load_model(tmp_path / "lost.json")
    (tmp_path / "eval.json").write_text("{}")
    assert evaluate(tmp_path / "eval.json").exit_code == 2


def test_an_entry_of_other_data(entry: Path) -> None:
    content = json.loads(entry.read_text()) | {"data_sha256": "a" * 64}
    entry.write_text(json.dumps(content))
    result = evaluate(entry)
    assert result.exit_code == 2
    assert "was measured on other data (SHA-256 aaaaaaaaaaaa...)" in result.stderr


@pytest.mark.parametrize("flag", [["--dataset", "digits"], ["--arch", "wrn-10-1"]])
def test_it_says_everything_itself(entry: Path, flag: list[str]) -> None:
    result = evaluate(entry, *flag)
    assert result.exit_code == 2
    assert "is for checkpoints: the entry" in result.stderr
