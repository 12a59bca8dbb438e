"""Schedules of the attack's steps: the base class and the constant one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deat_rb.training.metrics import EpochStats
from deat_rb.utils.errors import DeatError
from deat_rb.utils.text import counted
from deat_rb.utils.units import is_whole_number


class Schedule:
    """Number of attack steps per epoch; the base class keeps it constant.

    What `update` remembers from epoch to epoch, other than ``steps``, belongs into `state_dict` and `load_state_dict`:
    a run that is resumed and a second `fit` restore nothing else.

    Args:
        steps: Attack steps in the first epoch.
        max_steps: Upper bound; None for no bound.

    Attributes:
        steps: Attack steps in the next epoch.
        guided: Whether the steps depend on l_X, which needs a constant radius: `update` is then not called for the
            epochs of its warm-up.
        needs_epochs: Whether the steps depend on the run's number of epochs. If so, the run cannot be open-ended, and
            its number of epochs cannot be increased later.
        needs_accuracy: Whether the steps depend on training accuracy.
        fewest_steps: Lower bound of the steps of an epoch.

    Raises:
        DeatError: ``steps`` is negative or not a whole number, or ``max_steps`` is below the steps of the first epoch.
    """

    guided = False
    needs_epochs = False
    needs_accuracy = False
    fewest_steps = 0

    def __init__(self, steps: int = 1, max_steps: int | None = None) -> None:
        self.check_steps(steps)
        if max_steps is not None and max_steps < max(steps, 1):
            raise DeatError(f"max_steps = {max_steps} is below the first epoch's steps ({max(steps, 1)})")
        self.steps = int(steps)
        self.max_steps = max_steps

    def check_steps(self, steps: int) -> None:
        """Check that an epoch may have this number of steps.

        Raises:
            DeatError: It may not.
        """
        if not is_whole_number(steps) or steps < 0:
            raise DeatError(f"steps = {steps} is not a non-negative whole number")
        if steps < self.fewest_steps:
            raise DeatError(
                f"steps = {steps} is below {self.fewest_steps}; the method's schedule needs at least "
                f"{counted(self.fewest_steps, 'step')}"
            )

    def begin(self, epochs: int) -> None:
        """Prepare for a run of ``epochs`` epochs, `deat_rb.utils.options.OPEN` if open-ended; called by `fit`."""

    def update(self, stats: EpochStats) -> None:
        """Set ``steps`` for the next epoch, given the metrics of the epoch that has ended."""

    def alpha(self, alpha: float, eps: float) -> float:
        """Return the step size for the next epoch, given the method's base step size."""
        return alpha

    def step_bounds(self, epochs: int) -> list[tuple[int, int]] | None:
        """Return the fewest and the most steps of each of the first ``epochs`` epochs; None if they are not known.

        They are equal where the steps do not depend on the training metrics.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `load_state_dict`, as JSON values."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`.

        Raises:
            ValueError: ``steps`` is invalid.
        """
        if not isinstance(state["steps"], int) or state["steps"] < 0:
            raise ValueError(f"steps = {state['steps']!r} is not a non-negative whole number")
        self.steps = state["steps"]

    def _rising_bounds(self, fewest: int, epochs: int) -> list[tuple[int, int]]:
        """Return the bounds if an epoch may have one step more than the last, and all but the first have ``fewest``."""
        limit = self.steps + epochs if self.max_steps is None else max(self.max_steps, self.steps)
        fewest = min(fewest, limit)
        return [(fewest if epoch else self.steps, min(self.steps + epoch, limit)) for epoch in range(epochs)]

    def _rise(self) -> None:
        if self.max_steps is None or self.steps < self.max_steps:
            self.steps += 1


class Constant(Schedule):
    """Constant number of attack steps, as in FREE-r, PGD-N, U-FGSM, FAT, TRADES and MART."""

    def __init__(self, steps: int = 1) -> None:
        super().__init__(steps)

    def step_bounds(self, epochs: int) -> list[tuple[int, int]]:
        """Return ``steps`` for each epoch."""
        return [(self.steps, self.steps)] * epochs
