"""Types of evaluation attacks: context, batch, stage, attack."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deat_rb.attacks.functional import AttackOutput, CountingModel
from deat_rb.attacks.threat_models import L2, Linf, threat_model

Parameters = dict[str, bool | int | float | str]


@dataclass(frozen=True)
class AttackContext:
    """Settings common to all attacks of an evaluation.

    Attributes:
        norm: ``Linf`` or ``L2``.
        eps: The radius, in [0, 1] pixel units.
        seed: Random seed.
        num_classes: K.
        device: Device of the batches.
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
    """A batch of examples on the device.

    Attributes:
        images: (N, C, H, W), in [0, 1].
        labels: (N,).
        chosen: (N,) bool: the examples to attack. Random numbers are drawn for the whole batch, so that those of an
            example do not depend on which others are attacked.
        number: Index of the batch within the stage, from 0.
        rows: (N,) int64, on the CPU: indices of the examples in the evaluation.
    """

    images: Tensor
    labels: Tensor
    chosen: Tensor
    number: int
    rows: Tensor


@dataclass(frozen=True)
class AttackStage:
    """One pass of an attack over the examples; the next stage attacks those still classified correctly.

    Attributes:
        name: Name of the stage; empty if the attack has only one.
        craft: Function that generates adversarial examples for the chosen examples of a batch.
        calls: Largest number of forward passes per batch, for the progress display; 0 if unknown.
        craft_all: Function that does so for several batches, in order, forwarding a given number of examples together,
            of whichever batch; None if there is none. Its results are those of ``craft`` if the model's logits for an
            image do not depend on its batch.
        packed: Whether batches contain only the remaining examples, as in AutoAttack, instead of being the same in
            every stage.
        recordable: Whether forward passes may be repeated as CUDA graphs: at most one backward pass follows each,
            before the next forward pass, and an image's logits may depend on the size of its batch by rounding.
    """

    name: str
    craft: Callable[[CountingModel, Batch], AttackOutput]
    calls: int = 0
    craft_all: Callable[[CountingModel, Iterable[Batch], int], Iterator[AttackOutput]] | None = None
    packed: bool = False
    recordable: bool = False


@dataclass(frozen=True, eq=False)
class Attack:
    """An attack of an evaluation.

    Attributes:
        name: Canonical name, as `parse_attacks` returns it.
        parts: Its stages, in order.
        parameters: Its settings, for the report.
        notes: Remarks on its result, for the report.
        warnings: Warnings raised while the attack runs, without duplicates.
    """

    name: str
    parts: tuple[AttackStage, ...]
    parameters: Parameters
    notes: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)
