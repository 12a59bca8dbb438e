"""Workers submitted through submitit; its local executor stands for Slurm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training_problems import ARCH

from deat_rb.reproduction.slurm import parse_options, submit
from deat_rb.utils.errors import DeatError

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.mark.slow
def test_a_submitted_worker_trains_and_writes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", str(HELPERS))
    study = tmp_path / "small.toml"
    study.write_text(
        f"[options]\narch = '{ARCH}'\ntrain_size = 64\nval_size = 16\nbatch_size = 32\nepochs = 1\n"
        "precision = 'fp32'\n[grid]\nmethod = ['pgd-1']\n[evaluation]\nattacks = 'fgsm'\nn_examples = 16\n"
    )
    out = tmp_path / "out"
    (job,) = submit(
        ["sweep", str(study), "--output", str(out), "--no-wait", "--trust-code"],
        1,
        {"cluster": "local", "timeout_min": "5"},
        out / "logs",
    )
    assert job.result() == 0
    row = json.loads((out / "table.json").read_text())["rows"][0]
    assert row["runs"][0]["status"] == "done"
    assert row["means"]["backward passes"]["mean"] == 4  # 2 batches with an attack step and an update


def test_submit_refuses(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(DeatError, match="cannot be submitted to slurm"):  # there is no sbatch here
        submit(["sweep"], 1, {"partition_": "gpu"}, tmp_path)
    with pytest.raises(DeatError, match="--slurm-option gpu is not NAME=VALUE"):
        parse_options(["gpu"])
    assert parse_options(["slurm_partition=gpu", "timeout_min=60"]) == {"slurm_partition": "gpu", "timeout_min": "60"}
