"""Base class of trainers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torchattacks.attack import Attack

from deat_rb.attacks.base import NEEDS_LABELS, StatelessAttack
from deat_rb.attacks.names import norm_of
from deat_rb.attacks.pgd import PGD
from deat_rb.attacks.threat_models import THREATS
from deat_rb.training.costs import Costs
from deat_rb.training.engine import Engine
from deat_rb.training.metrics import BatchStats, EpochStats
from deat_rb.training.place import Place
from deat_rb.training.schedule import Constant, Schedule
from deat_rb.training.soft_labels import who_needs_one_class
from deat_rb.training.stopping_rule import StoppingRule
from deat_rb.training.surrogate_loss import SurrogateLoss
from deat_rb.utils.devices import check_outside_autocast
from deat_rb.utils.errors import DeatError
from deat_rb.utils.module_state import require_autograd
from deat_rb.utils.text import counted
from deat_rb.utils.units import is_whole_number

Batch = tuple[Tensor, Tensor]


class TrainerBase(StatelessAttack):
    """A method of adversarial training: an attack, a surrogate loss, a step schedule and a stopping rule.

    Args:
        attack: Generates the adversarial examples; the model that it attacks is trained.
        loss: The surrogate loss.
        schedule: Attack steps per epoch; by default constant.
        stopping: The stopping rule; None for none.
        name: The method's name; by default that of the class.
        eps_warmup: Number of epochs over which the radius of training rises linearly from 0 to the attack's eps, and
            alpha in proportion; see `warmed_up`.

    Attributes:
        crafter: The attack that generates the adversarial examples.
        base_alpha: Initial step size of the attack, which a guided schedule may raise; None if the attack has none.
        progress: Epochs trained so far, fractional, on which warm-ups depend; set by `fit`.

    Raises:
        DeatError: ``attack`` is not an attack with an eps, or a schedule is given but the attack has no steps.
    """

    needs_positions = False
    """Whether `begin_batch` needs the positions of a batch's images among the training images."""

    needs_epochs = False
    """Whether `begin_batch` needs the number of epochs, so that training cannot be open-ended."""

    refused: Mapping[str, str] = MappingProxyType({})
    """Why options of most methods are none of this one, as a clause by option."""

    not_compilable: str | None = None
    """Why a training step does not work with torch.compile, as the end of a sentence; None if it does."""

    takes_soft_labels = False
    """Whether a training step also takes class probabilities (N, K) as labels, if the loss and the attack do."""

    penalty_passes = (0, 0)
    """Forward and backward passes per batch of a penalty and its derivative, beside those of attack and loss."""

    shares_passes = False
    """Whether each pass serves both the attack and the update."""

    norms: tuple[str, ...] = tuple(THREATS)
    """The norms in which the method is defined."""

    fewest_steps = 0
    """Lower bound of the attack steps of an epoch."""

    most_steps: int | None = None
    """Upper bound of the attack steps of an epoch; None for no bound."""

    def __init__(
        self,
        attack: Attack,
        *,
        loss: SurrogateLoss,
        schedule: Schedule | None = None,
        stopping: StoppingRule | None = None,
        name: str | None = None,
        eps_warmup: int | None = None,
    ) -> None:
        if isinstance(attack, TrainerBase):
            raise DeatError(
                f"'{attack.attack}' is already a trainer: use that trainer, or pass its attack, trainer.crafter"
            )
        if not isinstance(attack, Attack):
            what = attack.__name__ if isinstance(attack, type) else type(attack).__name__
            raise DeatError(f"attack must be a torchattacks.attack.Attack such as deat_rb.PGD(model), not {what}")
        super().__init__(name or type(self).__name__, attack.model)
        self.crafter = attack
        self.device = attack.device
        self.loss = loss
        if not isinstance(getattr(attack, "eps", None), int | float):
            raise DeatError(f"{attack.attack} has no eps, so it cannot be used for training; use an attack with an eps")
        has_steps = isinstance(getattr(attack, "steps", None), int)
        if schedule is not None and not has_steps:
            raise DeatError(
                f"{attack.attack} has no steps that a schedule could set; use an attack with steps, such as "
                "torchattacks.PGD"
            )
        self.schedule = schedule or Constant(attack.steps if has_steps else 1)
        self.stopping = stopping
        self.base_alpha: float | None = getattr(attack, "alpha", None)
        if eps_warmup is not None and not (is_whole_number(eps_warmup) and eps_warmup >= 0):
            raise DeatError(f"eps_warmup = {eps_warmup} is not a non-negative whole number of epochs")
        self.eps_warmup = int(eps_warmup or 0)
        self.progress = 0.0
        self._rate: Callable[[float], float | Tensor] | None = None
        self._first: dict[str, Any] | None = None
        self._first_parts: dict[str, Schedule | StoppingRule | None] = {}
        self.apply_schedule()

    def set_replay_lr(self, rate: Callable[[float], float | Tensor] | None) -> None:
        """Set the learning rate as a function of the progress in [0, 1] within the current batch; called by `fit`."""
        self._rate = rate

    @property
    def replay_lr(self) -> Callable[[float], float | Tensor] | None:
        """The function given to `set_replay_lr`."""
        return self._rate

    def reads_statistics(self) -> bool:
        """Return whether a training step may read BatchNorm's running statistics, as an attack in eval mode does."""
        return True

    def costs(self, steps: int, epochs: int, sizes: Sequence[int], num_classes: int) -> Costs | None:
        """Return the passes and updates of a run; None if they are not known, as of the base class.

        Args:
            steps: Attack steps, summed over the epochs.
            epochs: Number of epochs.
            sizes: Number of examples of each mini-batch of an epoch.
            num_classes: Number of classes.
        """
        return None

    def has_known_passes(self, own: Any) -> bool:
        """Return whether this takes the training step of the class ``own`` with a `deat_rb.PGD` itself."""
        return type(self).training_step is own.training_step and type(self.crafter) is PGD

    @contextmanager
    def warmed_up(self, progress: float) -> Iterator[float]:
        """Set the `progress`, and within the context the attack's eps and alpha to those of the warm-up.

        Args:
            progress: Epochs trained so far, fractional.

        Yields:
            The radius.
        """
        self.progress = progress
        if progress >= self.eps_warmup:
            yield self.eps
            return
        crafter, share = self.crafter, progress / self.eps_warmup
        if not isinstance(crafter, PGD):
            share = max(share, 1e-6)  # torchattacks' L2 attacks divide by the radius
        own = {name: getattr(crafter, name) for name in ("eps", "alpha") if hasattr(crafter, name)}
        for name, value in own.items():
            setattr(crafter, name, share * value)
        try:
            yield self.eps
        finally:
            for name, value in own.items():
                setattr(crafter, name, value)

    def is_warming_up(self, epoch: int) -> bool:
        """Return whether the radius rises in an epoch, numbered from 1, so that no other may be compared with it."""
        return epoch <= self.eps_warmup

    def step_settings(self) -> tuple[object, ...]:
        """Return the settings that a training step uses, other than the model and the optimizer.

        When one of them changes, a step that was recorded as a CUDA graph is recorded again.
        """
        settings = {**vars(self.crafter), **vars(self), "progress": None}
        plain = {name: value for name, value in settings.items() if isinstance(value, int | float | str | None)}
        return self.steps, self.alpha, id(self.loss), *sorted(plain.items())

    @property
    def eps(self) -> float:
        """The attack's radius, in [0, 1] pixel units."""
        return float(self.crafter.eps)

    @property
    def norm(self) -> str:
        """The norm of the attack's eps-ball, ``Linf`` or ``L2``."""
        own = norm_of(type(self.crafter), getattr(self.crafter, "norm", "Linf"))
        return own if own in THREATS else "Linf"

    @property
    def alpha(self) -> float | None:
        """The attack's step size in the current epoch; None if it takes no steps."""
        return getattr(self.crafter, "alpha", None) if self.steps else None

    @property
    def steps(self) -> int:
        """The attack steps r of the current epoch; setting them changes the schedule."""
        return self.schedule.steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self.check_steps(steps)
        self.schedule.steps = int(steps)
        if self._first is not None:
            self._first["schedule"]["steps"] = int(steps)
        self.apply_schedule()

    def check_steps(self, steps: int) -> None:
        """Check that an epoch may have this number of attack steps.

        Raises:
            DeatError: It may not.
        """
        self.schedule.check_steps(steps)
        fewest, most = self.fewest_steps, self.most_steps
        if steps < fewest:
            raise DeatError(
                f"steps = {steps} is below {fewest}; {self.attack} needs at least {counted(fewest, 'step')}"
            )
        if most is not None and steps > most:
            raise DeatError(f"steps = {steps} is above {most}; {self.attack} takes at most {counted(most, 'step')}")

    def keep_first_schedule(self) -> None:
        """Keep the state of schedule and stopping rule before the first `fit`, for `reset_schedule`."""
        if self._first is None:
            self._first = deepcopy(self.state_dict())
            self._first_parts = self._parts()

    def reset_schedule(self) -> None:
        """Reset schedule and stopping rule to before their first `fit`, except for ``steps`` set by hand."""
        if self._first is None:
            self.keep_first_schedule()
            self.apply_schedule()
            return
        state, parts = deepcopy(self.state_dict()), self._parts()
        self._first |= {name: state[name] for name in parts if parts[name] is not self._first_parts[name]}
        self._first_parts = parts
        self.load_state_dict(deepcopy(self._first))

    def _parts(self) -> dict[str, Schedule | StoppingRule | None]:
        return {"schedule": self.schedule, "stopping": self.stopping}

    def step_bounds(self, epochs: int) -> list[tuple[int, int]] | None:
        """Return the fewest and the most attack steps of each epoch, as `Schedule.step_bounds` does."""
        before = sum(map(self.is_warming_up, range(1, epochs + 1))) if self.schedule.guided else 0
        bounds = self.schedule.step_bounds(epochs - before)
        return None if bounds is None else [(self.steps, self.steps)] * before + bounds

    def update_schedule(self, row: EpochStats) -> None:
        """Set the attack's steps and step size for the next epoch, given the metrics of the epoch that has ended.

        A guided schedule, which compares epochs, begins with the first one after the warm-up of the radius.
        """
        if not (self.schedule.guided and self.is_warming_up(row.epoch)):
            self.schedule.update(row)
        self.apply_schedule()

    def apply_schedule(self) -> None:
        """Set the attack's steps and step size as scheduled for the next epoch.

        Raises:
            DeatError: The method cannot take the schedule's number of steps.
        """
        self.check_steps(self.schedule.steps)
        if hasattr(self.crafter, "steps"):
            self.crafter.steps = self.schedule.steps
        if self.base_alpha is not None:
            self.crafter.alpha = self.schedule.alpha(self.base_alpha, self.eps)

    def forward(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Generate adversarial examples with the current epoch's attack; `__call__` also restores the model's state."""
        adv: Tensor = self.crafter(inputs, labels, *args, **kwargs)
        return adv.detach()

    def enter_mode(self) -> None:
        """Do nothing: the wrapped attack sets the mode."""

    def set_model_training_mode(
        self, model_training: bool = False, batchnorm_training: bool = False, dropout_training: bool = False
    ) -> None:
        """Set the model's mode during the attack, as in torchattacks."""
        for attack in self._attacks.values():
            attack.set_model_training_mode(model_training, batchnorm_training, dropout_training)

    def after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run after each optimizer step, before the weights are averaged; by default, this does nothing."""

    def begin_attack(self, inputs: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Set the model to the attack's mode; return the images and labels on its device.

        Raises:
            DeatError: There are no labels.
        """
        if labels is None:
            raise DeatError(NEEDS_LABELS)
        self.crafter.enter_mode()
        return inputs.detach().to(self.device), labels.to(self.device)

    def loss_gradient(self, adv: Tensor, labels: Tensor) -> Tensor:
        """Return the gradient of the surrogate loss with respect to its input ``adv``, (N, C, H, W)."""
        adv = adv.detach().requires_grad_()
        loss = self.loss.function(self.crafter.get_logits(adv), labels).sum()
        return torch.autograd.grad(loss, adv)[0]

    def begin_step(self, images: Tensor, engine: Engine | None) -> Engine:
        """Check that a training step is possible here; return the engine, by default that of `training_step`.

        Raises:
            DeatError: Gradients are disabled, autocast is enabled outside of the step, or `set_normalization_used` was
                called, so that the model does not take images in [0, 1].
        """
        if self.normalization_used is not None or self.crafter.normalization_used is not None:
            raise DeatError(
                "training needs images in [0, 1], so that eps is in pixel units: make the normalization part of the "
                "model, as deat_rb.build_model does, instead of calling set_normalization_used"
            )
        require_autograd("training", grad_mode=True)
        engine = engine or Engine(images.device)
        check_outside_autocast(engine.device)
        return engine

    def check_attack(self, images: Tensor) -> None:
        """Validate the attack on a few images before training; the model's state is preserved.

        Args:
            images: In [0, 1], (N, C, H, W), on the model's device.

        Raises:
            DeatError: The attack cannot be used for training.
        """

    def check_soft_labels(self) -> None:
        """Check that the method can be trained with class probabilities (N, K) as labels.

        Raises:
            DeatError: It cannot.
        """
        crafter = self.crafter
        part = who_needs_one_class(
            type(self),
            self.loss,
            type(crafter),
            getattr(crafter, "loss", ""),
            getattr(crafter, "tau", None),
            type(self.schedule),
        )
        if part is not None:
            raise DeatError(
                f"the labels are class probabilities, but {part} needs one class per image: give class indices (N,) "
                "or use a method with cross-entropy or TRADES, such as pgd-7, m-deat or m+trades"
            )

    def begin_batch(self, images: Tensor, place: Place, engine: Engine) -> float:
        """Prepare the training step of a batch; by default, this does nothing.

        Unlike a training step, it is never recorded as a CUDA graph.

        Args:
            images: As for `training_step`.
            place: The batch's place in the training.
            engine: Device, precision and ranks.

        Returns:
            The number of forward passes and of backward passes that this took, in units of the batch.
        """
        return 0.0

    def stored_bytes(self, images: int, size: int) -> int:
        """Return the memory that the method needs for state, on the device and in each checkpoint, in bytes.

        Args:
            images: Number of training images.
            size: Number of values per image, |x|.
        """
        return 0

    @abstractmethod
    def training_step(
        self, images: Tensor, labels: Tensor, optimizer: Optimizer, engine: Engine | None = None
    ) -> BatchStats:
        """Train on one batch.

        Args:
            images: In [0, 1], (N, C, H, W), on the model's device.
            labels: (N,), or class probabilities (N, K) if `check_soft_labels` accepts them.
            optimizer: Optimizer of the model's parameters.
            engine: Device, precision and ranks; by default fp32 on the images' device and a single rank.

        Returns:
            The batch's statistics.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the schedule and the stopping rule, as JSON values."""
        return {
            "schedule": self.schedule.state_dict(),
            "stopping": self.stopping.state_dict() if self.stopping else None,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the method's tensors, other than the model's, for `load_state_dict`."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Restore a `state_dict` and its `tensors`."""
        self.schedule.load_state_dict(state["schedule"])
        if self.stopping is not None:
            self.stopping.load_state_dict(state["stopping"])
        self.apply_schedule()

    def snapshot(self) -> Callable[[], None]:
        """Copy the method's state before a training step; return a function that restores it after the step."""
        state = deepcopy(self.state_dict())
        tensors = {name: tensor.clone() for name, tensor in self.tensors().items()}
        return lambda: self.load_state_dict(state, tensors)
