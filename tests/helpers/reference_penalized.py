"""Reference loops of one-step methods with a penalty: GradAlign, FGSM-PGI and LIET."""

from __future__ import annotations

import torch
from reference_step import Loop, cross_entropy, kl
from torch import Tensor


def gradalign(loop: Loop, images: Tensor, labels: Tensor) -> None:
    """GradAlign (Andriushchenko and Flammarion 2020, Equation 5): FGSM without noise, and a penalty on 1 - cos.

    Of the two gradients the one at the image is a constant, as in the public code.
    """
    clean = images.clone().requires_grad_()
    cross_entropy(loop.forward(clean), labels).sum().backward()
    assert clean.grad is not None
    loop.epoch.l_x += clean.grad.abs().sum().item()
    adversarial = loop.step(images, images, clean.grad)
    logits = loop.forward(adversarial)
    random = (images + torch.empty(images.shape, dtype=images.dtype).uniform_(-loop.eps, loop.eps)).requires_grad_()
    each = cross_entropy(loop.forward(random), labels)
    (other,) = torch.autograd.grad(each.sum(), random, create_graph=True)
    one, two = clean.grad.flatten(1), other.flatten(1)
    cosine = (one * two).sum(1) / (one.square().sum(1).sqrt() * two.square().sum(1).sqrt())
    loop.epoch.backwards += 3  # at the image, at the random point, and through the latter
    loop.update(cross_entropy(logits, labels) + 0.2 * (1 - cosine), logits, labels)


def smoothed(logits: Tensor, target: Tensor) -> Tensor:
    """- sum_k target_k log p_k of each example, (N,)."""
    return -(target * logits.log_softmax(1)).sum(1)


def fgsm_pgi(loop: Loop, images: Tensor, labels: Tensor) -> None:
    """FGSM-MEP (Jia et al. 2022, Algorithm 3): lambda 10 (of the mean over the classes), mu 0.3.

    As in the public code: label smoothing, in the attack too; alpha times a random sign in the first epoch, and again
    every 40 epochs; g_c is not the gradient's sign, but divided by its L1 norm over the batch.
    """
    if loop.batch == 0 and loop.number % 40 == 0:
        random = torch.empty((loop.total, *images.shape[1:]), dtype=images.dtype).uniform_(-1, 1)
        loop.delta["prior"] = torch.clamp(loop.alpha * random.sign(), -loop.eps, loop.eps)
        loop.delta["momentum"] = torch.zeros_like(random)
    prior, momentum = loop.delta["prior"], loop.delta["momentum"]
    rows = range(loop.first, loop.first + len(images))
    target = torch.full((len(labels), 4), 0.4 / 4, dtype=images.dtype)
    target[range(len(labels)), labels] += 0.6
    start = (images + prior[rows]).requires_grad_()  # 11
    start_logits = loop.forward(start)
    smoothed(start_logits, target).sum().backward(retain_graph=True)
    loop.epoch.backwards += 1
    assert start.grad is not None
    loop.epoch.l_x += start.grad.abs().sum().item()
    momentum[rows] = 0.3 * momentum[rows] + start.grad / start.grad.abs().sum()  # 12, 13
    adversarial = loop.step(images, start.detach(), start.grad)  # 14
    prior[rows] = loop.step(images, images + prior[rows], momentum[rows]) - images  # 15
    logits = loop.forward(adversarial)
    penalty = 10 * (logits - start_logits).square().sum(1) / 4
    loop.update(smoothed(logits, target) + penalty, logits, labels)  # 16


def uneven_target(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Non-uniform label smoothing (Pan et al. 2025, Equation 15)."""
    rows = range(len(labels))
    random = torch.empty((len(labels), classes), dtype=torch.float64).uniform_(-0.5, 0.5) + 0.5
    random[rows, labels] = 0
    target = smoothing * random / random.sum(1, keepdim=True)
    target[rows, labels] = 1 - smoothing
    return target


def liet(loop: Loop, images: Tensor, labels: Tensor) -> None:
    """LIET (Pan et al. 2025, Algorithm 1, Equations 10-15) at eps 8/255: lambda 100, smoothing 0.6.

    As in the public code: LI every 20 batches in eval mode, a tenth to a half of it replaced by noise, lambda rising
    with the epochs, and the divergence of the predictions at the start and at the adversarial example.
    """
    if loop.batch % 20 == 0:
        gray = torch.full((4, *images.shape[1:]), 0.5, dtype=images.dtype, requires_grad=True)
        loop.model.eval()
        gray_logits: Tensor = loop.model(gray)
        loop.model.train()
        smoothed(gray_logits, uneven_target(torch.arange(4), 4, 0.6)).sum().backward()
        assert gray.grad is not None
        loop.delta["li"] = loop.eps * gray.grad.sign()  # 3
        loop.epoch.forwards += 4 / len(images)
        loop.epoch.backwards += 4 / len(images)
    places = torch.empty_like(images).uniform_(-0.5, 0.5) + 0.5
    noise = torch.empty_like(images).uniform_(-loop.eps, loop.eps)
    share = torch.empty(1, dtype=images.dtype).uniform_(-0.5, 0.5) + 0.5
    subtract = float(torch.empty(1, dtype=images.dtype).uniform_(-0.5, 0.5)) + 0.5 < 0.5
    information = loop.delta["li"][labels]
    replaced = places < 0.1 + 0.4 * share
    information[replaced] = noise[replaced]
    start = torch.clamp(images - information if subtract else images + information, 0, 1).requires_grad_()  # 6-10
    start_logits = loop.forward(start)
    smoothed(start_logits, uneven_target(labels, 4, 0.6)).sum().backward(retain_graph=True)
    loop.epoch.backwards += 1
    assert start.grad is not None
    loop.epoch.l_x += start.grad.abs().sum().item()
    adversarial = loop.step(images, start.detach(), start.grad)  # 11, 12
    logits = loop.forward(adversarial)
    middle = (start_logits.softmax(1) + logits.softmax(1)) / 2
    divergence = (kl(start_logits, middle.log()) + kl(logits, middle.log())) / 2
    weight = 100 * loop.epochs_done
    loop.update(smoothed(logits, uneven_target(labels, 4, 0.6)) + weight * divergence, logits, labels)  # 13-17
