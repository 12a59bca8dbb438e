"""The command line: options, output, error messages and exit statuses."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import click
import pytest
import torch
from children import exit_status, fork
from click.testing import CliRunner, Result

from deat_rb import build_model, train
from deat_rb.cli import COMMANDS, main
from deat_rb.evaluation.report import Report
from deat_rb.utils.errors import DeatError, Interrupted


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refusal(*arguments: object) -> str:
    """Return the error message of a command that exits with status 2 and prints nothing else."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    return last.removeprefix("Error: ")


@pytest.fixture
def command_that(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], Sequence[str]]:
    """Add a command that raises an error; return its arguments."""

    def add(error: BaseException) -> Sequence[str]:
        module = ModuleType("deat_rb.cli.broken")

        def broken() -> None:
            raise error

        monkeypatch.setattr(module, "broken", click.command(broken), raising=False)
        monkeypatch.setitem(sys.modules, "deat_rb.cli.broken", module)
        monkeypatch.setitem(COMMANDS, "broken", ("broken", "Breaks."))
        return ["broken"]

    return add


@pytest.mark.parametrize("name", ["compare", "eval", "export", "predict", "submit"])
def test_commands_take_addresses_on_the_hub_as_text(name: str) -> None:
    """As a path, ``hf:owner/name`` would be ``hf:owner\\name`` on Windows."""
    context = click.Context(main)
    command = main.get_command(context, name)
    assert command is not None
    target = command.params[0]
    assert isinstance(target, click.Argument)
    assert target.type.convert("hf:owner/name", target, context) == "hf:owner/name"


# Help


def test_help_lists_each_command_with_its_own_first_sentence() -> None:
    help_text = run("--help").output
    for name, (_, sentence) in COMMANDS.items():
        command = main.get_command(click.Context(main), name)
        assert command.get_short_help_str(limit=200) == sentence
        assert re.search(rf"^  {name} +{re.escape(sentence)}$", help_text, re.MULTILINE)


def test_version_of_the_installed_command_and_of_the_module() -> None:
    script = Path(sys.executable).with_name("deat-rb")
    for command in ([script], [sys.executable, "-m", "deat_rb"]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == "deat-rb, version 0.1.0\n"


def test_resolve_command_suggests_the_nearest_name() -> None:
    assert refusal("trian") == "unknown command 'trian': did you mean 'train'?"


# Errors and exit statuses


def test_invoke_prints_a_deat_error_and_exits_with_2(command_that: Callable[[BaseException], Sequence[str]]) -> None:
    assert refusal(*command_that(DeatError("eps = 7 is outside (0, 1]"))) == "eps = 7 is outside (0, 1]"


@pytest.mark.parametrize(
    ("interrupt", "message"),
    [
        (KeyboardInterrupt(), "Interrupted: nothing was saved\n"),
        (Interrupted("epochs 1 to 3 are in runs/a"), "Interrupted: epochs 1 to 3 are in runs/a\n"),
    ],
)
def test_invoke_exits_with_130_on_ctrl_c(
    interrupt: BaseException, message: str, command_that: Callable[[BaseException], Sequence[str]]
) -> None:
    result = run(*command_that(interrupt))
    assert (result.exit_code, result.stderr) == (130, message)


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "the disk is full; free some space or choose another folder"),
        (errno.EROFS, "the file system is read-only; choose another folder"),
        (errno.EACCES, "permission denied; choose another folder or change its permissions"),
    ],
)
def test_invoke_prints_an_error_of_the_operating_system_as_one_sentence(
    number: int, reason: str, command_that: Callable[[BaseException], Sequence[str]]
) -> None:
    assert refusal(*command_that(OSError(number, os.strerror(number), "runs/a"))) == f"cannot use 'runs/a': {reason}"


def test_invoke_does_not_catch_a_bug(command_that: Callable[[BaseException], Sequence[str]]) -> None:
    result = run(*command_that(ZeroDivisionError()))
    assert isinstance(result.exception, ZeroDivisionError)


def test_help_into_a_closed_pipe_is_no_error() -> None:
    program = "from deat_rb.cli import main; main(['--help'])"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert done.stderr == ""


# eval


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(build_model("wrn-10-1", num_classes=4).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one short epoch on the digits."""
    options = {"method": "standard", "arch": "wrn-10-1", "train_size": 64, "val_size": 16, "batch_size": 16,
               "epochs": 1, "device": "cpu", "precision": "fp32"}  # fmt: skip
    return train(options, output=tmp_path_factory.mktemp("runs"), name="short")[0].path


@pytest.fixture
def described(checkpoint: Path, image_folder: Path) -> list[str | Path]:
    """A checkpoint with the options that are needed to evaluate it."""
    return [checkpoint, "--arch", "wrn-10-1", "--dataset", "folder", "--data-dir", image_folder]


def test_eval_of_a_checkpoint(described: list[str | Path], tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    result = run("eval", *described, "--attacks", "fgsm,pgd-2", "--eps", "2/255", "--n-examples", 8, "--seed", 3,
                 "--device", "cpu", "--json", file)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert re.search(r"natural.*fgsm.*pgd-2", result.stdout, re.DOTALL)
    assert result.stderr.splitlines()[-1].startswith("pgd-2: 8 images, ")
    report = Report.load(file)
    assert list(report.results) == ["natural", "fgsm", "pgd-2"]
    assert (report.eps, report.n_examples, report.num_classes, report.seed) == (2 / 255, 8, 4, 3)
    assert report.provenance["arch"] == "wrn-10-1"
    assert set(report.verdicts) == {"natural", "fgsm", "pgd-2"}


def test_eval_of_a_checkpoint_writes_nothing_without_json(
    described: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = Path(described[0])
    assert run("eval", *described, "--attacks", "natural", "--device", "cpu").exit_code == 0
    assert not list(tmp_path.iterdir())
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


@pytest.mark.slow
def test_eval_of_a_run_uses_its_config_and_writes_eval_json(digits_run: Path) -> None:
    result = run("eval", digits_run, "--attacks", "fgsm", "--n-examples", 20, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"written: {digits_run / 'eval.json'}"
    report = Report.load(digits_run)
    assert report.eps == json.loads((digits_run / "config.json").read_text())["attack"]["eps"]
    weights = digits_run / "last.safetensors"
    assert report.provenance["weights"] == weights.name
    assert report.provenance["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert "note" not in report.provenance


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--eps", "8/0"], "Invalid value for '--eps': '8/0' divides by zero"),
        (["--eps", "much"], "Invalid value for '--eps': 'much' is not a number"),
        (["--eps", "-1/255"], "--eps = -0.003921568627 is outside [0, 1]"),
        (["--eps", "0,8"], "--eps = 8 is outside [0, 1]"),
        (["--attacks", "pdg-100"], "there is no attack 'pdg-100': did you mean 'pgd-100'"),
        (["--attacks", ","], "Invalid value for '--attacks': the list is empty"),
        (["--n-examples", "17"], "--n-examples 17 is out of range for 16 test images: give a number from 1 to 16"),
        (["--n-examples", "0"], "--n-examples 0 is out of range"),
        (["--batch-size", "0"], "batch_size = 0 is not positive"),
        (["--device", "abacus"], "there is no device 'abacus'"),
        (["--arch", "wrn-16-1"], "has a different architecture"),
        (["--num-classes", "3"], "--num-classes 3 is too few: folder has 4 classes"),
        (["--image-size", "64"], "takes 3x32x32 images, not 3x64x64"),
        (["--json", "report.txt"], "Invalid value for '--json': 'report.txt' does not end in .json"),
        (
            ["--json", "nowhere/report.json"],
            "Invalid value for '--json': the folder 'nowhere' for 'report.json' does not exist",
        ),
    ],
)
def test_eval_refuses(flags: list[str], sentence: str, described: list[str | Path]) -> None:
    assert sentence in refusal("eval", *described, *flags)


@pytest.mark.parametrize(
    ("given", "missing"),
    [([], "--arch and --dataset"), (["--arch", "wrn-10-1"], "--dataset"), (["--dataset", "digits"], "--arch")],
)
def test_eval_of_a_checkpoint_names_the_options_that_are_missing(
    given: list[str], missing: str, checkpoint: Path
) -> None:
    assert refusal("eval", checkpoint, *given).endswith(f"does not specify its network and data: give {missing}")


def test_eval_of_a_path_that_does_not_exist() -> None:
    assert refusal("eval", "nowhere.pt") == "nowhere.pt does not exist"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends a signal that Windows does not have")
def test_eval_exits_with_130_on_ctrl_c(described: list[str | Path], tmp_path: Path) -> None:
    # Within such an eps no image is misclassified, so that the attack takes all of its steps.
    flags = ["--attacks", "pgd-100000", "--eps", "1e-12"]
    output = tmp_path / "output"

    def evaluate() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the suite runs in the background
        main(["eval", *map(str, described), *flags])

    child = fork(evaluate, output)
    deadline = time.monotonic() + 600
    while not (output.exists() and output.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert output.read_text().startswith("natural: ")
    time.sleep(0.5)
    os.kill(child, signal.SIGINT)
    assert exit_status(child) == 130
    assert output.read_text().partition("\n")[2] == "Interrupted: nothing was saved\n"


# export


def test_export_writes_the_accuracies_of_eval_json(digits_run: Path, tmp_path: Path) -> None:
    assert run("eval", digits_run, "--attacks", "fgsm", "--n-examples", 20, "--device", "cpu").exit_code == 0
    result = run("export", digits_run, "--model-name", "Wang2021Gradient_R18", "--as-dataset", "cifar10",
                 "--output", tmp_path, "--venue", "At home, 2021")  # fmt: skip
    assert result.exit_code == 0, result.output
    *written, unknown = result.stdout.splitlines()
    assert unknown.startswith("note: AutoAttack was not run, so autoattack_acc is written as 0.00, which ranks last")
    assert {Path(line.removeprefix("written: ")) for line in written} == {p for p in tmp_path.rglob("*") if p.is_file()}
    info = json.loads((tmp_path / "model_info" / "cifar10" / "Linf" / "Wang2021Gradient_R18.json").read_text())
    correct = Report.load(digits_run).results["natural"].n_correct
    assert info["clean_acc"] == f"{100 * correct / 20:.2f}"
    assert info["venue"] == "At home, 2021"


def test_export_refuses(digits_run: Path, tmp_path: Path) -> None:
    assert refusal("export", digits_run) == (
        "--model-name is missing: RobustBench needs a name such as Wang2021Gradient_R18"
    )
    name = ["--model-name", "Wang2021Gradient", "--output", tmp_path / "out"]
    assert "RobustBench has no dataset 'digits'" in refusal("export", digits_run, *name)
    assert refusal("export", tmp_path, *name, "--as-dataset", "cifar10").endswith("it has no config.json")
    assert not (tmp_path / "out").exists()


# methods


def test_methods_lists_every_method() -> None:
    names = {line.split()[0] for line in run("methods").stdout.splitlines() if line.split()}
    assert {"standard", "free-8", "deat-40%", "m-deat", "pgd-7", "m+u-fgsm", "fat-5", "f+mart", "m+trades"} <= names


def test_methods_as_json() -> None:
    rows = json.loads(run("methods", "--json").stdout)
    assert {"name", "family", "attack", "loss", "schedule", "stop", "cost", "paper"} == set(rows[0])
    assert len(rows) >= 16
    one = json.loads(run("methods", "M+TRADES", "--json").stdout)
    assert one == {**next(row for row in rows if row["name"] == "m+trades"), "explanation": one["explanation"]}


def test_methods_of_one_method() -> None:
    text = run("methods", "M+TRADES").stdout
    assert "m+trades" in text
    assert "Algorithm 4" in text


def test_methods_suggests_the_nearest_name() -> None:
    assert "there is no method 'm+trds': did you mean" in refusal("methods", "m+trds")
