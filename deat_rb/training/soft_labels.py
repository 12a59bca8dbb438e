"""Which methods can be trained with class probabilities as labels."""

from __future__ import annotations

from typing import Protocol

from torchattacks.attack import Attack

from deat_rb.attacks.pgd import PGD
from deat_rb.training.schedule import Schedule
from deat_rb.training.surrogate_loss import SurrogateLoss


class TakesLabels(Protocol):
    """A trainer, as far as its labels are concerned."""

    takes_soft_labels: bool


def who_needs_one_class(
    trainer: type[TakesLabels],
    loss: SurrogateLoss,
    attack: type[Attack],
    attack_loss: str,
    tau: int | None,
    schedule: type[Schedule],
) -> str | None:
    """Return the part of a method that needs one class per image, rather than shares of classes; None if none does.

    Args:
        trainer: The trainer's class.
        loss: The surrogate loss.
        attack: The attack's class.
        attack_loss: The loss that it maximizes.
        tau: Its early stop; None for none.
        schedule: The schedule's class.
    """
    if loss.class_weights is not None:
        return "weighting by class"
    if not loss.soft_labels:
        return f"the loss {loss.name}"
    if not trainer.takes_soft_labels:
        return f"the training step of {trainer.__name__}"
    if not issubclass(attack, PGD) or attack_loss not in ("ce", "kl"):
        return f"the attack {attack.__name__}" + (f" on {attack_loss}" if issubclass(attack, PGD) else "")
    if tau is not None:
        return "a friendly attack, which stops early at a misclassification,"
    return "a schedule by training accuracy" if schedule.needs_accuracy else None
