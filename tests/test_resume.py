"""A run that was stopped anywhere and continued is the run that was not stopped."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from training_problems import images_and_labels, normalized, run_config

import deat_rb
from deat_rb import checkpoint
from deat_rb.batches import Batches, ImageSet
from deat_rb.errors import DeatError, Interrupted
from deat_rb.history import History, Reporter
from deat_rb.runs import RunDirectory
from deat_rb.stats import EpochSums

TIMES = {"seconds", "val_seconds", "images_per_second", "peak_memory"}
METHODS = ["m+trades", "free-3", "m-deat", "deat-40%", "u-fgsm", "m+u-fgsm", "fat-2", "mart"]
EPOCHS, BATCHES = 3, 4


class Stops(Reporter):
    """Sends this process a signal once so many batches are done."""

    def __init__(self, after: int, number: signal.Signals = signal.SIGTERM) -> None:
        self.left = after
        self.number = number
        self.warnings: list[str] = []

    def batch_ended(self, sums: EpochSums) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)

    def warn(self, sentence: str) -> None:
        self.warnings.append(sentence)


def train(method: str, run: RunDirectory, reporter: Reporter | None = None, **options: Any) -> History:
    images, labels = images_and_labels(22)
    data = ImageSet((255 * images).round().to(torch.uint8), labels)
    # Four batches, the last of them short.
    train_loader = Batches(data, 6, shuffle=True, augment=True, memory_format=torch.channels_last)
    trainer = deat_rb.create(method, normalized(), **({"steps": 2} if method == "mart" else {}))
    return trainer.fit(
        train_loader,
        [images_and_labels(4)],
        epochs=EPOCHS,
        lr=0.1,
        precision="bf16",
        run=run,
        reporter=reporter,
        **options,
    )


def outcome(run: RunDirectory) -> tuple[bytes, bytes, list[dict[str, Any]]]:
    """The weights and all figures but times and memory."""
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    figures = [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
    return (run.path / "last.safetensors").read_bytes(), (run.path / "best.safetensors").read_bytes(), figures


@pytest.mark.parametrize("method", METHODS)
def test_a_run_interrupted_anywhere_is_the_uninterrupted_one_bit_for_bit(method: str, tmp_path: Path) -> None:
    whole = RunDirectory.create(tmp_path / "whole", run_config())
    train(method, whole)
    expected = outcome(whole)
    for after in (1, 4, 6, 11):
        run = RunDirectory.create(tmp_path / f"after-{after}", run_config())
        with pytest.raises(Interrupted, match="--resume"):
            train(method, run, Stops(after))
        history = train(method, run, resume=True)
        assert outcome(run) == expected
        assert len(history.rows) == EPOCHS


def test_a_run_interrupted_after_every_batch_ends_all_the_same(tmp_path: Path) -> None:
    whole = RunDirectory.create(tmp_path / "whole", run_config())
    train("m+trades", whole)
    run = RunDirectory.create(tmp_path / "pieces", run_config())
    pieces = 0
    while True:
        pieces += 1
        try:
            train("m+trades", run, Stops(1, signal.SIGINT), resume=True)
        except Interrupted:
            continue
        break
    assert pieces == EPOCHS * BATCHES + 1
    assert outcome(run) == outcome(whole)


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", run_config())
    train("pgd-1", run)
    before = outcome(run)
    again = train("pgd-1", run, Stops(1), resume=True)
    assert outcome(run) == before
    assert again.selected == EPOCHS or again.rows[again.selected - 1].val_robust_acc is not None


@pytest.mark.parametrize("damage", ["cut", "bit", "empty"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(damage: str, tmp_path: Path) -> None:
    whole = RunDirectory.create(tmp_path / "whole", run_config())
    train("free-2", whole)
    run = RunDirectory.create(tmp_path / "run", run_config())
    with pytest.raises(Interrupted):
        train("free-2", run, Stops(6))
    newest = sorted(run.checkpoints.iterdir())[-1]
    content = newest.read_bytes()
    flipped = content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]
    newest.write_bytes({"cut": content[: len(content) // 2], "bit": flipped, "empty": b""}[damage])
    reporter = Stops(10**6)
    train("free-2", run, reporter, resume=True)
    assert len(reporter.warnings) == 1
    assert newest.name in reporter.warnings[0]
    assert outcome(run) == outcome(whole)


def test_two_checkpoints_are_kept_and_all_damaged_is_a_sentence(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", run_config())
    train("pgd-1", run)
    there = sorted(run.checkpoints.iterdir())
    assert len(there) == 2
    for path in there:
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DeatError, match=r"all checkpoints in .* are damaged"):
        train("pgd-1", run, resume=True)


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    whole = RunDirectory.create(tmp_path / "whole", run_config())
    train("pgd-1", whole)
    run = RunDirectory.create(tmp_path / "run", run_config())
    train("pgd-1", run, resume=True)
    assert outcome(run) == outcome(whole)


def test_metrics_ahead_of_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    """A kill between an epoch's row and its checkpoint leaves a row too many."""
    whole = RunDirectory.create(tmp_path / "whole", run_config())
    train("m-deat", whole)
    run = RunDirectory.create(tmp_path / "run", run_config())
    train("m-deat", run)
    sorted(run.checkpoints.iterdir())[-1].unlink()
    train("m-deat", run, resume=True)
    assert outcome(run) == outcome(whole)


def test_the_second_process_on_a_run_is_refused(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", run_config())
    with run.locked(), pytest.raises(DeatError, match="another process is training"), run.locked():
        pass
    with run.locked():
        pass


def test_a_checkpoint_holds_facts_and_tensors_exactly(tmp_path: Path) -> None:
    tensor = torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    state = checkpoint.Checkpoint(facts={"spent": 0.1 + 0.2})
    state.put("model", {"a.b": tensor, "count": torch.tensor(3)})
    checkpoint.write(tmp_path / "there", state)
    found = checkpoint.newest(tmp_path / "there", print)
    assert found is not None
    assert found.facts == {"spent": 0.1 + 0.2}
    assert torch.equal(found.take("model")["a.b"], tensor)
    assert found.take("other") == {}
