"""The command `deat-rb sweep`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from training_problems import ARCH

from deat_rb.cli import main

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
    monkeypatch.chdir(tmp_path)
    Path("small.toml").write_text(STUDY)

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(main, ["sweep", "small.toml", *arguments], catch_exceptions=False)
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
    assert "free-2" in run()
    assert run("--print") == ""
    table = json.loads(Path("small/table.json").read_text())
    # 2 batches; PGD-1 has an attack step and an update, FREE-2 two replays
    assert [row["means"]["backward passes"]["mean"] for row in table["rows"]] == [4, 4]
    assert {path.name for path in Path("small").iterdir()} >= {"table.md", "table.tex", "table.csv", "runs", "state"}


def test_sweep_refuses(tmp_path: Path) -> None:
    study = tmp_path / "small.toml"
    study.write_text(STUDY)
    for arguments, message in (
        (["--jobs", "0"], "--jobs 0 is below 1"),
        (["--jobs", "2", "--gpus", "0"], "are mutually exclusive"),
        (["--only", "nothing"], "has no run named nothing"),
        (["--status", "--dry-run"], "--status and --dry-run are mutually exclusive: give only one"),
    ):
        result = CliRunner().invoke(main, ["sweep", str(study), "--output", str(tmp_path / "out"), *arguments])
        assert result.exit_code == 2
        assert message in result.stderr
