"""Two trainers: one that maximises and then descends, one that does both from the same backward pass.

A trainer is a `torchattacks.attack.Attack`: call it and it crafts as it would in training now, without learning.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torchattacks.attack import Attack

from deat_rb.attacks.base import CraftStats, StatelessAttack
from deat_rb.attacks.gradient_probe import GradientProbe, uses_mean_reduction
from deat_rb.attacks.pgd import PGD
from deat_rb.attacks.threat_models import Linf
from deat_rb.methods.losses import surrogate
from deat_rb.training.base import SurrogateLoss
from deat_rb.training.engine import Engine
from deat_rb.training.lr import set_rate
from deat_rb.training.metrics import BatchStats
from deat_rb.training.trainer import Trainer
from deat_rb.utils.errors import DeatError
from deat_rb.utils.module_state import frozen_parameters, preserve_modes

if TYPE_CHECKING:
    pass


class AttackTrainer(Trainer):
    """Maximise, then descend: PGD-N, U-FGSM, FAT, TRADES, MART, and their guided forms (Algorithms 4 and 5).

    Around any torchattacks attack; its gradient magnitude is seen by a probe.
    """

    _averages: bool | None = None

    def __init__(self, attack: Attack, *, loss: str | SurrogateLoss = "ce", **options: Any) -> None:
        super().__init__(attack, loss=surrogate(loss), **options)

    @property
    def _own(self) -> PGD | None:
        """The attack, if it is ours, which says itself what it saw and what it cost."""
        crafter = self.crafter
        return crafter if isinstance(crafter, PGD) and type(crafter).forward is PGD.forward else None

    def check_attack(self, images: Tensor) -> None:
        """Refuses another's attack that computes no gradient, and finds out whether its loss is averaged."""
        if self._averages is None and self._own is None:
            self._averages = uses_mean_reduction(self.crafter, images.contiguous())

    def craft(self, images: Tensor, labels: Tensor, loss_scale: float = 1.0) -> tuple[Tensor, CraftStats]:
        """Crafts and says what it cost; the attack sets the mode it wants, every module gets its own back.

        Args:
            images: As for `training_step`.
            labels: (N,).
            loss_scale: Under which our own attacks take their gradients.
        """
        crafter, own = self.crafter, self._own
        with preserve_modes(self.model):
            if own is not None:
                own.loss_scale = loss_scale
                own.enter_mode()
                return own.craft(images, labels)
            self.check_attack(images)
            # Called as such, an attack of ours gives BatchNorm's statistics back, which crafting in train mode moves.
            attack = crafter.forward if isinstance(crafter, StatelessAttack) else crafter
            with GradientProbe(self.model) as probe:
                if isinstance(crafter, StatelessAttack):
                    crafter.enter_mode()
                # Some of torchattacks' view their images as vectors, which channels_last does not allow.
                adv: Tensor = attack(images.contiguous(), labels)
            return adv.detach(), probe.stats(len(images), unit=len(images) if self._averages else 1)

    def training_step(
        self, images: Tensor, labels: Tensor, optimizer: Optimizer, engine: Engine | None = None
    ) -> BatchStats:
        """Crafts (Algorithm 4, lines 6-12), then updates the weights once (line 13)."""
        self.require_pixels()
        engine = engine or Engine(images.device)
        # Compiled passes compute all gradients that are asked for; eager ones cache no casts of frozen weights.
        with engine.autocast(), frozen_parameters(self.model) if engine.compiled else nullcontext():
            adv, crafting = self.craft(images, labels, engine.loss_scale)
        # A region of its own: the casts of weights that a no_grad forward caches would carry no gradient here.
        with engine.autocast():
            ddp_model = engine.ddp_model(self.model)
            if self.loss.needs_clean:
                clean_logits = ddp_model(images)
                adv_logits = ddp_model(adv)
                loss = self.loss.function(adv_logits, labels, clean_logits)
            else:
                adv_logits = ddp_model(adv)
                loss = self.loss.function(adv_logits, labels)
        engine.backward_and_step(loss, optimizer, images)
        return BatchStats(
            examples=len(images),
            loss=loss.detach().sum(),
            correct=(adv_logits.argmax(dim=1) == labels).sum(),
            l_x=crafting.l_x,
            forwards=crafting.forwards + (2 if self.loss.needs_clean else 1),
            backwards=crafting.backwards + 1,
            updates=1,
            image_size=images[0].numel(),
        )

    def state_dict(self) -> dict[str, Any]:
        """What the method carries from epoch to epoch beside the weights, as JSON values."""
        return {**super().state_dict(), "averages": self._averages}

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Goes on from a `state_dict`."""
        super().load_state_dict(state, tensors)
        self._averages = state["averages"]


class ReplayTrainer(Trainer):
    """Both from one backward: FREE, DEAT and M-DEAT (Algorithm 1, lines 4-10; Algorithm 3).

    Args:
        attack: A `PGD`, whose start, loss, eps and alpha the replays take.
        carry: Whether the perturbation is carried from batch to batch, from zero, as FREE does (Shafahi et al. 2019).
        lr_per_replay: Whether the learning rate moves with each replay, as in FREE's public code, and not once per
            batch.
        options: As `Trainer` has them.
    """

    def __init__(
        self,
        attack: PGD,
        *,
        loss: str | SurrogateLoss = "ce",
        carry: bool = False,
        lr_per_replay: bool = False,
        **options: Any,
    ) -> None:
        if not isinstance(attack, PGD) or attack.loss != "ce" or attack.tau is not None:
            raise DeatError(
                "a replay trainer crafts with deat_rb.PGD on cross-entropy; its update shares that gradient"
            )
        super().__init__(attack, loss=surrogate(loss), **options)
        if self.steps < 1:
            raise DeatError(f"steps = {self.steps} replays would learn nothing; a replay trainer needs 1 or more")
        if self.loss.needs_clean:
            raise DeatError(f"a replay trainer has one forward per replay, and the loss {self.loss.name} needs two")
        self.carry = carry
        self.lr_per_replay = lr_per_replay
        self._carried: Tensor | None = None

    def initialize(self, images: Tensor, part: slice = slice(None)) -> Tensor:
        """Where the first replay of ``images`` (N, C, H, W) begins (Algorithm 1, line 4).

        Args:
            images: A batch or, of a batch divided over processes, a part.
            part: Which.
        """
        if not self.carry:
            begun: Tensor = self.crafter.initialize(images)
            return begun
        delta = torch.zeros_like(images)
        if self._carried is not None and self._carried.shape[1:] == images.shape[1:]:
            kept = self._carried[part][: len(images)]
            delta[: len(kept)] = kept
        return (images + delta).clamp(0, 1)

    def forward(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Crafts as the replays would if the weights held still."""
        images = inputs.detach().to(self.device)
        self.crafter.enter_mode()
        adv: Tensor = self.crafter.craft(images, labels, adv=self.initialize(images))[0]
        return adv

    def training_step(
        self, images: Tensor, labels: Tensor, optimizer: Optimizer, engine: Engine | None = None
    ) -> BatchStats:
        """Replays one batch r times (Algorithm 1, lines 4-10)."""
        self.require_pixels()
        engine = engine or Engine(images.device)
        threat = Linf(self.eps)
        adv, gradient = self.initialize(images, engine.rank_slice(len(images))), images
        for replay in range(self.steps):
            if self.lr_per_replay and self._rate is not None:
                set_rate(optimizer, self._rate(replay / self.steps))
            adv = adv.detach().requires_grad_()
            with engine.autocast():
                logits = engine.ddp_model(self.model)(adv)
                loss = self.loss.function(logits, labels)
            gradient = engine.backward_and_step(loss, optimizer, adv)
            adv = threat.ascend(adv.detach(), images, gradient, self.crafter.alpha)
        if self.carry:
            self._keep(engine.all_gather(adv - images))
        return BatchStats(
            examples=len(images),
            loss=loss.detach().sum(),
            correct=(logits.argmax(dim=1) == labels).sum(),
            l_x=gradient.abs().sum() * engine.loss_divisor(len(images)),
            forwards=self.steps,
            backwards=self.steps,
            updates=self.steps,
            image_size=images[0].numel(),
        )

    def _keep(self, delta: Tensor) -> None:
        if self._carried is None or self._carried.shape[1:] != delta.shape[1:] or len(self._carried) <= len(delta):
            self._carried = delta
        else:
            self._carried = torch.cat([delta, self._carried[len(delta) :]])

    def tensors(self) -> dict[str, Tensor]:
        """FREE's perturbation."""
        return {} if self._carried is None else {"carried": self._carried}

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Goes on from a `state_dict` and its `tensors`."""
        super().load_state_dict(state, tensors)
        carried = tensors.get("carried")
        self._carried = None if carried is None else carried.to(self.device)
