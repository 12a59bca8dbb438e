"""Base class of one-step methods whose loss also uses the logits at the start of the step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from deat_rb.attacks.losses import at_least_float32
from deat_rb.attacks.pgd import PGD, Overflows, times
from deat_rb.methods.trainers import SharedPassTrainer
from deat_rb.training.costs import Costs
from deat_rb.training.engine import Engine
from deat_rb.training.metrics import BatchStats
from deat_rb.training.surrogate_loss import SurrogateLoss
from deat_rb.utils.errors import DeatError
from deat_rb.utils.units import check_weight


class SharedForwardTrainer(SharedPassTrainer):
    """Attack with one step and penalize the change of the prediction that it causes.

    The forward pass at the start of the step serves both the attack and the penalty, so that a batch takes two forward
    passes. The attack maximizes the surrogate loss, with its label smoothing. The backward pass of the update goes
    through both forward passes.

    Args:
        attack: An attack with one step, in train mode.
        loss: The surrogate loss.
        consistency: Weight of the penalty.
        options: As for `SharedPassTrainer`.
    """

    shares_passes = False  # the update has passes of its own
    refused = MappingProxyType(
        dict.fromkeys(("attack_mode", "awp", "awp_warmup"), "attack and loss share a forward pass, in train mode")
    )
    not_compilable = "takes two gradients from one forward pass, which torch.compile lacks"
    norms = ("Linf",)
    fewest_steps = most_steps = 1

    def __init__(
        self, attack: PGD, *, loss: str | SurrogateLoss = "ce", consistency: float = 10.0, **options: Any
    ) -> None:
        name = type(self).__name__
        check_weight("consistency", consistency)
        super().__init__(attack, loss=loss, **options)
        if attack.norm != "Linf":
            raise DeatError(f"{name} is defined for Linf only, not for {attack.norm}")
        if not attack.in_train_mode:
            raise DeatError(f"{name} uses one forward pass for attack and update, so it cannot attack in eval mode")
        if self.schedule.step_bounds(2) != [(1, 1), (1, 1)]:
            raise DeatError(f"{name} takes one step per batch in every epoch: use deat_rb.training.Constant(1)")
        self.consistency = consistency

    @abstractmethod
    def start(self, images: Tensor, labels: Tensor, engine: Engine) -> Tensor:
        """Return the first iterate of a training batch, (N, C, H, W)."""

    @abstractmethod
    def fresh_start(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the first iterate of images that are not a training batch, (N, C, H, W)."""

    @abstractmethod
    def penalty(self, start_logits: Tensor, logits: Tensor) -> Tensor:
        """Return the weighted penalty on the change of the logits (N, K), per example (N,)."""

    def keep(self, images: Tensor, gradient: Tensor, engine: Engine) -> None:
        """Store what later batches need; called after the attack."""

    def costs(self, steps: int, epochs: int, sizes: Sequence[int], num_classes: int) -> Costs | None:
        """Return the passes of the attack and of the update, and `extra_passes`."""
        if not self.has_known_passes(SharedForwardTrainer):
            return None
        passes = 2 * epochs * len(sizes) + epochs * self.extra_passes(sizes, num_classes)
        return Costs(passes, passes, epochs * len(sizes))

    def extra_passes(self, sizes: Sequence[int], num_classes: int) -> float:
        """Return the passes of an epoch that `start` takes, in mini-batches; arguments as for `costs`."""
        return 0

    def forward(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Generate adversarial examples from a `fresh_start`, without updating the weights."""
        images, labels = self.begin_attack(inputs, labels)
        start = self.fresh_start(images, labels)
        adv: Tensor = self.crafter.threat.ascend(start, images, self.loss_gradient(start, labels), self.crafter.alpha)
        return adv

    def training_step(
        self, images: Tensor, labels: Tensor, optimizer: Optimizer, engine: Engine | None = None
    ) -> BatchStats:
        """Take one step of the attack, then update the weights once; `begin_batch` must be called before."""
        engine = self.begin_step(images, engine)
        crafter, model, function = self.crafter, engine.ddp_model(self.model), self.loss.function
        overflows = Overflows(engine.loss_scale)
        start = self.start(images, labels, engine).requires_grad_()
        with engine.autocast():
            start_logits = model(start)
            objective = times(function(start_logits, labels).sum(), engine.loss_scale)
        (gradient,) = torch.autograd.grad(objective, start, retain_graph=True)
        gradient = overflows.masked(times(gradient, 1 / engine.loss_scale))
        gradient = self.loss.without_weights(gradient, labels)  # attack and l_X are of each example's own loss
        adv = crafter.threat.ascend(start.detach(), images, gradient, crafter.alpha)
        self.keep(images, gradient, engine)
        with engine.autocast():
            logits = model(adv)
            penalty = self.loss.with_weights(self.penalty(start_logits, logits), labels)
            loss = function(logits, labels) + penalty
        engine.update(loss, optimizer)
        return BatchStats(
            examples=len(images),
            loss=at_least_float32(loss.detach()).sum(),
            correct=(logits.argmax(dim=1) == labels).sum(),
            l_x=crafter.threat.total_dual_norm(gradient),
            forwards=2,
            backwards=2,
            updates=1,
            image_size=images[0].numel(),
            overflows=overflows.count,
        )
