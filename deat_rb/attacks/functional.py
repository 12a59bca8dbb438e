"""FGSM, PGD and CW as functions for evaluation; misclassified examples leave the batch, and others replace them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from deat_rb.attacks.threat_models import L2, Linf
from deat_rb.utils.errors import DeatError
from deat_rb.utils.module_state import require_autograd

Objective = Callable[[Tensor, Tensor], Tensor]

SMALLEST_BATCH = 16
"""Smallest batch to forward; in smaller ones matrix products round differently, so results would depend on the size."""

MOST_HELD = 4
"""No batch is begun while this many batches' worth of examples are held, which bounds the memory."""


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
        replay: Called instead of `logits`, such as to repeat recorded passes; None if there is none.
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
        self.replay: Callable[[Tensor], Tensor] | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, K) of images (N, C, H, W), converted to float32 after autocast."""
        return self._counted((self.replay or self.logits)(images))

    def logits(self, images: Tensor) -> Tensor:
        """Return what `forward` does, without counting the pass."""
        if self.dtype is None:
            logits: Tensor = self.model(images)
            return logits
        with torch.autocast(images.device.type, self.dtype):
            logits = self.model(images)
        return logits.float()

    def exact(self, images: Tensor) -> Tensor:
        """Return the logits in the model's own precision."""
        return self._counted(self.model(images))

    def _counted(self, logits: Tensor) -> Tensor:
        self.forwards += len(logits)
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
        passes: Single-image forward and backward passes, if the attack counts them itself because several batches
            share its passes; those that only fill up a batch to `SMALLEST_BATCH` are not counted.
    """

    images: Tensor
    misclassified: Tensor
    passes: tuple[int, int] | None = None


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


def pgd(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    start: Tensor,
    threat: Linf | L2,
    alpha: float,
    steps: int,
    loss: Objective,
    leave_every: int | None = None,
) -> AttackOutput:
    """Run `pgd_on_batches` on one batch of images (N, C, H, W), labels (N,) and first iterates ``start``."""
    batches = [(images, labels, start)]
    options: dict[str, Any] = {"alpha": alpha, "steps": steps, "loss": loss, "leave_every": leave_every}
    return next(pgd_on_batches(model, batches, size=len(images), threat=threat, **options))


def pgd_on_batches(
    model: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    size: int,
    threat: Linf | L2,
    alpha: float,
    steps: int,
    loss: Objective,
    leave_every: int | None = None,
) -> Iterator[AttackOutput]:
    """Run projected gradient descent (Madry et al. 2018); in Linf its iterates equal those of `torchattacks.PGD`.

    An example counts as misclassified as soon as any iterate is, including the start and the last one, and is not moved
    further; robust accuracy is therefore at most that of torchattacks. It then leaves the batch that is forwarded, and
    an example of the next batch takes its place. Its result does not depend on which others are forwarded with it.

    Args:
        model: Returns logits (N, K); must be in eval mode, where the examples of a batch do not affect each other.
        batches: Clean images in [0, 1], (N, C, H, W), labels (N,) and first iterates (N, C, H, W) of each batch.
        size: Number of examples to forward together.
        threat: The threat model.
        alpha: Step size, in [0, 1] pixel units.
        steps: Number of steps.
        loss: The loss to maximize, per example.
        leave_every: Number of steps after which misclassified examples leave; by default 1 on a CPU, 5 elsewhere.

    Yields:
        The result of each batch, in order.
    """
    supply = iter(batches)
    following = next(supply, None)
    if following is None:
        return
    held = _Held.of(*following)
    lengths = deque([len(held.labels)])
    device = held.images.device
    if leave_every is None:
        # Reading the mask synchronizes with the device, which costs more than a few steps on misclassified examples.
        leave_every = 1 if device.type == "cpu" else 5
    entered = 0  # the first examples of `held` that have entered
    rows = ended = torch.empty(0, dtype=torch.int64)  # examples that take steps, and that have taken all of them
    stepping, index = rows, rows.to(device)  # the rows of the last step, and the same, filled up, on the device
    for iteration in count():
        checks = iteration % leave_every == 0
        if checks:
            left = held.misclassified[rows.to(device)].cpu()
            held.finished[rows[left]] = True
            rows = rows[~left]
        over = held.backwards[rows] == steps
        ended, rows = torch.cat([ended, rows[over]]), rows[~over]
        if checks:
            while len(rows) < size:
                if entered == len(held.labels):
                    if entered >= MOST_HELD * size or (following := next(supply, None)) is None:
                        break
                    held = held.followed_by(_Held.of(*following))
                    lengths.append(len(following[1]))
                entering = torch.arange(entered, min(entered + size - len(rows), len(held.labels)))
                entered += len(entering)
                if steps:
                    rows = torch.cat([rows, entering])
                else:
                    ended = torch.cat([ended, entering])
        # Those that have ended wait for a full batch, unless nothing else is left or their batch keeps others waiting.
        waits = len(rows) == size or (len(rows) > 0 and following is None)
        while len(ended) >= size or (len(ended) and checks and not waits):
            chosen, ended = ended[:size], ended[size:]
            last = _filled(chosen, size).to(device)
            with torch.no_grad():
                wrong = model(held.adv[last]).argmax(dim=1) != held.labels[last]
            held.misclassified[last[: len(chosen)]] |= wrong[: len(chosen)]
            held.forwards[chosen] += 1
            held.finished[chosen] = True
        while lengths and held.finished[: lengths[0]].all():
            length = lengths.popleft()
            yield held.result(length)
            held = held.without(length)
            rows, ended, entered = rows - length, ended - length, entered - length
        if len(rows):
            if not torch.equal(rows, stepping):  # copying the index synchronizes with the device
                stepping, index = rows, _filled(rows, size).to(device)
            current, images, labels = held.adv[index], held.images[index], held.labels[index]
            logits, gradient = logits_and_gradient(model, current, labels, loss)
            wrong = held.misclassified[index] | (logits.argmax(dim=1) != labels)
            stepped = threat.ascend(current, images, gradient, alpha)
            moved = torch.where(wrong[:, None, None, None], current, stepped)
            own = index[: len(rows)]
            held.misclassified[own], held.adv[own] = wrong[: len(rows)], moved[: len(rows)]
            held.forwards[rows] += 1
            held.backwards[rows] += 1
        elif not lengths and following is None:
            return


@dataclass
class _Held:
    """The examples of the batches under attack, in order: on the device, except for the counts and `finished`."""

    images: Tensor
    labels: Tensor
    adv: Tensor
    misclassified: Tensor
    forwards: Tensor
    backwards: Tensor
    finished: Tensor

    @classmethod
    def of(cls, images: Tensor, labels: Tensor, start: Tensor) -> _Held:
        """Return the examples of a batch, with a copy of their first iterates."""
        zeros = torch.zeros(len(labels), dtype=torch.int64)
        wrong = torch.zeros_like(labels, dtype=torch.bool)
        return cls(images, labels, start.clone(), wrong, zeros, zeros.clone(), zeros.bool())

    def _each(self) -> Iterator[Tensor]:
        return (getattr(self, field.name) for field in fields(self))

    def followed_by(self, other: _Held) -> _Held:
        """Return these examples and those of ``other``."""
        return _Held(*(torch.cat(pair) for pair in zip(self._each(), other._each(), strict=True)))

    def without(self, length: int) -> _Held:
        """Return the examples but for the first ``length``."""
        return _Held(*(tensor[length:] for tensor in self._each()))

    def result(self, length: int) -> AttackOutput:
        """Return the result of the first ``length`` examples."""
        passes = (int(self.forwards[:length].sum()), int(self.backwards[:length].sum()))
        return AttackOutput(self.adv[:length], self.misclassified[:length], passes)


def _filled(rows: Tensor, size: int) -> Tensor:
    """Return the indices (n,), with the first one repeated up to `SMALLEST_BATCH` or ``size`` of them."""
    return torch.cat([rows, rows[:1].expand(max(0, min(SMALLEST_BATCH, size) - len(rows)))])
