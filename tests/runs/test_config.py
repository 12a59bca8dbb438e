"""Configuration of a run, and the files that hold it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_problems import run_config

from deat_rb.runs.config import RunConfig
from deat_rb.runs.directory import RunDirectory
from deat_rb.runs.options import make_options, read_options
from deat_rb.utils.errors import DeatError
from deat_rb.utils.options import OPEN

OLD_CONFIG = """{
  "method": "m+u-fgsm", "setting": "standard", "dataset": "folder", "data_dir": "/data/photos", "image_size": 64,
  "train_size": 900, "val_size": 100, "arch": "wrn-10-1", "init_from": null, "epochs": 30, "lr_epochs": 20, "lr": 0.05,
  "lr_schedule": "multistep", "momentum": 0.9, "weight_decay": 0.0005, "batch_size": 50, "eps": 0.03,
  "alpha": null, "steps": null, "max_steps": null, "gamma": null, "beta": null, "tau": null, "attack_mode": "train",
  "lr_per_replay": null, "precision": "fp32", "device": "cpu", "seed": 4, "select": "best", "heed_stop": false,
  "on_nonfinite": "skip", "compiled": true, "sync_bn": false, "classes": ["cat", "dog"],
  "model": {"arch": "wrn-10-1", "num_classes": 2, "image_size": 64, "channels": 3,
            "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]},
  "data_fingerprint": "abc", "versions": {"torch": "2.14.1"},
  "conduct": {"save_every": 7.0, "track": ["tensorboard"], "memory_limit": 1024}
}"""
"""A config.json of commit 28b4f8e."""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "old" / "config.json"
    path.parent.mkdir()
    path.write_text(OLD_CONFIG)
    return path


def test_run_directory_opens_a_flat_config_json(old: Path) -> None:
    config = RunDirectory.open(old.parent).config
    assert (config.attack.method, config.attack.setting, config.attack.eps) == ("m+u-fgsm", "standard", 0.03)
    assert (config.data.dataset, config.data.data_dir, config.data.memory_limit) == ("folder", "/data/photos", 1024)
    assert (config.optim.epochs, config.optim.lr_epochs, config.optim.seed) == (30, 20, 4)
    assert (config.optim.early_stopping, config.runtime.compile) == (False, True)
    assert (config.runtime.save_every, config.output.track) == (7, ("tensorboard",))
    assert (config.network.num_classes, config.network.mean, config.classes) == (2, (0.4, 0.5, 0.6), ("cat", "dog"))
    assert (config.data_fingerprint, config.versions) == ("abc", {"torch": "2.14.1"})


def test_a_flat_config_json_keeps_how_free_and_fat_started() -> None:
    for method, carry, omega in (("free-8", True, None), ("fat-5", None, 0), ("f+trades", None, None)):
        attack = RunConfig.model_validate({**json.loads(OLD_CONFIG), "method": method}).attack
        assert (attack.carry, attack.omega) == (carry, omega)


def test_a_flat_config_json_is_written_again_in_groups(old: Path) -> None:
    config = RunConfig.model_validate_json(OLD_CONFIG)
    written = config.model_dump(mode="json")
    assert list(written) == [
        "data", "model", "attack", "optim", "runtime", "output", "network", "classes", "data_fingerprint",
        "extra_fingerprint", "init_sha256", "train_images", "val_images", "versions"
    ]  # fmt: skip
    assert (written["model"]["arch"], written["model"]["init_from"]) == ("wrn-10-1", None)
    assert RunConfig.model_validate(written) == config


def test_read_options_takes_a_flat_config_json(old: Path) -> None:
    options = make_options(read_options(old))
    config = RunConfig.model_validate_json(OLD_CONFIG)
    assert options.flat() == config.flat()
    assert (options.optim.early_stopping, options.runtime.compile) == (False, True)


def test_differences_compares_with_the_flat_configuration_of_an_old_checkpoint() -> None:
    before = json.loads(OLD_CONFIG)
    config = RunConfig.model_validate(before)
    assert config.differences(before) == []
    assert config.differences({**before, "conduct": {}, "versions": {}, "device": "cuda"}) == []
    assert config.differences({**before, "heed_stop": True, "lr": 1.0}) == ["lr", "early_stopping"]
    assert config.differences({**before, "model": {**before["model"], "std": [1.0, 1.0, 1.0]}}) == ["network"]


def test_read_options_of_a_runs_configuration(tmp_path: Path) -> None:
    config = run_config(eps=0.1, lr=0.3, gamma=1.01, attack_mode="eval")
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json())
    assert RunConfig.model_validate(json.loads(path.read_text())) == config
    assert make_options(read_options(path)).flat() == config.flat()


def test_read_options_of_a_file_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    for content in ({"method": "pgd-3", "epochs": 2}, {"attack": {"method": "pgd-3"}, "optim": {"epochs": 2}}):
        path.write_text(json.dumps(content))
        assert read_options(path) == {"method": "pgd-3", "epochs": 2}
    for typo in ({"method": "pgd-3", "epoch": 2}, {"optim": {"epoch": 2}}):
        path.write_text(json.dumps(typo))
        with pytest.raises(DeatError, match="there is no option --epoch"):
            read_options(path)
    path.write_text("[1]")
    with pytest.raises(DeatError, match="does not contain a JSON object of training options"):
        read_options(path)


def test_method_options_are_those_of_create() -> None:
    config = run_config(alpha=0.1, max_steps=3, tau=2)
    given = {name: value for name, value in config.method_options().items() if value is not None}
    assert given == {"norm": "Linf", "alpha": 0.1, "max_steps": 3, "tau": 2}


def test_method_options_tell_no_carry_from_the_default() -> None:
    assert run_config(method="free-4", carry=False).method_options()["carry"] is False
    assert run_config(method="free-4").method_options()["carry"] is None
    assert run_config(method="free-4").method_options()["lr_per_replay"] is None


def test_extended_does_not_limit_an_open_ended_run() -> None:
    config: Any = run_config(lr_schedule="flat", epochs="open")
    with pytest.raises(DeatError, match=r"^--epochs = 5 cannot limit a run with --epochs open, whose averaged weights"):
        config.extended(5)
    assert config.extended(OPEN) == config


@pytest.mark.parametrize(
    ("schedule", "epochs", "lr_epochs"), [("flat", 5, None), ("multistep", 5, 2), ("multistep", 2, None)]
)
def test_extended_keeps_the_milestones(schedule: str, epochs: int, lr_epochs: int | None) -> None:
    config: Any = run_config(lr_schedule=schedule).extended(epochs)
    assert (config.optim.epochs, config.optim.lr_epochs) == (epochs, lr_epochs)
