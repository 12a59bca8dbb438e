"""Adversarial weight perturbation (AWP, Wu et al. 2020, arXiv:2004.05884)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from deat_rb.utils.errors import DeatError
from deat_rb.utils.units import is_whole_number

TINY = 1e-20
"""Constant added to the norm of a gradient, as in AWP's public code."""


class WeightPerturbation:
    """Adversarial weight perturbation (AWP, Wu et al. 2020).

    Before each update, the weights are perturbed so that the training loss increases; after it, the perturbation is
    removed. Each weight tensor w is moved by gamma ||w|| g / ||g||, where g is the gradient of the loss on the
    adversarial examples (Equations 7 to 9 with one step, per layer). As in AWP's public code, only the weights of
    convolutions and linear layers are perturbed: tensors with more than one dimension and ``weight`` in their names.

    Args:
        gamma: Size of the perturbation relative to the weights, in (0, 1).
        warmup: Number of epochs without the perturbation at the beginning of training.

    Raises:
        DeatError: If an argument is out of range.
    """

    def __init__(self, gamma: float, warmup: int = 0) -> None:
        if not (math.isfinite(gamma) and 0 < gamma < 1):
            raise DeatError(f"awp = {gamma:g} is outside (0, 1); Wu et al. use 0.005 to 0.01")
        if not is_whole_number(warmup) or warmup < 0:
            raise DeatError(f"awp_warmup = {warmup} is not a non-negative whole number of epochs")
        self.gamma = gamma
        self.warmup = warmup
        self._added: list[tuple[Tensor, Tensor]] = []

    @staticmethod
    def weights(model: nn.Module) -> list[Tensor]:
        """Return the weights of a model that are perturbed.

        Raises:
            DeatError: If there are none.
        """
        named = model.named_parameters()
        found: list[Tensor] = [
            weight for name, weight in named if weight.dim() > 1 and "weight" in name and weight.requires_grad
        ]
        if not found:
            raise DeatError(
                "awp perturbs trainable parameters with more than one dimension and 'weight' in their name, but the "
                "model has none: train without awp"
            )
        return found

    @torch.no_grad()
    def add(self, weights: list[Tensor], gradients: list[Tensor]) -> None:
        """Perturb the weights along the gradients of the loss; weights with a non-finite gradient are not changed."""
        self._added = []
        norms = zip(torch._foreach_norm(weights), torch._foreach_norm(gradients), strict=True)
        for weight, gradient, (size, norm) in zip(weights, gradients, norms, strict=True):
            step = self.gamma * (size / (norm + TINY) * gradient)
            self._added.append((weight, torch.where(norm.isfinite(), step, torch.zeros_like(step))))
        self._shift(1)

    def remove(self) -> None:
        """Subtract the perturbation, if there is one."""
        if self._added:
            self._shift(-1)
            self._added = []

    @torch.no_grad()
    def _shift(self, sign: int) -> None:
        torch._foreach_add_([weight for weight, _ in self._added], [step for _, step in self._added], alpha=sign)
