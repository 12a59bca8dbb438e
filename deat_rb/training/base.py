"""What a trainer consists of: the bases of schedules, stopping rules and trainers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer
from torchattacks.attack import Attack

from deat_rb.attacks.base import StatelessAttack
from deat_rb.training.engine import Engine
from deat_rb.training.metrics import BatchStats, EpochStats
from deat_rb.utils.errors import DeatError

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class SurrogateLoss:
    """What a trainer descends on.

    Attributes:
        name: Its name in tables and configurations.
        function: ``(adv_logits, labels)`` or, where ``needs_clean``, ``(adv_logits, labels, clean_logits)`` to the
            loss per example (N,).
        needs_clean: Whether the clean images are forwarded too.
    """

    name: str
    function: Callable[..., Tensor]
    needs_clean: bool = False


class Schedule:
    """A number of steps that may rise from epoch to epoch.

    Args:
        steps: The steps of the first epoch.
        max_steps: The most it will ever take; None for no bound.

    Attributes:
        steps: The steps of the next epoch to run.

    Raises:
        DeatError: If a number is negative or the bound lies below the start.
    """

    guided = False

    def __init__(self, steps: int = 1, max_steps: int | None = None) -> None:
        if not isinstance(steps, int) or steps < 0:
            raise DeatError(f"steps = {steps} is not a whole number of 0 or more")
        if max_steps is not None and max_steps < max(steps, 1):
            raise DeatError(f"max_steps = {max_steps} is below {max(steps, 1)}, with which the schedule begins")
        self.steps = steps
        self.max_steps = max_steps

    def update(self, stats: EpochStats) -> None:
        """Takes in the epoch that has just ended and sets ``steps`` for the next one."""

    def alpha(self, alpha: float, eps: float) -> float:
        """The step size of the next epoch, given the method's own."""
        return alpha

    def total_steps(self, epochs: int) -> int | None:
        """The sum of the steps of ``epochs`` epochs, or None where it depends on what training will see."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on, as JSON values."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`.

        Raises:
            ValueError: It is none of this schedule.
        """
        if not isinstance(state["steps"], int) or state["steps"] < 0:
            raise ValueError(f"steps = {state['steps']!r} is not a whole number of 0 or more")
        self.steps = state["steps"]

    def _rise(self) -> None:
        if self.max_steps is None or self.steps < self.max_steps:
            self.steps += 1


class Constant(Schedule):
    """The same number of steps in every epoch: FREE-r, PGD-N, U-FGSM, FAT, TRADES, MART."""

    def __init__(self, steps: int = 1) -> None:
        super().__init__(steps)

    def total_steps(self, epochs: int) -> int:
        """``steps`` times ``epochs``."""
        return self.steps * epochs


@dataclass(frozen=True)
class Stop:
    """A rule's verdict.

    Attributes:
        reason: One sentence for the metrics.
        keep: The epoch whose weights are the result, from 1.
    """

    reason: str
    keep: int


class StoppingRule:
    """Decides after each epoch whether training ends.

    Attributes:
        lookback: How many finished epochs' weights have to be kept, so that the one named by `Stop.keep` is there.
        validation_steps: The steps of the PGD that has to be run on the rule's own batch after each epoch for
            ``stop_robust_acc``; 0 for a rule that needs none.
    """

    lookback = 2
    validation_steps = 0

    def update(self, stats: EpochStats) -> Stop | None:
        """Takes in the epoch that has just ended and says whether it was the last."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on, as JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`."""


Batch = tuple[Tensor, Tensor]


class TrainerBase(StatelessAttack):
    """A method of adversarial training: an attack, a surrogate loss, a schedule and a rule that stops.

    Args:
        attack: What crafts; the model trained is the one it attacks.
        loss: What is learnt from.
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
        loss: SurrogateLoss,
        schedule: Schedule | None = None,
        stopping: StoppingRule | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name or type(self).__name__, attack.model)
        self.crafter = attack
        self.device = attack.device
        self.loss = loss
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
        self.apply_schedule()

    def set_replay_lr(self, rate: Callable[[float], float] | None) -> None:
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
        self.apply_schedule()

    def reset_schedule(self) -> None:
        """Forgets what an earlier `fit` has left in the schedule and the rule; steps set by hand since then stay."""
        if self._first is None:
            self._first = deepcopy(self.state_dict())
        else:
            self.load_state_dict(deepcopy(self._first))

    def apply_schedule(self) -> None:
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

    def check_attack(self, images: Tensor) -> None:
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
        self.apply_schedule()
