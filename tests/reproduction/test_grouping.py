"""`deat-rb compare --group-by`."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev

import pytest
from click.testing import CliRunner
from small_studies import small_study, work

from deat_rb.cli import main
from deat_rb.evaluation.report import Report


@pytest.mark.slow
def test_compare_group_by_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deat_rb.runs.train.plot_curves", lambda *_, **__: None)
    study = small_study({"method": "pgd-1"}, {"method": "free-2"}, seeds=(0, 1))
    folder = work(study, tmp_path)
    paths = [str(folder.run_path(run)) for run in study.runs]

    def run(*arguments: str, status: int = 0) -> str:
        result = CliRunner().invoke(main, ["compare", *paths, *arguments])
        assert result.exit_code == status, result.output
        return result.stdout if status == 0 else result.stderr

    table = json.loads(run("--group-by", "method", "--json"))
    assert [row["label"] for row in table["rows"]] == ["pgd-1", "free-2"]
    values = [100 * Report.load(path).results["natural"].accuracy for path in paths[:2]]
    assert table["rows"][0]["means"]["natural"] == {
        "mean": pytest.approx(mean(values)), "deviation": pytest.approx(stdev(values)), "count": 2,
    }  # fmt: skip
    assert table["rows"][0]["means"]["backward passes"]["mean"] == 8  # 2 epochs, 2 batches, a step and an update
    assert "| pgd-1 | 2 |" in run("--group-by", "method", "--markdown")
    assert r"\begin{tabular}" in run("--group-by", "method", "--latex")
    assert run("--group-by", "method", "--csv").startswith("row,seeds,natural,")
    assert "PGD-2" in run("--group-by", "method")
    assert "is not an option of runs" in run("--group-by", "methods", status=2)
    said = run(paths[0], "--group-by", "method", status=2)
    assert "have the same options and the same seed (pgd-1, seed 0): give one of them" in said
    assert "--latex is a format of --group-by" in run("--latex", status=2)
