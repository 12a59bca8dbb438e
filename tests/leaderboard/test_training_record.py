"""What a run records of its training."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from board_problems import make_run
from training_problems import run_config

from deat_rb.leaderboard.training_record import training_command, training_facts
from deat_rb.runs.config import RunConfig


def test_training_command_trains_the_same_again(tmp_path: Path) -> None:
    config = RunConfig.model_validate_json(
        (make_run(tmp_path / "run", steps=3, early_stopping=False) / "config.json").read_text()
    )
    words = shlex.split(training_command(config))
    assert words[:4] == ["deat-rb", "train", "--method", "m-deat"]
    assert {"--steps", "--no-early-stopping", "--eps"} <= set(words)
    from cli.train import train

    context = train.make_context("train", words[2:])
    assert (context.params["eps"], context.params["steps"], context.params["early_stopping"]) == ("0.1", "3", False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "free-4", "carry": False}, ["--no-carry"]),
        ({"method": "free-4", "carry": True}, ["--carry"]),
        ({"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}, ["--mean", "0.1,0.2,0.3", "--std", "0.4,0.5,0.6"]),
        ({"init_from": "/home/me/first.pt", "weights_key": "ema"}, ["--init-from", "first.pt", "--weights-key", "ema"]),
    ],
)
def test_training_command_spells_switches_numbers_and_paths(options: dict[str, Any], words: list[str]) -> None:
    command = shlex.split(training_command(run_config(**options)))
    start = command.index(words[0])
    assert command[start : start + len(words)] == words


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({}, False),
        ({"extra_data": "extra.npz"}, True),
        ({"pretrained": True}, True),
        ({"init_from": "hf:me/net"}, None),
        ({"init_from": "first.pt", "extra_data": "extra.npz"}, True),
    ],
)
def test_additional_data_is_unknown_of_a_checkpoint(options: dict[str, Any], known: bool | None) -> None:
    assert training_facts(run_config(**options), [])["additional_data"] is known


def test_training_command_has_all_digits_of_a_radius() -> None:
    command = shlex.split(training_command(run_config(eps=0.0312345678, alpha=2 / 255)))
    assert command[command.index("--eps") + 1] == "0.0312345678"
    assert command[command.index("--alpha") + 1] == "2/255"
