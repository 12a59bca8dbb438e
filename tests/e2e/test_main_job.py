"""Train by the installed command; evaluate, export and load in RobustBench what it has written."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from children import exit_status, fork
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from deat_rb.cli import main
from deat_rb.loading import load_model
from deat_rb.models.spec import build_model
from deat_rb.robustbench.register import register
from deat_rb.utils import compat

TINY = ["--arch", "wrn-10-1", "--train-size", "60", "--val-size", "10", "--batch-size", "20", "--epochs", "3",
        "--precision", "fp32"]  # fmt: skip


def invoke(*arguments: str | Path, cwd: Path) -> Result:
    """Run the command in this process."""
    with contextlib.chdir(cwd):
        return CliRunner().invoke(main, [str(argument) for argument in arguments])


def done(*arguments: str | Path, cwd: Path) -> str:
    """Run the command, which has to succeed, and return what it prints."""
    result = invoke(*arguments, cwd=cwd)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def refused(*arguments: str | Path, cwd: Path) -> str:
    """Run the command, which has to be refused and write nothing, and return its error output."""
    before = sorted(cwd.rglob("*"))
    result = invoke(*arguments, cwd=cwd)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    assert "Traceback" not in result.output
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert sorted(cwd.rglob("*")) == before, "something was written"
    return result.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("work")
    program = str(Path(sys.executable).with_name("deat-rb"))
    command = [program, "train", "--method", "M+TRADES", *TINY, "--name", "first"]
    result = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr
    assert "deat-rb eval runs/first" in result.stdout
    return where / "runs" / "first"


@pytest.mark.slow
def test_train_writes_a_run_directory(run: Path) -> None:
    assert {path.name for path in run.iterdir()} >= {
        "config.json", "metrics.jsonl", "last.safetensors", "last.json", "best.safetensors", "best.json", "curves.png",
    }  # fmt: skip
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["steps"] for row in rows][:2] == [1, 2]
    # Batches of 20; per batch r crafting passes and one update, whose two forwards join the clean one of crafting.
    for row in rows:
        batches = -(-row["examples"] // 20)
        assert row["backwards"] == (row["steps"] + 1) * batches
        assert row["forwards"] == (row["steps"] + 3) * batches


@pytest.mark.slow
@pytest.mark.usefixtures("without_curves")
def test_train_with_a_config_gives_the_same_weights(run: Path) -> None:
    done("train", "--config", run / "config.json", "--name", "again", cwd=run.parents[1])
    assert (run / "last.safetensors").read_bytes() == (run.parent / "again" / "last.safetensors").read_bytes()


@pytest.mark.slow
def test_eval_prints_and_writes_the_report(run: Path) -> None:
    printed = done("eval", run, "--attacks", "fgsm,pgd-5,cw-5", "--n-examples", "12", cwd=run.parents[1])
    for name in ("natural", "fgsm", "pgd-5", "cw-5"):
        assert name in printed
    report = json.loads((run / "eval.json").read_text())
    assert report["n_examples"] == 12
    pgd = report["results"]["pgd-5"]
    assert pgd["low"] <= pgd["accuracy"] <= pgd["high"]


@pytest.mark.slow
def test_export_loads_in_robustbench(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parents[1])
    name = "Wang2021Gradient_Tiny"
    done("export", run, "--model-name", name, "--as-dataset", "cifar10", "--output", "export", cwd=run.parents[1])
    register("export")
    robustbench: Any = compat.robustbench()
    model = robustbench.load_model(name, model_dir="export/models", dataset="cifar10", threat_model="Linf")
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(images), load_model("runs/first")(images))


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--method", "m+trade5"], "m+trades"),
        (["--dataset", "cifar"], "cifar10"),
        (["--arch", "preactresnet81"], "preactresnet18"),
        (["--eps", "-0.1"], "(0, 1]"),
        (["--eps", "0"], "(0, 1]"),
        (["--eps", "1.5"], "(0, 1]"),
        (["--eps", "8/0"], "divides by zero"),
        (["--eps", "nan"], "(0, 1]"),
        (["--name", "a/b"], "a/b"),
        (["--name", ".."], ".."),
        (["--method", "pgd-7", "--gamma", "1.01"], "gamma"),
        (["--precision", "fp16", "--device", "cpu"], "fp16"),
        (["--precision", "fp8"], "precision"),
        (["--epochs", "0"], "--epochs"),
        (["--lr", "-1"], "--lr"),
        (["--batch-size", "5000"], "5000"),
        (["--train-size", "100000"], "100000"),
        (["--dataset", "folder"], "--data-dir"),
        (["--dataset", "folder", "--data-dir", "nowhere"], "nowhere"),
        (["--init-from", "missing.pt"], "missing.pt"),
        (["--config", "missing.json"], "missing.json"),
        (["--device", "tpu9"], "tpu9"),
        (["--setting", "slow"], "slow"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_train_refuses_invalid_options(tmp_path: Path, flags: list[str], part: str) -> None:
    assert part in refused("train", *flags, cwd=tmp_path)


@pytest.mark.slow
def test_train_refuses_the_name_of_another_run(run: Path) -> None:
    assert "already" in refused("train", *TINY, "--name", "first", cwd=run.parents[1])


def test_train_refuses_invalid_image_folders(tmp_path: Path) -> None:
    from PIL import Image

    data = tmp_path / "data"
    (data / "train").mkdir(parents=True)
    train = ["train", "--dataset", "folder", "--data-dir", "data", "--arch", "wrn-10-1", "--batch-size", "2"]
    assert "test" in refused(*train, cwd=tmp_path)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (data / part / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (32, 32), (number * 9, 0, 0)).save(data / part / name / f"{number}.png")
    broken = data / "train" / "cat" / "2.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:20])
    assert "2.png" in refused(*train, cwd=tmp_path)
    broken.write_bytes(whole)
    assert "CIFAR" in refused(*train, "--image-size", "64", cwd=tmp_path)
    (data / "train" / "empty").mkdir()
    (data / "test" / "empty").mkdir()
    assert "empty" in refused(*train, cwd=tmp_path)


def test_eval_refuses_invalid_checkpoints(tmp_path: Path) -> None:
    weights = tmp_path / "whole.safetensors"
    save_file(build_model("wrn-10-1", dataset="digits").state_dict(), weights)
    bare = ["eval", "--arch", "wrn-10-1", "--dataset", "digits", "--n-examples", "4"]
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:1000])
    refused(*bare, "cut.safetensors", cwd=tmp_path)
    (tmp_path / "page.pt").write_text("<!DOCTYPE html><html>Quota exceeded</html>")
    assert "web page" in refused(*bare, "page.pt", cwd=tmp_path)
    (tmp_path / "other.safetensors").write_bytes(weights.read_bytes())
    other = ["eval", "--arch", "wrn-16-1", "--dataset", "digits", "--n-examples", "4", "other.safetensors"]
    assert "architecture" in refused(*other, cwd=tmp_path)

    class Opens:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return open, (str(tmp_path / "owned"), "w")

    torch.save({"net": Opens()}, tmp_path / "code.pt")
    assert "code" in refused(*bare, "code.pt", cwd=tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.slow
def test_train_exits_with_130_on_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def train() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the suite runs in the background
        main(["train", *TINY, "--arch", "tiny_networks:Strided", "--epochs", "9999", "--name", "long"])

    child = fork(train, tmp_path / "output")
    run = tmp_path / "runs" / "long"
    deadline = time.monotonic() + 900
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(child, signal.SIGINT)
    assert exit_status(child) == 130
    output = (tmp_path / "output").read_text(encoding="utf-8")
    assert "--resume" in output
    assert "Traceback" not in output
    assert (run / "last.safetensors").is_file()


@pytest.mark.slow
def test_train_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deat_rb.runs.estimate.BATCHES", 1)
    # 60 images less 10 held out make 3 batches of 20; 3 epochs of (7 + 1) backward passes each.
    assert "72 backward passes" in done("train", "--method", "pgd-7", "--dry-run", *TINY, cwd=tmp_path)
    assert not list(tmp_path.iterdir())
