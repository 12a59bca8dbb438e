"""Early stopping: the callback that applies a method's stopping rule."""

from __future__ import annotations

from deat_rb.training.base import StoppingRule
from deat_rb.training.callbacks import Callback
from deat_rb.training.metrics import EpochStats
from deat_rb.training.state import TrainingState


class EarlyStopping(Callback):
    """Apply a stopping rule after each epoch.

    Args:
        rule: The stopping rule.
        enabled: Whether the rule ends training; otherwise its decision is only recorded in the metrics.
    """

    def __init__(self, rule: StoppingRule, enabled: bool = True) -> None:
        self.rule = rule
        self.enabled = enabled

    def on_fit_start(self, state: TrainingState) -> None:  # noqa: D102 - the base class says it
        self.state = state

    def on_validation_end(self, row: EpochStats) -> None:  # noqa: D102 - the base class says it
        stop = self.rule.update(row)
        if stop is None:
            return
        row.stopped = stop.reason
        if self.enabled:
            self.state.stop, self.state.history.stopped = stop, stop.reason
