"""Learning-rate schedules, as functions from training progress in [0, 1] to a fraction of the peak learning rate.

The learning rate changes once per batch or, with a replay trainer's ``lr_per_replay``, once per replay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from deat_rb.utils.errors import DeatError, did_you_mean

if TYPE_CHECKING:
    from torch.optim import Optimizer


def cyclic(progress: float) -> float:
    """Return a fraction that rises linearly from 0 to 1 and falls back to 0 (the fast setting)."""
    return 1 - abs(2 * progress - 1)


def multistep(progress: float) -> float:
    """Return 1, then 0.1 after 1/2 and 0.01 after 4/5 of training (epochs 25 and 40 of the standard setting's 50)."""
    return 1.0 if progress < 0.5 else 0.1 if progress < 0.8 else 0.01


def constant(progress: float) -> float:
    """Return 1."""
    return 1.0


LR_SCHEDULES: dict[str, Callable[[float], float]] = {"cyclic": cyclic, "multistep": multistep, "flat": constant}


def check_layout(lr_schedule: str, lr_epochs: int | None, option: str = "lr_epochs") -> None:
    """Check a schedule's name and for how many epochs it is laid out, where that differs from the epochs trained.

    Args:
        lr_schedule: A key of `LR_SCHEDULES`.
        lr_epochs: The number of epochs, or None.
        option: What the message calls ``lr_epochs``.

    Raises:
        DeatError: There is no such schedule, or ``lr_epochs`` is given with one other than multistep: a cyclic rate
            would fall below 0 past its end.
    """
    if lr_schedule not in LR_SCHEDULES:
        raise DeatError(f"lr_schedule = '{lr_schedule}' is unknown: {did_you_mean(lr_schedule, LR_SCHEDULES)}")
    if lr_epochs is None:
        return
    if lr_schedule != "multistep":
        raise DeatError(
            f"{option} = {lr_epochs} applies to the multistep schedule only, not to {lr_schedule}; leave it out"
        )
    if lr_epochs < 1:
        raise DeatError(f"{option} = {lr_epochs} is below 1; give the number of epochs that the milestones refer to")


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate
