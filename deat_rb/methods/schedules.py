"""Schedules: how many steps the attack takes in the next epoch.

A schedule sees nothing but `EpochStats`, which are reduced over all processes (law 8) and written to ``metrics.jsonl``;
so it can be replayed offline from a run's metrics with `replay`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from deat_rb.training.base import Schedule
from deat_rb.training.metrics import EpochStats
from deat_rb.utils.errors import DeatError


class EveryDEpochs(Schedule):
    """One step more every ``every`` epochs: DEAT-D (section 4.1).

    Args:
        every: D, in epochs.
        start: The steps of the first epoch.
        max_steps: The most it will ever take; None for no bound.
    """

    def __init__(self, every: int = 3, *, start: int = 1, max_steps: int | None = None) -> None:
        super().__init__(start, max_steps)
        if every < 1:
            raise DeatError(f"every = {every} is not a number of epochs; DEAT-D needs D of 1 or more")
        self.every = every

    def update(self, stats: EpochStats) -> None:
        """Counts the epoch."""
        if stats.epoch % self.every == 0:
            self._rise()

    def total_steps(self, epochs: int) -> int:
        """The sum from a fresh schedule: T (T + D) / 2D, rounded up to whole steps, where no bound interferes."""
        copy = EveryDEpochs(self.every, start=self.steps, max_steps=self.max_steps)
        total = 0
        for epoch in range(1, epochs + 1):
            total += copy.steps
            copy.update(EpochStats(epoch=epoch))
        return total


class AccuracyThreshold(Schedule):
    """One step more after each epoch whose training accuracy is above a threshold: DEAT-P% (section 4.1).

    Args:
        threshold: In (0, 1): 0.4 for DEAT-40%.
        start: The steps of the first epoch.
        max_steps: The most it will ever take; None for no bound.
    """

    def __init__(self, threshold: float = 0.4, *, start: int = 1, max_steps: int | None = None) -> None:
        super().__init__(start, max_steps)
        if not 0 < threshold < 1:
            raise DeatError(f"threshold = {threshold:g} is outside (0, 1); DEAT-40% has 0.4")
        self.threshold = threshold

    def update(self, stats: EpochStats) -> None:
        """Compares the epoch's training accuracy."""
        if stats.train_acc > self.threshold:
            self._rise()


class GradientMagnitude(Schedule):
    """The paper's rule (Algorithm 2, lines 8-14): one step more whenever l_X passes a threshold.

    After the first epoch the steps rise by one; after the second the threshold is gamma * l_X; from then on an l_X
    above the threshold sets it to gamma * l_X and adds a step. The step size becomes max(alpha, eps / steps), so that
    alpha * steps >= eps (appendix A.2).

    Args:
        gamma: The relaxation, positive: 1.0 (fast, PreActResNet) or 1.01.
        max_steps: The method's bound: 8 for M-DEAT, the plain method's own number for M+PGD, M+TRADES, M+MART.
        start: The steps of the first epoch.
    """

    guided = True

    def __init__(self, *, gamma: float = 1.01, max_steps: int = 8, start: int = 1) -> None:
        super().__init__(start, max_steps)
        if not (math.isfinite(gamma) and gamma > 0):
            raise DeatError(f"gamma = {gamma:g} is not a positive number; the paper has 1.0 and 1.01")
        self.gamma = gamma
        self.epochs = 0
        self.threshold: float | None = None

    def update(self, stats: EpochStats) -> None:
        """Compares the epoch's l_X with the threshold.

        Raises:
            DeatError: If l_X is not finite, which no later one could be compared with.
        """
        if not math.isfinite(stats.l_x):
            raise DeatError(f"l_X is {stats.l_x:g} in epoch {stats.epoch}; training has diverged, try a smaller --lr")
        self.epochs += 1
        if self.epochs == 1:
            self._rise()
        elif self.threshold is None:
            self.threshold = self.gamma * stats.l_x
        elif stats.l_x > self.threshold:
            self.threshold = self.gamma * stats.l_x
            self._rise()

    def alpha(self, alpha: float, eps: float) -> float:
        """alpha* = max(alpha, eps / steps)."""
        return max(alpha, eps / max(self.steps, 1))

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on, as JSON values."""
        return {"steps": self.steps, "epochs": self.epochs, "threshold": self.threshold}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`."""
        super().load_state_dict(state)
        self.epochs = int(state["epochs"])
        self.threshold = None if state["threshold"] is None else float(state["threshold"])


def replay(schedule: Schedule, rows: Iterable[EpochStats | Mapping[str, Any]]) -> list[int]:
    """Replays a schedule over the rows of a run's metrics.

    Args:
        schedule: As it is before the first epoch.
        rows: As `deat_rb.runs.directory.RunDirectory.rows` reads them, or the lines of a
            ``metrics.jsonl``, of which what the schedule decides by, such as ``l_x``, is enough.

    Returns:
        The steps it would have taken in each of these epochs.
    """
    steps = []
    for number, row in enumerate(rows, start=1):
        steps.append(schedule.steps)
        schedule.update(EpochStats.of(row, number))
    return steps
