"""YOPO: adversarial training that attacks through the first layer only (Zhang et al. 2019, arXiv:1905.00877)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deat_rb.attacks.losses import at_least_float32, main_class
from deat_rb.attacks.pgd import PGD
from deat_rb.methods.trainers import SharedPassTrainer
from deat_rb.models.first_layer import find_first_layer, output_gradients, output_of
from deat_rb.training.costs import Costs
from deat_rb.training.engine import Engine
from deat_rb.training.metrics import BatchStats
from deat_rb.training.surrogate_loss import SurrogateLoss
from deat_rb.utils.errors import DeatError
from deat_rb.utils.units import is_whole_number


class YopoTrainer(SharedPassTrainer):
    """YOPO-m-n: m full passes per batch, each followed by n steps of the attack through the first layer.

    A full pass gives the gradients of the weights, which are summed over the m passes, and the gradient p of the first
    layer's output. With p held fixed, n steps ascend <p, f_0(x')>, where f_0 is the first layer and all before it, such
    as the normalization. As in the public code, the gradient of <p, f_0> at the last of them is added to that of the
    first layer's weights, and the optimizer takes one step along the sum.

    Args:
        attack: The attack; its steps are m.
        loss: The surrogate loss.
        inner: n.
        options: As for `SharedPassTrainer`.

    Raises:
        DeatError: The attack or the loss cannot be used, or m or n is below 1.
    """

    fewest_steps = 1
    takes_soft_labels = True
    not_compilable = "needs the gradient of the first layer's output, which torch.compile hides"

    def __init__(self, attack: PGD, *, loss: str | SurrogateLoss = "ce", inner: int = 3, **options: Any) -> None:
        if not is_whole_number(inner) or inner < 1:
            raise DeatError(f"inner = {inner} is not a positive whole number of steps; YOPO-5-3 has 3")
        super().__init__(attack, loss=loss, **options)
        self.inner = int(inner)
        self._first_layer: str | None = None

    def costs(self, steps: int, epochs: int, sizes: Sequence[int], num_classes: int) -> Costs | None:
        """Return the full passes, one per step."""
        if not self.has_known_passes(YopoTrainer):
            return None
        passes = steps * len(sizes)
        return Costs(passes, passes, epochs * len(sizes))

    def check_attack(self, images: Tensor) -> None:
        """Find the network's first layer.

        Raises:
            DeatError: There is none that could be separated from the others.
        """
        self._first_layer = find_first_layer(self.model, images[:2])

    def forward(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """Generate adversarial examples with the steps of a training step, without updating the weights."""
        images, labels = self.begin_attack(inputs, labels)
        layer = self._layer(images)
        adv: Tensor = self.crafter.initialize(images)
        for _ in range(self.steps):
            adv = adv.detach().requires_grad_()
            with output_gradients(layer) as slopes:
                loss = self.loss.function(self.crafter.get_logits(adv), labels).sum()
            torch.autograd.grad(loss, adv)
            adv, *_ = self._ascend(layer, self.crafter.get_logits, images, adv, slopes[0], Engine(images.device))
        return adv

    def training_step(
        self, images: Tensor, labels: Tensor, optimizer: Optimizer, engine: Engine | None = None
    ) -> BatchStats:
        """Train on one batch (Algorithm 1)."""
        engine = self.begin_step(images, engine)
        layer, adv, magnitude = self._layer(images), self.crafter.initialize(images), images
        overflows: float | Tensor = 0.0
        own = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        added = [torch.zeros_like(parameter) for parameter in own]
        optimizer.zero_grad(set_to_none=True)
        for _ in range(self.steps):
            with output_gradients(layer) as slopes, engine.autocast():
                # The output of a frozen layer has a gradient only if its input does.
                logits = engine.ddp_model(self.model)(adv if own else adv.detach().requires_grad_())
                loss = self.loss.function(logits, labels)
            engine.backward(loss)
            slope, of_slope = engine.finite(slopes[0])
            adv, magnitude, of_steps = self._ascend(layer, self.model, images, adv, slope, engine)
            overflows = overflows + of_slope + of_steps
            if own:
                with engine.autocast():
                    output = output_of(layer, self.model, adv)
                torch._foreach_add_(added, list(torch.autograd.grad(output, own, slope)))
        engine.world.average(added)
        for parameter, gradient in zip(own, added, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        magnitude, _ = engine.unscaled(magnitude)
        engine.step(optimizer)
        magnitude = self.loss.without_weights(magnitude, labels)  # l_X is that of each example's own loss
        return BatchStats(
            examples=len(images),
            loss=at_least_float32(loss.detach()).sum(),
            correct=(logits.argmax(dim=1) == main_class(labels)).sum(),
            l_x=self.crafter.threat.total_dual_norm(magnitude) * engine.loss_divisor(len(images)),
            forwards=self.steps,
            backwards=self.steps,
            updates=1,
            image_size=images[0].numel(),
            overflows=overflows,
        )

    def _layer(self, images: Tensor) -> nn.Module:
        if self._first_layer is None:
            self.check_attack(images)
        assert self._first_layer is not None
        layer: nn.Module = self.model.get_submodule(self._first_layer)
        return layer

    def _ascend(
        self,
        layer: nn.Module,
        forward: Callable[[Tensor], Tensor],
        images: Tensor,
        adv: Tensor,
        slope: Tensor,
        engine: Engine,
    ) -> tuple[Tensor, Tensor, float | Tensor]:
        """Take n steps along the gradient of <slope, f_0>.

        Args:
            layer: The first layer.
            forward: The network's forward pass.
            images: The clean images, (N, C, H, W).
            adv: The iterate at which the slope was computed.
            slope: The gradient p of the first layer's output, scaled as the loss.
            engine: Device and precision.

        Returns:
            The adversarial examples; the gradient in the first step, which is that of the full pass, (N, C, H, W); and
            the number of gradients that overflowed.
        """
        first: Tensor | None = None
        overflows: float | Tensor = 0.0
        for _ in range(self.inner):
            adv = adv.detach()
            point = adv.clamp(0, 1).requires_grad_()
            with engine.autocast():
                output = output_of(layer, forward, point)
            (gradient,) = torch.autograd.grad(output, point, slope)
            gradient, overflowed = engine.finite(gradient)
            overflows = overflows + overflowed
            # As in the public code, pixels of a start outside [0, 1] are only clamped in their first step.
            gradient = torch.where(point == adv, gradient, 0.0)
            first = gradient if first is None else first
            adv = self.crafter.threat.ascend(adv, images, gradient, self.crafter.alpha)
        assert first is not None
        return adv, first, overflows
