"""Observes an attack from outside: the gradient it computes at its inputs and the passes it takes, at no extra pass.

Every gradient attack forwards images that require a gradient and asks for it. A forward pre-hook on the model finds
those inputs, and a hook on the tensor sees the gradient when it comes. That is l_X for any attack (law 3).
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from deat_rb.attacks.base import CraftStats
from deat_rb.utils.errors import DeatError
from deat_rb.utils.module_state import preserve_state
from deat_rb.utils.seeding import preserved


class GradientProbe:
    """A context manager in which a model's input gradients are seen.

    Args:
        model: The model that an attack is about to forward.
        pixel_scale: d(model input) / d(pixel), (1, C, 1, 1) or a number: 1 / std where the model's input is normalised.

    Attributes:
        gradient: The last input gradient seen, (N, C, H, W), or None.
        forwards: How many images went forward.
        backwards: How many images' gradients came back.
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
        # An attack may forward the same images more than once, as EOTPGD does, each time with a backward of its own.
        if torch.is_grad_enabled() and images.requires_grad and images is not self._hooked:
            images.register_hook(self._see_gradient)
            self._hooked = images

    def _see_gradient(self, gradient: Tensor) -> Tensor:
        self.gradient = gradient.detach()
        self.backwards += len(gradient)
        # Of a model in channels_last it would be, too, and torchattacks' L2 attacks view gradients as vectors.
        return gradient.contiguous()

    def stats(self, examples: int, unit: float) -> CraftStats:
        """The figures of one call.

        Args:
            examples: How many images it was called with.
            unit: By what the gradient is to be multiplied to be that of each example's own loss.
        """
        gradient = torch.zeros(()) if self.gradient is None else self.gradient
        return CraftStats(
            (gradient * self.pixel_scale).abs().sum() * unit,
            forwards=self.forwards / examples,
            backwards=self.backwards / examples,
        )


def uses_mean_reduction(attack: Attack, images: Tensor) -> bool:
    """Finds out whether an attack's loss is averaged over the batch (torchattacks' PGD) or summed (its TPGD).

    It is called once on a few images and once on the same ones twice over, with the labels the model predicts: an
    averaged loss halves each gradient. The model and torch's generators are left as they were.

    Raises:
        DeatError: If the attack computes no gradient at its inputs, so that l_X cannot be had.
    """
    few = images[:8]
    with preserve_state(attack.model):
        labels = attack.get_output_with_eval_nograd(few).argmax(dim=1)
    norms = []
    for copies in (1, 2):
        with preserve_state(attack.model), preserved(), GradientProbe(attack.model) as probe:
            torch.manual_seed(0)
            attack(torch.cat([few] * copies), torch.cat([labels] * copies))
        if probe.gradient is None:
            raise DeatError(
                f"{attack.attack} computes no gradient at its inputs, so that l_X cannot be had; "
                "choose a gradient attack such as torchattacks.PGD"
            )
        norms.append(float(probe.gradient[: len(few)].abs().sum()))
    return norms[1] < 0.7 * norms[0]


def lipschitz_lower_bound(l_x: float, *, examples: int, eps: float, size: int) -> float:
    """Theorem 1 (Equation 5): ||grad||_1 / (2 eps |x|) <= l_xx, the mean over examples.

    Args:
        l_x: Sum of the L1 norms of the examples' input gradients.
        examples: How many examples.
        eps: The radius, in [0, 1] pixel units.
        size: |x|, the number of values of one image: C * H * W.
    """
    return l_x / (examples * 2 * eps * size)
