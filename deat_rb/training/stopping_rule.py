"""Rules that decide after each epoch whether to end training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deat_rb.training.metrics import EpochStats


@dataclass(frozen=True)
class Stop:
    """Decision of a stopping rule to end training.

    Attributes:
        reason: Reason in one sentence, recorded in the metrics.
        keep: Epoch (1-based) whose weights are the result.
    """

    reason: str
    keep: int


class StoppingRule:
    """Base class of rules that decide after each epoch whether to end training; the base class never does.

    What `update` remembers from epoch to epoch belongs into `state_dict` and `load_state_dict`: a run that is resumed
    and a second `fit` restore nothing else.

    Attributes:
        lookback: Number of newest epochs whose weights are kept; `Stop.keep` must be one of them.
        validation_steps: Steps of the PGD attack that measures ``stop_robust_acc`` on a fixed batch after each epoch; 0
            for none.
    """

    lookback = 2
    validation_steps = 0

    def update(self, stats: EpochStats) -> Stop | None:
        """Return a `Stop` if training should end after this epoch, else None; not called in the radius's warm-up."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `load_state_dict`, as JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`."""
