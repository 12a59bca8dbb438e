"""FGSM, PGD and CW as functions for evaluation; examples are dropped from the batch once misclassified."""

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
    """Model wrapper that counts passes per image: a forward pass on a batch of 100 counts as 100.

    Args:
        model: Returns logits (N, K) of images (N, C, H, W).
        dtype: Autocast precision; None disables autocast. `exact` never enables it.

    Attributes:
        forwards: Images forwarded.
        backwards: Images for which gradients were backpropagated from the logits.
        calls: Number of forward passes, whatever the batch size.
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
        """Return the logits (N, K) of images (N, C, H, W), converted to float32 after autocast."""
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
        images: (N, C, H, W): each example's first misclassified iterate, or its last iterate if there is none.
        misclassified: (N,) bool: whether any iterate was misclassified.
    """

    images: Tensor
    misclassified: Tensor


def logits_and_gradient(
    model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, loss: Objective
) -> tuple[Tensor, Tensor]:
    """Return the logits (N, K) and the loss's input gradient, using one forward and one backward pass.

    The losses are summed: averaging would make small gradients underflow in large batches.

    Args:
        model: Returns logits (N, K).
        images: (N, C, H, W).
        labels: (N,).
        loss: Maps ``(logits, labels)`` to the loss per example (N,).

    Raises:
        DeatError: If the logits are not differentiable with respect to the images, or this is called inside
            `torch.inference_mode`.
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
        threat: The threat model; by default Linf. With L2 this is the fast gradient method.
    """
    _, gradient = logits_and_gradient(model, images, labels, loss)
    adv = (images + (threat or Linf(eps)).step(gradient, eps)).clamp(0, 1)
    with torch.no_grad():
        return AttackOutput(adv, model(adv).argmax(dim=1) != labels)


def uniform_start(images: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """Draw a start from U(-eps, eps) around ``images`` (N, C, H, W), within [0, 1].

    The noise is drawn on the generator's device, so a CPU generator gives the same start on every device.
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

    An example counts as misclassified as soon as any iterate is, including the start and the last one, and is not moved
    further; robust accuracy is therefore at most that of torchattacks.

    Args:
        model: Returns logits (N, K); must be in eval mode, where the examples of a batch do not affect each other.
        images: Clean images in [0, 1], (N, C, H, W).
        labels: (N,).
        start: The first iterate, (N, C, H, W).
        eps: Radius, in [0, 1] pixel units.
        alpha: Step size, in the same unit.
        steps: Number of steps.
        loss: The loss to maximize, per example.
        threat: The threat model; by default Linf.
        leave_every: Number of steps after which misclassified examples are dropped from the batch; by default 1 on a
            CPU, 5 elsewhere.
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
    """Return which adversarial examples are finite, in [0, 1] and within eps + 1e-6 of the images; (N,) bool."""
    return threat_model(norm, eps).contains(adv, images)
