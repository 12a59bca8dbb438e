"""Two trainers: one that maximises and then descends, one that does both from the same backward pass.

A trainer is a `torchattacks.attack.Attack`: call it and it crafts as it would in training now, without learning.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from copy import deepcopy
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torchattacks.attack import Attack

from deat_rb.attacks import PGD, QuietAttack
from deat_rb.engine import Engine
from deat_rb.errors import DeatError
from deat_rb.guard import frozen, modes_restored
from deat_rb.losses import SurrogateLoss, surrogate
from deat_rb.probe import GradientProbe, averages
from deat_rb.schedules import Constant, Schedule
from deat_rb.stats import BatchStats, CraftStats
from deat_rb.stopping import StoppingRule
from deat_rb.threat import Linf

if TYPE_CHECKING:
    from deat_rb.history import History

Batch = tuple[Tensor, Tensor]


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Sets the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class Trainer(QuietAttack):
    """A method of adversarial training: an attack, a surrogate loss, a schedule and a rule that stops.

    Args:
        attack: What crafts; the model trained is the one it attacks.
        loss: What is learnt from: ``ce``, ``trades``, ``mart`` or a `SurrogateLoss`.
        schedule: How many steps the attack takes; by default as many as it has.
        stopping: When training ends early, if ever.
        name: What to call the method.

    Attributes:
        crafter: The attack.
        base_alpha: The attack's own step size, which a guided schedule may raise; None where it has none.

    Raises:
        DeatError: If a schedule is to change the steps of an attack that has none.
    """

    def __init__(
        self,
        attack: Attack,
        *,
        loss: str | SurrogateLoss = "ce",
        schedule: Schedule | None = None,
        stopping: StoppingRule | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name or type(self).__name__, attack.model)
        self.crafter = attack
        self.device = attack.device
        self.loss = surrogate(loss)
        if not isinstance(getattr(attack, "eps", None), int | float):
            raise DeatError(
                f"{attack.attack} has no eps, so that it cannot be trained with; wrap one attack with an eps"
            )
        has_steps = isinstance(getattr(attack, "steps", None), int)
        if schedule is not None and not has_steps:
            raise DeatError(
                f"{attack.attack} has no steps, so a schedule cannot set them; "
                "wrap an attack that has, such as torchattacks.PGD"
            )
        self.schedule = schedule or Constant(attack.steps if has_steps else 1)
        self.stopping = stopping
        self.base_alpha: float | None = getattr(attack, "alpha", None)
        self._rate: Callable[[float], float] | None = None
        self._first: dict[str, Any] | None = None
        self.follow_schedule()

    def follow_rate(self, rate: Callable[[float], float] | None) -> None:
        """Is given the learning rate by the share of the present batch that is done, while `fit` runs."""
        self._rate = rate

    @property
    def eps(self) -> float:
        """The attack's radius, in [0, 1] pixel units."""
        return float(self.crafter.eps)

    @property
    def alpha(self) -> float | None:
        """The attack's step size at its present number of steps; None where it takes none."""
        return getattr(self.crafter, "alpha", None) if self.steps else None

    @property
    def steps(self) -> int:
        """The steps r of the present epoch; setting them moves the schedule there."""
        return self.schedule.steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self.schedule.steps = steps
        if self._first is not None:
            self._first["schedule"]["steps"] = steps
        self.follow_schedule()

    def begin_anew(self) -> None:
        """Forgets what an earlier `fit` has left in the schedule and the rule; steps set by hand since then stay."""
        if self._first is None:
            self._first = deepcopy(self.state_dict())
        else:
            self.load_state_dict(deepcopy(self._first))

    def follow_schedule(self) -> None:
        """Gives the attack the steps and the step size that the schedule has for the next epoch."""
        if hasattr(self.crafter, "steps"):
            self.crafter.steps = self.schedule.steps
        if self.base_alpha is not None:
            self.crafter.alpha = self.schedule.alpha(self.base_alpha, self.eps)

    def forward(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Crafts as training would now; `__call__` sees to it that nothing is learnt."""
        adv: Tensor = self.crafter(inputs, labels, *args, **kwargs)
        return adv.detach()

    def enter_mode(self) -> None:
        """Nothing: the attack inside sets the mode it crafts in."""

    def set_model_training_mode(
        self, model_training: bool = False, batchnorm_training: bool = False, dropout_training: bool = False
    ) -> None:
        """Sets the mode that crafting runs in, as torchattacks has it."""
        for attack in self._attacks.values():
            attack.set_model_training_mode(model_training, batchnorm_training, dropout_training)

    def require_pixels(self) -> None:
        """Refuses to train after `set_normalization_used`: a model that is trained takes images in [0, 1].

        Raises:
            DeatError: Always then.
        """
        if self.normalization_used is not None or self.crafter.normalization_used is not None:
            raise DeatError(
                "training takes images in [0, 1], so that eps is in pixel units: put the normalisation into the model, "
                "as deat_rb.build_model does, in place of set_normalization_used"
            )

    def examine(self, images: Tensor) -> None:
        """Looks, on some images, whether the attack can be trained with; the model is left as it was.

        Args:
            images: In [0, 1], (N, C, H, W), on the model's device.

        Raises:
            DeatError: It cannot.
        """

    @abstractmethod
    def training_step(
        self, images: Tensor, labels: Tensor, optimizer: Optimizer, engine: Engine | None = None
    ) -> BatchStats:
        """Learns from one batch.

        Args:
            images: In [0, 1], (N, C, H, W), on the model's device.
            labels: (N,).
            optimizer: Of the model's parameters.
            engine: Precision and processes; by default fp32 where the model is.
        """

    def fit(self, train_loader: Iterable[Batch], val_loader: Iterable[Batch] | None = None, **options: Any) -> History:
        """Trains; the options and what comes back are those of `deat_rb.fit.fit`."""
        from deat_rb.fit import fit

        return fit(self, train_loader, val_loader, **options)

    def state_dict(self) -> dict[str, Any]:
        """What the method carries from epoch to epoch beside the weights, as JSON values."""
        return {
            "schedule": self.schedule.state_dict(),
            "stopping": self.stopping.state_dict() if self.stopping else None,
        }

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that the method carries from batch to batch."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Goes on from a `state_dict` and its `tensors`."""
        self.schedule.load_state_dict(state["schedule"])
        if self.stopping is not None:
            self.stopping.load_state_dict(state["stopping"])
        self.follow_schedule()


class AttackTrainer(Trainer):
    """Maximise, then descend: PGD-N, U-FGSM, FAT, TRADES, MART, and their guided forms (Algorithms 4 and 5).

    Around any torchattacks attack; its gradient magnitude is seen by a probe.
    """

    _averages: bool | None = None

    @property
    def _own(self) -> PGD | None:
        """The attack, if it is ours, which says itself what it saw and what it cost."""
        crafter = self.crafter
        return crafter if isinstance(crafter, PGD) and type(crafter).forward is PGD.forward else None

    def examine(self, images: Tensor) -> None:
        """Refuses another's attack that computes no gradient, and finds out whether its loss is averaged."""
        if self._averages is None and self._own is None:
            self._averages = averages(self.crafter, images.contiguous())

    def craft(self, images: Tensor, labels: Tensor, loss_scale: float = 1.0) -> tuple[Tensor, CraftStats]:
        """Crafts and says what it cost; the attack sets the mode it wants, every module gets its own back.

        Args:
            images: As for `training_step`.
            labels: (N,).
            loss_scale: Under which our own attacks take their gradients.
        """
        crafter, own = self.crafter, self._own
        with modes_restored(self.model):
            if own is not None:
                own.loss_scale = loss_scale
                own.enter_mode()
                return own.craft(images, labels)
            self.examine(images)
            # Called as such, an attack of ours gives BatchNorm's statistics back, which crafting in train mode moves.
            attack = crafter.forward if isinstance(crafter, QuietAttack) else crafter
            with GradientProbe(self.model) as probe:
                if isinstance(crafter, QuietAttack):
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
        with engine.autocast(), frozen(self.model) if engine.compiled else nullcontext():
            adv, crafting = self.craft(images, labels, engine.loss_scale)
        # A region of its own: the casts of weights that a no_grad forward caches would carry no gradient here.
        with engine.autocast():
            learner = engine.learner(self.model)
            if self.loss.needs_clean:
                clean_logits = learner(images)
                adv_logits = learner(adv)
                loss = self.loss.function(adv_logits, labels, clean_logits)
            else:
                adv_logits = learner(adv)
                loss = self.loss.function(adv_logits, labels)
        engine.descend(loss, optimizer, images)
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

    def __init__(self, attack: PGD, *, carry: bool = False, lr_per_replay: bool = False, **options: Any) -> None:
        if not isinstance(attack, PGD) or attack.loss != "ce" or attack.tau is not None:
            raise DeatError(
                "a replay trainer crafts with deat_rb.PGD on cross-entropy; its update shares that gradient"
            )
        super().__init__(attack, **options)
        if self.steps < 1:
            raise DeatError(f"steps = {self.steps} replays would learn nothing; a replay trainer needs 1 or more")
        if self.loss.needs_clean:
            raise DeatError(f"a replay trainer has one forward per replay, and the loss {self.loss.name} needs two")
        self.carry = carry
        self.lr_per_replay = lr_per_replay
        self._carried: Tensor | None = None

    def begin(self, images: Tensor, part: slice = slice(None)) -> Tensor:
        """Where the first replay of ``images`` (N, C, H, W) begins (Algorithm 1, line 4).

        Args:
            images: A batch or, of a batch divided over processes, a part.
            part: Which.
        """
        if not self.carry:
            begun: Tensor = self.crafter.begin(images)
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
        adv: Tensor = self.crafter.craft(images, labels, adv=self.begin(images))[0]
        return adv

    def training_step(
        self, images: Tensor, labels: Tensor, optimizer: Optimizer, engine: Engine | None = None
    ) -> BatchStats:
        """Replays one batch r times (Algorithm 1, lines 4-10)."""
        self.require_pixels()
        engine = engine or Engine(images.device)
        threat = Linf(self.eps)
        adv, gradient = self.begin(images, engine.part(len(images))), images
        for replay in range(self.steps):
            if self.lr_per_replay and self._rate is not None:
                set_rate(optimizer, self._rate(replay / self.steps))
            adv = adv.detach().requires_grad_()
            with engine.autocast():
                logits = engine.learner(self.model)(adv)
                loss = self.loss.function(logits, labels)
            gradient = engine.descend(loss, optimizer, adv)
            adv = threat.ascend(adv.detach(), images, gradient, self.crafter.alpha)
        if self.carry:
            self._keep(engine.gathered(adv - images))
        return BatchStats(
            examples=len(images),
            loss=loss.detach().sum(),
            correct=(logits.argmax(dim=1) == labels).sum(),
            l_x=gradient.abs().sum() * engine.averaged_over(len(images)),
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
