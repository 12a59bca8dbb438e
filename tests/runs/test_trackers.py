"""Experiment trackers."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import SMALL

from deat_rb.runs.train import train
from deat_rb.utils.errors import DeatError


def test_tracker_logs_each_epoch_to_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, history = train({**SMALL, "track": ["tensorboard"]}, output=tmp_path, name="run")
    events = EventAccumulator(str(next((run.path / "tensorboard").rglob("events*")).parent))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("l_x")}
    assert logged == {row.epoch: pytest.approx(row.l_x) for row in history.rows}


def test_check_trackers_refuses_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DeatError, match="--track tensorbord is unknown: did you mean 'tensorboard'"):
        train({"method": "pgd-1", "track": ["tensorbord"]}, output=tmp_path)
    with pytest.raises(DeatError, match=r"--track wandb needs the package wandb, .*: pip install wandb"):
        train({"method": "pgd-1", "track": ["wandb"]}, output=tmp_path)
    assert not list(tmp_path.iterdir())
