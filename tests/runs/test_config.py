"""Options and the settings they resolve to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_problems import run_config

from deat_rb.methods.registry import recipe
from deat_rb.runs.config import RunConfig, TrainOptions, make_options, read_options
from deat_rb.runs.defaults import dataset_defaults, setting_defaults
from deat_rb.utils.errors import DeatError


@pytest.mark.parametrize(
    ("method", "epochs"),
    [("deat-3", 12), ("deat-40%", 11), ("m-deat", 11), ("u-fgsm", 15), ("m+u-fgsm", 15), ("free-8", 10),
     ("pgd-7", 10), ("m+trades", 10)],
)  # fmt: skip
def test_the_fast_setting_is_the_paper_s(method: str, epochs: int) -> None:
    settings = setting_defaults("fast", recipe(method)[1], "wrn-34-10")
    assert settings.pop("gamma", 1.01) == 1.01
    assert settings == {"epochs": epochs, "lr": 0.1, "lr_schedule": "cyclic", "precision": "auto", "select": "last"}


@pytest.mark.parametrize("method", ["deat-3", "u-fgsm", "m+mart", "standard"])
def test_the_standard_setting_is_the_paper_s(method: str) -> None:
    settings = setting_defaults("standard", recipe(method)[1], "preactresnet18")
    assert settings.pop("gamma", 1.01) == 1.01
    assert settings == {"epochs": 50, "lr": 0.05, "lr_schedule": "multistep", "precision": "fp32", "select": "best"}


def test_gamma_is_the_architecture_s_and_only_the_guided_have_it() -> None:
    guided, plain = recipe("m-deat")[1], recipe("deat-3")[1]
    assert setting_defaults("fast", guided, "preactresnet18")["gamma"] == 1.0
    assert setting_defaults("fast", guided, "wrn-34-10")["gamma"] == 1.01
    assert "gamma" not in setting_defaults("fast", plain, "preactresnet18")


def test_options_without_values_are_the_paper_s() -> None:
    options = make_options({"method": "pgd-7"})
    assert (options.momentum, options.weight_decay) == (0.9, 5e-4)
    for dataset in ("cifar10", "cifar100", "folder"):
        defaults = dataset_defaults(dataset)
        assert (defaults.eps, defaults.batch_size, defaults.epoch_factor) == (8 / 255, 128, 1)
    with pytest.raises(DeatError, match="no data set 'cifar': did you mean 'cifar10'"):
        dataset_defaults("cifar")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("epochs", 0, "--epochs = 0 cannot be used: it should be greater than or equal to 1"),
        ("epochs", "many", "--epochs = 'many' cannot be used"),
        ("lr", -1, "--lr = -1 cannot be used: it should be greater than 0"),
        ("lr", float("nan"), "--lr = nan cannot be used"),
        ("lr", float("inf"), "--lr = inf cannot be used"),
        ("momentum", 1.0, "--momentum = 1.0 cannot be used: it should be less than 1"),
        ("batch_size", 1, "--batch-size = 1 cannot be used"),
        ("weight_decay", -1, "--weight-decay = -1 cannot be used"),
        ("max_steps", 0, "--max-steps = 0 cannot be used"),
        ("seed", -1, "--seed = -1 cannot be used"),
        ("setting", "quick", "--setting = 'quick' cannot be used: it should be 'fast' or 'standard'"),
        ("select", "first", "--select = 'first' cannot be used: it should be 'best' or 'last'"),
        ("attack_mode", "half", "--attack-mode = 'half' cannot be used"),
        ("precision", "fp64", "--precision = 'fp64' cannot be used"),
        ("epoch", 3, "there is no option --epoch"),
    ],
)
def test_a_bad_option_is_named_with_its_value(option: str, value: Any, message: str) -> None:
    with pytest.raises(DeatError, match=message):
        make_options({"method": "pgd-7", option: value})


def test_a_method_is_needed() -> None:
    with pytest.raises(DeatError, match="--method is missing"):
        make_options({})


def test_a_run_s_configuration_reads_as_options(tmp_path: Path) -> None:
    config = run_config(eps=0.1, lr=0.3, gamma=1.01, attack_mode="eval")
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json())
    assert RunConfig.model_validate(json.loads(path.read_text())) == config
    options = make_options(read_options(path))
    for name in TrainOptions.model_fields:
        assert getattr(options, name) == getattr(config, name), name


def test_a_configuration_written_by_hand_may_be_short(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"method": "pgd-3", "epochs": 2}')
    assert make_options(read_options(path)) == make_options({"method": "pgd-3", "epochs": 2})
    path.write_text('{"method": "pgd-3", "epoch": 2}')
    with pytest.raises(DeatError, match="there is no option --epoch"):
        make_options(read_options(path))
    path.write_text("[1]")
    with pytest.raises(DeatError, match="does not hold a JSON object of training options"):
        read_options(path)


def test_the_configuration_hands_the_method_its_options() -> None:
    config = run_config(alpha=0.1, max_steps=3, tau=2)
    given = {name: value for name, value in config.method_options().items() if value is not None}
    assert given == {"alpha": 0.1, "max_steps": 3, "tau": 2}
