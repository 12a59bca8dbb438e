"""LIET, label information elimination training (Pan et al., ICCV 2025)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deat_rb.attacks.losses import at_least_float32
from deat_rb.attacks.pgd import PGD, Overflows, times
from deat_rb.methods.shared_forward import SharedForwardTrainer
from deat_rb.training.engine import Engine
from deat_rb.training.place import Place
from deat_rb.training.surrogate_loss import SurrogateLoss
from deat_rb.utils import seeding
from deat_rb.utils.errors import DeatError
from deat_rb.utils.module_state import preserve_modes
from deat_rb.utils.units import is_whole_number

PROJECTED = 8 / 255
"""The largest radius at which the adversarial examples are kept within eps."""


class LabelInformationTrainer(SharedForwardTrainer):
    """FGSM from a start that carries the label's own perturbation, of random sign (LIET, Algorithm 1, Equations 10-13).

    For each class, the sign of the loss's gradient at a gray image is taken in eval mode (Equation 10). A batch starts
    at the images plus or minus eps times the signs of their labels, of which a random share of the values is replaced
    by uniform noise. The penalty is the Jensen-Shannon divergence of the predictions at the start and at the
    adversarial example; its weight rises linearly to ``consistency`` in the last epoch.

    As in the paper, at an eps above 8/255 the adversarial examples are not projected onto the eps-ball, the noise is
    within 2 eps, and its share is from 0 to 1.

    Args:
        attack: A `PGD` with one step; see `SharedForwardTrainer`. Above 8/255 its ``project`` and ``start_scale`` are
            changed.
        loss: The surrogate loss.
        consistency: Weight of the penalty in the last epoch, the paper's lambda.
        refresh: Number of batches after which the signs are computed again; also at the beginning of an epoch.
        noise_share: The smallest and the largest share of values that are replaced by noise; by default 0.1 and 0.5.
        options: As for `Trainer`.
    """

    needs_epochs = True

    def __init__(
        self,
        attack: PGD,
        *,
        loss: str | SurrogateLoss = "nls",
        consistency: float = 100.0,
        refresh: int = 20,
        noise_share: tuple[float, float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(attack, loss=loss, consistency=consistency, **options)
        if not (is_whole_number(refresh) and refresh >= 1):
            raise DeatError(f"refresh = {refresh} is not a positive whole number of batches; the authors' code uses 20")
        wide = self.eps > PROJECTED * (1 + 1e-6)
        low, high = noise_share or ((0.0, 1.0) if wide else (0.1, 0.5))
        if not 0 <= low <= high <= 1:
            raise DeatError(f"noise_share = ({low:g}, {high:g}) is not a range in [0, 1]")
        attack.project, attack.start_scale = not wide, 2.0 if wide else 1.0
        self.refresh = int(refresh)
        self.noise_share = (low, high)
        self._weight: float | None = None
        self._epochs: int | None = None
        self._signs: Tensor | None = None

    def check_attack(self, images: Tensor) -> None:
        """Compute the loss of a few images, which refuses a label smoothing that is too large for the classes."""
        super().check_attack(images)
        with preserve_modes(self.model), seeding.preserved(), torch.no_grad():
            self.loss.function(self.model.eval()(images), torch.zeros(len(images), dtype=torch.long).to(images.device))

    def begin_batch(self, images: Tensor, place: Place, engine: Engine) -> float:
        """Set the penalty's weight, and compute the signs of the classes when they are due."""
        self._epochs = self._epochs or place.epochs
        self._weight = self.consistency * min(place.epoch / self._epochs, 1.0)
        if place.batch % self.refresh == 0:
            signs = self._signs_of_classes(images, place.num_classes, engine)
            # In place, since a CUDA graph reads them at the same address.
            fits = self._signs is not None and self._signs.shape == signs.shape and self._signs.dtype == signs.dtype
            self._signs = self._signs.copy_(signs) if self._signs is not None and fits else signs
            return place.num_classes / place.size
        if self._signs is None:
            raise DeatError(
                f"{self.attack} needs the classes' perturbations, which are computed in the first batch of an epoch: "
                f"call begin_batch for that batch before batch {place.batch + 1}"
            )
        return 0.0

    def extra_passes(self, sizes: Sequence[int], num_classes: int) -> float:
        """Return the passes of an epoch for the signs of the classes, in mini-batches."""
        return sum(num_classes / size for size in sizes[:: self.refresh])

    def _signs_of_classes(self, images: Tensor, classes: int, engine: Engine) -> Tensor:
        """Return the sign of the loss's gradient at a gray image for each class, (K, C, H, W)."""
        gray = torch.full((classes, *images.shape[1:]), 0.5, dtype=images.dtype, device=images.device)
        labels = torch.arange(classes, device=images.device)
        with preserve_modes(self.model), seeding.same_on_all_ranks(), engine.autocast():
            self.model.eval()
            gray.requires_grad_()
            objective = times(self.loss.function(self.model(gray), labels).sum(), engine.loss_scale)
            (gradient,) = torch.autograd.grad(objective, gray)
        return Overflows(engine.loss_scale).masked(gradient).sign()

    def start(self, images: Tensor, labels: Tensor, engine: Engine) -> Tensor:
        """Return the images plus or minus their labels' perturbation, mixed with noise, within [0, 1]."""
        if self._signs is None or self._weight is None:
            raise DeatError(f"{self.attack} needs the batch's place in the training: call begin_batch before each step")
        return self._start(images, labels, self._signs)

    def _start(self, images: Tensor, labels: Tensor, signs: Tensor) -> Tensor:
        eps = self.crafter.eps
        low, high = self.noise_share
        places = seeding.uniform_like(images, 0.5) + 0.5
        noise = seeding.uniform_like(images, self.crafter.start_scale * eps)
        with seeding.same_on_all_ranks():
            share, side = (seeding.uniform_like(images.new_empty(1), 0.5) + 0.5 for _ in range(2))
        delta = torch.where(places < low + (high - low) * share, noise, eps * signs.index_select(0, labels))
        return (images + torch.where(side < 0.5, -delta, delta)).clamp(0, 1)

    def fresh_start(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the start that a training batch would have, with the signs of the model as it is."""
        with torch.no_grad(), preserve_modes(self.model):
            self.model.eval()
            classes = self.model(images[:1]).shape[1]
        return self._start(images, labels, self._signs_of_classes(images, classes, Engine(images.device)))

    def penalty(self, start_logits: Tensor, logits: Tensor) -> Tensor:
        """Return the weighted Jensen-Shannon divergence of the predictions, per example (N,)."""
        assert self._weight is not None
        first, second = (F.log_softmax(at_least_float32(each), dim=1) for each in (start_logits, logits))
        middle = torch.logaddexp(first, second) - math.log(2)
        both = first.exp() * (first - middle) + second.exp() * (second - middle)
        return self._weight * both.sum(dim=1) / 2

    def reads_statistics(self) -> bool:
        """Return True: the signs of the classes are computed in eval mode."""
        return True

    def step_settings(self) -> tuple[object, ...]:
        """Return the settings that a training step uses, and the address of the classes' signs."""
        return *super().step_settings(), None if self._signs is None else self._signs.data_ptr()

    def state_dict(self) -> dict[str, Any]:
        """Return the method's state, without the weights, as JSON values."""
        return {**super().state_dict(), "epochs": self._epochs}

    def tensors(self) -> dict[str, Tensor]:
        """Return the signs of the classes, (K, C, H, W), once training has begun."""
        return {} if self._signs is None else {"signs": self._signs}

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Restore a `state_dict` and its `tensors`."""
        super().load_state_dict(state, tensors)
        self._epochs = state["epochs"]
        signs = tensors.get("signs")
        self._signs = None if signs is None else signs.to(self.device)

    def snapshot(self) -> Callable[[], None]:
        """Return a function that restores the state; the signs, which a training step does not change, are kept."""
        state = deepcopy(self.state_dict())
        return lambda: self.load_state_dict(state, self.tensors())
