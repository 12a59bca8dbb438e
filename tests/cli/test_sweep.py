"""The command `deat-rb sweep`."""

from __future__ import annotations

import json
import os
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from training_problems import ARCH

from deat_rb.cli import main
from deat_rb.reproduction.estimate import Times
from deat_rb.reproduction.folder import Record, StudyFolder
from deat_rb.reproduction.study import read_study
from deat_rb.reproduction.work import Worker
from deat_rb.utils.errors import Interrupted

STUDY = f"""
[options]
arch = "{ARCH}"
train_size = 64
val_size = 16
batch_size = 32
epochs = 1
precision = "fp32"
[grid]
method = ["pgd-1", "free-2"]
[evaluation]
attacks = "fgsm"
n_examples = 16
"""


@pytest.mark.slow
def test_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deat_rb.runs.train.plot_curves", lambda *_, **__: None)
    monkeypatch.setattr("deat_rb.runs.estimate.BATCHES", 1)
    monkeypatch.chdir(tmp_path)
    Path("small.toml").write_text(STUDY)

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(main, ["sweep", "--trust-code", "small.toml", *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    commands = run("--print").splitlines()
    assert len(commands) == 2
    dry = run("--dry-run")
    assert "2 runs left, 0 done" in dry
    assert not Path("small/runs").exists() or not list(Path("small/runs").iterdir())
    run(*commands[1].split()[3:])
    assert len(run("--print").splitlines()) == 1
    assert "1 done, 1 waiting" in run("--status")
    shown = run()
    assert "free-2" in shown
    assert "Test images: 16." in shown
    assert "Test images: 16." in Path("small/small.md").read_text()
    for arguments in (["--print"], ["--gpus", "0"], ["--jobs", "2"], [], ["--slurm"]):
        result = CliRunner().invoke(main, ["sweep", "--trust-code", "small.toml", *arguments], catch_exceptions=False)
        assert (result.exit_code, result.stderr) == (0, "nothing is left: 2 runs done\n")
        assert bool(result.stdout) == (arguments not in (["--print"], ["--slurm"]))
    assert not Path("small/logs").exists(), "no worker was started"
    only = CliRunner().invoke(
        main, ["sweep", "--trust-code", "small.toml", *commands[0].split()[3:]], catch_exceptions=False
    )
    assert only.stderr == f"{commands[0].split()[-1]} is done\n"
    table = json.loads(Path("small/small.json").read_text())
    # 2 batches; PGD-1 has an attack step and an update, FREE-2 two replays
    assert [row["means"]["backward passes"]["mean"] for row in table["rows"]] == [4, 4]
    assert {path.name for path in Path("small").iterdir()} >= {"small.md", "small.tex", "small.csv", "runs", "state"}


def test_studies_with_one_output_keep_their_tables(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / f"{name}.toml").write_text(f'title = "The {name}"\n{STUDY}')
        arguments = ["sweep", "--trust-code", str(tmp_path / f"{name}.toml"), "--output", str(tmp_path), "--tables"]
        assert CliRunner().invoke(main, arguments).exit_code == 0
    assert [(tmp_path / f"{name}.md").read_text().splitlines()[0] for name in ("first", "second")] == [
        "## The first", "## The second",
    ]  # fmt: skip


def test_sweep_leaves_runs_whose_images_are_not_on_this_machine_to_others(tmp_path: Path) -> None:
    study, out = tmp_path / "small.toml", tmp_path / "out"
    study.write_text(STUDY.replace("[grid]", f'dataset = "folder"\ndata_dir = "{tmp_path / "nowhere"}"\n[grid]'))
    result = CliRunner().invoke(main, ["sweep", "--trust-code", str(study), "--output", str(out)])
    assert result.exit_code == 2
    assert "cannot begin here: free-2, seed 0: " in result.stderr
    assert "2 runs cannot begin on this machine: pgd-1, seed 0: " in result.stderr
    assert not list((out / "state").glob("*.json"))
    assert "seed 0: not done" in (out / "small.md").read_text()


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for a worker is a shell script")
def test_sweep_fails_if_workers_fail_and_leave_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker prints its command, which is then run in this process."""
    study, out, failing = tmp_path / "small.toml", tmp_path / "out", tmp_path / "failing"
    study.write_text(STUDY.replace("[grid]", f'dataset = "folder"\ndata_dir = "{tmp_path / "nowhere"}"\n[grid]'))
    failing.write_text('#!/bin/sh\necho "$@"\nexit 2\n')
    failing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(failing))
    result = CliRunner().invoke(main, ["sweep", "--trust-code", str(study), "--output", str(out), "--jobs", "2"])
    assert result.exit_code == 2
    for number in (1, 2):
        option, module, *command = (out / "logs" / f"worker-{number}.log").read_text().split()
        assert (option, module) == ("-m", "deat_rb")
        worker = CliRunner().invoke(main, command)
        assert worker.exit_code == 2
        assert "2 runs cannot begin on this machine" in worker.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: 2 runs not done: worker ")
    assert f"ended with exit status 2; see {out / 'logs' / 'worker-'}" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, Interrupted])
def test_sweep_says_what_is_done_after_ctrl_c(
    error: type[KeyboardInterrupt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Worker, wait: bool) -> None:
        self.folder.create()
        self.folder.write_record(self.study.runs[1], Record(status="failed", reason="it diverged"))
        raise error

    monkeypatch.setattr(Worker, "work", interrupted)
    study = tmp_path / "small.toml"
    study.write_text(STUDY)
    result = CliRunner().invoke(main, ["sweep", "--trust-code", str(study), "--output", str(tmp_path / "out")])
    assert result.exit_code == 130
    kept = f"{tmp_path / 'out'} keeps 1 of 2 runs, and what the others have saved; repeat the command to continue"
    assert result.stderr == f"Interrupted: {kept}\n"


def test_sweep_retries_only_the_run_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, folder = tmp_path / "small.toml", StudyFolder(tmp_path / "out")
    file.write_text(STUDY)
    first, second = read_study(file).runs
    folder.create()
    for run in (first, second):
        folder.write_record(run, Record(status="failed", reason="it diverged"))
    monkeypatch.setattr(Worker, "work_on", lambda self, run: True)
    arguments = ["sweep", "--trust-code", str(file), "--output", str(folder.path), "--only", first.name, "--retry"]
    assert CliRunner().invoke(main, arguments, catch_exceptions=False).exit_code == 0
    assert folder.record(first) is None
    assert folder.record(second) == Record(status="failed", reason="it diverged")


def test_sweep_of_open_ended_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deat_rb.runs.estimate.BATCHES", 1)
    study = tmp_path / "small.toml"
    study.write_text(STUDY.replace("epochs = 1", 'epochs = "open"\npatience = 2'))
    arguments = ["sweep", "--trust-code", str(study), "--output", str(tmp_path / "out")]
    assert "0 of open" in CliRunner().invoke(main, [*arguments, "--status"]).stdout
    dry = " ".join(CliRunner().invoke(main, [*arguments, "--dry-run"]).stdout.split())
    assert "open about 4 per epoch" in dry
    assert "2 runs left, 0 done: open-ended, so that their number of epochs is not known" in dry


def test_dry_run_times_as_the_workers_compute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches: PGD-1 with 2 x (2 + 1) s, FREE-2 with 2 x (2 + 2 x 1) s; two workers need as long as the longer."""
    threads = []

    def measure(planned: object, kind: str) -> Times:
        threads.append(torch.get_num_threads())
        return Times(update=2.0, step=1.0, evaluation=0.0)

    monkeypatch.setattr("deat_rb.reproduction.estimate._measure", measure)
    for module in ("deat_rb.reproduction.workers", "deat_rb.utils.threads"):
        monkeypatch.setattr(f"{module}.processors", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    study = tmp_path / "small.toml"

    def last_line(jobs: str, option: str = "") -> str:
        study.write_text(STUDY.replace("[options]", f"[options]\ndevice = 'cpu'\n{option}"))
        arguments = ["sweep", "--trust-code", str(study), "--output", str(tmp_path / "out"), "--dry-run"]
        return CliRunner().invoke(main, [*arguments, "--jobs", jobs], catch_exceptions=False).stdout.splitlines()[-1]

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert last_line("2") == "2 runs left, 0 done: about 8 s with 2 at a time"
        assert threads == [1, 1]
        assert last_line("1") == "2 runs left, 0 done: about 14 s with 1 at a time"
        assert threads[2:] == [2, 2]
        assert last_line("2", "threads = 2") == "2 runs left, 0 done: about 14 s with 2 at a time"
    finally:
        torch.set_num_threads(before)


def test_reproduce_lists_the_given_targets() -> None:
    listed = CliRunner().invoke(main, ["reproduce", "--list", "table5", "figure2"]).stdout.splitlines()
    assert [line.split()[0] for line in listed if line and not line.startswith("--scale")] == ["table5", "figure2"]
    assert len(CliRunner().invoke(main, ["reproduce", "--list"]).stdout.splitlines()) > 14
    assert "did you mean" in CliRunner().invoke(main, ["reproduce", "--list", "tabel5"]).stderr


def test_sweep_imports_no_module_that_a_study_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_study_network.py").write_text("from pathlib import Path\nPath('imported').touch()\nbuild = None\n")
    Path("small.toml").write_text(STUDY.replace(ARCH, "own_study_network:build"))
    refused = CliRunner().invoke(main, ["sweep", "small.toml", "--print"])
    assert refused.exit_code == 2
    assert "the study small.toml builds its network with 'own_study_network:build'" in refused.stderr
    assert not Path("imported").exists()
    trusted = CliRunner().invoke(main, ["sweep", "small.toml", "--print", "--trust-code"], catch_exceptions=False)
    assert Path("imported").exists()
    assert all("--trust-code" in line for line in trusted.stdout.splitlines())


def test_status_of_a_study_for_another_machine(tmp_path: Path) -> None:
    study = tmp_path / "small.toml"
    study.write_text(STUDY.replace("epochs = 1", 'epochs = 1\ndevice = "cuda:7"'))
    result = CliRunner().invoke(
        main, ["sweep", "--trust-code", str(study), "--output", str(tmp_path / "out"), "--status"]
    )
    assert (result.exit_code, "2 waiting" in result.stdout) == (0, True)


def test_sweep_refuses(tmp_path: Path) -> None:
    study = tmp_path / "small.toml"
    study.write_text(STUDY)
    for arguments, message in (
        (["--jobs", "0"], "--jobs 0 is below 1"),
        (["--jobs", "2", "--gpus", "0"], "are mutually exclusive"),
        (["--gpus", ","], "--gpus ',' names no GPU; give indices or UUIDs, such as 0,1"),
        (["--only", "nothing"], "has no run named nothing"),
        (["--status", "--dry-run"], "--status and --dry-run are mutually exclusive: give only one"),
    ):
        result = CliRunner().invoke(
            main, ["sweep", "--trust-code", str(study), "--output", str(tmp_path / "out"), *arguments]
        )
        assert result.exit_code == 2
        assert message in result.stderr


@pytest.mark.parametrize("output", [[], ["--output", "."]])
def test_sweep_does_not_overwrite_its_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: list[str]) -> None:
    """The results are written to small/small.json, or to ./small.json."""
    monkeypatch.chdir(tmp_path)
    study = Path("small.json") if output else Path("small", "small.json")
    study.parent.mkdir(exist_ok=True)
    study.write_text(json.dumps(tomllib.loads(STUDY)))
    before = study.read_bytes()
    result = CliRunner().invoke(main, ["sweep", "--trust-code", str(study), *output, "--tables"])
    assert result.exit_code == 2
    assert f"the results would overwrite the study {study}: give another folder by --output" in result.stderr
    assert study.read_bytes() == before


@pytest.mark.slow
def test_sweep_refuses_a_gpu_that_does_not_exist(tmp_path: Path) -> None:
    """Its worker would train on the CPU."""
    study, output = tmp_path / "small.toml", tmp_path / "out"
    study.write_text(STUDY)
    result = CliRunner().invoke(main, ["sweep", "--trust-code", str(study), "--output", str(output), "--gpus", "99"])
    assert result.exit_code == 2
    assert "--gpus 99: torch finds no GPU 99 on this machine" in result.stderr
    assert not output.exists()
