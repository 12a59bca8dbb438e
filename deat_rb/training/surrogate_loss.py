"""Loss that a trainer minimizes, and class weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deat_rb.utils.errors import DeatError


class ClassWeights:
    """Class weights, copied to each device only once.

    Args:
        weights: The weights, (K,).
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights
        self._on: dict[torch.device, Tensor] = {}

    def of(self, labels: Tensor) -> Tensor:
        """Return the weight of each label's class, (N,)."""
        if labels.device not in self._on:  # without waiting for the device, as a recorded step must not
            self._on[labels.device] = self.weights.to(labels.device, non_blocking=True)
        return self._on[labels.device][labels]


@dataclass(frozen=True, eq=False)
class WeightedLoss:
    """A loss per example, multiplied by the weight of the example's class.

    Attributes:
        function: The loss; see `SurrogateLoss`.
        weights: The class weights.
    """

    function: Callable[..., Tensor]
    weights: ClassWeights

    def __call__(self, adv_logits: Tensor, labels: Tensor, *clean_logits: Tensor) -> Tensor:
        """Return the weighted loss per example, (N,)."""
        loss: Tensor = self.function(adv_logits, labels, *clean_logits)
        return loss * self.weights.of(labels)


@dataclass(frozen=True)
class SurrogateLoss:
    """The loss that a trainer minimizes.

    Attributes:
        name: Name in tables and configurations.
        function: Maps ``(adv_logits, labels)``, or ``(adv_logits, labels, clean_logits)`` if ``needs_clean``, to the
            loss per example (N,).
        needs_clean: Whether the loss needs the logits of the clean images.
        class_weights: Class weights (K,), by which ``function`` multiplies the loss of each example; None for none.
        soft_labels: Whether ``function`` also takes class probabilities (N, K) as labels.
    """

    name: str
    function: Callable[..., Tensor]
    needs_clean: bool = False
    class_weights: ClassWeights | None = None
    soft_labels: bool = False

    def without_weights(self, gradient: Tensor, labels: Tensor) -> Tensor:
        """Return the input gradients (N, C, H, W) of the examples' losses divided by their class weights, if any."""
        if self.class_weights is None:
            return gradient
        return gradient / self.class_weights.of(labels).view(-1, 1, 1, 1)

    def with_weights(self, values: Tensor, labels: Tensor) -> Tensor:
        """Return a value per example (N,) multiplied by the weight of its class, if there are class weights."""
        return values if self.class_weights is None else values * self.class_weights.of(labels)


def check_shape(loss: SurrogateLoss, logits: Tensor, labels: Tensor) -> None:
    """Check that a loss is one value per example, before class weights multiply it.

    Args:
        loss: The loss.
        logits: Any logits, (N, K).
        labels: Their labels.

    Raises:
        DeatError: It is not.
    """
    function = loss.function.function if isinstance(loss.function, WeightedLoss) else loss.function
    losses = function(logits, labels, *([logits] if loss.needs_clean else []))
    if losses.shape != (len(logits),):
        raise DeatError(
            f"the loss {loss.name} has the shape {tuple(losses.shape)} for {len(logits)} images, not "
            f"({len(logits)},): return one value per image, as torch's cross_entropy with reduction='none'"
        )
