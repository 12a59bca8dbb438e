"""Learning-rate schedules."""

from __future__ import annotations

import pytest
from training_problems import loader, made

import deat_rb
import deat_rb.methods
from deat_rb.training.lr import LR_SCHEDULES


def test_lr_schedules_by_hand() -> None:
    """Over 5 epochs of 2 batches: the rate of an epoch's second batch, at 0.1, 0.3, 0.5, 0.7 and 0.9 of the run."""
    rates = {
        "cyclic": [0.2, 0.6, 1.0, 0.6, 0.2],
        "multistep": [1, 1, 0.1, 0.1, 0.01],
        "flat": [1] * 5,
    }
    assert set(rates) == set(LR_SCHEDULES)
    for name, expected in rates.items():
        history = deat_rb.create("standard", made()).fit(loader(), epochs=5, lr=0.05, lr_schedule=name)
        assert [row.lr / 0.05 for row in history.rows] == pytest.approx(expected), name
