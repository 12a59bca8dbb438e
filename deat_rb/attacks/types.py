"""What an attack of an evaluation consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deat_rb.attacks.functional import AttackOutput, CountingModel
from deat_rb.attacks.threat_models import L2, Linf, threat_model

Parameters = dict[str, bool | int | float | str]


@dataclass(frozen=True)
class AttackContext:
    """What all attacks of an evaluation have in common.

    Attributes:
        norm: ``Linf`` or ``L2``.
        eps: The radius, in [0, 1] pixel units.
        seed: Of everything random.
        num_classes: K.
        device: Where the batches are.
    """

    norm: str
    eps: float
    seed: int
    num_classes: int
    device: torch.device

    @property
    def ball(self) -> Linf | L2:
        """The threat model."""
        return threat_model(self.norm, self.eps)


@dataclass(frozen=True, eq=False)
class Batch:
    """Some examples, on the device.

    Attributes:
        images: (N, C, H, W), in [0, 1].
        labels: (N,).
        chosen: (N,) bool: which of them are to be attacked; random numbers are drawn for all, so that none depends on
            who else is attacked.
        number: Which batch of the part this is, from 0 on.
        rows: (N,) int64, on the CPU: which examples of the evaluation these are.
    """

    images: Tensor
    labels: Tensor
    chosen: Tensor
    number: int
    rows: Tensor


@dataclass(frozen=True)
class AttackStage:
    """What an attack does in one go through the examples; the next part attacks what this one left.

    Attributes:
        name: Which part; empty where the attack has but one.
        craft: Makes, of the chosen examples of a batch, adversarial images.
        calls: How often it forwards a batch at most, for the display; 0 where that is not known.
        packed: Whether the batches are made of what is left, as AutoAttack's are, or are the same for every part.
    """

    name: str
    craft: Callable[[CountingModel, Batch], AttackOutput]
    calls: int = 0
    packed: bool = False


@dataclass(frozen=True, eq=False)
class Attack:
    """One attack.

    Attributes:
        name: As `parse_attacks` spells it.
        parts: In their order.
        parameters: Its settings, for the report.
        notes: What a reader of its figure should know beforehand.
        warnings: What the attack warns of while it runs, each sentence once.
    """

    name: str
    parts: tuple[AttackStage, ...]
    parameters: Parameters
    notes: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)
