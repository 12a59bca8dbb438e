"""Reference implementations as published by the methods' authors: plain loops in float32 and NCHW.

They compute the same as `deat_rb`; a test compares the weights after a step. The implementation follows the public
scripts of fast_adversarial (PGD, U-FGSM, FREE, and DEAT, which is based on it), TRADES, MART and FAT: inner steps call
``loss.backward()``, which computes the gradients of all parameters; TRADES forwards the clean images again in each
step and backpropagates through both forward passes; FAT's early stopping loops over examples in Python; loss and
accuracy are read in each batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deat_rb.utils.errors import DeatError

BETA = 6.0
TAU = 3
OMEGA = 0.001


class PublishedLoop:
    """Training loop of a method, called with one batch after another.

    Args:
        method: Canonical name of the method, such as ``m+trades``.
        model: Model in train mode that maps images (N, C, H, W) in [0, 1] to logits (N, K).
        eps: Perturbation radius, in [0, 1] units.
        alpha: Step size, in [0, 1] units.
        steps: Number of inner steps or replays.
        lr: The learning rate.

    Attributes:
        optimizer: SGD with momentum 0.9 and weight decay 5e-4.
        loss: Sum of the losses of all examples so far.
        correct: Number of correctly classified training examples so far.

    Raises:
        DeatError: There is no published loop for the method.
    """

    def __init__(self, method: str, model: nn.Module, *, eps: float, alpha: float, steps: int, lr: float) -> None:
        if family(method) not in LOOPS:
            raise DeatError(f"there is no published loop for the method '{method}'; choose one of {', '.join(LOOPS)}")
        self.body = LOOPS[family(method)]
        self.model = model
        self.eps = eps
        self.alpha = alpha
        self.steps = steps
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
        self.loss = 0.0
        self.correct = 0
        self.carried: Tensor | None = None

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Train on a batch: images (N, C, H, W) in [0, 1] and labels (N,)."""
        self.body(self, images, labels)

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Update the weights with the mean ``loss``, and read loss and accuracy, as the scripts do."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.note(loss, logits, labels)

    def note(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Read loss and accuracy of a batch."""
        self.loss += loss.item() * len(labels)
        self.correct += int((logits.max(1)[1] == labels).sum().item())

    def ascend(self, delta: Tensor, gradient: Tensor, images: Tensor) -> Tensor:
        """Return delta after a step, clamped to [-eps, eps] and so that images stay in [0, 1]."""
        delta = torch.clamp(delta + self.alpha * torch.sign(gradient), -self.eps, self.eps)
        return torch.max(torch.min(delta, 1 - images), 0 - images)

    def uniform_delta(self, images: Tensor) -> Tensor:
        """Return delta from U(-eps, eps), clamped so that images stay in [0, 1]."""
        delta = torch.zeros_like(images).uniform_(-self.eps, self.eps)
        return torch.max(torch.min(delta, 1 - images), 0 - images)

    def normal_start(self, images: Tensor) -> Tensor:
        """Return the images plus 0.001 * N(0, 1)."""
        return images + 0.001 * torch.randn_like(images)

    def project(self, adv: Tensor, images: Tensor) -> Tensor:
        """Return ``adv`` projected onto the eps-ball around the clean images and onto [0, 1]."""
        adv = torch.min(torch.max(adv, images - self.eps), images + self.eps)
        return torch.clamp(adv, 0.0, 1.0)


def family(method: str) -> str:
    """Return the name of a method's loop: ``trades`` for ``m+trades``, ``deat`` for ``deat-40%``."""
    return re.sub(r"^m[+-]|-\d+%?$", "", method)


def kl_sum(adv_logits: Tensor, clean_logits: Tensor) -> Tensor:
    """Return KL(clean || adversarial), summed over the batch."""
    return F.kl_div(F.log_softmax(adv_logits, dim=1), F.softmax(clean_logits, dim=1), reduction="sum")


def standard(loop: PublishedLoop, images: Tensor, labels: Tensor) -> None:
    """Train on clean images."""
    logits = loop.model(images)
    loop.update(F.cross_entropy(logits, labels), logits, labels)


def replays(loop: PublishedLoop, images: Tensor, labels: Tensor, delta: Tensor) -> Tensor:
    """Update weights and delta (N, C, H, W) with the same backward passes; return the last delta."""
    delta = delta.detach().requires_grad_()
    for _ in range(loop.steps):
        logits = loop.model(images + delta)
        loss = F.cross_entropy(logits, labels)
        loop.optimizer.zero_grad()
        loss.backward()
        assert delta.grad is not None
        gradient = delta.grad.detach()
        delta.data = loop.ascend(delta.detach(), gradient, images)
        loop.optimizer.step()
        delta.grad.zero_()
    loop.note(loss, logits, labels)
    return delta.detach()


def free(loop: PublishedLoop, images: Tensor, labels: Tensor) -> None:
    """Train with FREE (Shafahi et al. 2019): delta is carried over from batch to batch."""
    delta = torch.zeros_like(images) if loop.carried is None else loop.carried
    loop.carried = replays(loop, images, labels, delta)


def deat(loop: PublishedLoop, images: Tensor, labels: Tensor) -> None:
    """Train with DEAT or M-DEAT: delta is drawn anew for each batch."""
    replays(loop, images, labels, loop.uniform_delta(images))


def pgd(loop: PublishedLoop, images: Tensor, labels: Tensor) -> None:
    """Train with PGD-N (Madry et al. 2018) or, with one step, U-FGSM (Wong et al. 2020)."""
    delta = loop.uniform_delta(images).requires_grad_()
    for _ in range(loop.steps):
        F.cross_entropy(loop.model(images + delta), labels).backward()
        assert delta.grad is not None
        delta.data = loop.ascend(delta.detach(), delta.grad.detach(), images)
        delta.grad.zero_()
    logits = loop.model(images + delta.detach())
    loop.update(F.cross_entropy(logits, labels), logits, labels)


def n_fgsm(loop: PublishedLoop, images: Tensor, labels: Tensor) -> None:
    """Train with N-FGSM (de Jorge et al. 2022): noise of 2 eps, one step, no projection onto the eps-ball."""
    eta = torch.zeros_like(images).uniform_(-2 * loop.eps, 2 * loop.eps)
    eta = torch.max(torch.min(eta, 1 - images), 0 - images).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(loop.model(images + eta), labels), eta)
    delta = eta.detach() + loop.alpha * torch.sign(gradient)
    logits = loop.model(images + torch.max(torch.min(delta, 1 - images), 0 - images))
    loop.update(F.cross_entropy(logits, labels), logits, labels)


def craft(loop: PublishedLoop, images: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the adversarial examples of TRADES or MART; ``objective`` maps images (N, C, H, W) to a scalar."""
    adv = loop.normal_start(images)
    for _ in range(loop.steps):
        adv.requires_grad_()
        objective(adv).backward()
        assert adv.grad is not None
        adv = loop.project(adv.detach() + loop.alpha * torch.sign(adv.grad), images)
    return adv


def trades_update(loop: PublishedLoop, images: Tensor, adv: Tensor, labels: Tensor) -> None:
    """Update the weights with TRADES' loss (Zhang et al. 2019)."""
    clean_logits, adv_logits = loop.model(images), loop.model(adv)
    natural = F.cross_entropy(clean_logits, labels)
    robust = kl_sum(adv_logits, clean_logits) / len(images)
    loop.update(natural + BETA * robust, adv_logits, labels)


def trades(loop: PublishedLoop, images: Tensor, labels: Tensor) -> None:
    """Train with TRADES: each attack step backpropagates through forward passes of clean and adversarial images."""
    adv = craft(loop, images, lambda adv: kl_sum(loop.model(adv), loop.model(images)))
    trades_update(loop, images, adv, labels)


def mart_update(loop: PublishedLoop, images: Tensor, adv: Tensor, labels: Tensor) -> None:
    """Update the weights with MART's loss (Wang et al. 2020)."""
    clean_logits, adv_logits = loop.model(images), loop.model(adv)
    adv_probabilities = F.softmax(adv_logits, dim=1)
    ranked = torch.argsort(adv_probabilities, dim=1)[:, -2:]
    strongest_wrong = torch.where(ranked[:, -1] == labels, ranked[:, -2], ranked[:, -1])
    boosted = F.cross_entropy(adv_logits, labels) + F.nll_loss(
        torch.log(1.0001 - adv_probabilities + 1e-12), strongest_wrong
    )
    clean_probabilities = F.softmax(clean_logits, dim=1)
    true = torch.gather(clean_probabilities, 1, labels.unsqueeze(1)).squeeze()
    divergence = F.kl_div(F.log_softmax(adv_logits, dim=1), clean_probabilities, reduction="none").sum(dim=1)
    robust = torch.sum(divergence * (1.0 - true)) / len(images)
    loop.update(boosted + BETA * robust, adv_logits, labels)


def mart(loop: PublishedLoop, images: Tensor, labels: Tensor) -> None:
    """Train with MART, whose attack maximizes cross-entropy."""
    adv = craft(loop, images, lambda adv: F.cross_entropy(loop.model(adv), labels))
    mart_update(loop, images, adv, labels)


def friendly(loop: PublishedLoop, images: Tensor, labels: Tensor, on_kl: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Generate FAT's adversarial examples (Zhang et al. 2020) in eval mode; stopped examples leave the batch.

    Returns:
        Clean images, adversarial images and labels, in the order in which they stopped.
    """
    loop.model.eval()
    clean_logits = loop.model(images).detach() if on_kl else images.new_empty(len(images))
    adv = torch.clamp(loop.normal_start(images), 0, 1) if on_kl else images + loop.uniform_delta(images)
    patience, batch, rows = [TAU] * len(images), images, torch.arange(len(images), device=images.device)
    done: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(loop.steps):
        adv = adv.detach().requires_grad_()
        logits = loop.model(adv)
        predictions = logits.max(1)[1]
        stopping, moving = [], []
        for index in range(len(adv)):
            if predictions[index] != labels[index] and patience[index] == 0:
                stopping.append(index)
                continue
            if predictions[index] != labels[index]:
                patience[index] -= 1
            moving.append(index)
        loop.model.zero_grad()
        (kl_sum(logits, clean_logits) if on_kl else F.cross_entropy(logits, labels)).backward()
        assert adv.grad is not None
        if stopping:
            done.append((images[stopping], adv[stopping].detach(), labels[stopping]))
        stepped = adv.detach() + loop.alpha * torch.sign(adv.grad)
        if not on_kl:
            stepped = stepped + OMEGA * torch.randn_like(batch)[rows]
        stepped, rows = loop.project(stepped, images), rows[moving]
        adv, images, labels, clean_logits = stepped[moving], images[moving], labels[moving], clean_logits[moving]
        patience = [patience[index] for index in moving]
        if not moving:
            break
    loop.model.train()
    done.append((images, adv.detach(), labels))
    clean, adversarial, ordered_labels = (torch.cat(parts) for parts in zip(*done, strict=True))
    return clean, adversarial, ordered_labels


def fat(loop: PublishedLoop, images: Tensor, labels: Tensor) -> None:
    """Train with FAT: cross-entropy on friendly adversarial examples."""
    _, adv, labels = friendly(loop, images, labels)
    logits = loop.model(adv)
    loop.update(F.cross_entropy(logits, labels), logits, labels)


def f_trades(loop: PublishedLoop, images: Tensor, labels: Tensor) -> None:
    """Train with TRADES on FAT's adversarial examples."""
    images, adv, labels = friendly(loop, images, labels, on_kl=True)
    trades_update(loop, images, adv, labels)


def f_mart(loop: PublishedLoop, images: Tensor, labels: Tensor) -> None:
    """Train with MART on FAT's adversarial examples, for which FAT's public code maximizes KL."""
    images, adv, labels = friendly(loop, images, labels, on_kl=True)
    mart_update(loop, images, adv, labels)


LOOPS: dict[str, Callable[[PublishedLoop, Tensor, Tensor], None]] = {
    "standard": standard,
    "free": free,
    "deat": deat,
    "pgd": pgd,
    "u-fgsm": pgd,
    "n-fgsm": n_fgsm,
    "fat": fat,
    "trades": trades,
    "f+trades": f_trades,
    "mart": mart,
    "f+mart": f_mart,
}
