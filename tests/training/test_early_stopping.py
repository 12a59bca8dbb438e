"""Early stopping by a method's rule."""

from __future__ import annotations

from typing import Any

import pytest
from fits import fitted
from training_problems import loader, made

import deat_rb
import deat_rb.methods
from deat_rb.training.base import Stop
from deat_rb.utils.errors import DeatError


def test_fit_requires_validation_images_for_a_rule_that_validates() -> None:
    with pytest.raises(DeatError, match="u-fgsm needs validation images for its stopping rule; give a val_loader"):
        fitted("u-fgsm")


def test_early_stopping_disabled_only_records_the_reason() -> None:
    class Alarm(deat_rb.methods.GradientRatio):
        def update(self, stats: Any) -> Any:

            return Stop("because", keep=1) if stats.epoch == 2 else None

    def trainer() -> Any:
        created = deat_rb.create("m+u-fgsm", made())
        created.stopping = Alarm()
        return created

    stopped = trainer().fit(loader(2), epochs=4, lr=0.05)
    recorded = trainer().fit(loader(2), epochs=4, lr=0.05, early_stopping=False)
    assert (len(stopped.rows), stopped.stopped, stopped.selected) == (2, "because", 1)
    assert (len(recorded.rows), recorded.stopped, recorded.selected) == (4, None, 4)
    assert [row.stopped for row in recorded.rows] == [None, "because", None, None]
