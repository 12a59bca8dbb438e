"""Gradient alignment (GradAlign, Andriushchenko and Flammarion 2020, arXiv:2007.02617)."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deat_rb.attacks.base import CraftStats
from deat_rb.attacks.losses import cross_entropy
from deat_rb.attacks.pgd import PGD, Overflows
from deat_rb.methods.trainers import AttackTrainer, check_plain
from deat_rb.training.engine import Engine
from deat_rb.training.surrogate_loss import SurrogateLoss
from deat_rb.utils.errors import DeatError
from deat_rb.utils.units import check_weight


class GradAlignTrainer(AttackTrainer):
    """FGSM with a penalty on the angle between the input gradients at the image and at a random point in the eps-ball.

    To the loss of each example ``align * (1 - cos)`` is added. As in the public code, the gradient at the image is that
    of the attack and a constant; the other one is differentiated again, which takes a second-order backward pass.

    Args:
        attack: A `PGD` on cross-entropy with one step from the clean images.
        loss: The surrogate loss.
        align: Weight of the penalty: 0.2 at eps = 8/255 on CIFAR-10.
        options: As for `AttackTrainer`, without AWP.
    """

    penalty_passes = (1, 2)
    refused = MappingProxyType(
        dict.fromkeys(
            ("awp", "awp_warmup"), "its penalty compares two gradients, which AWP would take at different weights"
        )
    )
    not_compilable = "needs second derivatives, which torch.compile lacks"

    def __init__(self, attack: PGD, *, loss: str | SurrogateLoss = "ce", align: float = 0.2, **options: Any) -> None:
        check_plain(attack, type(self).__name__)
        check_weight("align", align, "the paper uses 0.2 at eps 8/255")
        super().__init__(attack, loss=loss, **options)
        self.align = align

    def _penalty(self, images: Tensor, labels: Tensor, crafting: CraftStats, engine: Engine) -> Tensor:
        first = crafting.gradient
        if first is None:
            raise DeatError(f"steps = {self.steps} cannot be used: gradient alignment needs 1 or more attack steps")
        noise = self.crafter.threat.training_noise(images, self.crafter.eps)
        with engine.autocast():
            point = (images + noise).requires_grad_()
            loss = cross_entropy(self.model(point), labels).sum()
            if isinstance(engine.loss_scale, Tensor):
                loss = loss * (engine.loss_scale / len(images))  # as in the attack, whose loss is a mean
        (second,) = torch.autograd.grad(loss, point, create_graph=True)
        overflows = Overflows(engine.loss_scale)
        second = overflows.masked(second)
        crafting.overflows = crafting.overflows + overflows.count
        one, two = (gradient.float() if gradient.dtype != torch.float64 else gradient for gradient in (first, second))
        cosines = F.cosine_similarity(_of_length_1(one), _of_length_1(two), dim=1, eps=1e-30)
        defined = (one.detach().flatten(1).any(dim=1)) & (two.detach().flatten(1).any(dim=1))
        return self.align * torch.where(defined, 1 - cosines, 0.0)


def _of_length_1(gradient: Tensor) -> Tensor:
    """Return gradients divided by their lengths, as constants, so that squares do not underflow, (N, |x|)."""
    flat = gradient.flatten(1)
    lengths: Tensor = torch.linalg.vector_norm(flat.detach(), dim=1, keepdim=True)
    return flat / lengths.clamp_min(1e-30)
