"""Checkpoint files: content, damage and format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from resumed_runs import Stops, outcome, train
from training_problems import run_config

from deat_rb.runs.directory import RunDirectory
from deat_rb.training import checkpoint
from deat_rb.utils.errors import DeatError, Interrupted


def test_checkpoint_restores_facts_and_tensors_exactly(tmp_path: Path) -> None:
    tensor = torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    state = checkpoint.Checkpoint(facts={"spent": 0.1 + 0.2})
    state.put("model", {"a.b": tensor, "count": torch.tensor(3)})
    checkpoint.write(tmp_path / "there", state)
    found = checkpoint.newest(tmp_path / "there", print)
    assert found is not None
    assert found.facts == {"spent": 0.1 + 0.2}
    assert torch.equal(found.take("model")["a.b"], tensor)
    assert found.take("other") == {}


@pytest.mark.parametrize("damage", ["cut", "bit", "empty"])
def test_newest_falls_back_to_the_checkpoint_before_a_damaged_one(damage: str, tmp_path: Path) -> None:
    whole = RunDirectory.create(tmp_path / "whole", run_config())
    train("free-2", whole)
    run = RunDirectory.create(tmp_path / "run", run_config())
    with pytest.raises(Interrupted):
        train("free-2", run, Stops(6))
    newest = sorted(run.checkpoints.iterdir())[-1]
    content = newest.read_bytes()
    flipped = content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]
    newest.write_bytes({"cut": content[: len(content) // 2], "bit": flipped, "empty": b""}[damage])
    callback = Stops(10**6)
    train("free-2", run, callback, resume=True)
    assert len(callback.warnings) == 1
    assert newest.name in callback.warnings[0]
    assert outcome(run) == outcome(whole)


def test_newest_refuses_when_all_are_damaged(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", run_config())
    train("pgd-1", run)
    there = sorted(run.checkpoints.iterdir())
    assert len(there) == 2
    for path in there:
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DeatError, match=r"all checkpoints in .* are damaged"):
        train("pgd-1", run, resume=True)
