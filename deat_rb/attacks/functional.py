"""FGSM, PGD and CW as functions for evaluation; an example leaves the batch once it is misclassified."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deat_rb.attacks.threat_models import L2, Linf, threat_model
from deat_rb.utils.errors import DeatError
from deat_rb.utils.module_state import require_autograd

Objective = Callable[[Tensor, Tensor], Tensor]


class CountingModel(nn.Module):
    """Model that counts its passes in images: a forward over a batch of 100 is 100 forwards.

    Args:
        model: Returns logits (N, K) of images (N, C, H, W).
        dtype: Autocast precision of a call; None for none. `exact` never uses autocast.

    Attributes:
        forwards: Images forwarded.
        backwards: Images for which a gradient was propagated back from the logits.
        calls: Forward passes of any number of images.
        on_call: Called after every forward pass; its exceptions propagate.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.dtype = dtype
        self.forwards = 0
        self.backwards = 0
        self.calls = 0
        self.on_call: Callable[[], None] | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, K) of images (N, C, H, W), in float32 if the precision is lower."""
        if self.dtype is None:
            return self.exact(images)
        with torch.autocast(images.device.type, self.dtype):
            logits = self.exact(images)
        return logits.float()

    def exact(self, images: Tensor) -> Tensor:
        """Return the logits in the model's own precision."""
        logits: Tensor = self.model(images)
        self.forwards += len(images)
        self.calls += 1
        if logits.requires_grad:
            logits.register_hook(self._count_backward)
        if self.on_call is not None:
            self.on_call()
        return logits

    def _count_backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


@dataclass(frozen=True)
class AttackOutput:
    """Result of an attack on a batch.

    Attributes:
        images: (N, C, H, W): the first misclassified iterate of an example, else its last iterate.
        misclassified: (N,) bool: an iterate was misclassified.
    """

    images: Tensor
    misclassified: Tensor


def logits_and_gradient(
    model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, loss: Objective
) -> tuple[Tensor, Tensor]:
    """Return the logits (N, K) and the loss's input gradient, by one forward and one backward pass.

    The losses are summed, not averaged: a mean would let small gradients of large batches underflow.

    Args:
        model: Returns logits (N, K).
        images: (N, C, H, W).
        labels: (N,).
        loss: Maps ``(logits, labels)`` to the loss per example (N,).

    Raises:
        DeatError: If the logits are not differentiable with respect to the images, or inside `torch.inference_mode`.
    """
    require_autograd("a white-box attack")
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        logits = model(images)
        if not logits.requires_grad:
            raise DeatError(
                "the model's logits have no gradient, so white-box attacks cannot run on it; "
                "remove no_grad() and detach() from its forward"
            )
        (gradient,) = torch.autograd.grad(loss(logits, labels).sum(), images)
    return logits.detach(), gradient


def fgsm(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    loss: Objective,
    threat: Linf | L2 | None = None,
) -> AttackOutput:
    """Run the fast gradient sign method (Goodfellow et al. 2015): one step of ``eps`` from the clean image.

    Args:
        model: Returns logits (N, K).
        images: Clean images in [0, 1], (N, C, H, W).
        labels: (N,).
        eps: Radius, in [0, 1] pixel units.
        loss: The loss to maximize, per example.
        threat: The threat model; by default Linf. In L2 it is the fast gradient method.
    """
    _, gradient = logits_and_gradient(model, images, labels, loss)
    adv = (images + (threat or Linf(eps)).step(gradient, eps)).clamp(0, 1)
    with torch.no_grad():
        return AttackOutput(adv, model(adv).argmax(dim=1) != labels)


def uniform_start(images: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """Draw a start from U(-eps, eps) around ``images`` (N, C, H, W), within [0, 1].

    The noise is drawn on the generator's device, so that a CPU generator gives every device the same start.
    """
    return Linf(eps).start(images, generator)


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
    threat: Linf | L2 | None = None,
    leave_every: int | None = None,
) -> AttackOutput:
    """Run projected gradient descent (Madry et al. 2018); in Linf its iterates equal those of `torchattacks.PGD`.

    An example counts as misclassified as soon as one iterate is, the start and the last one included, and is moved no
    further; so robust accuracy is at most that of torchattacks.

    Args:
        model: Returns logits (N, K); in eval mode, where the examples of a batch do not affect each other.
        images: Clean images in [0, 1], (N, C, H, W).
        labels: (N,).
        start: The first iterate, (N, C, H, W).
        eps: Radius, in [0, 1] pixel units.
        alpha: Step size, in the same unit.
        steps: Number of steps.
        loss: The loss to maximize, per example.
        threat: The threat model; by default Linf.
        leave_every: Steps between removals of misclassified examples from the batch; by default 1 on a CPU, else 5.
    """
    if leave_every is None:
        # Reading the mask synchronizes with the device, which costs more than a few steps on misclassified examples.
        leave_every = 1 if images.device.type == "cpu" else 5
    threat_ball = threat or Linf(eps)
    adv = start.clone()
    misclassified = torch.zeros_like(labels, dtype=torch.bool)
    rows = torch.arange(len(images), device=images.device)
    for step in range(steps):
        current = adv[rows]
        logits, gradient = logits_and_gradient(model, current, labels[rows], loss)
        misclassified[rows] |= logits.argmax(dim=1) != labels[rows]
        stepped = threat_ball.ascend(current, images[rows], gradient, alpha)
        adv[rows] = torch.where(misclassified[rows, None, None, None], current, stepped)
        if step % leave_every == 0:
            rows = rows[~misclassified[rows]]
            if len(rows) == 0:
                return AttackOutput(adv, misclassified)
    with torch.no_grad():
        misclassified[rows] |= model(adv[rows]).argmax(dim=1) != labels[rows]
    return AttackOutput(adv, misclassified)


def admissible(adv: Tensor, images: Tensor, eps: float, norm: str = "Linf") -> Tensor:
    """Return which adversarial examples are in the threat model: finite, in [0, 1], within eps + 1e-6; (N,) bool."""
    return threat_model(norm, eps).contains(adv, images)
