"""A run that was stopped anywhere and continued is the run that was not stopped."""

from __future__ import annotations

import math
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from children import in_a_child
from resumed_runs import BATCHES, EPOCHS, Stops, outcome, train
from safetensors import safe_open
from training_problems import normalized, run_config

import deat_rb
from deat_rb.methods.registry import known_methods
from deat_rb.runs.directory import RunDirectory
from deat_rb.training import checkpoint
from deat_rb.training.callbacks import Callback
from deat_rb.training.metrics import BatchStats, EpochStats
from deat_rb.utils.errors import DeatError, Interrupted
from deat_rb.utils.safe_load import load_tensors, save_tensors, sha256_tensors

EVERYWHERE = ["m+trades", "free-3", "m-deat"]
WITHIN_AN_EPOCH = [
    "standard", "deat-2", "deat-40%", "pgd-2", "m+pgd", "u-fgsm", "m+u-fgsm", "fat-2", "trades", "f+trades", "mart",
    "f+mart", "m+mart", "torchattacks.PGD",
]  # fmt: skip


def test_all_methods_are_here() -> None:
    families = {name.partition("-")[0] for name in [*EVERYWHERE, *WITHIN_AN_EPOCH]}
    assert {name.partition("-")[0] for name in known_methods()} <= families
    assert len([*EVERYWHERE, *WITHIN_AN_EPOCH]) >= 17


@pytest.mark.parametrize(
    ("method", "moments"),
    [*((method, (1, 4, 6, 11)) for method in EVERYWHERE), *((method, (6,)) for method in WITHIN_AN_EPOCH)],
)
def test_a_run_interrupted_anywhere_is_the_uninterrupted_one_bit_for_bit(
    method: str, moments: tuple[int, ...], tmp_path: Path
) -> None:
    whole = RunDirectory.create(tmp_path / "whole", run_config())
    train(method, whole)
    expected = outcome(whole)
    for after in moments:
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
    callback = Stops(10**6)
    train("free-2", run, callback, resume=True)
    assert len(callback.warnings) == 1
    assert newest.name in callback.warnings[0]
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


def test_metrics_without_a_checkpoint_are_not_thrown_away(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", run_config())
    train("pgd-1", run)
    shutil.rmtree(run.checkpoints)
    before = outcome(run)
    with pytest.raises(DeatError, match="has no checkpoint to go on from; start a new run"):
        train("pgd-1", run, resume=True)
    assert outcome(run) == before


def test_weights_of_an_epoch_that_is_forgotten_are_forgotten(tmp_path: Path) -> None:
    """A kill after the weights of an epoch were written and before its checkpoint was."""
    run = RunDirectory.create(tmp_path / "run", run_config())
    with pytest.raises(Interrupted):
        train("pgd-1", run, Stops(6))
    for which in ("best", "last"):
        run.save_weights(which, normalized().state_dict(), replace(run.rows()[0], epoch=2, val_robust_acc=1.0))
    with pytest.raises(Interrupted, match="keeps 1 of 3 epochs and 3 batches of the next; deat-rb train --resume"):
        train("pgd-1", run, Stops(1), resume=True)
    assert [run.checkpoint(which)["epoch"] for which in ("best", "last")] == [1, 1]
    for which in ("best", "last"):
        assert run.checkpoint(which)["sha256"] == sha256_tensors(load_tensors(run.path / f"{which}.safetensors"))


def test_what_is_not_finite_right_after_a_resume_names_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory.create(tmp_path / "run", run_config())
    with pytest.raises(Interrupted):
        train("pgd-1", run, Stops(6))
    newest = sorted(run.checkpoints.iterdir())[-1]
    learn = deat_rb.AttackTrainer.training_step

    def broken(self: deat_rb.AttackTrainer, *arguments: Any) -> BatchStats:
        return replace(learn(self, *arguments), loss=torch.tensor(math.nan))

    monkeypatch.setattr(deat_rb.AttackTrainer, "training_step", broken)
    with pytest.raises(DeatError, match=f"the loss at batch 3 of epoch 2; .* checkpoint {newest} of epoch 2, batch 2"):
        train("pgd-1", run, resume=True)


Facts = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def without(name: str) -> Callable[[Facts, Tensors], object]:
    return lambda facts, tensors: tensors.pop(name)


ALTERED: dict[str, tuple[Callable[[Facts, Tensors], object], str]] = {
    "a text for a number": (lambda facts, _: facts.update(epoch="2"), "epoch: Input should be a valid integer"),
    "a fact more": (lambda facts, _: facts.update(best=1), "best: Extra inputs are not permitted"),
    "a fact less": (lambda facts, _: facts.pop("sums"), "sums: Field required"),
    "an epoch never reached": (lambda facts, _: facts.update(epoch=9), "has 1 epochs where the run is 8 on"),
    "more batches than there are": (lambda facts, _: facts.update(batch=5), "5 batches into an epoch of 4"),
    "an epoch nobody has": (lambda facts, _: facts.update(kept=[7]), "7"),
    "no epoch's weights": (lambda facts, _: facts.update(kept=[]), "no epoch's weights"),
    "sums without a loss": (lambda facts, _: facts["sums"][0].pop("loss"), "'loss'"),
    "steps that are a text": (lambda facts, _: facts["trainer"]["schedule"].update(steps="many"), "steps = 'many'"),
    "no schedule": (lambda facts, _: facts["trainer"].pop("schedule"), "'schedule'"),
    "a weight less": (without("model.net.0.weight"), r"net\.0\.weight is missing, not float32 of \(6, 3, 3, 3\)"),
    "a weight of an epoch less": (without("kept.1.net.0.weight"), r"kept\.1\.net\.0\.weight is missing"),
    "a momentum less": (without("momentum.0"), r"momentum\.0 is missing"),
    "a momentum of one number": (
        lambda _, tensors: tensors.update({"momentum.0": torch.zeros(1)}), r"momentum\.0 is float32 of \(1,\), not"
    ),
    "a weight in another type": (
        lambda _, tensors: tensors.update({"model.net.0.weight": torch.zeros(6, 3, 3, 3, dtype=torch.int64)}),
        r"is int64 of \(6, 3, 3, 3\), not float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ALTERED)
def test_an_altered_checkpoint_is_one_sentence(case: str, interrupted: RunDirectory) -> None:
    alter, message = ALTERED[case]
    newest = checkpoint.newest(interrupted.checkpoints, print)
    assert newest is not None
    alter(newest.facts, newest.tensors)
    checkpoint.write(interrupted.checkpoints, newest)
    with pytest.raises(DeatError, match=message):
        train("m-deat", interrupted, resume=True)


@pytest.fixture(scope="module")
def interrupted_once(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = RunDirectory.create(tmp_path_factory.mktemp("runs") / "run", run_config())
    with pytest.raises(Interrupted):
        train("m-deat", run, Stops(6))
    return run


@pytest.fixture
def interrupted(interrupted_once: RunDirectory, tmp_path: Path) -> RunDirectory:
    """A run of M-DEAT, interrupted after the second batch of the second epoch."""
    shutil.copytree(interrupted_once.path, tmp_path / "run")
    return RunDirectory(tmp_path / "run", interrupted_once.config)


@pytest.mark.parametrize("form", ["1", "3", None])
def test_a_checkpoint_of_another_form_is_refused(
    form: str | None, interrupted: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sorted(interrupted.checkpoints.iterdir())[-1]
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    header.pop("format")
    save_tensors(path, tensors, header if form is None else {**header, "format": form})
    with pytest.raises(DeatError, match=f"a checkpoint of form {form or 1} and this version .* from form 2; go"):
        train("m-deat", interrupted, resume=True)


@pytest.mark.parametrize("row", ['{"epoch": "1"}', '{"epoch": 1, "val_acc": "high"}', "[1]", "\xff"])
def test_altered_metrics_are_one_sentence(row: str, interrupted: RunDirectory) -> None:
    (interrupted.path / "metrics.jsonl").write_bytes(row.encode("latin-1") + b"\n")
    with pytest.raises(DeatError, match="line 1, is not an epoch's figures"):
        train("m-deat", interrupted, resume=True)


def test_a_full_disk_is_told_with_what_is_kept_and_loses_nothing(tmp_path: Path) -> None:
    """The child may write no more than a kilobyte to any file once its first epoch has ended."""

    class FillsUp(Callback):
        def on_epoch_end(self, row: EpochStats) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    run, whole = (RunDirectory.create(tmp_path / name, run_config()) for name in ("run", "whole"))

    def work() -> None:
        kept = f"{run.path} keeps 1 of 3 epochs; deat-rb train --resume {run.path} goes on from there"
        with pytest.raises(DeatError, match=f"metrics.jsonl cannot be written .No space left on device.; {kept}"):
            train("m-deat", run, FillsUp())

    assert in_a_child(work)
    assert len(run.rows()) == 1
    train("m-deat", run, resume=True)
    train("m-deat", whole)
    assert outcome(run) == outcome(whole)


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
