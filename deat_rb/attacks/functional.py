"""The evaluation's own attacks: noise, FGSM, PGD and CW, with every example leaving as soon as it is broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deat_rb.attacks.threat_models import L2, Linf, threat_model
from deat_rb.utils.errors import DeatError

Objective = Callable[[Tensor, Tensor], Tensor]


class CountingModel(nn.Module):
    """A model that counts its passes, in images: a forward over a batch of 100 is 100 forwards.

    Args:
        model: Gives logits (N, K) of images (N, C, H, W).
        dtype: In which precision, by autocast, the calls are made; `exact` never is.

    Attributes:
        forwards: Images forwarded so far.
        backwards: Images for which a gradient was propagated back from the logits so far.
        calls: Forward passes so far, whatever the number of images.
        on_call: Told after every call; where it raises, so does the call.
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
        """Gives the logits (N, K) of images (N, C, H, W), float32 where the precision is lower."""
        if self.dtype is None:
            return self.exact(images)
        with torch.autocast(images.device.type, self.dtype):
            logits = self.exact(images)
        return logits.float()

    def exact(self, images: Tensor) -> Tensor:
        """Gives the logits in the model's own precision."""
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


def fgsm(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    loss: Objective,
    threat: Linf | L2 | None = None,
) -> AttackOutput:
    """The fast gradient sign method (Goodfellow et al. 2015): one step of ``eps`` from the clean image.

    Args:
        model: Gives logits (N, K).
        images: Clean images in [0, 1], (N, C, H, W).
        labels: (N,).
        eps: Radius, in [0, 1] pixel units.
        loss: What is maximised, per example.
        threat: In which the step is the steepest; by default Linf. In L2 it is the fast gradient method.
    """
    _, gradient = logits_and_gradient(model, images, labels, loss)
    adv = (images + (threat or Linf(eps)).step(gradient, eps)).clamp(0, 1)
    with torch.no_grad():
        return AttackOutput(adv, model(adv).argmax(dim=1) != labels)


def uniform_start(images: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """Draws a start from U(-eps, eps) around ``images`` (N, C, H, W), within [0, 1].

    The numbers are drawn on the generator's device, so that a CPU generator gives every device the same start.
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
    """Projected gradient descent (Madry et al. 2018), in Linf iterate for iterate that of `torchattacks.PGD`.

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
        threat: The ball; by default Linf's.
        leave_every: Take the broken examples out of the batch every so many steps; by default 1 on a CPU, else 5.
    """
    if leave_every is None:
        # To know who is broken an accelerator's queue has to run empty: dragging the broken ones along is cheaper.
        leave_every = 1 if images.device.type == "cpu" else 5
    ball = threat or Linf(eps)
    adv = start.clone()
    broken = torch.zeros_like(labels, dtype=torch.bool)
    rows = torch.arange(len(images), device=images.device)
    for step in range(steps):
        here = adv[rows]
        logits, gradient = logits_and_gradient(model, here, labels[rows], loss)
        broken[rows] |= logits.argmax(dim=1) != labels[rows]
        stepped = ball.ascend(here, images[rows], gradient, alpha)
        adv[rows] = torch.where(broken[rows, None, None, None], here, stepped)
        if step % leave_every == 0:
            rows = rows[~broken[rows]]
            if len(rows) == 0:
                return AttackOutput(adv, broken)
    with torch.no_grad():
        broken[rows] |= model(adv[rows]).argmax(dim=1) != labels[rows]
    return AttackOutput(adv, broken)


def admissible(adv: Tensor, images: Tensor, eps: float, norm: str = "Linf") -> Tensor:
    """Says which adversarial images are in the threat model: finite, in [0, 1], within eps + 1e-6; (N,) bool."""
    return threat_model(norm, eps).contains(adv, images)
