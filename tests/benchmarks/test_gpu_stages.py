"""The stages of ``python -m benchmarks.gpu``, on the CPU at the smallest sizes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import table1
from benchmarks.gpu.session import Session

ROOT = Path(__file__).parents[2]


def test_decoded_images_are_read_from_their_cache(image_folder: Path, tmp_path: Path) -> None:
    session = Session(argparse.Namespace(data=str(image_folder), cache=tmp_path / "images.pt", out=tmp_path))
    decoded, cached = table1._data(session), table1._data(session)
    assert [row["stage"] for row in session.rows] == ["decode"], "the second time from the cache"
    for name in ("classes", "mean", "std", "fingerprint"):
        assert getattr(cached, name) == getattr(decoded, name)
    for part in ("train", "test"):
        images = getattr(decoded, part).in_memory()
        assert torch.equal(getattr(cached, part).images, images.images)
        assert torch.equal(getattr(cached, part).labels, images.labels)


@pytest.mark.slow
def test_stages_run_on_a_cpu(image_folder: Path, tmp_path: Path) -> None:
    stages = "env,smoke,speed,profile,throughput,decode,table1,full"
    sizes = ["--val-size", "8", "--test-size", "4", "--full-size", "8", "--epochs", "1", "--batch-size", "4",
             "--eval-batch", "4", "--eval-batches", "4", "--repeats", "1"]  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.gpu", stages, "--device", "cpu", "--arch", "wrn-10-1", *sizes,
               "--attacks", "fgsm,pgd-2", "--methods", "m-deat,u-fgsm", "--data", str(image_folder),
               "--cache", str(tmp_path / "images.pt"), "--out", str(tmp_path), "--budget", "100000"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert not [row for row in rows if "failed" in row or "left_out" in row]
    assert {row["stage"] for row in rows} == {*stages.split(","), "table1-eval", "full-eval"} - {"full"}
    assert {row["method"] for row in rows if row["stage"] == "full-eval"} == {"m-deat", "u-fgsm"}
