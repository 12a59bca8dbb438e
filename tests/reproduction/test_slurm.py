"""Workers submitted through submitit; its local executor stands for Slurm."""

from __future__ import annotations

import json
import os
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
    row = json.loads((out / "small.json").read_text())["rows"][0]
    assert row["runs"][0]["status"] == "done"
    assert row["means"]["backward passes"]["mean"] == 4  # 2 batches with an attack step and an update


@pytest.mark.skipif(os.name == "nt", reason="replaces Slurm's commands by shell scripts")
@pytest.mark.parametrize(("options", "expected"), [({}, 1000), ({"slurm_max_num_timeout": "7"}, 7)])
@pytest.mark.parametrize("count", [1, 2], ids=["job", "array"])
def test_a_job_may_reach_its_time_limit_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], expected: int, count: int
) -> None:
    utils = pytest.importorskip("submitit.core.utils")
    for name in ("srun", "sbatch"):
        (tmp_path / name).write_text("#!/bin/sh\necho Submitted batch job 12\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    jobs = submit(["sweep"], count, {"timeout_min": "5", **options}, tmp_path / "logs")
    submissions = [utils.DelayedSubmission.load(job.paths.submitted_pickle) for job in jobs]
    assert [each._timeout_countdown for each in submissions] == [expected] * count
    assert "--time=5\n" in jobs[0].paths.submission_file.read_text()


def test_submit_refuses(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(DeatError, match="cannot be submitted to slurm"):  # there is no sbatch here
        submit(["sweep"], 1, {"partition_": "gpu"}, tmp_path)
    with pytest.raises(DeatError, match="--slurm-option slurm_max_num_timeout=many is not a whole number"):
        submit(["sweep"], 1, {"slurm_max_num_timeout": "many"}, tmp_path)
    with pytest.raises(DeatError, match="--slurm-option gpu is not NAME=VALUE"):
        parse_options(["gpu"])
    assert parse_options(["slurm_partition=gpu", "timeout_min=60"]) == {"slurm_partition": "gpu", "timeout_min": "60"}
