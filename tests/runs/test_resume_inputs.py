"""Resuming a run whose images or initial weights were changed, moved or removed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from resumed_runs import Stops
from small_runs import SMALL, identical, planned

from deat_rb.runs.train import resume, train
from deat_rb.utils.errors import DeatError, Interrupted

pytestmark = pytest.mark.usefixtures("without_curves")


def test_resume_refuses_changed_data(image_folder: Path, tmp_path: Path) -> None:
    """Also where there are now too few of them, or others' classes, for the rest of the configuration."""
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    options = {**SMALL, "dataset": "folder", "data_dir": str(data), "train_size": 40, "val_size": 8, "batch_size": 20}
    run, _ = train({**options, "lr_schedule": "flat"}, output=tmp_path)
    changes: dict[str, list[Path]] = {
        "an image fewer": [next((data / "train" / "blue").iterdir())],
        "a class fewer": [data / "train" / "red", data / "test" / "red"],
    }
    for change in changes.values():
        for path in change:
            path.rename(tmp_path / f"{path.parent.name}-{path.name}")
        with pytest.raises(
            DeatError, match=r"^the data of folder differ from those of the run; restore them, or start a new run$"
        ):
            resume(run.path, {"epochs": 3}, trust_code=True)


def test_resume_accepts_and_records_a_moved_folder(image_folder: Path, tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    shutil.copytree(image_folder, there)
    options = {**SMALL, "dataset": "folder", "data_dir": str(there), "train_size": 40, "val_size": 8, "batch_size": 20}
    run, _ = train({**options, "lr_schedule": "flat", "memory_limit": 1}, output=tmp_path / "runs")
    there.rename(here)
    resumed, history = resume(run.path, {"data_dir": str(here), "epochs": 3}, trust_code=True)
    assert len(history.rows) == 3
    assert (resumed.config.data.data_dir, resumed.config.data.memory_limit) == (str(here), 1)
    resume(run.path, {}, trust_code=True)


def test_resume_does_not_need_the_initial_weights(tmp_path: Path) -> None:
    weights = train({**SMALL, "epochs": 1}, output=tmp_path, name="first")[0].path / "last.safetensors"
    begun = {**SMALL, "init_from": str(weights)}
    whole, _ = train(begun, output=tmp_path, name="whole")
    with pytest.raises(Interrupted, match="keeps 0 of 2 epochs and 1 batch of"):
        train(begun, output=tmp_path, name="run", callbacks=[Stops(1)])
    weights.unlink()
    run, _ = resume(tmp_path / "run", {}, trust_code=True)
    assert identical(run, whole)


def test_resume_refuses_changed_initial_weights_if_there_is_no_checkpoint(tmp_path: Path) -> None:
    weights = tmp_path / "first.pt"
    begun = {**SMALL, "init_from": str(weights)}
    torch.save(planned(seed=3).trainer.model.state_dict(), weights)
    with pytest.raises(Interrupted):
        train(begun, output=tmp_path, name="run", callbacks=[Stops(1)])
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    kept = weights.read_bytes()
    torch.save(planned(seed=4).trainer.model.state_dict(), weights)
    with pytest.raises(DeatError, match=r"^the initial weights of .*first\.pt differ from those of the run; restore"):
        resume(tmp_path / "run", {}, trust_code=True)
    weights.write_bytes(kept)
    _, history = resume(tmp_path / "run", {}, trust_code=True)
    assert len(history.rows) == 2
