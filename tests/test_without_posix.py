"""The package where `fcntl` and `resource` do not exist, as on Windows."""

from __future__ import annotations

from pathlib import Path

import pytest
from fresh_interpreters import Fresh

SCRIPT = """
import sys
sys.modules["fcntl"] = sys.modules["resource"] = None  # importing them raises ImportError
import torch
import deat_rb
import deat_rb.runs.train
import deat_rb.cli, deat_rb.cli.train, deat_rb.cli.evaluate, deat_rb.cli.leaderboard, deat_rb.cli.submit

deat_rb.runs.train.plot_curves = lambda *_, **__: None
data = deat_rb.load_data("digits")
model = deat_rb.build_model("wrn-10-1", num_classes=10)
trainer = deat_rb.create("pgd-1", model, eps=0.1)
images, labels = data.test.first(8).tensors()
assert trainer(images, labels).shape == images.shape
options = {"method": "pgd-1", "arch": "wrn-10-1", "dataset": "digits", "epochs": 1, "train_size": 64, "val_size": 16,
           "batch_size": 32, "device": "cpu", "precision": "fp32"}
run, history = deat_rb.train(options, output="runs")
report = deat_rb.evaluate(deat_rb.load_model(run.path), images, labels, eps=0.1, attacks=("natural", "fgsm"),
                          device="cpu", state="unfinished")
assert report.results, report
from deat_rb.leaderboard.board import Board
with Board("board").locked():
    pass
(run.path / ".lock").touch()  # as it is left on systems with fcntl
with run.locked():
    pass
print("done")
"""


@pytest.mark.slow
def test_everything_works_without_fcntl_and_resource(fresh: Fresh, tmp_path: Path) -> None:
    outcome = fresh(SCRIPT, tmp_path)
    assert outcome.stdout.endswith("done\n"), outcome.stderr
