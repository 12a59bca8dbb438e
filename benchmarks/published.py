"""The methods as their authors publish them: plain loops in float32 and NCHW, one ``backward()`` per gradient.

The mathematics is that of `deat_rb`; a test holds a step's weights to it. What differs is the writing, as in the public
scripts of fast_adversarial (PGD, U-FGSM, FREE, and DEAT after it), TRADES, MART and FAT: the inner steps go backward by
``loss.backward()``, which forms the gradients of all parameters; TRADES forwards the clean images anew, with a graph,
in each of them, and goes backward through both forwards; friendly crafting decides example by example in Python; loss
and accuracy are read in each batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's own name for it

from deat_rb.utils.errors import DeatError

BETA = 6.0
TAU = 3


class PublishedLoop:
    """One method's loop over batches.

    Args:
        method: Its canonical name, such as ``m+trades``.
        model: Takes images in [0, 1], (N, C, H, W), and returns logits (N, K); in train mode.
        eps: The radius, in [0, 1] pixel units.
        alpha: The step size, in the same unit.
        steps: The inner steps or replays.
        lr: The learning rate.

    Attributes:
        optimizer: SGD with momentum 0.9 and weight decay 5e-4.
        loss: The losses' sum over all examples so far.
        correct: How many examples so far were classified correctly as trained on.

    Raises:
        DeatError: There is no published loop for the method.
    """

    def __init__(self, method: str, model: nn.Module, *, eps: float, alpha: float, steps: int, lr: float) -> None:
        if family(method) not in LOOPS:
            raise DeatError(f"there is no published loop for the method '{method}'; known are {', '.join(LOOPS)}")
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
        """Learns from a batch: images (N, C, H, W) in [0, 1] and labels (N,)."""
        self.body(self, images, labels)

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """One step on the mean ``loss``; loss and accuracy are read, as the scripts do."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.note(loss, logits, labels)

    def note(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Reads loss and accuracy of a batch."""
        self.loss += loss.item() * len(labels)
        self.correct += int((logits.max(1)[1] == labels).sum().item())

    def ascend(self, delta: Tensor, gradient: Tensor, images: Tensor) -> Tensor:
        """A step of delta, kept within eps and with the images in [0, 1]."""
        delta = torch.clamp(delta + self.alpha * torch.sign(gradient), -self.eps, self.eps)
        return torch.max(torch.min(delta, 1 - images), 0 - images)

    def uniform_delta(self, images: Tensor) -> Tensor:
        """U(-eps, eps), with the images in [0, 1]."""
        delta = torch.zeros_like(images).uniform_(-self.eps, self.eps)
        return torch.max(torch.min(delta, 1 - images), 0 - images)

    def normal_start(self, images: Tensor) -> Tensor:
        """The images with 0.001 * N(0, 1)."""
        return torch.clamp(images + 0.001 * torch.randn_like(images), 0, 1)

    def project(self, adv: Tensor, images: Tensor) -> Tensor:
        """Brings images back to within eps of the clean ones, and into [0, 1]."""
        adv = torch.min(torch.max(adv, images - self.eps), images + self.eps)
        return torch.clamp(adv, 0.0, 1.0)


def family(method: str) -> str:
    """The name of a method's loop: ``trades`` of ``m+trades``, ``deat`` of ``deat-40%``."""
    return re.sub(r"^m[+-]|-\d+%?$", "", method)


def kl_sum(adv_logits: Tensor, clean_logits: Tensor) -> Tensor:
    """KL(clean || adversarial), summed over the batch."""
    return F.kl_div(F.log_softmax(adv_logits, dim=1), F.softmax(clean_logits, dim=1), reduction="sum")


def standard(loop: PublishedLoop, images: Tensor, labels: Tensor) -> None:
    """Plain training."""
    logits = loop.model(images)
    loop.update(F.cross_entropy(logits, labels), logits, labels)


def replays(loop: PublishedLoop, images: Tensor, labels: Tensor, delta: Tensor) -> Tensor:
    """Updates weights and delta (N, C, H, W) from the same backward passes; returns the last delta."""
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
    """FREE (Shafahi et al. 2019): delta is carried from batch to batch."""
    delta = torch.zeros_like(images) if loop.carried is None else loop.carried
    loop.carried = replays(loop, images, labels, torch.max(torch.min(delta, 1 - images), 0 - images))


def deat(loop: PublishedLoop, images: Tensor, labels: Tensor) -> None:
    """DEAT and M-DEAT: delta begins anew in each batch."""
    replays(loop, images, labels, loop.uniform_delta(images))


def pgd(loop: PublishedLoop, images: Tensor, labels: Tensor) -> None:
    """PGD-N (Madry et al. 2018) and, in one step, U-FGSM (Wong et al. 2020)."""
    delta = loop.uniform_delta(images).requires_grad_()
    for _ in range(loop.steps):
        F.cross_entropy(loop.model(images + delta), labels).backward()
        assert delta.grad is not None
        delta.data = loop.ascend(delta.detach(), delta.grad.detach(), images)
        delta.grad.zero_()
    logits = loop.model(images + delta.detach())
    loop.update(F.cross_entropy(logits, labels), logits, labels)


def craft(loop: PublishedLoop, images: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
    """Steps of TRADES and MART; ``objective`` maps adversarial images (N, C, H, W) to a scalar."""
    adv = loop.normal_start(images)
    for _ in range(loop.steps):
        adv.requires_grad_()
        objective(adv).backward()
        assert adv.grad is not None
        adv = loop.project(adv.detach() + loop.alpha * torch.sign(adv.grad), images)
    return adv


def trades_update(loop: PublishedLoop, images: Tensor, adv: Tensor, labels: Tensor) -> None:
    """The outer step of TRADES (Zhang et al. 2019)."""
    clean_logits, adv_logits = loop.model(images), loop.model(adv)
    natural = F.cross_entropy(clean_logits, labels)
    robust = kl_sum(adv_logits, clean_logits) / len(images)
    loop.update(natural + BETA * robust, adv_logits, labels)


def trades(loop: PublishedLoop, images: Tensor, labels: Tensor) -> None:
    """TRADES: both logits are computed, and gone backward through, in each step."""
    adv = craft(loop, images, lambda adv: kl_sum(loop.model(adv), loop.model(images)))
    trades_update(loop, images, adv, labels)


def mart_update(loop: PublishedLoop, images: Tensor, adv: Tensor, labels: Tensor) -> None:
    """The outer step of MART (Wang et al. 2020)."""
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
    """MART: crafts on cross-entropy."""
    adv = craft(loop, images, lambda adv: F.cross_entropy(loop.model(adv), labels))
    mart_update(loop, images, adv, labels)


def friendly(loop: PublishedLoop, images: Tensor, labels: Tensor, on_kl: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Friendly crafting (Zhang et al. 2020), in eval mode; who has stopped leaves the batch.

    Returns:
        Clean images, adversarial images and labels, in the order in which they stopped.
    """
    loop.model.eval()
    clean_logits = loop.model(images).detach() if on_kl else images.new_empty(len(images))
    adv, patience = loop.normal_start(images), [TAU] * len(images)
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
        stepped = loop.project(adv.detach() + loop.alpha * torch.sign(adv.grad), images)
        adv, images, labels, clean_logits = stepped[moving], images[moving], labels[moving], clean_logits[moving]
        patience = [patience[index] for index in moving]
        if not moving:
            break
    loop.model.train()
    done.append((images, adv.detach(), labels))
    clean, crafted, truth = (torch.cat(parts) for parts in zip(*done, strict=True))
    return clean, crafted, truth


def fat(loop: PublishedLoop, images: Tensor, labels: Tensor) -> None:
    """FAT: plain training on friendly examples."""
    _, adv, labels = friendly(loop, images, labels)
    logits = loop.model(adv)
    loop.update(F.cross_entropy(logits, labels), logits, labels)


def f_trades(loop: PublishedLoop, images: Tensor, labels: Tensor) -> None:
    """TRADES on friendly examples."""
    images, adv, labels = friendly(loop, images, labels, on_kl=True)
    trades_update(loop, images, adv, labels)


def f_mart(loop: PublishedLoop, images: Tensor, labels: Tensor) -> None:
    """MART on friendly examples, which its public code crafts on KL."""
    images, adv, labels = friendly(loop, images, labels, on_kl=True)
    mart_update(loop, images, adv, labels)


LOOPS: dict[str, Callable[[PublishedLoop, Tensor, Tensor], None]] = {
    "standard": standard,
    "free": free,
    "deat": deat,
    "pgd": pgd,
    "u-fgsm": pgd,
    "fat": fat,
    "trades": trades,
    "f+trades": f_trades,
    "mart": mart,
    "f+mart": f_mart,
}
