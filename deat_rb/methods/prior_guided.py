"""FGSM-PGI (Jia et al. 2022, arXiv:2207.08859), in the paper's form with momentum, FGSM-MEP."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from deat_rb.attacks.losses import at_least_float32
from deat_rb.attacks.pgd import PGD
from deat_rb.methods.shared_forward import SharedForwardTrainer
from deat_rb.training.engine import Engine
from deat_rb.training.place import Place
from deat_rb.training.surrogate_loss import SurrogateLoss
from deat_rb.utils import seeding
from deat_rb.utils.errors import DeatError
from deat_rb.utils.units import is_whole_number


class PriorGuidedTrainer(SharedForwardTrainer):
    """FGSM from a perturbation that each training image keeps from epoch to epoch (FGSM-MEP, Algorithm 3).

    For each image a perturbation and a momentum are stored, in the frame of the augmented image: as in the authors'
    code, they are not shifted and flipped along with it. The momentum adds up the input gradients of all epochs, each
    divided by the L1 norm of the batch's gradient; the stored perturbation follows its sign, the adversarial example
    that of the current gradient. The penalty is ``consistency`` times the mean squared difference of the logits at the
    stored perturbation and at the adversarial example.

    Args:
        attack: A `PGD` with one step; see `SharedForwardTrainer`.
        loss: The surrogate loss.
        consistency: Weight of the penalty, the paper's lambda.
        decay: Decay of the momentum, the paper's mu.
        prior_reset: Number of epochs after which perturbations start again at random signs, and the momenta at zero.
        options: As for `Trainer`.
    """

    needs_positions = True

    def __init__(
        self,
        attack: PGD,
        *,
        loss: str | SurrogateLoss = "ce",
        consistency: float = 10.0,
        decay: float = 0.3,
        prior_reset: int = 40,
        **options: Any,
    ) -> None:
        super().__init__(attack, loss=loss, consistency=consistency, **options)
        if not (math.isfinite(decay) and 0 <= decay < 1):
            raise DeatError(f"decay = {decay:g} is not in [0, 1); the paper uses 0.3")
        if not (is_whole_number(prior_reset) and prior_reset >= 1):
            raise DeatError(f"prior_reset = {prior_reset} is not a positive whole number of epochs; the paper uses 40")
        self.decay = decay
        self.prior_reset = int(prior_reset)
        self._radius = self.eps
        self._size = 0
        self._prior: Tensor | None = None
        self._momentum: Tensor | None = None
        self._rows = torch.empty(0, dtype=torch.long)
        self._before: tuple[Tensor, Tensor, Tensor] | None = None
        self._copies: list[tuple[Tensor, Tensor, Tensor]] | None = None

    def begin_batch(self, images: Tensor, place: Place, engine: Engine) -> float:
        """Note which images the batch has; begin with new perturbations where they are reset."""
        positions, count = place.positions, place.number_of_images
        if positions is None:
            raise DeatError(f"{self.attack} needs the positions of the batch's images among the training images")
        if len(self._rows) < place.size or self._rows.device != images.device:
            self._rows = torch.empty(place.size, dtype=torch.long, device=images.device)
        self._rows[: place.size].copy_(positions, non_blocking=True)
        self._size = place.size
        shape = torch.Size((count, *images.shape[1:]))
        fits = self._prior is not None and self._prior.shape == shape
        if place.batch == 0 and (place.epoch - 1) % self.prior_reset == 0:
            self._reset(images.new_empty(shape) if self._prior is None or not fits else self._prior)
        elif not fits:
            raise DeatError(
                f"{self.attack} has no perturbations for {count} images of shape {tuple(shape[1:])} at batch "
                f"{place.batch + 1} of epoch {place.epoch}: begin with the first batch, and keep the images' size"
            )
        if self._copies is not None:
            rows = self._rows[: self._size].clone()
            self._copies.append((rows, *self._stored(rows)))
            self._copies = None
        return 0.0

    def _stored(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return copies of the perturbations and momenta of some images."""
        assert self._prior is not None
        assert self._momentum is not None
        return self._prior.index_select(0, rows), self._momentum.index_select(0, rows)

    def _reset(self, prior: Tensor) -> None:
        """Set the perturbations of all images, in place, to random signs times alpha, and their momenta to zero."""
        assert self.base_alpha is not None
        with seeding.same_on_all_ranks():
            prior.copy_(seeding.uniform_like(prior, 1.0))
        self._prior = prior.sign_().mul_(self.base_alpha).clamp_(-self._radius, self._radius)
        fits = self._momentum is not None and self._momentum.shape == prior.shape
        self._momentum = self._momentum.zero_() if fits and self._momentum is not None else torch.zeros_like(prior)

    def start(self, images: Tensor, labels: Tensor, engine: Engine) -> Tensor:
        """Return the images at their stored perturbations; as in the authors' code they may leave [0, 1]."""
        if self._prior is None or self._momentum is None:
            raise DeatError(f"{self.attack} needs to know which images a batch has: call begin_batch before each step")
        rows = self._rows[: self._size]
        self._before = rows, *self._stored(rows)
        eps: float = self.crafter.eps
        return images + self._own(self._before[1], engine).clamp(-eps, eps)

    def _own(self, whole: Tensor, engine: Engine) -> Tensor:
        """Return this rank's rows of the global batch."""
        return whole if engine.world.size == 1 else whole[engine.rank_slice(0)]

    def fresh_start(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the images at random signs times alpha, where training begins."""
        signs = seeding.uniform_like(images, 1.0).sign()
        start: Tensor = images + (self.crafter.alpha * signs).clamp(-self.crafter.eps, self.crafter.eps)
        return start

    def penalty(self, start_logits: Tensor, logits: Tensor) -> Tensor:
        """Return the weighted mean squared difference of the logits, per example (N,)."""
        difference = at_least_float32(logits) - at_least_float32(start_logits)
        return self.consistency * difference.square().mean(dim=1)

    def keep(self, images: Tensor, gradient: Tensor, engine: Engine) -> None:
        """Store the momenta and the perturbations of the batch's images."""
        assert self._before is not None
        assert self._prior is not None
        assert self._momentum is not None
        rows, deltas, momenta = self._before
        eps, alpha = self.crafter.eps, self.crafter.alpha
        length = engine.world.sum(gradient.abs().sum()).clamp_min(torch.finfo(gradient.dtype).tiny)
        momentum = gradient / length + self.decay * self._own(momenta, engine)
        delta = (self._own(deltas, engine).clamp(-eps, eps) + alpha * momentum.sign()).clamp(-eps, eps)
        delta = torch.minimum(torch.maximum(delta, -images), 1 - images)
        self._momentum.index_copy_(0, rows, engine.all_gather(momentum.contiguous()))
        self._prior.index_copy_(0, rows, engine.all_gather(delta.contiguous()))

    def stored_bytes(self, images: int, size: int) -> int:
        """Return the size of the perturbations and the momenta, in float32."""
        return 2 * images * size * 4

    def step_settings(self) -> tuple[object, ...]:
        """Return the settings that a training step uses, and the addresses of the perturbations."""
        kept = (self._prior, self._momentum, self._rows)
        return *super().step_settings(), *(None if each is None else each.data_ptr() for each in kept)

    def tensors(self) -> dict[str, Tensor]:
        """Return the perturbations and momenta of all training images, (images, C, H, W), once training has begun."""
        if self._prior is None or self._momentum is None:
            return {}
        return {"prior": self._prior, "momentum": self._momentum}

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Restore a `state_dict` and its `tensors`."""
        super().load_state_dict(state, tensors)
        prior, momentum = tensors.get("prior"), tensors.get("momentum")
        if prior is not None and (momentum is None or momentum.shape != prior.shape):
            raise ValueError("the perturbations have no momenta of their shape")
        self._prior = None if prior is None else prior.to(self.device)
        self._momentum = None if momentum is None else momentum.to(self.device)

    def snapshot(self) -> Callable[[], None]:
        """Return a function that restores the rows of the next batch, so that not all images' are copied.

        The copies are made by its `begin_batch`, which is not part of a recorded step, as `start` and `keep` are.
        """
        state = deepcopy(self.state_dict())
        copies = self._copies = []

        def restore() -> None:
            super(PriorGuidedTrainer, self).load_state_dict(state)
            for rows, deltas, momenta in copies:
                assert self._prior is not None
                assert self._momentum is not None
                self._prior.index_copy_(0, rows, deltas)
                self._momentum.index_copy_(0, rows, momenta)

        return restore
