"""Options of `deat-rb train`: validation, and what is generated from their fields."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from fresh_interpreters import Fresh

from deat_rb.runs.options import make_options, options_markdown, train_options
from deat_rb.utils.errors import DeatError
from deat_rb.utils.options import OPEN

ROOT = Path(__file__).parents[2]


def test_make_options_defaults() -> None:
    options = make_options({})
    assert (options.attack.method, options.attack.setting, options.data.dataset) == ("m+trades", "fast", "digits")
    assert (options.optim.momentum, options.optim.weight_decay, options.optim.seed) == (0.9, 5e-4, 0)
    assert options.explicit() == {}


def test_make_options_leaves_out_what_is_none() -> None:
    assert make_options({"method": "pgd-7", "epochs": None, "alpha": None}).explicit() == {"method": "pgd-7"}


def test_make_options_reads_text_as_from_the_command_line() -> None:
    typed = {"epochs": "3", "eps": "8/255", "alpha": "0.01", "memory_limit": "8G", "track": ("tensorboard",)}
    assert make_options(typed).explicit() == {
        "epochs": 3, "eps": 8 / 255, "alpha": 0.01, "memory_limit": 8 * 10**9, "track": ("tensorboard",),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("epochs", 0, "--epochs = 0 cannot be used: it should be greater than or equal to 1"),
        ("epochs", "many", "--epochs = 'many' cannot be used"),
        ("lr", -1, "--lr = -1 cannot be used: it should be greater than 0"),
        ("lr", float("nan"), "--lr = nan cannot be used"),
        ("lr", float("inf"), "--lr = inf cannot be used"),
        ("alpha", "nan", "--alpha = 'nan' cannot be used"),
        ("eps", "8/0", "--eps = '8/0' cannot be used: '8/0' divides by zero"),
        ("eps", "much", "--eps = 'much' cannot be used: 'much' is not a number; give a fraction such as 8/255"),
        ("momentum", 1.0, "--momentum = 1.0 cannot be used: it should be less than 1"),
        ("batch_size", 1, "--batch-size = 1 cannot be used"),
        ("weight_decay", -1, "--weight-decay = -1 cannot be used"),
        ("max_steps", 0, "--max-steps = 0 cannot be used"),
        ("seed", -1, "--seed = -1 cannot be used"),
        ("setting", "quick", "--setting = 'quick' cannot be used: it should be 'fast', 'standard' or 'fastat'"),
        ("dataset", "cifar", "--dataset = 'cifar' cannot be used: it should be 'digits', 'cifar10', 'cifar100' or"),
        ("select", "first", "--select = 'first' cannot be used: it should be 'best' or 'last'"),
        ("attack_mode", "half", "--attack-mode = 'half' cannot be used"),
        ("precision", "fp64", "--precision = 'fp64' cannot be used"),
        ("memory_limit", "plenty", "--memory-limit = 'plenty' cannot be used"),
        ("no_decay", 5, "--no-decay = 5 cannot be used: '5' is not a list of names; give names such as norm,bias"),
        ("no_decay", [1], "--no-decay = .1. cannot be used: '.1.' is not a list of names"),
        ("runtime", "cpu", "--runtime = 'cpu' cannot be used: it should be a table of options"),
        ("epoch", 3, "there is no option --epoch"),
        (5, 3, "options = 5 cannot be used: keys should be strings"),
    ],
)
def test_make_options_names_the_option_and_its_value(option: Any, value: Any, message: str) -> None:
    with pytest.raises(DeatError, match=message):
        make_options({option: value})


@pytest.mark.parametrize("group", [None, 5, "cpu", []])
def test_make_options_refuses_a_group_that_is_no_table_beside_one_of_its_options(group: Any) -> None:
    with pytest.raises(DeatError, match=r"--runtime = .* cannot be used: it should be a table of options$"):
        make_options({"runtime": group, "device": "cpu"})


def test_options_markdown_is_in_the_docs() -> None:
    text = (ROOT / "docs" / "options.md").read_text()
    assert text == options_markdown(), "run `python -m deat_rb.runs.options > docs/options.md`"
    for each in train_options():
        assert f"| `{each.flag}` |" in text


@pytest.mark.slow
def test_an_option_is_added_by_one_line(fresh: Fresh, tmp_path: Path) -> None:
    """In a copy of the package one line is added to a group; nothing else changes."""
    package = tmp_path / "deat_rb"
    shutil.copytree(ROOT / "deat_rb", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "cli", package / "cli", ignore=shutil.ignore_patterns("__pycache__"))
    for module, group, line in (
        ("runs/options.py", '    """Data."""\n', '    mixup: float = option(0.0, "Mixup weight.", ge=0)\n'),
        ("training/options.py", '    """Optimization."""\n', '    warmup: int = option(0, "Warm-up epochs.", ge=0)\n'),
    ):
        path = package / module
        assert path.read_text().count(group) == 1
        path.write_text(path.read_text().replace(group, group + line))
    program = """
import json, sys
from pathlib import Path
import torch
from click.testing import CliRunner
import deat_rb.runs.train
from deat_rb import create
from deat_rb.cli import main
from deat_rb.runs.options import options_markdown
from deat_rb.runs.train import train
from training_problems import loader, made

deat_rb.runs.train.plot_curves = lambda *_, **__: None
lines = CliRunner().invoke(main, ["train", "--help"]).output.splitlines()
mixup = next(number for number, line in enumerate(lines) if "--mixup NUMBER" in line)
assert lines.index("Data:") < mixup < lines.index("Model:")
assert "| `--warmup` | integer, x>=0 | 0 | Warm-up epochs. |" in options_markdown()
options = ["--arch", "training_problems:network", "--train-size", "32", "--val-size", "8", "--batch-size", "16"]
result = CliRunner().invoke(main, ["train", *options, "--method", "standard", "--epochs", "1", "--device", "cpu",
                                   "--mixup", "0.5", "--warmup", "2", "--name", "run"])
assert result.exit_code == 0, result.output
config = json.loads(Path("runs/run/config.json").read_text())
assert (config["data"]["mixup"], config["optim"]["warmup"]) == (0.5, 2)
again = CliRunner().invoke(main, ["train", "--config", "runs/run/config.json", "--trust-code", "--name", "again"])
assert again.exit_code == 0, again.output
assert json.loads(Path("runs/again/config.json").read_text()) == config
create("standard", made()).fit(loader(), epochs=1, warmup=1)
"""
    done = fresh(program, tmp_path, str(tmp_path), str(ROOT / "tests" / "helpers"))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("batch_size", 64, ["--batch-size", "64"]),
        ("eps", 8 / 255, ["--eps", "8/255"]),
        ("eps", 0.0312345678, ["--eps", "0.0312345678"]),
        ("epochs", OPEN, ["--epochs", "open"]),
        ("mean", (0.1, 0.25), ["--mean", "0.1,0.25"]),
        ("track", ("wandb", "mlflow"), ["--track", "wandb", "--track", "mlflow"]),
        ("carry", False, ["--no-carry"]),
        ("nesterov", True, ["--nesterov"]),
        ("nesterov", False, []),
        ("early_stopping", False, ["--no-early-stopping"]),
        ("early_stopping", True, []),
    ],
)
def test_words_set_an_option_on_the_command_line(name: str, value: Any, words: list[str]) -> None:
    (option,) = (each for each in train_options() if each.name == name)
    assert option.words(value) == words
