"""The evaluation's own attacks: FGSM, PGD and CW in Linf, with every example leaving as soon as it is broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deat_rb.errors import DeatError
from deat_rb.threat import Linf

Objective = Callable[[Tensor, Tensor], Tensor]


class Counted:
    """A model that counts its passes, in images: a forward over a batch of 100 is 100 forwards.

    Attributes:
        forwards: Images forwarded so far.
        backwards: Images for which a gradient was propagated back from the logits so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.forwards = 0
        self.backwards = 0

    def __call__(self, images: Tensor) -> Tensor:
        """Gives the logits (N, K) of images (N, C, H, W)."""
        output = self.model(images)
        self.forwards += len(images)
        if output.requires_grad:
            output.register_hook(self._count_backward)
        logits: Tensor = output
        return logits

    def _count_backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


@dataclass(frozen=True)
class Crafted:
    """What an attack made of a batch.

    Attributes:
        images: (N, C, H, W): where an example broke, the iterate that broke it, else the last one.
        broken: (N,) bool: an iterate was misclassified.
    """

    images: Tensor
    broken: Tensor


def logits_and_gradient(
    model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, loss: Objective
) -> tuple[Tensor, Tensor]:
    """One forward and one backward with respect to the images alone.

    The losses are summed and not averaged, as a mean would let small gradients of large batches underflow.

    Args:
        model: Gives logits (N, K).
        images: (N, C, H, W).
        labels: (N,).
        loss: ``(logits, labels)`` to the loss per example (N,).

    Raises:
        DeatError: If the logits do not depend on the images in a way that can be differentiated.
    """
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        logits = model(images)
        if not logits.requires_grad:
            raise DeatError(
                "the model gives logits without a gradient, so that white-box attacks cannot run on it; "
                "take no_grad() and detach() out of its forward"
            )
        (gradient,) = torch.autograd.grad(loss(logits, labels).sum(), images)
    return logits.detach(), gradient


def fgsm(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, *, eps: float, loss: Objective) -> Crafted:
    """The fast gradient sign method (Goodfellow et al. 2015): one step of ``eps`` from the clean image.

    Args:
        model: Gives logits (N, K).
        images: Clean images in [0, 1], (N, C, H, W).
        labels: (N,).
        eps: Radius, in [0, 1] pixel units.
        loss: What is maximised, per example.
    """
    _, gradient = logits_and_gradient(model, images, labels, loss)
    adv = (images + eps * gradient.sign()).clamp(0, 1)
    with torch.no_grad():
        return Crafted(adv, model(adv).argmax(dim=1) != labels)


def uniform_start(images: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """Draws a start from U(-eps, eps) around ``images`` (N, C, H, W), within [0, 1].

    The numbers are drawn on the generator's device, so that a CPU generator gives every device the same start.
    """
    noise = torch.empty(images.shape, dtype=images.dtype, device=generator.device)
    noise.uniform_(-eps, eps, generator=generator)
    return (images + noise.to(images.device)).clamp(0, 1)


def pgd(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    start: Tensor,
    eps: float,
    alpha: float,
    steps: int,
    loss: Objective,
    leave_every: int | None = None,
) -> Crafted:
    """Projected gradient descent (Madry et al. 2018), iterate for iterate that of `torchattacks.PGD`.

    An example counts as broken as soon as one iterate is misclassified, the start and the last one included, and is
    moved no further: the verdict is torchattacks' or a stricter one.

    Args:
        model: Gives logits (N, K); in eval mode, where the examples of a batch do not see each other.
        images: Clean images in [0, 1], (N, C, H, W).
        labels: (N,).
        start: The first iterate, (N, C, H, W).
        eps: Radius, in [0, 1] pixel units.
        alpha: Step size, in the same unit.
        steps: Number of steps.
        loss: What is maximised, per example.
        leave_every: Take the broken examples out of the batch every so many steps; by default 1 on a CPU, else 5.
    """
    if leave_every is None:
        # To know who is broken an accelerator's queue has to run empty: dragging the broken ones along is cheaper.
        leave_every = 1 if images.device.type == "cpu" else 5
    threat = Linf(eps)
    adv = start.clone()
    broken = torch.zeros_like(labels, dtype=torch.bool)
    rows = torch.arange(len(images), device=images.device)
    for step in range(steps):
        here = adv[rows]
        logits, gradient = logits_and_gradient(model, here, labels[rows], loss)
        broken[rows] |= logits.argmax(dim=1) != labels[rows]
        stepped = threat.ascend(here, images[rows], gradient, alpha)
        adv[rows] = torch.where(broken[rows, None, None, None], here, stepped)
        if step % leave_every == 0:
            rows = rows[~broken[rows]]
            if len(rows) == 0:
                return Crafted(adv, broken)
    with torch.no_grad():
        broken[rows] |= model(adv[rows]).argmax(dim=1) != labels[rows]
    return Crafted(adv, broken)


def admissible(adv: Tensor, images: Tensor, eps: float) -> Tensor:
    """Says which adversarial images are in the threat model: finite, in [0, 1], within eps + 1e-6; (N,) bool."""
    inside = ((adv - images).abs() <= eps + 1e-6) & (adv >= 0) & (adv <= 1)
    return inside.flatten(1).all(dim=1)
