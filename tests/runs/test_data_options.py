"""Options about the training data: an interrupted and resumed run equals an uninterrupted one, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from resumed_runs import TIMES, Stops
from small_runs import SMALL, identical
from small_runs import planned as small_plan

from deat_rb.runs.directory import RunDirectory
from deat_rb.runs.options import make_options
from deat_rb.runs.train import resume, train
from deat_rb.utils.errors import DeatError, Interrupted


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the curves would take longer than the rest of such a run."""
    monkeypatch.setattr("deat_rb.runs.train.plot_curves", lambda rows, path, title: None)


def metrics(run: RunDirectory) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


@pytest.mark.parametrize(
    "changes",
    [
        {"augment": "trivialaugment"},
        {"augment": "cutout", "method": "m-deat"},
        {"class_weights": "balanced", "method": "m+trades"},
    ],
    ids=str,
)
def test_resumed_run_equals_the_uninterrupted_one(changes: dict[str, Any], tmp_path: Path) -> None:
    options = {**SMALL, **changes}
    plain, _ = train({**SMALL, "method": options["method"]}, output=tmp_path, name="plain")
    whole, _ = train(options, output=tmp_path, name="whole")
    with pytest.raises(Interrupted):
        train(options, output=tmp_path, name="stopped", callbacks=[Stops(3)])
    again, _ = resume(tmp_path / "stopped", {}, trust_code=True)
    assert identical(whole, again)
    assert metrics(whole) == metrics(again)
    assert not identical(whole, plain)
    assert again.config.flat().items() >= changes.items()


def test_metrics_and_plan_say_what_classes_weigh_and_how_accurate_each_is(tmp_path: Path) -> None:
    planned = small_plan(class_weights="balanced", train_size=70)
    counts = torch.bincount(planned.train.labels).tolist()
    text = dict(planned.lines())["class weights"]
    assert text.startswith(f"balanced: {70 / (10 * max(counts)):.3g} ('")
    assert f"to {70 / (10 * min(counts)):.3g} ('" in text
    run, _ = train(planned, output=tmp_path, name="run")
    row = metrics(run)[-1]
    held = torch.bincount(planned.val.labels, minlength=10).tolist()
    assert [each is None for each in row["val_class_acc"]] == [count == 0 for count in held]
    for name in ("", "robust_"):
        by_class = row[f"val_class_{name}acc"]
        total = sum((each or 0) * count for each, count in zip(by_class, held, strict=True)) / sum(held)
        assert total == pytest.approx(row[f"val_{name}acc"])
    with pytest.raises(DeatError, match="--class-weights = 'some' cannot be used: it should be 'none' or 'balanced'"):
        make_options({"class_weights": "some"})
