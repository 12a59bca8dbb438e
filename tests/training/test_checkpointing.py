"""Resuming: a run that was interrupted anywhere and resumed equals the uninterrupted run."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torchattacks
from children import run_in_child
from resumed_runs import BATCHES, EPOCHS, Stops, outcome, train
from training_problems import images_and_labels, normalized, run_config

import deat_rb
from deat_rb.methods.registry import known_methods
from deat_rb.runs.directory import RunDirectory
from deat_rb.training.callbacks import Callback
from deat_rb.training.metrics import EpochStats
from deat_rb.utils.errors import DeatError, Interrupted
from deat_rb.utils.safe_load import load_tensors, sha256_tensors

EVERYWHERE = ["m+trades", "free-3", "m-deat"]


WITHIN_AN_EPOCH = [
    "standard", "deat-2", "deat-40%", "pgd-2", "m+pgd", "u-fgsm", "m+u-fgsm", "n-fgsm", "m+n-fgsm", "gradalign",
    "amata-1-4", "yopo-2-2", "fgsm-pgi", "liet", "fat-2", "trades", "f+trades", "mart", "f+mart", "m+mart",
    "pgd-2 awp", "trades awp", "free-2 eps-warmup", "torchattacks.PGD",
]  # fmt: skip


def test_resume_covers_all_methods() -> None:
    families = {name.partition("-")[0] for name in [*EVERYWHERE, *WITHIN_AN_EPOCH]}
    assert {name.partition("-")[0] for name in known_methods()} <= families
    assert len([*EVERYWHERE, *WITHIN_AN_EPOCH]) >= 17


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "moments"),
    [("m+trades", (1, 4, 6, 11)),
     *(pytest.param(method, (1, 4, 6, 11), marks=pytest.mark.slow) for method in EVERYWHERE[1:]),
     *(pytest.param(method, (6,), marks=pytest.mark.slow) for method in WITHIN_AN_EPOCH)],
)  # fmt: skip
def test_resume_equals_the_uninterrupted_run_bit_for_bit(method: str, moments: tuple[int, ...], tmp_path: Path) -> None:
    options: dict[str, Any] = {"validate_every": 1 if method in EVERYWHERE else EPOCHS}
    whole = RunDirectory.create(tmp_path / "whole", run_config())
    train(method, whole, **options)
    expected = outcome(whole)
    for after in moments:
        run = RunDirectory.create(tmp_path / f"after-{after}", run_config())
        with pytest.raises(Interrupted, match="--resume"):
            train(method, run, Stops(after), **options)
        history = train(method, run, resume=True, **options)
        assert outcome(run) == expected
        assert len(history.rows) == EPOCHS


@pytest.mark.parametrize(("method", "augmentation"), [("free-3", "cutmix"), ("m+trades", "mixup")])
def test_resume_with_mixed_labels_equals_the_uninterrupted_run(method: str, augmentation: str, tmp_path: Path) -> None:
    whole = RunDirectory.create(tmp_path / "whole", run_config())
    train(method, whole, augmentation=augmentation)
    run = RunDirectory.create(tmp_path / "run", run_config())
    with pytest.raises(Interrupted):
        train(method, run, Stops(6), augmentation)
    train(method, run, augmentation=augmentation, resume=True)
    assert outcome(run) == outcome(whole)


def test_resume_after_every_batch_equals_the_uninterrupted_run(tmp_path: Path) -> None:
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


def test_resume_checks_the_attack_again(tmp_path: Path) -> None:
    """An attack that returns clean images may have taken the place of the one with which the run began."""
    run = RunDirectory.create(tmp_path / "run", run_config())
    with pytest.raises(Interrupted):
        train("torchattacks.PGD", run, Stops(6))
    images, labels = images_and_labels(24)
    trainer = deat_rb.AttackTrainer(torchattacks.APGD(normalized(), steps=2))
    with pytest.raises(DeatError, match="APGD returns the clean image when it fails to change the prediction"):
        trainer.fit([(images, labels)] * BATCHES, [(images, labels)], run=run, resume=True, epochs=EPOCHS)


def test_resume_of_a_finished_run_does_not_train(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", run_config())
    train("pgd-1", run)
    before = outcome(run)
    again = train("pgd-1", run, Stops(1), resume=True)
    assert outcome(run) == before
    assert again.selected == EPOCHS or again.rows[again.selected - 1].val_robust_acc is not None


def test_resume_without_a_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    whole = RunDirectory.create(tmp_path / "whole", run_config())
    train("pgd-1", whole)
    run = RunDirectory.create(tmp_path / "run", run_config())
    train("pgd-1", run, resume=True)
    assert outcome(run) == outcome(whole)


def test_resume_drops_metrics_newer_than_the_checkpoint(tmp_path: Path) -> None:
    """A kill between an epoch's row and its checkpoint leaves a row too many."""
    whole = RunDirectory.create(tmp_path / "whole", run_config())
    train("m-deat", whole)
    run = RunDirectory.create(tmp_path / "run", run_config())
    train("m-deat", run)
    sorted(run.checkpoints.iterdir())[-1].unlink()
    train("m-deat", run, resume=True)
    assert outcome(run) == outcome(whole)


def test_resume_refuses_metrics_without_a_checkpoint(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", run_config())
    train("pgd-1", run)
    shutil.rmtree(run.checkpoints)
    before = outcome(run)
    with pytest.raises(DeatError, match="has no checkpoint to resume from; start a new run"):
        train("pgd-1", run, resume=True)
    assert outcome(run) == before


def test_resume_drops_weights_newer_than_the_checkpoint(tmp_path: Path) -> None:
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


def test_checkpointing_on_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """The child may write no more than a kilobyte to any file once the checkpoint of its first epoch is written."""
    resource = pytest.importorskip("resource")

    class FillsUp(Callback):
        def on_validation_end(self, row: EpochStats) -> None:
            if run.rows():
                resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    run, whole = (RunDirectory.create(tmp_path / name, run_config()) for name in ("run", "whole"))

    def work() -> None:
        kept = f"{run.path} keeps 1 of 3 epochs; deat-rb train --resume {run.path} --trust-code resumes it"
        with pytest.raises(DeatError, match=f"metrics.jsonl cannot be written .No space left on device.; {kept}"):
            train("m-deat", run, FillsUp())

    assert run_in_child(work)
    assert len(run.rows()) == 1
    train("m-deat", run, resume=True)
    train("m-deat", whole)
    assert outcome(run) == outcome(whole)
