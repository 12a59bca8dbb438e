"""Checkpoint files: content, damage and format."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from resumed_runs import Stops, outcome, train
from safetensors import safe_open
from training_problems import run_config

from deat_rb.runs.directory import RunDirectory
from deat_rb.training import checkpoint
from deat_rb.utils.errors import DeatError, Interrupted
from deat_rb.utils.safe_load import save_tensors, sha256_tensors


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


@pytest.mark.slow
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


def test_write_stores_equal_tensors_once(tmp_path: Path) -> None:
    weights = torch.rand(3, 2)
    state = checkpoint.Checkpoint()
    state.put("model", {"a": weights, "b": torch.zeros(2), "c": torch.zeros(2, 1)})
    state.put("kept.1", {"a": weights.clone(), "b": torch.tensor([0.0, -0.0]), "c": torch.zeros(2, 1)}, copy=False)
    path = checkpoint.write(tmp_path / "there", state)
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == ["kept.1.b", "model.a", "model.b", "model.c"]
    found = checkpoint.newest(tmp_path / "there", print)
    assert found is not None
    assert found.tensors.keys() == state.tensors.keys()
    assert torch.equal(found.tensors["kept.1.a"], weights)
    assert found.tensors["kept.1.b"].signbit().tolist() == [False, True]
    assert found.tensors["kept.1.c"].shape == (2, 1)


def test_put_copies_what_training_changes(tmp_path: Path) -> None:
    weights, kept = torch.zeros(2), torch.zeros(2)
    state = checkpoint.Checkpoint()
    state.put("model", {"a": weights})
    state.put("kept.1", {"a": kept}, copy=False)
    weights += 1
    assert state.tensors["model.a"].tolist() == [0, 0]
    assert state.tensors["kept.1.a"] is kept


def test_newest_reads_format_2(tmp_path: Path) -> None:
    tensors, facts = {"model.a": torch.rand(3)}, '{"epoch": 1}'
    sha256 = hashlib.sha256(facts.encode() + sha256_tensors(tensors).encode()).hexdigest()
    save_tensors(tmp_path / "00000001.safetensors", tensors, {"format": "2", "facts": facts, "sha256": sha256})
    found = checkpoint.newest(tmp_path, print)
    assert found is not None
    assert found.facts == {"epoch": 1}
    assert torch.equal(found.tensors["model.a"], tensors["model.a"])


@pytest.mark.parametrize("same", ["[]", '{"x": "y"}', '{"x": ["model.a"]}', '{"model.b": "model.a"}', "{"])
def test_newest_refuses_a_damaged_list_of_equal_tensors(same: str, tmp_path: Path) -> None:
    state = checkpoint.Checkpoint()
    state.put("model", {"a": torch.ones(2), "b": torch.zeros(2)})
    path = checkpoint.write(tmp_path, state)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    save_tensors(path, tensors, {**header, "same": same})
    with pytest.raises(DeatError, match=r"all checkpoints in .* are damaged"):
        checkpoint.newest(tmp_path, lambda damage: None)
