"""Losses as pure functions of logits, one number per example.

Everything is computed in float32 at least, from log-softmax, so that saturated and half-precision logits give finite
losses and gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's own name for it

from deat_rb.errors import DeatError, nearest


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _is_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Where in the logits (N, K) the labels (N,) are; one_hot would look at the labels, which waits for the device."""
    return labels[:, None] == torch.arange(logits.shape[1], device=labels.device)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (N, K) against labels (N,), per example (N,)."""
    return F.cross_entropy(_wide(logits), labels, reduction="none")


def kl_divergence(logits: Tensor, target_logits: Tensor) -> Tensor:
    """KL(target || prediction) of two sets of logits (N, K), per example (N,); TRADES' boundary term.

    Args:
        logits: The prediction: the adversarial images' logits.
        target_logits: The reference distribution: the clean images' logits.
    """
    prediction = F.log_softmax(_wide(logits), dim=1)
    target = _wide(target_logits)
    # softmax and not exp(log_softmax): their last bits differ, and torchattacks' TPGD has the former.
    return (F.softmax(target, dim=1) * (F.log_softmax(target, dim=1) - prediction)).sum(dim=1)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The Carlini-Wagner margin, max_{k != y} z_k - z_y, per example (N,): positive once misclassified."""
    logits = _wide(logits)
    true = _is_label(logits, labels)
    return logits.masked_fill(true, -torch.inf).amax(dim=1) - logits.gather(1, labels[:, None]).squeeze(1)


def boosted_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """MART's BCE (Wang et al. 2020, Equation 8), per example (N,): CE - log(1 - max_{k != y} p_k).

    As in MART's public code 1.0001 stands for the 1, which bounds the second term by 9.2.
    """
    logits = _wide(logits)
    true = _is_label(logits, labels)
    strongest_wrong = F.softmax(logits, dim=1).masked_fill(true, 0).amax(dim=1)
    return cross_entropy(logits, labels) - torch.log(1.0001 - strongest_wrong + 1e-12)


def trades(adv_logits: Tensor, labels: Tensor, clean_logits: Tensor, *, beta: float = 6.0) -> Tensor:
    """TRADES (Zhang et al. 2019, Equation 5), per example (N,): CE(clean) + beta * KL(clean || adversarial)."""
    return cross_entropy(clean_logits, labels) + beta * kl_divergence(adv_logits, clean_logits)


def mart(adv_logits: Tensor, labels: Tensor, clean_logits: Tensor, *, beta: float = 6.0) -> Tensor:
    """MART (Wang et al. 2020, Equation 11), per example (N,): BCE(adv) + beta * KL(clean || adv) * (1 - p_clean(y)).

    The paper's lambda is called ``beta`` as it is in MART's public code.
    """
    missed = 1 - F.softmax(_wide(clean_logits), dim=1).gather(1, labels[:, None]).squeeze(1)
    return boosted_cross_entropy(adv_logits, labels) + beta * kl_divergence(adv_logits, clean_logits) * missed


@dataclass(frozen=True)
class SurrogateLoss:
    """What a trainer descends on.

    Attributes:
        name: Its name in tables and configurations.
        function: ``(adv_logits, labels)`` or, where ``needs_clean``, ``(adv_logits, labels, clean_logits)`` to the
            loss per example (N,).
        needs_clean: Whether the clean images are forwarded too.
    """

    name: str
    function: Callable[..., Tensor]
    needs_clean: bool = False


def surrogate(name: str | SurrogateLoss, *, beta: float = 6.0) -> SurrogateLoss:
    """Finds the surrogate loss ``ce``, ``trades`` or ``mart``; one of your own is passed through.

    Raises:
        DeatError: If no loss has that name, or beta is negative.
    """
    if isinstance(name, SurrogateLoss):
        return name
    if not (math.isfinite(beta) and beta >= 0):
        raise DeatError(f"beta = {beta:g} is not a finite number of 0 or more; TRADES and MART have 6")
    if name == "ce":
        return SurrogateLoss("ce", cross_entropy)
    regularised = {"trades": trades, "mart": mart}
    if name not in regularised:
        raise DeatError(f"there is no surrogate loss '{name}': {nearest(name, ('ce', *regularised))}")
    function = regularised[name]

    def loss(adv_logits: Tensor, labels: Tensor, clean_logits: Tensor) -> Tensor:
        return function(adv_logits, labels, clean_logits, beta=beta)

    return SurrogateLoss(name, loss, needs_clean=True)
