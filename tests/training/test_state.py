"""The training state read from a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from resumed_runs import Stops, train
from safetensors import safe_open
from training_problems import run_config

from deat_rb.runs.directory import RunDirectory
from deat_rb.training import checkpoint
from deat_rb.utils.errors import DeatError, Interrupted
from deat_rb.utils.safe_load import save_tensors

Facts = dict[str, Any]


Tensors = dict[str, torch.Tensor]


def without(name: str) -> Callable[[Facts, Tensors], object]:
    return lambda facts, tensors: tensors.pop(name)


ALTERED: dict[str, tuple[Callable[[Facts, Tensors], object], str]] = {
    "a text for a number": (lambda facts, _: facts.update(epoch="2"), "epoch: Input should be a valid integer"),
    "a fact more": (lambda facts, _: facts.update(best=1), "best: Extra inputs are not permitted"),
    "a fact less": (lambda facts, _: facts.pop("sums"), "sums: Field required"),
    "an epoch never reached": (lambda facts, _: facts.update(epoch=9), "has 1 epoch but the checkpoint has 8"),
    "more batches than there are": (lambda facts, _: facts.update(batch=5), "5 finished batches in an epoch of 4"),
    "an epoch nobody has": (lambda facts, _: facts.update(kept=[7]), "7"),
    "no epoch's weights": (lambda facts, _: facts.update(kept=[]), "lacks the weights of the finished epochs"),
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


@pytest.mark.parametrize("case", ALTERED)
def test_restore_refuses_an_altered_checkpoint(case: str, interrupted: RunDirectory) -> None:
    alter, message = ALTERED[case]
    newest = checkpoint.newest(interrupted.checkpoints, print)
    assert newest is not None
    alter(newest.facts, newest.tensors)
    checkpoint.write(interrupted.checkpoints, newest)
    with pytest.raises(DeatError, match=message):
        train("m-deat", interrupted, resume=True)


@pytest.mark.parametrize("form", ["1", "4", None])
def test_newest_refuses_another_format(
    form: str | None, interrupted: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sorted(interrupted.checkpoints.iterdir())[-1]
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    header.pop("format")
    save_tensors(path, tensors, header if form is None else {**header, "format": form})
    with pytest.raises(
        DeatError, match=f"has checkpoint format {form or 1}, but this version .* needs format 3; resume"
    ):
        train("m-deat", interrupted, resume=True)


@pytest.mark.parametrize("row", ['{"epoch": "1"}', '{"epoch": 1, "val_acc": "high"}', "[1]", "\xff"])
def test_resume_refuses_altered_metrics(row: str, interrupted: RunDirectory) -> None:
    (interrupted.path / "metrics.jsonl").write_bytes(row.encode("latin-1") + b"\n")
    with pytest.raises(DeatError, match="line 1, does not contain an epoch's metrics"):
        train("m-deat", interrupted, resume=True)
