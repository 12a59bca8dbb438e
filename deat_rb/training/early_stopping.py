"""Early stopping: the callbacks that apply a method's stopping rule and the user's patience."""

from __future__ import annotations

from deat_rb.training.callbacks import Callback
from deat_rb.training.metrics import EpochStats
from deat_rb.training.stopping_rule import Stop, StoppingRule
from deat_rb.utils.errors import DeatError
from deat_rb.utils.text import counted


class EarlyStopping(Callback):
    """Apply a stopping rule after each epoch that follows the warm-up of the radius.

    Args:
        rule: The stopping rule.
        enabled: Whether the rule ends training; otherwise its decision is only recorded in the metrics.
    """

    def __init__(self, rule: StoppingRule, enabled: bool = True) -> None:
        self.rule = rule
        self.enabled = enabled

    def on_validation_end(self, row: EpochStats) -> None:
        """Update the rule, and record and carry out its decision.

        Raises:
            DeatError: The rule keeps an epoch whose weights are no longer there.
        """
        if self.state.trainer.is_warming_up(row.epoch):
            return
        stop = self.rule.update(row)
        if stop is None:
            return
        row.stopped = stop.reason
        if self.enabled:
            lookback = self.rule.lookback
            if not max(0, row.epoch - lookback) < stop.keep <= row.epoch:
                raise DeatError(
                    f"the stopping rule {type(self.rule).__name__} keeps epoch {stop.keep} in epoch {row.epoch}, but "
                    f"only the weights of the last {counted(lookback, 'epoch')} are there; raise its lookback"
                )
            self.state.stop, self.state.history.stopped = stop, stop.reason


NOT_RISEN = "robust validation accuracy has not risen"
"""Beginning of the reason of `Patience`."""


class Patience(Callback):
    """End training when the robust validation accuracy has not risen for some epochs after the radius's warm-up.

    Training ends only after an epoch with validation, so that a patience below ``validate_every`` waits for the next
    one.
    This callback has no state: it finds the best epoch in the history.

    Args:
        epochs: The number of epochs.
    """

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_validation_end(self, row: EpochStats) -> None:
        """End training if the best epoch is too long ago."""
        history, is_warming_up = self.state.history, self.state.trainer.is_warming_up
        if row.val_robust_acc is None or history.stopped is not None or is_warming_up(row.epoch):
            return
        rows = [each for each in (*history.rows, row) if not is_warming_up(each.epoch)]
        validated = [each for each in rows if each.val_robust_acc is not None]
        best = max(validated, key=lambda each: (each.val_robust_acc or 0.0, -each.epoch))
        if row.epoch - best.epoch >= self.epochs:
            count = row.epoch - best.epoch
            reason = f"{NOT_RISEN} for {counted(count, 'epoch')}"
            row.stopped = history.stopped = reason
            self.state.stop = Stop(reason, keep=row.epoch)
