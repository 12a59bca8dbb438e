"""Learning-rate schedules: the share of the peak by the share of the run that is done.

The rate moves once per batch; where a replay trainer is asked to, once per replay.
"""

from __future__ import annotations

from collections.abc import Callable


def cyclic(done: float) -> float:
    """0 -> 1 -> 0, in straight lines (the fast setting)."""
    return 1 - abs(2 * done - 1)


def multistep(done: float) -> float:
    """Divided by 10 after 1/2 and 4/5 of the run: after epochs 25 and 40 of the standard setting's 50."""
    return 1.0 if done < 0.5 else 0.1 if done < 0.8 else 0.01


def flat(done: float) -> float:
    """Always the peak."""
    return 1.0


LR_SCHEDULES: dict[str, Callable[[float], float]] = {"cyclic": cyclic, "multistep": multistep, "flat": flat}
