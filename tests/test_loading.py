"""`deat_rb.loading`: load_model of runs, checkpoints and entries of a leaderboard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from board_problems import make_run, network, without_evaluating
from click.testing import CliRunner, Result
from training_problems import run_config

import deat_rb
from deat_rb.cli import main
from deat_rb.leaderboard.board import Board
from deat_rb.leaderboard.submission import SubmissionMetadata
from deat_rb.loading import load_model
from deat_rb.models.spec import build_model, model_spec
from deat_rb.runs.directory import RunDirectory
from deat_rb.utils.errors import DeatError
from deat_rb.utils.safe_load import save_tensors


def test_load_model_takes_the_selected_weights_of_a_run(tmp_path: Path) -> None:
    trained, images = build_model("wrn-10-1", dataset="cifar10").eval(), torch.rand(2, 3, 32, 32)
    network = model_spec("wrn-10-1", dataset="cifar10")
    run = RunDirectory.create(tmp_path / "run", run_config(arch="wrn-10-1", network=network, select="best"))
    save_tensors(run.path / "best.safetensors", trained.state_dict())
    save_tensors(run.path / "last.safetensors", build_model("wrn-10-1", dataset="cifar10").state_dict())
    loaded = load_model(run.path)
    assert not loaded.training
    assert torch.equal(loaded(images), trained(images))


def test_load_model_of_a_bare_checkpoint_says_what_is_missing(tmp_path: Path) -> None:
    torch.save(build_model("wrn-10-1", dataset="cifar10").state_dict(), tmp_path / "weights.pt")
    with pytest.raises(DeatError, match=r"weights\.pt is not part of an export, so its architecture is unknown"):
        load_model(tmp_path / "weights.pt")
    with pytest.raises(DeatError, match="does not exist"):
        load_model(tmp_path / "nothing.pt")


# Entries of a leaderboard that holds the weights


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of an entry of an untrained network."""
    with monkeypatch.context() as patched:
        without_evaluating(patched)
        Board(tmp_path / "board").submit(make_run(tmp_path / "run"), SubmissionMetadata(model_name="Wang2021Gradient"))
    return tmp_path / "board" / "entries" / "digits" / "Linf" / "Wang2021Gradient.json"


def evaluate(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, arguments)], prog_name="deat-rb")


def test_load_model_of_an_entry_is_the_submitted_network(entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(2, 3, 32, 32)
    loaded = deat_rb.load_model(entry)
    assert not loaded.training
    assert torch.equal(loaded(images), network()(images))
    monkeypatch.chdir(entry.parents[3])
    assert torch.equal(deat_rb.load_model("entries/digits/Linf/Wang2021Gradient.json")(images), network()(images))


def test_eval_of_an_entry_uses_its_data_and_eps(entry: Path, tmp_path: Path) -> None:
    result = evaluate(entry, "--attacks", "fgsm", "--n-examples", 8, "--checks", "none", "--json", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["eps"] == pytest.approx(0.1)
    assert report["provenance"]["entry"] == "digits/Linf/Wang2021Gradient"
    assert report["provenance"]["weights_sha256"] == json.loads(entry.read_text())["weights_sha256"]


def test_load_model_of_an_entry_refuses_other_weights(entry: Path) -> None:
    weights = entry.parents[3] / "weights" / "digits" / "Linf" / "Wang2021Gradient.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DeatError, match=r"Wang2021Gradient\.safetensors has the SHA-256 \w{12}\.\.\., but its entry"):
        deat_rb.load_model(entry)


def test_load_model_of_an_entry_names_damaged_weights(entry: Path) -> None:
    weights = entry.parents[3] / "weights" / "digits" / "Linf" / "Wang2021Gradient.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(DeatError, match=f"^{weights} has the SHA-256"):
        deat_rb.load_model(entry)


def test_load_model_of_an_entry_without_weights(entry: Path) -> None:
    content = json.loads(entry.read_text()) | {"weights_file": None}
    entry.write_text(json.dumps(content))
    with pytest.raises(DeatError, match="the board does not store the weights of digits/Linf/Wang2021Gradient"):
        deat_rb.load_model(entry)


def test_load_model_of_an_entry_outside_its_board(entry: Path, tmp_path: Path) -> None:
    (tmp_path / "lost.json").write_bytes(entry.read_bytes())
    with pytest.raises(DeatError, match=r"lost\.json is misplaced: it contains the entry digits/Linf/Wang2021Gradient"):
        deat_rb.load_model(tmp_path / "lost.json")
    (tmp_path / "eval.json").write_text("{}")
    assert evaluate(tmp_path / "eval.json").exit_code == 2


def test_eval_of_an_entry_refuses_other_data(entry: Path) -> None:
    content = json.loads(entry.read_text()) | {"data_sha256": "a" * 64}
    entry.write_text(json.dumps(content))
    result = evaluate(entry)
    assert result.exit_code == 2
    assert "was measured on different data (SHA-256 aaaaaaaaaaaa...)" in result.stderr


@pytest.mark.parametrize("flag", [["--dataset", "digits"], ["--arch", "wrn-10-1"]])
def test_eval_of_an_entry_refuses_options_of_checkpoints(entry: Path, flag: list[str]) -> None:
    result = evaluate(entry, *flag)
    assert result.exit_code == 2
    assert "is only for checkpoints: the entry" in result.stderr


ENTRIES = Path(__file__).parents[1] / "leaderboard" / "entries"


@pytest.mark.parametrize("file", sorted(ENTRIES.rglob("*.json")), ids=lambda path: path.stem)
def test_load_model_of_the_repositorys_own_board(file: Path) -> None:
    model = load_model(file)
    assert len(model.classes) == 10
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
