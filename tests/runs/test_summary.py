"""`deat_rb.runs.summary` and the picture of a run's curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from board_problems import make_run
from matplotlib.figure import Figure

from deat_rb.runs.directory import RunDirectory
from deat_rb.runs.plots import draw_curves
from deat_rb.runs.summary import summary
from deat_rb.training.metrics import EpochStats


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def savefig(self: Figure, *arguments: Any, **options: Any) -> None:
        saved.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def test_summary_adds_up_the_epochs(tmp_path: Path, figures: list[Figure]) -> None:
    """`make_run`: two epochs with 10 and 20 backward passes, 1 and 2 steps, 1.5 s each."""
    path = make_run(tmp_path / "my-run")
    (path / "last.json").write_text('{"epoch": 2}')
    facts, curves = summary(RunDirectory.open(path))
    assert facts["epochs"] == "2; the weights of epoch 2 are evaluated"
    assert facts["attack steps"] == "1, 2"
    assert facts["backward passes"].startswith("30 (")
    assert facts["training time"] == "3 s"
    assert curves[:8] == b"\x89PNG\r\n\x1a\n"
    assert figures[0].get_suptitle() == "my-run: m-deat on digits, wrn-10-1, seed 0"


@pytest.mark.parametrize(("name", "content"), [("metrics.jsonl", "damaged"), ("last.json", "{"), ("last.json", "[]")])
def test_summary_of_damaged_metrics_is_empty(name: str, content: str, tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    (path / name).write_text(content)
    assert summary(RunDirectory.open(path)) == ({}, b"")


def test_draw_curves_marks_the_result_and_has_a_legend_on_each_plot(figures: list[Figure]) -> None:
    rows = [EpochStats(epoch=epoch, steps=epoch, loss=1.0, val_acc=0.5, val_robust_acc=0.25) for epoch in (1, 2, 3)]
    draw_curves(rows, title="run", chosen=2)
    legends = [[text.get_text() for text in legend.get_texts()]
               for axes in figures[0].axes if (legend := axes.get_legend()) is not None]  # fmt: skip
    assert len(legends) == 4
    assert all("epoch 2, the result" in texts for texts in legends)
    assert {"surrogate loss", "learning rate"} < set(legends[1]) | set(legends[2]) | set(legends[3])
    marks = [line for axes in figures[0].axes for line in axes.lines if np.asarray(line.get_xdata()).tolist() == [2, 2]]
    assert len(marks) == 4
