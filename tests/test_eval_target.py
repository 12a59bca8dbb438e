"""`deat_rb.loading`: targets of an evaluation, their examples and their data."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deat_rb.loading import EvalTarget, open_target
from deat_rb.models.spec import build_model
from deat_rb.runs.train import train
from deat_rb.utils.errors import DeatError


@pytest.fixture
def target(image_folder: Path, tmp_path: Path) -> EvalTarget:
    """A checkpoint for the folder's 4 classes."""
    path = tmp_path / "weights.pt"
    torch.save(build_model("wrn-10-1", num_classes=4).net.state_dict(), path)
    return open_target(path, arch="WRN10-1", dataset="folder", data_dir=image_folder)


def test_examples_take_the_classes_in_turn(target: EvalTarget) -> None:
    images, labels = target.examples(6)
    assert labels.tolist() == [0, 1, 2, 3, 0, 1]
    assert images.shape == (6, 3, 32, 32)
    assert 0 <= images.min() < images.max() <= 1
    assert torch.equal(target.examples()[0][:6], images)
    assert len(target.examples()[0]) == 16


def test_open_checkpoint_without_mean_takes_images_as_they_are(target: EvalTarget) -> None:
    assert not target.model.training
    assert target.run is None
    assert target.eps == 8 / 255
    buffers = dict(target.model.named_buffers())
    assert buffers["mu"].unique().tolist() == [0]
    assert buffers["sigma"].unique().tolist() == [1]
    assert target.model(target.examples(2)[0]).shape == (2, 4)


@pytest.fixture
def run_and_data(image_folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run of one epoch, and the folder it was trained on."""
    data = shutil.copytree(image_folder, tmp_path / "data")
    options = {"method": "standard", "dataset": "folder", "data_dir": str(data), "arch": "wrn-10-1", "val_size": 8,
               "batch_size": 8, "epochs": 1, "eps": 0.25, "device": "cpu", "precision": "fp32"}  # fmt: skip
    return train(options, output=tmp_path, name="run")[0].path, data


def test_open_target_of_a_run(run_and_data: tuple[Path, Path]) -> None:
    run, _ = run_and_data
    target = open_target(run)
    assert (target.eps, target.run, target.data.name) == (0.25, run, "folder")
    assert not target.model.training
    saved = load_file(run / "last.safetensors")
    assert torch.equal(target.model.state_dict()["net.conv1.weight"], saved["net.conv1.weight"])
    assert "note" not in target.provenance


def test_open_target_notes_changed_data(run_and_data: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = run_and_data
    moved = data.rename(tmp_path / "elsewhere")
    with pytest.raises(DeatError, match="has no folder train"):
        open_target(run)
    assert "note" not in open_target(run, data_dir=moved).provenance
    shutil.copy(moved / "test" / "red" / "0000.png", moved / "test" / "blue" / "0000.png")
    assert "not those that the run was trained on" in open_target(run, data_dir=moved).provenance["note"]


def test_open_target_of_a_run_refuses_options_of_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(DeatError, match="--arch wrn-10-1 is for checkpoints: the run"):
        open_target(tmp_path, arch="wrn-10-1")
