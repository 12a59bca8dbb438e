"""Rules that end training before its time, against catastrophic overfitting, and name the last healthy epoch.

Like schedules they see nothing but `EpochStats` and can be replayed offline with `replay`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from deat_rb.training.base import Stop, StoppingRule
from deat_rb.training.metrics import EpochStats
from deat_rb.utils.errors import DeatError


class RobustnessDrop(StoppingRule):
    """U-FGSM's own rule (Wong et al. 2020): stop when PGD accuracy on a kept batch drops suddenly.

    Args:
        drop: How much is sudden, in (0, 1): 0.2 is 20 points from one epoch to the next.
        steps: The steps of that PGD.
    """

    def __init__(self, drop: float = 0.2, *, steps: int = 5) -> None:
        if not 0 < drop < 1:
            raise DeatError(f"drop = {drop:g} is outside (0, 1); 20 points are 0.2")
        if steps < 1:
            raise DeatError(f"steps = {steps} of the validating PGD is below 1")
        self.drop = drop
        self.validation_steps = steps
        self.last: float | None = None

    def update(self, stats: EpochStats) -> Stop | None:
        """Compares with the epoch before."""
        last, now = self.last, stats.stop_robust_acc
        if now is None:
            raise DeatError(f"epoch {stats.epoch} has no stop_robust_acc, which the rule RobustnessDrop compares")
        self.last = now
        if last is not None and last - now > self.drop:
            reason = f"PGD-{self.validation_steps} accuracy fell from {last:.1%} to {now:.1%} in epoch {stats.epoch}"
            return Stop(reason, keep=stats.epoch - 1)
        return None

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on, as JSON values."""
        return {"last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`."""
        self.last = None if state["last"] is None else float(state["last"])


class GradientRatio(StoppingRule):
    """M+U-FGSM's rule (Algorithm 5, Equation 8): stop when l_X surges.

    R^t = (l_X^t - l_X^{t-m}) / m, and training ends when R^t > gamma * R^{t-1}, from epoch m + 2 on. Taken literally
    that fires on noise and, with negative ratios, while l_X falls; so R^t has to be more than ``guard`` times l_X^{t-m}
    as well. While a healthy network begins to learn, l_X may rise by up to 30 % an epoch; in a collapse it doubles
    within two epochs (docs/lab/results.md has the recorded runs). The rise may have begun at any of the m
    epochs, so that
    it is epoch t - m that is kept.

    Args:
        m: The distance of the epochs compared.
        gamma: How much faster than before l_X has to rise.
        guard: The rise per epoch, as a share of l_X, below which nothing is a surge.
    """

    def __init__(self, *, m: int = 2, gamma: float = 1.5, guard: float = 0.4) -> None:
        if m < 1:
            raise DeatError(f"m = {m} is not a number of epochs; Algorithm 5 has m = 2")
        if not (math.isfinite(gamma) and gamma > 0):
            raise DeatError(f"gamma = {gamma:g} is not a positive number; Algorithm 5 has 1.5")
        if not 0 <= guard < 1:
            raise DeatError(f"guard = {guard:g} is outside [0, 1)")
        self.m = m
        self.gamma = gamma
        self.guard = guard
        self.lookback = m + 1
        self.l_x: list[float] = []

    def update(self, stats: EpochStats) -> Stop | None:
        """Compares the changing ratio with the epoch's before."""
        self.l_x = [*self.l_x, stats.l_x][-(self.m + 2) :]
        ratio, before = self._ratio(-1), self._ratio(-2)
        if ratio is None or before is None:
            return None
        base = self.l_x[-1 - self.m]
        if ratio > self.guard * base and ratio > self.gamma * before:
            reason = f"l_X rose by {ratio / base:.0%} an epoch (R = {ratio:.4g}) up to epoch {stats.epoch}"
            return Stop(reason, keep=stats.epoch - self.m)
        return None

    def _ratio(self, at: int) -> float | None:
        if len(self.l_x) < self.m - at:
            return None
        return (self.l_x[at] - self.l_x[at - self.m]) / self.m

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on, as JSON values."""
        return {"l_x": list(self.l_x)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`."""
        self.l_x = [float(value) for value in state["l_x"]]


def replay(rule: StoppingRule, rows: Iterable[EpochStats | Mapping[str, Any]]) -> Stop | None:
    """Replays a rule over the rows of a run's metrics, which may be as for `deat_rb.methods.schedules.replay`.

    Returns:
        Where and why it would have stopped, or None.
    """
    for number, row in enumerate(rows, start=1):
        stop = rule.update(EpochStats.of(row, number))
        if stop is not None:
            return stop
    return None
