"""Options about the training data: an interrupted and resumed run equals an uninterrupted one, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from resumed_runs import TIMES, Stops
from small_runs import SMALL, identical

from deat_rb.runs.directory import RunDirectory
from deat_rb.runs.train import resume, train
from deat_rb.utils.errors import Interrupted


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the curves would take longer than the rest of such a run."""
    monkeypatch.setattr("deat_rb.runs.train.plot_curves", lambda rows, path, title: None)


def metrics(run: RunDirectory) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


@pytest.mark.parametrize(
    "changes",
    [{"augment": "trivialaugment"}, {"augment": "cutout", "method": "m-deat"}],
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
