"""`AttackTrainer` (attack, then update) and `ReplayTrainer` (both from one backward pass).

Trainers of methods with steps of another kind, such as YOPO, are in modules of their own; those whose passes serve both
attack and update are `SharedPassTrainer`.

A trainer is a `torchattacks.attack.Attack`: calling it generates adversarial examples with the current epoch's attack,
without updating the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchattacks.attack import Attack

from deat_rb.attacks.base import CraftStats, StatelessAttack
from deat_rb.attacks.gradient_probe import GradientProbe, check_every_image_is_attacked, uses_mean_reduction
from deat_rb.attacks.losses import at_least_float32, main_class
from deat_rb.attacks.pgd import PGD
from deat_rb.methods.losses import surrogate
from deat_rb.methods.weight_perturbation import WeightPerturbation
from deat_rb.training.costs import Costs
from deat_rb.training.engine import Engine
from deat_rb.training.lr import set_rate
from deat_rb.training.metrics import BatchStats
from deat_rb.training.surrogate_loss import SurrogateLoss
from deat_rb.training.trainer import Trainer
from deat_rb.utils.errors import DeatError
from deat_rb.utils.module_state import frozen_parameters, preserve_modes, preserved_buffers


class AttackTrainer(Trainer):
    """Attack, then update: PGD-N, U-FGSM, FAT, TRADES, MART, and their guided forms (Algorithms 4 and 5).

    Any gradient attack of torchattacks with an eps can be used; unless it is a `deat_rb.PGD`, a probe records its
    gradient magnitude. Attacks that return the clean image when they fail to change the prediction (APGD, APGDT, FAB,
    AutoAttack and others made for evaluation) are rejected, because most training images would remain clean.

    Args:
        attack: The attack.
        loss: The surrogate loss: ``ce``, ``trades``, ``mart`` or a custom loss.
        awp: Gamma of adversarial weight perturbation (`WeightPerturbation`); None to train without it. It adds one
            backward pass per batch and the forward passes of the loss, which do not update BatchNorm's statistics.
        awp_warmup: Number of epochs without AWP at the beginning of training.
        options: As for `Trainer`.
    """

    takes_soft_labels = True

    _averages: bool | None = None
    _checked = False

    def __init__(
        self,
        attack: Attack,
        *,
        loss: str | SurrogateLoss = "ce",
        awp: float | None = None,
        awp_warmup: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(attack, loss=surrogate(loss), **options)
        if awp is None and awp_warmup is not None:
            raise DeatError("awp_warmup has no effect without awp: give awp as well, such as awp=0.005")
        self.awp = None if awp is None else WeightPerturbation(awp, awp_warmup or 0)

    @property
    def _own(self) -> PGD | None:
        """The attack if it is a `deat_rb.PGD`, which returns its statistics itself; otherwise None."""
        crafter = self.crafter
        return crafter if isinstance(crafter, PGD) and type(crafter).forward is PGD.forward else None

    def reads_statistics(self) -> bool:
        """Return whether the attack may run in eval mode."""
        return self._own is None or not self._own.in_train_mode

    def costs(self, steps: int, epochs: int, sizes: Sequence[int], num_classes: int) -> Costs | None:
        """Return the passes of a `deat_rb.PGD`, of the update, of AWP and of the penalty."""
        if not self.has_known_passes(AttackTrainer):
            return None
        perturbed = 0 if self.awp is None else max(epochs - self.awp.warmup, 0)
        of_attack = steps + (epochs if steps and self.crafter.loss == "kl" else 0)
        of_loss = (epochs + perturbed) * (2 if self.loss.needs_clean else 1)
        forwards, backwards = self.penalty_passes
        return Costs(
            backwards=(steps + perturbed + epochs * (1 + backwards)) * len(sizes),
            forwards=(of_attack + of_loss + epochs * forwards) * len(sizes),
            updates=epochs * len(sizes),
        )

    def check_attack(self, images: Tensor) -> None:
        """Check that the attack computes gradients and perturbs every image; detect whether it averages its loss.

        A resumed run checks the attack again, but takes from the checkpoint whether the loss is averaged.
        """
        if self._own is not None or self._checked:
            return
        check_every_image_is_attacked(self.crafter, images.contiguous())
        self._checked = True
        if self._averages is None:
            self._averages = uses_mean_reduction(self.crafter, images.contiguous())

    def craft(
        self, images: Tensor, labels: Tensor, loss_scale: float | Tensor = 1.0, fixed_size: bool = False
    ) -> tuple[Tensor, CraftStats]:
        """Generate adversarial examples for training; in train mode this updates BatchNorm's statistics.

        Args:
            images: As for `training_step`.
            labels: (N,).
            loss_scale: Loss scale for the gradients of a `deat_rb.PGD`, which halves it on overflow if it is a tensor.
            fixed_size: Whether a `deat_rb.PGD` always passes the whole batch to the model.

        Returns:
            The adversarial examples (N, C, H, W) and the attack's statistics.
        """
        crafter, own = self.crafter, self._own
        with preserve_modes(self.model):
            if own is not None:
                own.loss_scale, own.fixed_size = loss_scale, fixed_size
                try:
                    own.enter_mode()
                    return own.craft(images, labels)
                finally:  # so that later calls, perhaps on another device, use no scale
                    own.loss_scale, own.fixed_size = 1.0, False
            self.check_attack(images)
            # Calling a StatelessAttack would undo the updates of BatchNorm's statistics.
            attack = crafter.forward if isinstance(crafter, StatelessAttack) else crafter
            with GradientProbe(self.model) as probe:
                if isinstance(crafter, StatelessAttack):
                    crafter.enter_mode()
                # Some torchattacks attacks flatten the images with `view`, which fails in channels_last.
                adv: Tensor = attack(images.contiguous(), labels)
            return adv.detach(), probe.stats(len(images), unit=len(images) if self._averages else 1, norm=self.norm)

    def training_step(
        self, images: Tensor, labels: Tensor, optimizer: Optimizer, engine: Engine | None = None
    ) -> BatchStats:
        """Generate adversarial examples (Algorithm 4, lines 6-12), then update the weights once (line 13)."""
        engine = self.begin_step(images, engine)
        # Freeze only if compiled: a compiled pass computes all requested gradients, even if unused; an eager one would
        # not cache the casts of frozen weights.
        with engine.autocast(), frozen_parameters(self.model) if engine.compiled else nullcontext():
            adv, crafting = self.craft(images, labels, engine.loss_scale, fixed_size=engine.fixed_size)
        extra = 0
        try:
            if self.awp is not None and self.progress >= self.awp.warmup:
                self._perturb_weights(self.awp, images, adv, labels, engine)
                extra = 1
            loss, adv_logits = self._forward_losses(engine.ddp_model(self.model), images, adv, labels, engine)
            penalty = self._penalty(images, labels, crafting, engine)
            loss = loss if penalty is None else loss + self.loss.with_weights(penalty, labels)
            engine.update(loss, optimizer)
        finally:
            if self.awp is not None:
                self.awp.remove()  # done by `after_step`, unless the loss scaler skipped the step
        own = 2 if self.loss.needs_clean else 1
        return BatchStats(
            examples=len(images),
            loss=at_least_float32(loss.detach()).sum(),
            correct=(adv_logits.argmax(dim=1) == main_class(labels)).sum(),
            l_x=crafting.l_x,
            forwards=crafting.forwards + own * (1 + extra) + self.penalty_passes[0],
            backwards=crafting.backwards + 1 + extra + self.penalty_passes[1],
            updates=1,
            image_size=images[0].numel(),
            overflows=crafting.overflows,
        )

    def _forward_losses(
        self, model: nn.Module, images: Tensor, adv: Tensor, labels: Tensor, engine: Engine
    ) -> tuple[Tensor, Tensor]:
        """Return the surrogate loss per example (N,) and the logits (N, K) of the adversarial examples."""
        # In an autocast region of its own: casts of weights cached by a no_grad forward carry no gradient, and those
        # cached before a perturbation are outdated.
        with engine.autocast():
            if self.loss.needs_clean:
                clean_logits = model(images)
                adv_logits: Tensor = model(adv)
                return self.loss.function(adv_logits, labels, clean_logits), adv_logits
            adv_logits = model(adv)
            return self.loss.function(adv_logits, labels), adv_logits

    def _penalty(self, images: Tensor, labels: Tensor, crafting: CraftStats, engine: Engine) -> Tensor | None:
        """Return a penalty to add to the loss of each example, (N,), or None."""
        return None

    def _perturb_weights(
        self, awp: WeightPerturbation, images: Tensor, adv: Tensor, labels: Tensor, engine: Engine
    ) -> None:
        """Add AWP's perturbation to the weights, from the gradient of the mean loss over all ranks."""
        weights = awp.weights(self.model)
        with preserved_buffers(self.model), engine.counters.paused():
            losses, _ = self._forward_losses(self.model, images, adv, labels, engine)
            loss = losses.sum() * (engine.loss_scale / engine.loss_divisor(len(losses)))
            found = torch.autograd.grad(loss, weights, allow_unused=True)
        gradients = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]
        if isinstance(engine.loss_scale, Tensor):  # may differ between ranks
            torch._foreach_div_(gradients, engine.loss_scale)
        engine.world.average(gradients)
        awp.add(weights, gradients)

    def step_settings(self) -> tuple[object, ...]:
        """Return the settings of `Trainer.step_settings`, and whether the step includes AWP."""
        return *super().step_settings(), self.awp is not None and (self.awp.gamma, self.progress >= self.awp.warmup)

    def after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remove AWP's perturbation, so that it is not part of the averaged weights."""
        if self.awp is not None:
            self.awp.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return the method's state, without the weights, as JSON values."""
        return {**super().state_dict(), "averages": self._averages}

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Restore a `state_dict`."""
        super().load_state_dict(state, tensors)
        if state["averages"] is not None:  # None if the attack was not checked yet
            self._averages = state["averages"]


def check_plain(attack: Attack, trainer: str) -> None:
    """Refuse an attack other than a `PGD` on cross-entropy without tau and omega, for a trainer that needs that."""
    if not isinstance(attack, PGD) or attack.loss != "ce" or attack.tau is not None or attack.omega:
        raise DeatError(f"{trainer} needs a deat_rb.PGD on cross-entropy without tau and omega")


class SharedPassTrainer(Trainer):
    """A method that takes the steps of the attack itself, because its passes serve both the attack and the update.

    Args:
        attack: A `PGD` on cross-entropy without tau and omega, whose start, eps and alpha are used.
        loss: The surrogate loss, which the attack maximizes, too; one that needs no logits of the clean images.
        options: As for `Trainer`.
    """

    shares_passes = True
    refused = MappingProxyType(
        dict.fromkeys(("attack_mode", "awp", "awp_warmup"), "each of its passes serves both attack and update")
    )

    def __init__(self, attack: PGD, *, loss: str | SurrogateLoss = "ce", **options: Any) -> None:
        name = type(self).__name__
        check_plain(attack, name)
        super().__init__(attack, loss=surrogate(loss), **options)
        if self.loss.needs_clean:
            raise DeatError(f"{name} cannot use the loss {self.loss.name}, which needs the clean images' logits")

    def reads_statistics(self) -> bool:
        """Return False: all passes are in train mode."""
        return False


class ReplayTrainer(SharedPassTrainer):
    """Attack and update from one backward pass: FREE, DEAT and M-DEAT (Algorithm 1, lines 4-10; Algorithm 3).

    Args:
        attack: The attack.
        loss: The surrogate loss.
        carry: Whether the perturbation is carried from batch to batch, starting at zero (FREE, Shafahi et al. 2019),
            instead of being initialized by the attack in every batch. As in fast_adversarial's code it is clipped to
            the bounds of the images that it was computed for, not of the next ones.
        lr_per_replay: Whether the learning rate is updated with each replay, as in FREE's public code, instead of once
            per batch.
        options: As for `SharedPassTrainer`.
    """

    fewest_steps = 1
    takes_soft_labels = True

    def __init__(
        self,
        attack: PGD,
        *,
        loss: str | SurrogateLoss = "ce",
        carry: bool = False,
        lr_per_replay: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(attack, loss=loss, **options)
        self.carry = carry
        self.lr_per_replay = lr_per_replay
        self._carried: Tensor | None = None

    def costs(self, steps: int, epochs: int, sizes: Sequence[int], num_classes: int) -> Costs | None:
        """Return one pass and one update per step."""
        if not self.has_known_passes(ReplayTrainer):
            return None
        passes = steps * len(sizes)
        return Costs(passes, passes, passes)

    def initialize(self, images: Tensor, part: slice = slice(None)) -> Tensor:
        """Return the first iterate of ``images`` (N, C, H, W) (Algorithm 1, line 4).

        Args:
            images: A batch, or this rank's part of it.
            part: The indices of ``images`` in the global batch.
        """
        if not self.carry:
            adv: Tensor = self.crafter.initialize(images)
            return adv
        if self._carried is None or self._carried.shape[1:] != images.shape[1:]:
            return images
        carried = self._carried[part][: len(images)]
        if missing := len(images) - len(carried):
            carried = torch.cat([carried, torch.zeros_like(images[:missing])])
        return images + carried

    def forward(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Generate adversarial examples with the replays' steps, without updating the weights."""
        images, labels = self.begin_attack(inputs, labels)
        adv = self.initialize(images)
        for _ in range(self.steps):
            adv = self.crafter.threat.ascend(adv, images, self.loss_gradient(adv, labels), self.crafter.alpha)
        return adv

    def training_step(
        self, images: Tensor, labels: Tensor, optimizer: Optimizer, engine: Engine | None = None
    ) -> BatchStats:
        """Replay one batch r times (Algorithm 1, lines 4-10)."""
        engine = self.begin_step(images, engine)
        threat = self.crafter.threat
        adv, gradient = self.initialize(images, engine.rank_slice(len(images))), images
        overflows: float | Tensor = 0.0
        for replay in range(self.steps):
            if self.lr_per_replay and self._rate is not None:
                set_rate(optimizer, self._rate(replay / self.steps))
            adv = adv.detach().requires_grad_()
            with engine.autocast():
                logits = engine.ddp_model(self.model)(adv)
                loss = self.loss.function(logits, labels)
            gradient, overflowed = engine.backward_and_step(loss, optimizer, adv)
            overflows = overflows + overflowed
            adv = threat.ascend(adv.detach(), images, gradient, self.crafter.alpha)
        if self.carry:
            self._carry_over(engine.all_gather(adv - images))
        own = self.loss.without_weights(gradient, labels)  # l_X is that of each example's own loss
        return BatchStats(
            examples=len(images),
            loss=at_least_float32(loss.detach()).sum(),
            correct=(logits.argmax(dim=1) == main_class(labels)).sum(),
            l_x=threat.total_dual_norm(own) * engine.loss_divisor(len(images)),
            forwards=self.steps,
            backwards=self.steps,
            updates=self.steps,
            image_size=images[0].numel(),
            overflows=overflows,
        )

    def _carry_over(self, delta: Tensor) -> None:
        """Store the global batch's perturbation, in place if it fits; a short batch replaces only the first rows."""
        if self._carried is None or self._carried.shape[1:] != delta.shape[1:] or len(self._carried) < len(delta):
            self._carried = delta
        else:
            self._carried[: len(delta)].copy_(delta)

    def step_settings(self) -> tuple[object, ...]:
        """Return the settings of `Trainer.step_settings`, and the memory address of FREE's perturbation."""
        place = None if self._carried is None else (self._carried.data_ptr(), self._carried.shape)
        return *super().step_settings(), place

    def tensors(self) -> dict[str, Tensor]:
        """Return the perturbation that FREE carries to the next batch, if there is one."""
        return {} if self._carried is None else {"carried": self._carried}

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Restore a `state_dict` and its `tensors`."""
        super().load_state_dict(state, tensors)
        carried = tensors.get("carried")
        if carried is not None and self._carried is not None and carried.shape == self._carried.shape:
            self._carried.copy_(carried)
        else:
            self._carried = None if carried is None else carried.to(self.device)
