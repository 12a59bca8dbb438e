"""`deat-rb reproduce` on small problems, and its files."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
from click.testing import CliRunner
from noise_folder import SIZE, make_folder
from PIL import Image
from training_problems import ARCH, run_config

from deat_rb.cli import main
from deat_rb.reproduction.experiments import FigureKind, Setup, experiments
from deat_rb.reproduction.figures import CURVES, Drawn, draw
from deat_rb.reproduction.folder import StudyFolder
from deat_rb.reproduction.planning import Planner
from deat_rb.reproduction.reproduce import _drawn, check_setup, record_targets, study_of
from deat_rb.runs.directory import RunDirectory
from deat_rb.training.metrics import EpochStats
from deat_rb.utils.errors import DeatError

PNG, PDF = b"\x89PNG\r\n\x1a\n", b"%PDF"


@pytest.fixture(autouse=True)
def tiny_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the scale ``digits`` so small that a run takes a second."""
    monkeypatch.setattr("deat_rb.runs.train.plot_curves", lambda *_, **__: None)
    small = {
        "networks": {"small": ARCH, "wide": ARCH},
        "curve_test": 16,
        "n_examples": 16,
        "options": {"eps": 0.1, "precision": "fp32", "train_size": 64, "val_size": 16, "batch_size": 32, "epochs": 2},
        "settings": {},
    }
    scales = experiments().scales
    monkeypatch.setitem(scales, "digits", scales["digits"].model_copy(update=small))


class Links(HTMLParser):
    """Collects the addresses of a page's links and pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value for name, value in attrs if name in ("href", "src") and value]


@pytest.mark.slow
def test_reproduce_writes_tables_figures_and_the_page(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(main, ["reproduce", *arguments, "--output", str(out)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    run("figure3", "--seeds", "0")
    shown = run("table6", "--seeds", "0,1")
    assert "Not the paper's setting: digits in place of CIFAR-10" in shown
    names = {path.name for path in out.iterdir()}
    assert names >= {f"table6.{suffix}" for suffix in ("md", "tex", "csv", "json")}
    assert names >= {"figure3.png", "figure3.pdf", "index.html"}
    table = json.loads((out / "table6.json").read_text())
    assert [row["published"]["pgd-100"]["mean"] for row in table["rows"]] == [40.47, 41.80]
    assert [len(row["runs"]) for row in table["rows"]] == [2, 2]
    assert {claim["outcome"] for claim in table["claims"]} <= {"holds", "does not hold", "undecided"}
    assert "40.47 ± 2.4" in (out / "table6.md").read_text()
    page = Links()
    page.feed((out / "index.html").read_text())
    reports = [address for address in page.addresses if address.endswith("report.html")]
    assert len(reports) == 10  # of four runs of the table and one of the figure, each in its row and its details
    local = [address for address in page.addresses if not address.startswith(("#", "https://arxiv.org/", "data:"))]
    assert all((out / address.replace("%2B", "+")).is_file() for address in local)
    refused = CliRunner().invoke(main, ["reproduce", "table6", "--arch", "wrn-10-1", "--tables", "--output", str(out)])
    assert refused.exit_code == 2
    assert "choose another --output" in refused.stderr


def test_reproduce_rewrites_earlier_targets_with_their_own_seeds_and_images(tmp_path: Path) -> None:
    """No run is trained: the tables list the runs that they need."""
    out = tmp_path / "out"

    def table(*arguments: str) -> dict[str, Any]:
        result = CliRunner().invoke(main, ["reproduce", *arguments, "--tables", "--output", str(out)])
        assert result.exit_code == 0, result.output
        content: dict[str, Any] = json.loads((out / "table6.json").read_text())
        return content

    own = table("table6", "--seeds", "0,1,2,3,4", "--n-examples", "8", "--autoattack", "4")
    assert [run["seed"] for run in own["rows"][0]["runs"]] == [0, 1, 2, 3, 4]
    assert "autoattack" in own["columns"]
    assert table("table1", "--seeds", "7") == own
    assert {each["label"] for each in json.loads((out / "table1.json").read_text())["rows"]} >= {"pgd-7"}
    assert [run["seed"] for run in table("table6", "--seeds", "7")["rows"][0]["runs"]] == [7]
    (out / "reproduction.json").write_text('{"scale": "digits", "targets": ["table6"]}')
    refused = CliRunner().invoke(main, ["reproduce", "table6", "--tables", "--output", str(out)])
    assert (refused.exit_code, "is damaged or of an earlier version; remove it" in refused.stderr) == (2, True)


def test_a_reproduction_goes_on_with_the_same_images_under_another_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other images of the same name are refused, also for targets that have no run yet."""
    monkeypatch.chdir(tmp_path)
    images, others = make_folder(tmp_path / "images"), make_folder(tmp_path / "others" / "images")
    Image.fromarray(np.zeros((20, 20, 3), dtype=np.uint8)).save(others / "train" / "a" / "1.png")
    folder, setup = StudyFolder(tmp_path / "out"), Setup("digits", (0,), "folder", "images")
    record_targets(folder, setup, ["table6"])
    run = study_of(["table6"], setup).runs[0]
    own = run.options.but(train_size=18, val_size=3, batch_size=9, image_size=SIZE)
    RunDirectory.create(folder.run_path(run), Planner().plan(own).config)
    moved = replace(setup, data_dir=str(images))
    assert record_targets(folder, moved, ["table1"]) == {"table1": moved, "table6": moved}
    with pytest.raises(DeatError, match=r"whose images are not those of .*others/images; choose another --output"):
        check_setup(folder, replace(setup, data_dir=str(others)))
    with pytest.raises(DeatError, match=r"with data-dir .*images, not pictures; choose another --output"):
        check_setup(folder, replace(setup, data_dir="pictures"))


def test_reproduce_finds_a_network_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_reproduced_network.py").write_text("from training_problems import *\n")
    command = ["reproduce", "table6", "--seeds", "0", "--arch", f"own_reproduced_network:{ARCH.partition(':')[2]}"]
    result = CliRunner().invoke(main, [*command, "--only", "nothing", "--output", "out"])
    assert "own_reproduced_network" in sys.modules, result.output


def test_reproduce_lists_and_refuses() -> None:
    listed = CliRunner().invoke(main, ["reproduce", "--list"]).stdout
    assert "table4" in listed
    assert "--scale paper" in listed
    for arguments, message in (
        ([], "no target is given"),
        (["table8"], "there is no target 'table8'"),
        (["table1", "--scale", "large"], "--scale large does not exist"),
    ):
        result = CliRunner().invoke(main, ["reproduce", *arguments])
        assert result.exit_code == 2
        assert message in result.stderr


def test_drawn_counts_passes_per_batch_of_a_run_with_all_training_images(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "run", run_config(train_size=None, batch_size=6))
    (directory.path / "metrics.jsonl").write_text('{"epoch": 1, "examples": 13, "backwards": 12}\n')
    folder: Any = SimpleNamespace(
        record=lambda run: SimpleNamespace(status="done"), run_path=lambda run: directory.path,
        report=lambda *_: None,
    )  # fmt: skip
    run: Any = SimpleNamespace(seed=0, evaluation=SimpleNamespace(n_examples=4))
    drawn = _drawn(run, folder, "", 1.0)
    assert drawn is not None
    assert CURVES["passes"][2](drawn) == [(1, 4)]  # 12 passes; 13 images are 3 batches of 6


@pytest.mark.slow
@pytest.mark.parametrize("kind", get_args(FigureKind))
def test_draw(kind: FigureKind) -> None:
    rows = [EpochStats(epoch=epoch, l_x=10.0 * epoch, loss=1 / epoch, val_acc=0.5, val_robust_acc=0.1 * epoch,
                       backwards=20, seconds=6) for epoch in (1, 2, 3)]  # fmt: skip
    runs = {
        f"m-deat, gamma {gamma}": [Drawn(seed, rows, {1: 0.1, 3: 0.3}, 10, 40.0 + seed, "10/255", gamma)
                                   for seed in (0, 1)]
        for gamma in (1.0, 1.01)
    }  # fmt: skip
    pictures = draw(kind, "A title with $ and _", runs, [], "Not the paper's setting")
    assert pictures["png"].startswith(PNG)
    assert pictures["pdf"].startswith(PDF)


def test_draw_says_what_means_and_deviations_are_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds with 3 and 2 epochs have a mean curve of 2 points."""
    drawn: list[Any] = []
    monkeypatch.setattr(f"{draw.__module__}._saved", drawn.append)
    rows = [EpochStats(epoch=epoch, l_x=10.0 * epoch, loss=1 / epoch) for epoch in (1, 2, 3)]
    two = [Drawn(0, rows, {}, 10, 40.0, "", 1.0), Drawn(1, rows[:2], {}, 10, 50.0, "", 1.0)]
    one, unevaluated = [Drawn(2, rows, {}, 10)], [Drawn(3, rows, {}, 10)] * 3
    cases: list[tuple[FigureKind, dict[str, list[Drawn]]]] = [
        ("loss", {"a": two}), ("loss", {"a": two, "b": one}), ("loss", {"b": one}), ("collapse", {"a": two}),
        ("trade-off", {"a": two, "b": unevaluated}),
    ]  # fmt: skip
    for kind, runs in cases:
        draw(kind, "A title", runs, [], "Not the paper's.")
    assert len(drawn[0].axes[0].lines[0].get_xdata()) == 2
    of, over = (
        "Not the paper's. Mean and one standard deviation of",
        ", over the epochs that all seeds of a curve have.",
    )
    assert [" ".join(each.get_supxlabel().split()) for each in drawn] == [
        f"{of} 2 seeds{over}", f"{of} 1 to 2 seeds{over}", *["Not the paper's."] * 2, f"{of} 2 seeds.",
    ]  # fmt: skip
