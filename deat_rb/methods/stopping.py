"""Stopping rules: end training at catastrophic overfitting and return to the last epoch before it.

Like schedules, they depend only on `EpochStats`; `replay` runs one on the metrics of a finished run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from deat_rb.training.metrics import EpochStats
from deat_rb.training.stopping_rule import Stop, StoppingRule
from deat_rb.utils.errors import DeatError


class RobustnessDrop(StoppingRule):
    """U-FGSM's own rule (Wong et al. 2020): stop when PGD accuracy on a fixed batch drops suddenly.

    Args:
        drop: Drop from one epoch to the next that stops training, in (0, 1): 0.2 means 20 percentage points.
        steps: Steps of the PGD attack.
    """

    def __init__(self, drop: float = 0.2, *, steps: int = 5) -> None:
        if not 0 < drop < 1:
            raise DeatError(f"drop = {drop:g} is outside (0, 1); give 0.2 for 20 percentage points")
        if steps < 1:
            raise DeatError(f"steps = {steps} is below 1; the stopping rule's PGD needs at least 1")
        self.drop = drop
        self.validation_steps = steps
        self.last: float | None = None

    def update(self, stats: EpochStats) -> Stop | None:
        """Compare the accuracy with the previous epoch's."""
        last, now = self.last, stats.stop_robust_acc
        if now is None:
            raise DeatError(f"epoch {stats.epoch} has no stop_robust_acc, which RobustnessDrop needs")
        self.last = now
        if last is not None and last - now > self.drop:
            reason = f"PGD-{self.validation_steps} accuracy fell from {last:.1%} to {now:.1%} in epoch {stats.epoch}"
            return Stop(reason, keep=stats.epoch - 1)
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `load_state_dict`, as JSON values."""
        return {"last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`."""
        self.last = None if state["last"] is None else float(state["last"])


class GradientRatio(StoppingRule):
    """M+U-FGSM's rule (Algorithm 5, Equation 8): stop when l_X surges.

    R^t = (l_X^t - l_X^{t-m}) / m, and training ends when R^t > gamma * R^{t-1}, from epoch m + 2 on. Taken literally,
    that is triggered by noise and, with negative ratios, while l_X falls; so R^t must also exceed ``guard`` times
    l_X^{t-m}. In the first epochs of a healthy run l_X may rise by up to 30 % per epoch; in a collapse it doubles
    within two epochs (docs/lab/results.md has the recorded runs). The rise may have begun in any of the last m epochs,
    so the weights of epoch t - m are kept.

    Args:
        m: Distance between the compared epochs.
        gamma: Factor by which the rise must exceed the previous one.
        guard: Smallest rise per epoch, as a fraction of l_X, that counts as a surge.
    """

    def __init__(self, *, m: int = 2, gamma: float = 1.5, guard: float = 0.4) -> None:
        if m < 1:
            raise DeatError(f"m = {m} is below 1 epoch; Algorithm 5 uses m = 2")
        if not (math.isfinite(gamma) and gamma > 0):
            raise DeatError(f"gamma = {gamma:g} is not a positive number; Algorithm 5 uses 1.5")
        if not 0 <= guard < 1:
            raise DeatError(f"guard = {guard:g} is outside [0, 1); give a fraction such as 0.4")
        self.m = m
        self.gamma = gamma
        self.guard = guard
        self.lookback = m + 1
        self.l_x: list[float] = []

    def update(self, stats: EpochStats) -> Stop | None:
        """Compare R with that of the previous epoch."""
        self.l_x = [*self.l_x, stats.l_x][-(self.m + 2) :]
        ratio, before = self._ratio(-1), self._ratio(-2)
        if ratio is None or before is None:
            return None
        base = self.l_x[-1 - self.m]
        if ratio > self.guard * base and ratio > self.gamma * before:
            reason = f"l_X rose by {ratio / base:.0%} per epoch (R = {ratio:.4g}) up to epoch {stats.epoch}"
            return Stop(reason, keep=stats.epoch - self.m)
        return None

    def _ratio(self, at: int) -> float | None:
        if len(self.l_x) < self.m - at:
            return None
        return (self.l_x[at] - self.l_x[at - self.m]) / self.m

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `load_state_dict`, as JSON values."""
        return {"l_x": list(self.l_x)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`."""
        self.l_x = [float(value) for value in state["l_x"]]


def replay(rule: StoppingRule, rows: Iterable[EpochStats | Mapping[str, Any]]) -> Stop | None:
    """Run a rule on the metrics of a finished run; rows as for `deat_rb.methods.schedules.replay`.

    Give only those after the warm-up of the radius.

    Returns:
        The `Stop` that would have ended training, or None.
    """
    for number, row in enumerate(rows, start=1):
        stop = rule.update(EpochStats.of(row, number))
        if stop is not None:
            return stop
    return None
