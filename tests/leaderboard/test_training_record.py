"""What a run records of its training."""

from __future__ import annotations

import shlex
from pathlib import Path

from board_problems import make_run

from deat_rb.leaderboard.training_record import training_command
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
