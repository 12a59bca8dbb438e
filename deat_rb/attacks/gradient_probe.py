"""Input-gradient probe: records the gradient that an attack computes at its inputs and counts its passes.

Every gradient attack forwards images that require a gradient. A forward pre-hook on the model finds those inputs, and a
hook on the tensor records their gradient, which gives l_X of any attack without an extra pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from deat_rb.attacks.base import CraftStats, explained_failures
from deat_rb.attacks.threat_models import THREATS
from deat_rb.utils.errors import DeatError
from deat_rb.utils.module_state import preserve_state
from deat_rb.utils.seeding import preserved


class GradientProbe:
    """Context manager that records a model's input gradients.

    Args:
        model: The model under attack.
        pixel_scale: d(model input) / d(pixel), (1, C, 1, 1) or a number: 1 / std if the model's input is normalized.

    Attributes:
        gradient: The last input gradient, (N, C, H, W), or None.
        forwards: Number of images forwarded.
        backwards: Number of images whose gradient was computed.
    """

    def __init__(self, model: nn.Module, pixel_scale: Tensor | float = 1.0) -> None:
        self.model = model
        self.pixel_scale = pixel_scale
        self.gradient: Tensor | None = None
        self.forwards = 0
        self.backwards = 0
        self._hooked: Tensor | None = None

    def __enter__(self) -> GradientProbe:
        self._handle = self.model.register_forward_pre_hook(self._see_input)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.remove()
        self._hooked = None

    def _see_input(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        images = inputs[0]
        self.forwards += len(images)
        # An attack such as EOTPGD may forward the same images several times, each time with its own backward pass.
        if torch.is_grad_enabled() and images.requires_grad and images is not self._hooked:
            images.register_hook(self._see_gradient)
            self._hooked = images

    def _see_gradient(self, gradient: Tensor) -> Tensor:
        self.gradient = gradient.detach()
        self.backwards += len(gradient)
        # A model in channels_last returns gradients in channels_last, which torchattacks' L2 attacks cannot flatten.
        return gradient.contiguous()

    def stats(self, examples: int, unit: float, norm: str = "Linf") -> CraftStats:
        """Return the statistics of one call to the attack.

        Args:
            examples: Number of images in the call.
            unit: Factor that converts the gradient to that of each example's own loss.
            norm: Norm of the attack, ``Linf`` or ``L2``; l_X is the dual norm of the gradient.
        """
        gradient = torch.zeros(1, 1, 1, 1) if self.gradient is None else self.gradient
        return CraftStats(
            THREATS[norm].total_dual_norm(gradient * self.pixel_scale) * unit,
            forwards=self.forwards / examples,
            backwards=self.backwards / examples,
        )


@contextmanager
def _trial_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """Let a model predict class 0, with logits that are the same for all images but have the model's gradients.

    They differ between calls, so that an attack on the divergence from another output has a gradient.

    Yields:
        The L1 norm of the gradient with respect to the logits of each backward pass so far.
    """
    norms: list[Tensor] = []
    calls = itertools.count()

    def replace(module: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> Tensor:
        values = torch.empty(logits.shape[1]).uniform_(0.8, 0.99, generator=torch.Generator().manual_seed(next(calls)))
        values[0] = 1.0
        replaced = logits - logits.detach() + values.to(logits)
        if replaced.requires_grad:
            replaced.register_hook(lambda gradient: norms.append(gradient.abs().sum()))
        return replaced

    handle = model.register_forward_hook(replace)
    try:
        yield norms
    finally:
        handle.remove()


def uses_mean_reduction(attack: Attack, images: Tensor) -> bool:
    """Return whether an attack's loss is averaged over the batch (torchattacks' PGD) or summed (its TPGD).

    The attack is called on two images and on a batch that has each of them eight times, with the same logits for all:
    the L1 norm of the gradient with respect to the logits remains if the loss is averaged, and is eightfold if it is
    summed, whatever noise the attack draws. The model's state and the global generators are preserved.

    Raises:
        DeatError: If the attack computes no gradient at its inputs, so that l_X is undefined.
    """
    few = images[:2]
    labels = torch.zeros(len(few), dtype=torch.long, device=few.device)
    totals = []
    for copies in (1, 8):
        with preserve_state(attack.model), preserved(), _trial_logits(attack.model) as norms:
            torch.manual_seed(0)
            with explained_failures(attack, few, labels), GradientProbe(attack.model) as probe:
                attack(torch.cat([few] * copies), torch.cat([labels] * copies))
        if probe.gradient is None:
            raise DeatError(
                f"{attack.attack} computes no gradient at its inputs, so l_X is undefined; "
                "use a gradient attack such as torchattacks.PGD"
            )
        totals.append(sum(map(float, norms)))
    return totals[1] < math.sqrt(8) * totals[0]


SUCCESSFUL_ONLY = ("APGD", "APGDT", "FAB", "AutoAttack", "CW", "DeepFool", "SparseFool", "JSMA", "EADL1", "EADEN")
"""Gradient attacks of torchattacks that return only successful or minimal perturbations."""


def check_every_image_is_attacked(attack: Attack, images: Tensor) -> None:
    """Check that an attack also perturbs images whose prediction it does not change, as training needs.

    Attacks made for evaluation return the clean image there. They are known by name (`SUCCESSFUL_ONLY`) or by a trial
    on a few images, in which logits are replaced by ones that always predict the label but have the model's gradients.
    The model's state and the global generators are preserved.

    Raises:
        DeatError: If the attack returns clean images.
    """
    kind = type(attack)
    if not (kind.__module__.startswith("torchattacks.") and kind.__name__ in SUCCESSFUL_ONLY):
        few = images[:8] / 2 + 0.25  # away from 0 and 1, so that clamping cannot undo the perturbation
        labels = torch.zeros(len(few), dtype=torch.long, device=few.device)
        with (
            explained_failures(attack, few, labels), preserve_state(attack.model), preserved(),
            _trial_logits(attack.model), GradientProbe(attack.model) as probe,
        ):  # fmt: skip
            adv = attack(few, labels)
        if not attack.eps or probe.gradient is None:
            return
        # Without a gradient, as in a saturated network, FGSM does not change an image either.
        attacked = probe.gradient.flatten(1).any(dim=1) if len(probe.gradient) == len(few) else probe.gradient.any()
        if not ((adv.detach() == few).flatten(1).all(dim=1) & attacked).any():
            return
    raise DeatError(
        f"{attack.attack} returns the clean image when it fails to change the prediction, so most training images "
        "would remain clean: use an attack that perturbs every image, such as deat_rb.PGD"
    )


def lipschitz_lower_bound(
    l_x: float, *, examples: int, eps: float, size: int, radius: float | None = None, norm: str = "Linf"
) -> float:
    """Return the mean over examples of ||grad||_1 / (2 eps |x|) <= l_xx (Theorem 1, Equation 5).

    In L2 it is ||grad||_2 / (2 eps): the gradient's norm is the dual of the images', and the proof's distances are at
    most eps.

    Args:
        l_x: Sum of the L1 norms of the examples' input gradients; in L2, of their L2 norms.
        examples: Number of examples.
        eps: The radius, in [0, 1] pixel units.
        size: |x|, the number of values of one image, C * H * W.
        radius: Distance from the clean image within which the gradients were computed, if not ``eps``: the two terms of
            the proof's triangle inequality (Equation 7) are then ``radius`` and ``eps``.
        norm: ``Linf`` or ``L2``.
    """
    return l_x / (examples * ((eps if radius is None else radius) + eps) * (size if norm == "Linf" else 1))
