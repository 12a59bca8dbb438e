"""The paper's fifteen methods and others as plain training loops, to hold the product against.

Written from the papers (arXiv:2103.03076v1: Algorithms 1-5, sections 4 and 5, appendix A.2; those named at the other
loops) and without deat_rb, so that
the two can only agree by both being right. Naive on purpose: one loop per algorithm, ``loss.backward()`` for every
gradient, FAT one example at a time. Read it with the paper beside it; numbers in comments are the
algorithms' lines.

What the paper leaves open, the loops take from the public code: perturbed images stay in [0, 1], the start included,
but for the starts of TRADES and MART and the perturbation that FREE carries on; attacks run in train mode (they update
BatchNorm's statistics) except FAT's, which run in eval mode; noise is drawn from torch's global generator.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch
from reference_penalized import fgsm_pgi, gradalign, liet
from reference_step import Epoch, Loop, Trace, cross_entropy, kl, normal_start, uniform_start
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
INNER = 2 / 255
SINGLE = 10 / 255
PATIENCE = 3
LAMBDA = 6.0
TAU = 20 / 255


def trades_loss(clean_logits: Tensor, adversarial_logits: Tensor, labels: Tensor) -> Tensor:
    """TRADES (Zhang et al. 2019) of each example, (N,)."""
    return cross_entropy(clean_logits, labels) + LAMBDA * kl(clean_logits, adversarial_logits)


def mart_loss(clean_logits: Tensor, adversarial_logits: Tensor, labels: Tensor) -> Tensor:
    """MART (Wang et al. 2020) of each example, (N,): boosted cross-entropy, and KL weighted by 1 - p_clean[y]."""
    rows = range(len(labels))
    others = adversarial_logits.softmax(1).clone()
    others[rows, labels] = -1
    boosted = cross_entropy(adversarial_logits, labels) - torch.log(1.0001 - others.max(1).values + 1e-12)
    doubt = 1 - clean_logits.softmax(1)[rows, labels]
    return boosted + LAMBDA * kl(clean_logits, adversarial_logits) * doubt


def standard(loop: Loop, images: Tensor, labels: Tensor) -> None:
    """Plain training."""
    logits = loop.forward(images)
    loop.update(cross_entropy(logits, labels), logits, labels)


def replay(loop: Loop, images: Tensor, labels: Tensor, adversarial: Tensor) -> Tensor:
    """Algorithm 1, lines 5-10 (and Algorithm 2's line 6); returns x + delta as the last replay left it."""
    gradient = torch.zeros_like(images)
    for j in range(loop.steps):  # 5
        adversarial = adversarial.detach().requires_grad_()
        logits = loop.forward(adversarial)
        each = cross_entropy(logits, labels)
        loop.optimizer.zero_grad()
        each.mean().backward()  # 6: both gradients from one pass
        loop.epoch.backwards += 1
        assert adversarial.grad is not None
        gradient = adversarial.grad * len(labels)
        loop.optimizer.step()  # 7
        if j == loop.steps - 1:
            loop.record(each, logits, labels)
        else:
            loop.epoch.updates += 1
        adversarial = loop.step(images, adversarial.detach(), gradient)  # 8, 9
    loop.epoch.l_x += gradient.abs().sum().item()
    return adversarial


def free(loop: Loop, images: Tensor, labels: Tensor) -> None:
    """FREE (Shafahi et al. 2019): replays whose delta is carried from batch to batch; a short batch takes its rows."""
    delta = loop.delta.setdefault("delta", torch.zeros_like(images))
    start = images + delta[: len(images)]
    delta[: len(images)] = replay(loop, images, labels, start) - images


def deat(loop: Loop, images: Tensor, labels: Tensor) -> None:
    """Algorithm 1, lines 4-10: replays from a fresh start."""
    replay(loop, images, labels, uniform_start(images, loop.eps))  # 4


def craft(loop: Loop, images: Tensor, start: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
    """Algorithm 4, lines 7-12, where N is read as r; ``objective`` maps logits to a scalar, the sum over examples."""
    adversarial, gradient = start, torch.zeros_like(images)
    for _ in range(loop.steps):  # 7
        adversarial = adversarial.detach().requires_grad_()
        objective(loop.forward(adversarial)).backward()  # 8
        loop.epoch.backwards += 1
        assert adversarial.grad is not None
        gradient = adversarial.grad
        adversarial = loop.step(images, adversarial.detach(), gradient)  # 9, 10
    loop.epoch.l_x += gradient.abs().sum().item()  # 12
    return adversarial


def pgd(loop: Loop, images: Tensor, labels: Tensor) -> None:
    """PGD-N, and Algorithm 4, lines 6-13."""
    start = uniform_start(images, loop.eps)  # 6
    adversarial = craft(loop, images, start, lambda logits: cross_entropy(logits, labels).sum())
    logits = loop.forward(adversarial)
    loop.update(cross_entropy(logits, labels), logits, labels)  # 13


def u_fgsm(loop: Loop, images: Tensor, labels: Tensor) -> None:
    """Algorithm 5, lines 4-7, with the sum of l_X that its listing forgets."""
    noisy = uniform_start(images, loop.eps).requires_grad_()  # 4
    cross_entropy(loop.forward(noisy), labels).sum().backward()
    loop.epoch.backwards += 1
    assert noisy.grad is not None
    loop.epoch.l_x += noisy.grad.abs().sum().item()
    adversarial = loop.step(images, noisy.detach(), noisy.grad)  # 5, 6
    logits = loop.forward(adversarial)
    loop.update(cross_entropy(logits, labels), logits, labels)  # 7


def n_fgsm(loop: Loop, images: Tensor, labels: Tensor) -> None:
    """N-FGSM (de Jorge et al. 2022, Algorithm 1 with k = 2): noise of 2 eps, a step of eps, no projection."""
    noisy = uniform_start(images, 2 * loop.eps).requires_grad_()
    cross_entropy(loop.forward(noisy), labels).sum().backward()
    loop.epoch.backwards += 1
    assert noisy.grad is not None
    loop.epoch.l_x += noisy.grad.abs().sum().item()
    adversarial = torch.clamp(noisy.detach() + loop.alpha * noisy.grad.sign(), 0, 1)
    logits = loop.forward(adversarial)
    loop.update(cross_entropy(logits, labels), logits, labels)


def trades(loop: Loop, images: Tensor, labels: Tensor) -> None:
    """TRADES: the attack maximizes KL to the clean prediction, computed once; Algorithm 4 with another loss."""
    fixed = loop.forward(images).detach()
    adversarial = craft(loop, images, normal_start(images), lambda logits: kl(fixed, logits).sum())
    clean_logits = loop.forward(images)
    adversarial_logits = loop.forward(adversarial)
    loop.update(trades_loss(clean_logits, adversarial_logits, labels), adversarial_logits, labels)


def mart(loop: Loop, images: Tensor, labels: Tensor) -> None:
    """MART: the attack maximizes cross-entropy."""
    start = normal_start(images)
    adversarial = craft(loop, images, start, lambda logits: cross_entropy(logits, labels).sum())
    clean_logits = loop.forward(images)
    adversarial_logits = loop.forward(adversarial)
    loop.update(mart_loss(clean_logits, adversarial_logits, labels), adversarial_logits, labels)


def early_stopped_pgd(loop: Loop, images: Tensor, labels: Tensor, on_kl: bool) -> Tensor:
    """FAT's early-stopped PGD (Zhang et al. 2020, Algorithm 1), one example at a time, in eval mode.

    FAT starts uniform and adds 0.001 N(0, 1) after every step; on KL it starts at 0.001 N(0, 1) and adds none.

    An example that is misclassified is moved at most `PATIENCE` more times. As in the public code the pass where it is
    found to stop has gone backward too; that gradient moves nothing, and l_X has the one it last moved along.
    """
    share = 1 / len(images)
    loop.model.eval()
    fixed = loop.forward(images).detach() if on_kl else None
    start = normal_start(images).clamp(0, 1) if on_kl else uniform_start(images, loop.eps)
    noise = [
        torch.zeros_like(images) if on_kl else 0.001 * torch.randn(images.shape, dtype=images.dtype)
        for _ in range(loop.steps)
    ]
    done = []
    for i in range(len(images)):
        image, label, adversarial = images[i : i + 1], labels[i : i + 1], start[i : i + 1]
        patience, magnitude = PATIENCE, 0.0
        for step in range(loop.steps):
            adversarial = adversarial.detach().requires_grad_()
            logits = loop.model(adversarial)
            each = cross_entropy(logits, label) if fixed is None else kl(fixed[i : i + 1], logits)
            each.sum().backward()
            loop.epoch.forwards += share
            loop.epoch.backwards += share
            assert adversarial.grad is not None
            if logits.argmax() != label:
                if patience == 0:
                    break
                patience -= 1
            magnitude = adversarial.grad.abs().sum().item()
            adversarial = loop.step(image, adversarial.detach() + noise[step][i : i + 1], adversarial.grad)
        loop.epoch.l_x += magnitude
        done.append(adversarial.detach())
    loop.model.train()
    return torch.cat(done)


def fat(loop: Loop, images: Tensor, labels: Tensor) -> None:
    """FAT: training on the early-stopped examples."""
    logits = loop.forward(early_stopped_pgd(loop, images, labels, on_kl=False))
    loop.update(cross_entropy(logits, labels), logits, labels)


def f_trades(loop: Loop, images: Tensor, labels: Tensor) -> None:
    """TRADES on early-stopped examples."""
    adversarial = early_stopped_pgd(loop, images, labels, on_kl=True)
    clean_logits = loop.forward(images)
    adversarial_logits = loop.forward(adversarial)
    loop.update(trades_loss(clean_logits, adversarial_logits, labels), adversarial_logits, labels)


def f_mart(loop: Loop, images: Tensor, labels: Tensor) -> None:
    """MART on FAT's examples, which the authors' copy of its code generates on KL."""
    adversarial = early_stopped_pgd(loop, images, labels, on_kl=True)
    clean_logits = loop.forward(images)
    adversarial_logits = loop.forward(adversarial)
    loop.update(mart_loss(clean_logits, adversarial_logits, labels), adversarial_logits, labels)


def amata(loop: Loop, images: Tensor, labels: Tensor) -> None:
    """Amata (Ye et al. 2021, Algorithm 1): K_t steps of tau / K_t, from the image; `run` sets them."""
    adversarial = craft(loop, images, images, lambda logits: cross_entropy(logits, labels).sum())
    logits = loop.forward(adversarial)
    loop.update(cross_entropy(logits, labels), logits, labels)


def yopo(loop: Loop, images: Tensor, labels: Tensor) -> None:
    """YOPO-m-n (Zhang et al. 2019, Algorithm 1) for a network that begins with its first layer f_0.

    As in the public code the start may leave [0, 1]; the steps are of the sign, and f_0 then gets the images within
    [0, 1]; and f_0's weights get the gradient of <p, f_0> at the end of each n steps, too.
    """
    assert isinstance(loop.model, nn.Sequential)
    first, others = loop.model[0], loop.model[1:]
    eta, gradient = torch.empty(images.shape, dtype=images.dtype).uniform_(-loop.eps, loop.eps), images
    loop.optimizer.zero_grad()
    for j in range(loop.steps):
        loop.epoch.forwards += 1
        loop.epoch.backwards += 1
        hidden = first(images + eta)
        hidden.retain_grad()
        logits = others(hidden)
        each = cross_entropy(logits, labels)
        each.mean().backward()
        p = hidden.grad
        for s in range(loop.inner):
            point = torch.clamp(images + eta, 0, 1).requires_grad_()
            (found,) = torch.autograd.grad((p * first(point)).sum(), point)
            if j == s == 0:
                found = torch.where((images + eta < 0) | (images + eta > 1), 0.0, found)
            gradient = found if s == 0 else gradient
            eta = loop.step(images, images + eta, found) - images
        (p * first(images + eta)).sum().backward()
    loop.optimizer.step()
    loop.record(each, logits, labels)
    loop.epoch.l_x += len(labels) * gradient.abs().sum().item()


def magnitude_rule(l_x: Sequence[float], start: int, gamma: float, bound: int) -> int:
    """Algorithm 2, lines 1 and 8-14: the next epoch's r after epochs that summed to ``l_x``."""
    r, threshold = start, 0.0  # 1
    for t, summed in enumerate(l_x, start=1):
        if t == 1:  # 8
            r = r + 1  # 9
        elif t == 2:  # 10
            threshold = gamma * summed  # 11
        elif summed > threshold:  # 12
            threshold = gamma * summed
            r = r + 1  # 13
        r = min(r, bound)
    return r


def ratio_rule(l_x: Sequence[float], gamma: float = 1.5, m: int = 2, rise: float = 0.4) -> bool:
    """Algorithm 5, lines 9-14: whether training stops after the last epoch of ``l_x``.

    Taken literally the rule fires on noise and while l_X falls; so R must also be ``rise`` of the l_X it rose from.
    """
    t = len(l_x) - 1
    if t - 1 - m < 0:  # 9, for R of this epoch and of the one before
        return False
    now = (l_x[t] - l_x[t - m]) / m  # 10
    before = (l_x[t - 1] - l_x[t - 1 - m]) / m
    return now > gamma * before and now > rise * l_x[t - m]  # 11


def robustness_rule(accuracies: Sequence[float], drop: float = 0.20) -> bool:
    """U-FGSM's own stop (Wong et al. 2020): PGD-5 accuracy fell by more than ``drop`` from one epoch to the next."""
    return len(accuracies) > 1 and accuracies[-2] - accuracies[-1] > drop


Body = Callable[[Loop, Tensor, Tensor], None]
BODIES: dict[str, tuple[Body, float, int]] = {
    "standard": (standard, 0.0, 0),
    "pgd": (pgd, INNER, 7),
    "deat": (deat, SINGLE, 8),
    "u-fgsm": (u_fgsm, SINGLE, 1),
    "n-fgsm": (n_fgsm, 8 / 255, 1),
    "gradalign": (gradalign, 8 / 255, 1),
    "amata": (amata, 0.0, 0),
    "yopo": (yopo, INNER, 0),
    "fgsm-pgi": (fgsm_pgi, 8 / 255, 1),
    "liet": (liet, 8 / 255, 1),
    "fat": (fat, INNER, 5),
    "trades": (trades, INNER, 10),
    "f+trades": (f_trades, INNER, 10),
    "mart": (mart, INNER, 10),
    "f+mart": (f_mart, INNER, 10),
}
GUIDED = {"m-deat": "deat", "m+pgd": "pgd", "m+trades": "trades", "m+mart": "mart"}


def run(
    method: str,
    model: nn.Module,
    batches_per_epoch: Sequence[Sequence[Batch]],
    *,
    lr: float,
    seed_batch: Callable[[int, int], None],
    gamma: float = 1.01,
    eps: float = 8 / 255,
    start_steps: int | None = None,
) -> Trace:
    """Trains ``model`` in place by SGD (momentum 0.9, weight decay 5e-4).

    Args:
        method: The paper's name in lower case: ``free-4``, ``deat-3``, ``deat-40%``, ``m-deat``, ``m+u-fgsm``, ...
        model: Anything that maps images (N, C, H, W) to logits (N, K); it is put in train mode.
        batches_per_epoch: For each epoch its batches of images and labels.
        lr: The learning rate, constant.
        seed_batch: Called with (epoch, batch) before each batch; seeds torch's global generator.
        gamma: The relax parameter of the guided methods.
        eps: The radius.
        start_steps: The steps of the first epoch, where not the method's own.

    Returns:
        What each epoch did. The stopping rules are not applied: ask `ratio_rule` or `robustness_rule`.
    """
    parts = re.fullmatch(r"(free|deat|pgd|fat|amata|yopo)-(\d+)(%|-\d+)?", method)
    guided = method in GUIDED
    family = parts[1] if parts else GUIDED.get(method, method.removeprefix("m+"))
    body, base_alpha, bound = (free, eps, 0) if family == "free" else BODIES[family]
    number = int(parts[2]) if parts else bound
    start = 1 if guided or family == "deat" else number
    r = start = start if start_steps is None else start_steps

    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    carried: dict[str, Tensor] = {}
    trace: Trace = []
    model.train()
    for t, batches in enumerate(batches_per_epoch):
        alpha = max(base_alpha, eps / r) if guided else base_alpha  # Algorithm 4, line 3
        alpha = TAU / r if family == "amata" else alpha
        trace.append(Epoch(steps=r))
        loop = Loop(model, optimizer, eps, alpha, r, trace[-1], carried, number=t)
        loop.inner = int(parts[3][1:]) if family == "yopo" and parts is not None else 0
        loop.total, loop.epochs_done = sum(len(labels) for _, labels in batches), (t + 1) / len(batches_per_epoch)
        for i, (images, labels) in enumerate(batches):
            seed_batch(t, i)
            loop.batch = i
            body(loop, images, labels)
            loop.first += len(images)
        if guided:
            r = magnitude_rule([epoch.l_x for epoch in trace], start, gamma, bound)
        elif family == "deat" and parts is not None:  # Algorithm 1, line 12
            meets = trace[-1].accuracy > number / 100 if parts[3] else (t + 1) % number == 0
            r = r + 1 if meets else r  # 13
        elif family == "amata" and parts is not None:
            r = math.floor(number + (int(parts[3][1:]) - number) * (t + 1) / len(batches_per_epoch))
    return trace
