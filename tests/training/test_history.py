"""The training history as text."""

from __future__ import annotations

from deat_rb.training.history import History
from deat_rb.training.metrics import EpochStats


def test_history_prints_a_table() -> None:
    rows = [
        EpochStats(epoch=1, steps=1, loss=2.25, train_acc=0.125, val_acc=0.5, val_robust_acc=0.25, l_x=35726.4, lr=0.05,
                   backwards=38, seconds=3.25, val_seconds=0.5),
        EpochStats(epoch=2, steps=2, loss=1.5, train_acc=0.25, val_acc=0.625, val_robust_acc=0.375, l_x=9332, lr=0.1,
                   backwards=57, seconds=5, val_seconds=0.5),
    ]  # fmt: skip
    assert str(History(rows, selected=2, stopped="l_X rose by 20% an epoch")).splitlines() == [
        "epoch  steps    loss  train  validation  PGD-20        l_X    lr  backward passes  seconds",
        "    1      1  2.2500  12.5%       50.0%   25.0%  3.573e+04  0.05               38      3.8",
        "    2      2  1.5000  25.0%       62.5%   37.5%       9332   0.1               57      5.5",
        "selected epoch: 2; stopped: l_X rose by 20% an epoch",
    ]


def test_history_leaves_out_columns_without_values() -> None:
    table = str(History([EpochStats(epoch=1, steps=1)], selected=1)).splitlines()
    assert "validation" not in table[0]
    assert len(table) == 3
    assert str(History()) == "no epoch has been trained"
