"""Files written at commit 28b4f8e still open: runs, checkpoints, evaluations, exports and boards."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import deat_rb
from deat_rb.cli import main
from deat_rb.evaluation.report import Report
from deat_rb.utils import compat

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "28b4f8e" / "files.tar.xz"
MODEL = "Wang2021Gradient_Old"
pytestmark = pytest.mark.usefixtures("without_curves")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, which is the current directory."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def deat_rb_command(*arguments: str) -> str:
    """Return the standard output of a command that has to succeed."""
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def read_metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_load_model_of_an_old_run(files: Path) -> None:
    model = deat_rb.load_model(files / "runs" / "finished", trust_code=True)
    stored = load_file(files / "runs" / "finished" / "last.safetensors")
    state = model.state_dict()
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)


@pytest.mark.slow
def test_eval_of_an_old_run_counts_what_was_counted_then(files: Path) -> None:
    old = Report.load(files / "runs" / "finished")
    deat_rb_command("eval", "runs/finished", "--attacks", "natural,fgsm,pgd-5,cw-2", "--n-examples", "100",
                    "--trust-code", "--device", "cpu", "--json", "new.json")  # fmt: skip
    new = Report.load(files / "new.json")
    assert new.examples_sha256 == old.examples_sha256
    assert new.model_sha256 == old.model_sha256
    assert list(new.results) == list(old.results) == ["natural", "fgsm", "pgd-5", "cw-2"]
    for name, result in old.results.items():  # another CPU's rounding may move an example at the boundary
        assert abs(new.results[name].n_correct - result.n_correct) <= 2


def test_report_of_an_old_run(files: Path) -> None:
    report = Report.load(files / "runs" / "finished")
    assert {name: result.n_correct for name, result in report.results.items()} == {
        "natural": 96, "fgsm": 52, "pgd-5": 61, "cw-2": 86,
    }  # fmt: skip
    assert report.worst_case.n_correct == 52
    assert (report.eps, report.n_examples, report.num_classes) == (0.1, 100, 10)
    assert [check.name for check in report.checks if check.status == "fail"] == ["PGD <= FGSM"]


def test_compare_of_old_evaluations(files: Path) -> None:
    table = deat_rb_command("compare", "runs/finished", "runs/wrn")
    assert "96.00" in table
    assert "97.00" in table


def test_resume_of_an_old_interrupted_run(files: Path) -> None:
    run = files / "runs" / "interrupted"
    before = read_metrics(run)
    assert len(before) == 1
    deat_rb_command("train", "--resume", "runs/interrupted", "--trust-code")
    after, uninterrupted = read_metrics(run), read_metrics(files / "runs" / "finished")
    assert after[0] == before[0]
    assert [(row["epoch"], row["steps"]) for row in after] == [(row["epoch"], row["steps"]) for row in uninterrupted]
    weights, expected = load_file(run / "last.safetensors"), load_file(files / "runs" / "finished" / "last.safetensors")
    assert weights.keys() == expected.keys()
    for name in weights:  # bit for bit on the CPU that wrote them; another CPU rounds differently
        torch.testing.assert_close(weights[name], expected[name], rtol=0.01, atol=0.01)


def test_resume_of_an_old_finished_run_with_more_epochs_is_refused_for_its_cyclic_rate(files: Path) -> None:
    result = CliRunner().invoke(main, ["train", "--resume", "runs/finished", "--epochs", "5", "--trust-code"])
    assert result.exit_code == 2
    assert "cyclic" in result.stderr


@pytest.mark.slow
def test_train_with_an_old_config(files: Path) -> None:
    deat_rb_command("train", "--config", "runs/finished/config.json", "--name", "again", "--trust-code")
    again, first = read_metrics(files / "runs" / "again"), read_metrics(files / "runs" / "finished")
    assert [(row["epoch"], row["steps"], row["examples"]) for row in again] == [
        (row["epoch"], row["steps"], row["examples"]) for row in first
    ]
    for name, tensor in load_file(files / "runs" / "again" / "last.safetensors").items():
        expected = load_file(files / "runs" / "finished" / "last.safetensors")[name]
        torch.testing.assert_close(tensor, expected, rtol=0.01, atol=0.01)


def test_export_of_an_old_run(files: Path) -> None:
    deat_rb_command("export", "runs/wrn", "--model-name", MODEL, "--as-dataset", "cifar10", "--output", "new")
    for name in ("models", "model_info"):
        (file,) = (files / "export" / name / "cifar10" / "Linf").iterdir()
        assert (files / "new" / name / "cifar10" / "Linf" / file.name).exists()
    info, old = (json.loads((files / folder / "model_info" / "cifar10" / "Linf" / f"{MODEL}.json").read_text())
                 for folder in ("new", "export"))  # fmt: skip
    assert {key: info[key] for key in ("clean_acc", "reported", "eps", "architecture")} == {
        key: old[key] for key in ("clean_acc", "reported", "eps", "architecture")
    }


def test_register_of_an_old_export(files: Path) -> None:
    assert deat_rb.register("export") == (MODEL,)
    robustbench = compat.robustbench()
    model = robustbench.load_model(MODEL, model_dir="export/models", dataset="cifar10", threat_model="Linf")
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(images), deat_rb.load_model("runs/wrn")(images))


def test_leaderboard_of_an_old_board(files: Path) -> None:
    (row,) = json.loads(deat_rb_command("leaderboard", "--board", "board", "--json"))
    assert (row["autoattack_acc"], row["clean_acc"]) == ("68.75", "93.75")
    assert "68.75" in deat_rb_command("leaderboard", "--board", "board")
    deat_rb_command("leaderboard", "build", "--board", "board")
    assert MODEL in (files / "board" / "index.html").read_text()


def test_leaderboard_verify_of_an_old_board(files: Path) -> None:
    deat_rb_command("leaderboard", "verify", "--board", "board", "--sample", "0")


@pytest.mark.slow
def test_load_model_of_an_old_board_entry(files: Path) -> None:
    result = deat_rb_command("eval", f"board/entries/digits/Linf/{MODEL}.json", "--attacks", "natural",
                             "--n-examples", "16", "--device", "cpu")  # fmt: skip
    assert "93.75" in result
