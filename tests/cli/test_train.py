"""`deat-rb train`: its help and its flags."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from training_problems import run_config

from deat_rb.cli import main
from deat_rb.runs.options import train_options


@pytest.fixture(scope="module")
def help_text() -> str:
    result = CliRunner().invoke(main, ["train", "--help"], terminal_width=120)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_help_has_the_groups_in_order(help_text: str) -> None:
    titles = ["Data:", "Model:", "Method:", "Optimization:", "Runtime:", "Output:"]
    places = [help_text.index(f" {title} --") for title in titles]
    assert places == sorted(places)


def test_help_has_each_option_with_choices_default_and_sentence(help_text: str) -> None:
    squeezed = "".join(help_text.split())  # lines are also broken at hyphens
    for each in train_options():
        assert f" {each.flag.replace('/', ' / ')} " in help_text
        assert " ".join(each.help.split()) in help_text
        if each.choices:
            assert f"{each.flag} [{'|'.join(each.choices)}]" in help_text
        if each.default:
            assert "".join(f"[default: {each.default}".split()) in squeezed
        else:
            optional = each.metavar in ("PATH", "PATTERN") or each.name == "curve_test"
            assert each.kind in ("flag", "off", "switch", "many") or optional
    assert (
        "[default:setting's:0.1fast,0.05standard,0.1fastat;yopo-m-n0.2/mfastandfastat;0.001withadamw;x>0]" in squeezed
    )
    assert "--no-stop" not in help_text


def test_help_does_not_import_torch() -> None:
    program = "import sys; from deat_rb.cli import main; main(['train', '--help'], standalone_mode=False);"
    done = subprocess.run(
        [sys.executable, "-c", program + "print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"


def refusal(*arguments: object) -> str:
    result = CliRunner().invoke(main, ["train", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    return result.stderr.splitlines()[-1].removeprefix("Error: ")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--setting", "quick"], "Invalid value for '--setting': 'quick' is not one of 'fast', 'standard', 'fastat'."),
        (["--dataset", "mnist"], "'mnist' is not one of 'digits', 'cifar10', 'cifar100', 'folder'."),
        (["--eps", "much"], "--eps = 'much' cannot be used: 'much' is not a number; give a fraction such as 8/255"),
        (["--epochs", "0"], "--epochs = '0' cannot be used: it should be greater than or equal to 1"),
        (["--memory-limit", "8X"], "--memory-limit = '8X' cannot be used: '8X' is not a size"),
        (["--seeds", "1,1"], "'1,1' is not a list of different seeds"),
        (["--seeds", "1,2", "--seed", "3"], "--seed 3 and --seeds 1,2 are mutually exclusive; give only one"),
    ],
)
def test_train_refuses(flags: list[str], sentence: str) -> None:
    assert sentence in refusal(*flags)


@pytest.mark.parametrize(
    "flags",
    [["--optimizer", "adamw"], ["--norm", "L2"], ["--dataset", "digits"], ["--setting", "standard"],
     ["--arch", "wrn-34-10"], ["--pretrained"]],
)  # fmt: skip
def test_config_refuses_options_on_which_the_defaults_of_others_depend(flags: list[str], tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(run_config(dataset="cifar10", setting="fast").model_dump_json())
    said = refusal("--config", config, "--trust-code", *flags)
    assert f"{' '.join(flags)} conflicts with --config, as {config} holds the options of" in said


@pytest.mark.parametrize(
    ("recorded", "option", "value", "too", "others"),
    [  # YOPO's learning rate is 0.2 / m; FREE's epochs in fastat are 200 / R, twice that on digits
        ({"method": "yopo-5-3", "lr": 0.04}, "--steps", "2", "--lr", ["0.1"]),
        ({"method": "free-4", "setting": "fastat", "epochs": 100}, "--steps", "8", "--epochs", ["50"]),
        ({"method": "m-deat", "epochs": 22, "lr": 0.1}, "--epochs", "open", "--lr", ["0.05"]),
        ({"method": "m-deat", "epochs": "open", "lr": 0.05}, "--epochs", "22", "--lr", ["0.1"]),
    ],
)
def test_config_refuses_steps_and_epochs_on_which_what_it_holds_depends(
    recorded: dict[str, Any], option: str, value: str, too: str, others: list[str], tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(recorded))
    said = refusal("--config", config, option, value, "--dry-run")
    expected = f"{option} {value} changes the default of {too}, which {config} holds: give it, too, or omit --config"
    assert said == expected
    said = refusal("--config", config, option, value, too, *others, "--eps", "5", "--dry-run")
    assert said.startswith("--eps"), "the next option is refused"


def test_config_takes_another_number_of_steps_or_epochs_that_changes_no_default(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    for recorded in ({"method": "pgd-7", "lr": 0.1}, {"method": "yopo-5-3", "optimizer": "adamw", "lr": 0.001}):
        config.write_text(json.dumps(recorded))
        said = refusal("--config", config, "--steps", "2", "--epochs", "3", "--eps", "5", "--dry-run")
        assert said.startswith("--eps"), "the next option is refused"


@pytest.mark.parametrize("flags", [["--arch", "WRN10-1"], ["--method", "M+TRADE"]])
def test_config_takes_its_architecture_and_method_in_another_spelling(flags: list[str], tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(run_config(arch="wrn-10-1", method="m+trades").model_dump_json())
    said = refusal("--config", config, *flags, "--eps", "5", "--dry-run")
    assert said.startswith("--eps"), "the other spelling is accepted, and the next option is refused"


def test_resume_refuses_flags_of_a_new_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    config = tmp_path / "run" / "config.json"
    config.write_text(run_config().model_dump_json())
    for flags in (["--name", "x"], ["--seeds", "1,2"], ["--dry-run"], ["--config", config]):
        assert "--resume cannot be combined with" in refusal("--resume", config.parent, *flags)
    assert "--trust-code" in refusal("--resume", config.parent)
    assert refusal("--resume", tmp_path).endswith("is not a run directory: it has no config.json")


def test_no_stop_is_another_spelling_of_no_early_stopping() -> None:
    command = main.commands.get("train") or main.get_command(main.make_context("deat-rb", ["train"]), "train")
    assert command is not None
    for flag in ("--no-stop", "--no-early-stopping"):
        assert command.make_context("train", [flag]).params["early_stopping"] is False
    assert command.make_context("train", []).params["early_stopping"] is None
