"""Learning-rate schedules: functions from training progress in [0, 1] to a fraction of the peak learning rate.

The learning rate changes with each batch or, if a replay trainer has ``lr_per_replay``, with each replay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from deat_rb.utils.errors import DeatError, did_you_mean

if TYPE_CHECKING:
    from torch.optim import Optimizer


def cyclic(progress: float) -> float:
    """Return a fraction that rises linearly from 0 to 1 and then falls linearly to 0 (the fast setting)."""
    return 1 - abs(2 * progress - 1)


def multistep(progress: float) -> float:
    """Return 1, then 0.1 after 1/2 and 0.01 after 4/5 of training (epochs 25 and 40 of the standard setting's 50)."""
    return 1.0 if progress < 0.5 else 0.1 if progress < 0.8 else 0.01


def constant(progress: float) -> float:
    """Return 1."""
    return 1.0


LR_SCHEDULES: dict[str, Callable[[float], float]] = {"cyclic": cyclic, "multistep": multistep, "flat": constant}


def check_layout(lr_schedule: str, lr_epochs: int | None, option: str = "lr_epochs") -> None:
    """Check the name of a schedule and the number of epochs over which it extends.

    Args:
        lr_schedule: A key of `LR_SCHEDULES`.
        lr_epochs: Number of epochs; None for the number of training epochs.
        option: Name of ``lr_epochs`` in error messages.

    Raises:
        DeatError: The schedule is unknown, or ``lr_epochs`` is below 1 or given without multistep: a cyclic learning
            rate would fall below 0 after ``lr_epochs``.
    """
    if lr_schedule not in LR_SCHEDULES:
        raise DeatError(f"lr_schedule = '{lr_schedule}' is unknown: {did_you_mean(lr_schedule, LR_SCHEDULES)}")
    if lr_epochs is None:
        return
    if lr_schedule != "multistep":
        raise DeatError(f"{option} = {lr_epochs} applies only to the multistep schedule, not to {lr_schedule}; omit it")
    if lr_epochs < 1:
        raise DeatError(f"{option} = {lr_epochs} is below 1; give the number of epochs that the milestones refer to")


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate
