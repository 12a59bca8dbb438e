"""Learning-rate schedules: the share of the peak by the share of the run that is done.

The rate moves once per batch; where a replay trainer is asked to, once per replay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from deat_rb.utils.errors import DeatError, did_you_mean

if TYPE_CHECKING:
    from torch.optim import Optimizer


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


def check_layout(lr_schedule: str, lr_epochs: int | None, option: str = "lr_epochs") -> None:
    """Looks whether a schedule may be laid out for another number of epochs than are trained; ``option`` names that.

    Raises:
        DeatError: There is no such schedule, or it is not multistep: past its end a cyclic rate would be below 0.
    """
    if lr_schedule not in LR_SCHEDULES:
        raise DeatError(
            f"there is no learning-rate schedule '{lr_schedule}': {did_you_mean(lr_schedule, LR_SCHEDULES)}"
        )
    if lr_epochs is None:
        return
    if lr_schedule != "multistep":
        raise DeatError(
            f"{option} = {lr_epochs} lays out the milestones of a multistep learning rate, and this one is "
            f"{lr_schedule}; leave it out"
        )
    if lr_epochs < 1:
        raise DeatError(f"{option} = {lr_epochs} is below 1; give the epochs that the milestones are laid out for")


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Sets the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate
