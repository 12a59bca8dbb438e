"""Step schedules: how many steps the attack takes in the next epoch.

A schedule depends only on `EpochStats`, which are reduced over all ranks and written to
``metrics.jsonl``; `replay` runs it on the metrics of a finished run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from deat_rb.training.metrics import EpochStats
from deat_rb.training.schedule import Schedule
from deat_rb.utils.errors import DeatError


class EveryDEpochs(Schedule):
    """One more step every ``every`` epochs: DEAT-D (section 4.1).

    Args:
        every: D, in epochs.
        start: Steps of the first epoch.
        max_steps: Upper bound; None for no bound.
    """

    def __init__(self, every: int = 3, *, start: int = 1, max_steps: int | None = None) -> None:
        super().__init__(start, max_steps)
        if every < 1:
            raise DeatError(f"every = {every} is below 1 epoch; DEAT-D needs D >= 1")
        self.every = every

    def update(self, stats: EpochStats) -> None:
        """Add a step after every ``every``-th epoch."""
        if stats.epoch % self.every == 0:
            self._rise()

    def step_bounds(self, epochs: int) -> list[tuple[int, int]]:
        """Return the steps of each epoch; in all T (T + D) / 2D rounded up, unless ``max_steps`` is reached."""
        copy = EveryDEpochs(self.every, start=self.steps, max_steps=self.max_steps)
        steps = replay(copy, [EpochStats(epoch=epoch) for epoch in range(1, epochs + 1)])
        return [(each, each) for each in steps]


class AccuracyThreshold(Schedule):
    """One more step after each epoch whose training accuracy is above a threshold: DEAT-P% (section 4.1).

    Args:
        threshold: Accuracy in (0, 1): 0.4 for DEAT-40%.
        start: Steps of the first epoch.
        max_steps: Upper bound; None for no bound.
    """

    needs_accuracy = True

    def __init__(self, threshold: float = 0.4, *, start: int = 1, max_steps: int | None = None) -> None:
        super().__init__(start, max_steps)
        if not 0 < threshold < 1:
            raise DeatError(f"threshold = {threshold:g} is outside (0, 1); DEAT-40% uses 0.4")
        self.threshold = threshold

    def update(self, stats: EpochStats) -> None:
        """Add a step if the epoch's training accuracy is above the threshold."""
        if stats.train_acc > self.threshold:
            self._rise()

    def step_bounds(self, epochs: int) -> list[tuple[int, int]]:
        """Return the bounds of the steps: each epoch may have one more than the last."""
        return self._rising_bounds(self.steps, epochs)


class GradientMagnitude(Schedule):
    """The paper's rule (Algorithm 2, lines 8-14): one more step whenever l_X exceeds a threshold.

    A step is added after the first epoch. After the second, the threshold is set to gamma * l_X; from then on, whenever
    l_X exceeds the threshold, it is set to gamma * l_X again and a step is added. The step size becomes
    max(alpha, eps / steps), so that alpha * steps >= eps (appendix A.2).

    Args:
        gamma: Threshold factor, positive: 1.0 (fast, PreActResNet) or 1.01.
        max_steps: Upper bound: 8 for M-DEAT, the steps of the unguided method for M+PGD, M+TRADES, M+MART.
        start: Steps of the first epoch.
    """

    guided = True

    def __init__(self, *, gamma: float = 1.01, max_steps: int = 8, start: int = 1) -> None:
        super().__init__(start, max_steps)
        if not (math.isfinite(gamma) and gamma > 0):
            raise DeatError(f"gamma = {gamma:g} is not a positive number; the paper uses 1.0 and 1.01")
        self.gamma = gamma
        self.epochs = 0
        self.threshold: float | None = None

    def update(self, stats: EpochStats) -> None:
        """Compare the epoch's l_X with the threshold.

        Raises:
            DeatError: If l_X is not finite.
        """
        if not math.isfinite(stats.l_x):
            raise DeatError(f"l_X is {stats.l_x:g} in epoch {stats.epoch}: training has diverged; try a smaller --lr")
        self.epochs += 1
        if self.epochs == 1:
            self._rise()
        elif self.threshold is None:
            self.threshold = self.gamma * stats.l_x
        elif stats.l_x > self.threshold:
            self.threshold = self.gamma * stats.l_x
            self._rise()

    def step_bounds(self, epochs: int) -> list[tuple[int, int]]:
        """Return the bounds of the steps: the second epoch has one more, later ones may have one more than the last."""
        return self._rising_bounds(self.steps + 1, epochs)

    def alpha(self, alpha: float, eps: float) -> float:
        """Return alpha* = max(alpha, eps / steps)."""
        return max(alpha, eps / max(self.steps, 1))

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `load_state_dict`, as JSON values."""
        return {"steps": self.steps, "epochs": self.epochs, "threshold": self.threshold}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`."""
        super().load_state_dict(state)
        self.epochs = int(state["epochs"])
        self.threshold = None if state["threshold"] is None else float(state["threshold"])


class Annealed(Schedule):
    """Steps that rise linearly over the epochs, while the step size falls: Amata (Ye et al. 2021, arXiv:2012.08112).

    Epoch t of T, counted from 0, has r = start + (max_steps - start) t / T steps, rounded down, of size tau / r, where
    tau, the sum of the step sizes, is the method's step size times ``start``.

    Args:
        start: Steps of the first epoch, K_min.
        max_steps: K_max, which is reached only after the last epoch.
    """

    needs_epochs = True
    fewest_steps = 1

    def __init__(self, start: int = 2, *, max_steps: int = 10) -> None:
        super().__init__(start, max_steps)
        self.start, self.last = start, max_steps
        self.epochs: int | None = None

    def begin(self, epochs: int) -> None:
        """Set T.

        Raises:
            DeatError: The run is open-ended.
        """
        from deat_rb.utils.options import OPEN  # imports pydantic, which listing the methods does not need

        if epochs == OPEN:
            raise DeatError(
                "Amata raises the attack's steps over the epochs of the run, so their number must be known: give "
                "epochs = 50, for example, instead of open"
            )
        self.epochs = epochs

    def update(self, stats: EpochStats) -> None:
        """Set the steps of the epoch after ``stats.epoch``.

        Raises:
            DeatError: `begin` was not called.
        """
        if self.epochs is None:
            raise DeatError("the number of epochs is unknown: call schedule.begin(epochs) before the first epoch")
        self.steps = self._steps(stats.epoch, self.epochs)

    def alpha(self, alpha: float, eps: float) -> float:
        """Return tau / steps, where tau = alpha * start."""
        return alpha * self.start / max(self.steps, 1)

    def step_bounds(self, epochs: int) -> list[tuple[int, int]]:
        """Return the steps of each of T epochs."""
        return [(self._steps(epoch, epochs),) * 2 for epoch in range(epochs)]

    def _steps(self, epoch: int, epochs: int) -> int:
        return self.start + (self.last - self.start) * min(epoch, epochs) // epochs

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `load_state_dict`, as JSON values."""
        return {"steps": self.steps, "epochs": self.epochs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`."""
        super().load_state_dict(state)
        self.epochs = None if state["epochs"] is None else int(state["epochs"])


def replay(schedule: Schedule, rows: Iterable[EpochStats | Mapping[str, Any]]) -> list[int]:
    """Run a schedule on the metrics of a finished run.

    Args:
        schedule: The schedule, in its initial state.
        rows: The result of `deat_rb.runs.directory.RunDirectory.rows`, or the parsed lines of a ``metrics.jsonl``; only
            the values that the schedule uses, such as ``l_x``, are needed. A guided schedule takes those after the
            warm-up of the radius.

    Returns:
        The steps of each epoch.
    """
    steps = []
    for number, row in enumerate(rows, start=1):
        steps.append(schedule.steps)
        schedule.update(EpochStats.of(row, number))
    return steps
