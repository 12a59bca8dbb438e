"""What the reference loops share: an epoch's numbers, the update of a batch, one step of an attack."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Epoch:
    """What one epoch did; forwards and backwards are in mini-batches, a share where only some examples took part."""

    steps: int
    examples: int = 0
    correct: int = 0
    loss: float = 0.0
    l_x: float = 0.0
    forwards: float = 0.0
    backwards: float = 0.0
    updates: int = 0

    @property
    def accuracy(self) -> float:
        """The share of the epoch's examples, as they were trained on, that the model got right."""
        return self.correct / self.examples


Trace = list[Epoch]


@dataclass
class Loop:
    """What the loop bodies share: the model, its optimizer and the numbers of this epoch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    eps: float
    alpha: float
    steps: int
    epoch: Epoch
    delta: dict[str, Tensor] = field(default_factory=dict)
    number: int = 0  # of the epoch
    batch: int = 0
    first: int = 0  # position of the batch's first image among all
    total: int = 0  # images
    epochs_done: float = 1.0  # t / T
    inner: int = 0  # YOPO's n

    def forward(self, images: Tensor) -> Tensor:
        """Runs the whole mini-batch through the model."""
        self.epoch.forwards += 1
        logits: Tensor = self.model(images)
        return logits

    def update(self, each: Tensor, logits: Tensor, labels: Tensor) -> None:
        """theta <- theta - grad_theta of the mean of ``each``, the examples' losses (N,)."""
        self.optimizer.zero_grad()
        each.mean().backward()
        self.epoch.backwards += 1
        self.optimizer.step()
        self.record(each, logits, labels)

    def record(self, each: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Record the update of a batch whose loss and accuracy count: its only one, or its last replay's."""
        self.epoch.updates += 1
        self.epoch.examples += len(labels)
        self.epoch.loss += each.sum().item()
        self.epoch.correct += int((logits.argmax(1) == labels).sum())

    def step(self, images: Tensor, adversarial: Tensor, gradient: Tensor) -> Tensor:
        """delta <- delta + alpha sign(gradient); delta <- max(min(delta, eps), -eps); images stay images."""
        delta = adversarial + self.alpha * gradient.sign() - images
        delta = torch.clamp(delta, -self.eps, self.eps)
        return torch.clamp(images + delta, 0, 1).detach()


def uniform_start(images: Tensor, eps: float) -> Tensor:
    """x + delta for delta = U(-eps, eps), kept in [0, 1]."""
    return torch.clamp(images + torch.empty(images.shape, dtype=images.dtype).uniform_(-eps, eps), 0, 1)


def normal_start(images: Tensor) -> Tensor:
    """x + delta for delta = 0.001 N(0, 1), as TRADES and MART begin: it may leave [0, 1]."""
    return images + 0.001 * torch.randn(images.shape, dtype=images.dtype)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p_y of each example, (N,)."""
    return -logits.log_softmax(1)[range(len(labels)), labels]


def kl(clean_logits: Tensor, adversarial_logits: Tensor) -> Tensor:
    """KL(p_clean || p_adv) of each example, (N,)."""
    log_p, log_q = clean_logits.log_softmax(1), adversarial_logits.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)
