"""Accuracy on test images that is only drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL, identical

from deat_rb.runs.curve_test import CURVE_TEST, curve_test
from deat_rb.runs.options import make_options
from deat_rb.runs.plan import plan
from deat_rb.runs.train import resume, train
from deat_rb.training.callbacks import Callback
from deat_rb.training.metrics import EpochStats
from deat_rb.training.validation import Validation
from deat_rb.utils.errors import DeatError

pytestmark = pytest.mark.usefixtures("without_curves")


def untimed(row: EpochStats) -> dict[str, object]:
    return {name: value for name, value in vars(row).items() if not name.endswith(("seconds", "second", "memory"))}


def test_curve_test_changes_no_weights_and_no_metrics(tmp_path: Path) -> None:
    plain, history = train({**SMALL, "select": "best"}, output=tmp_path / "plain")
    curve, drawn = train({**SMALL, "select": "best", "curve_test": 32}, output=tmp_path / "curve")
    assert identical(plain, curve)
    assert list(map(untimed, history.rows)) == list(map(untimed, drawn.rows))
    assert history.selected == drawn.selected
    assert list(curve_test(curve.path)) == [1, 2]
    assert curve_test(plain.path) == {}
    assert curve.config.output.curve_test == 32


def test_curve_test_attacks_in_the_norm_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []

    def validate(*arguments: Any, **options: Any) -> Validation:
        norms.append((options["norm"], options["eps"]))
        return Validation(1.0, 0.5, 0, 0)

    monkeypatch.setattr("deat_rb.runs.curve_test.validate", validate)
    train({**SMALL, "norm": "L2", "eps": 2.0, "epochs": 1, "curve_test": 16}, output=tmp_path)
    assert norms == [("L2", 2.0)]


def test_curve_test_survives_an_interruption(tmp_path: Path) -> None:
    """An epoch whose metrics are not stored yet is measured again, and none is missing or there twice."""

    class Interrupt(Callback):
        def on_validation_end(self, row: EpochStats) -> None:
            if row.epoch == 2:
                raise KeyboardInterrupt

    whole, _ = train({**SMALL, "epochs": 3, "curve_test": 16}, output=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train({**SMALL, "epochs": 3, "curve_test": 16}, output=tmp_path / "part", callbacks=[Interrupt()])
    part = tmp_path / "part" / whole.path.name
    resume(part, {}, trust_code=True)
    assert (part / CURVE_TEST).read_bytes() == (whole.path / CURVE_TEST).read_bytes()


def test_curve_test_refuses_more_images_than_there_are() -> None:
    with pytest.raises(DeatError, match="--curve-test 501 is more than the 500 test images"):
        plan(make_options({**SMALL, "curve_test": 501}))
