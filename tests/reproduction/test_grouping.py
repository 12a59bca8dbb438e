"""`deat-rb compare --group-by`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean, stdev

import pytest
from click.testing import CliRunner
from small_image_sets import write_extra
from small_runs import planned
from small_studies import small_study, work

from deat_rb.cli import main
from deat_rb.evaluation.report import Report
from deat_rb.evaluation.tables import group
from deat_rb.reproduction.grouping import group_key
from deat_rb.runs.directory import RunDirectory
from deat_rb.sharing import shared_files
from deat_rb.utils.hub import HubAddress
from deat_rb.utils.safe_load import save_tensors


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
    assert table["columns"] == ["natural", "fgsm", "pgd-2", "worst case", "backward passes", "minutes", "epochs"]
    worst = [100 * Report.load(path).worst_case.accuracy for path in paths[2:]]
    assert table["rows"][1]["means"]["worst case"]["mean"] == pytest.approx(mean(worst))
    assert table["rows"][0]["means"]["backward passes"]["mean"] == 8  # 2 epochs, 2 batches, a step and an update
    assert "| pgd-1 | 2 |" in run("--group-by", "method", "--markdown")
    assert r"\begin{tabular}" in run("--group-by", "method", "--latex")
    assert run("--group-by", "method", "--csv").startswith("row,seeds,natural,")
    assert "PGD-2" in run("--group-by", "method")
    assert "is not an option of runs" in run("--group-by", "methods", status=2)
    said = run(paths[0], "--group-by", "method", status=2)
    assert "have the same options and the same seed (pgd-1, seed 0): give one of them" in said
    assert "--latex is a format of --group-by" in run("--latex", status=2)


@pytest.mark.slow
def test_a_run_whose_training_has_not_ended_is_no_seed_of_one_that_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three seeds, one has the first of its two epochs only."""
    monkeypatch.setattr("deat_rb.runs.train.plot_curves", lambda *_, **__: None)
    study = small_study({"method": "pgd-1"}, seeds=(0, 1, 2))
    folder = work(study, tmp_path)
    paths = [folder.run_path(run) for run in study.runs]
    metrics = paths[1] / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines(keepends=True)[0])
    result = CliRunner().invoke(main, ["compare", *map(str, paths), "--group-by", "method", "--json"])
    table = json.loads(result.stdout)
    assert table["notes"] == [f"training of {paths[1]} has not ended: it has 1 of 2 epochs"]
    rows = {row["label"]: row["means"]["natural"]["count"] for row in table["rows"]}
    assert rows == {"pgd-1, trained all epochs": 2, "pgd-1, trained 1 of 2 epochs": 1}
    result = CliRunner().invoke(main, ["compare", *map(str, paths[:2])])
    assert f"note: training of {paths[1]} has not ended: it has 1 of 2 epochs" in result.stderr
    result = CliRunner().invoke(
        main, ["eval", *map(str, paths), "--attacks", "natural", "--checks", "none", "--trust-code"]
    )
    assert "note: training has not ended: the run has 1 of 2 epochs" in result.stdout
    assert re.search(r"pgd-1, trained all\s", result.stdout), result.stdout
    pushed = shared_files(RunDirectory.open(paths[1]), HubAddress.parse("hf:me/x"), "mit")
    assert "training has not ended, and the card says so: the run has 1 of 2 epochs" in pushed[1]
    assert "1 of 2 epochs" in pushed[0]["README.md"].decode()


def test_runs_with_other_extra_data_are_no_seeds_of_one_setting(tmp_path: Path) -> None:
    files = [write_extra(tmp_path / "extra.npz"), write_extra(tmp_path / "other.npz", seed=1)]
    moved = write_extra(tmp_path / "moved.npz")
    configs = [planned(extra_data=str(path), seed=seed).config for seed, path in enumerate((*files, moved))]
    first, second = group([group_key(config) for config in configs]).items()
    assert (first[1], second[1]) == ([0, 2], [1])
    for (label, _), config in zip((first, second), configs, strict=False):
        assert label == f"pgd-1, extra_data {config.extra_fingerprint}"


def test_runs_from_other_initial_weights_at_one_path_are_no_seeds_of_one_setting(tmp_path: Path) -> None:
    weights, initial = tmp_path / "pre.safetensors", planned().trainer.model.state_dict()
    keys = []
    for seed, factor in enumerate((1, 1, 2)):
        save_tensors(weights, {name: factor * tensor for name, tensor in initial.items()})
        keys.append(group_key(planned(init_from=str(weights), seed=seed).config))
    assert list(group(keys).values()) == [[0, 1], [2]]


def test_runs_of_earlier_versions_which_record_their_sizes_as_options_are_seeds_of_one_setting() -> None:
    config = planned(dataset="digits", train_size=None, val_size=None, seed=1).config
    # Of the 1,797 digits, 500 are test images and 100 are held out.
    assert (config.train_images, config.val_images) == (1197, 100)
    before = config.but(seed=2, train_size=1197, val_size=100, train_images=None, val_images=None)
    fewer = config.but(seed=3, train_size=500, train_images=500)
    assert list(group([group_key(each) for each in (config, before, fewer)]).values()) == [[0, 1], [2]]
