"""Learning-rate schedules: functions from training progress in [0, 1] to a fraction of the peak learning rate.

The learning rate changes with each batch or, if a replay trainer has ``lr_per_replay``, with each replay.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer


def cyclic(progress: float) -> float:
    """Return a fraction that rises linearly from 0 to 1 and then falls linearly to 0 (used in the fast setting)."""
    return 1 - abs(2 * progress - 1)


def multistep(progress: float) -> float:
    """Return 1, then 0.1 after 1/2 and 0.01 after 4/5 of training (epochs 25 and 40 of the standard setting's 50)."""
    return 1.0 if progress < 0.5 else 0.1 if progress < 0.8 else 0.01


def constant(progress: float) -> float:
    """Return 1."""
    return 1.0


def cosine(progress: float) -> float:
    """Return a fraction that falls from 1 to 0 along half a cosine, as torch's CosineAnnealingLR."""
    return (1 + math.cos(math.pi * progress)) / 2


def onecycle(progress: float) -> float:
    """Return a fraction that rises from 1/25 to 1 in the first 30 % and then falls to 4e-6, along half cosines.

    These are the defaults of torch's OneCycleLR, here as a function of continuous progress.
    """
    low = 1 / 25 if progress < RISE else 1 / 25e4
    return low + (1 - low) * _cycle(progress)


def _cycle(progress: float) -> float:
    """Return a fraction that rises from 0 to 1 in the first 30 % and then falls to 0, along half cosines."""
    return 1 - cosine(progress / RISE) if progress < RISE else cosine((progress - RISE) / (1 - RISE))


RISE = 0.3
"""Fraction of training in which ``onecycle`` rises."""

LR_SCHEDULES: dict[str, Callable[[float], float]] = {
    "cyclic": cyclic, "multistep": multistep, "flat": constant, "cosine": cosine, "onecycle": onecycle,
}  # fmt: skip

OPEN_ENDED = ("flat", "multistep")
"""Schedules under which a run can be extended; the others end at a learning rate of 0."""

MOMENTUM_RANGE = 0.05
"""Amplitude of the momentum under ``onecycle``."""


@dataclass(frozen=True)
class LearningRate:
    """The learning rate and the momentum as functions of training progress.

    Attributes:
        peak: Peak learning rate.
        schedule: A key of `LR_SCHEDULES`.
        epochs: Number of epochs over which the schedule extends.
        warmup: Number of epochs in which the learning rate first rises linearly from 0 to the peak; the schedule then
            extends over the remaining epochs.
        momentum: The momentum, or AdamW's beta1.
    """

    peak: float
    schedule: str
    epochs: int
    warmup: float = 0.0
    momentum: float = 0.9

    def at(self, epochs: float) -> float:
        """Return the learning rate after ``epochs`` epochs, which may be fractional."""
        if epochs < self.warmup:
            return self.peak * epochs / self.warmup
        return self.peak * LR_SCHEDULES[self.schedule](self._progress(epochs))

    def momentum_at(self, epochs: float) -> float | None:
        """Return the momentum after ``epochs`` epochs, or None if it is constant.

        Under ``onecycle`` it falls while the learning rate rises, as with torch's OneCycleLR: for a momentum of 0.9,
        from 0.95 to 0.85 and back. The training loop changes it once per epoch.
        """
        if self.schedule != "onecycle":
            return None
        return self.momentum + MOMENTUM_RANGE * (1 - 2 * _cycle(self._progress(epochs)))

    def _progress(self, epochs: float) -> float:
        return (epochs - self.warmup) / (self.epochs - self.warmup)


def set_rate(optimizer: Optimizer, rate: float | Tensor) -> None:
    """Set the learning rate of all parameter groups; if it is a tensor, in place, and without a host sync."""
    for group in optimizer.param_groups:
        if not hasattr(group["lr"], "copy_"):
            group["lr"] = rate
        elif isinstance(rate, int | float):
            group["lr"].fill_(rate)
            group["rate"] = rate
        else:
            group["lr"].copy_(rate)


def set_momentum(optimizer: Optimizer, momentum: float) -> None:
    """Set the momentum of SGD, or beta1 of AdamW, of all parameter groups."""
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum


def rate_of(optimizer: Optimizer) -> float:
    """Return the learning rate that was last passed to `set_rate`, without a host sync."""
    group = optimizer.param_groups[0]
    return float(group.get("rate", group["lr"]))
