"""The surrogate losses of TRADES and MART."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's own name for it

from deat_rb.attacks.losses import _is_label, _wide, cross_entropy, kl_divergence
from deat_rb.training.base import SurrogateLoss
from deat_rb.utils.errors import DeatError, did_you_mean


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
        raise DeatError(f"there is no surrogate loss '{name}': {did_you_mean(name, ('ce', *regularised))}")
    function = regularised[name]

    def loss(adv_logits: Tensor, labels: Tensor, clean_logits: Tensor) -> Tensor:
        return function(adv_logits, labels, clean_logits, beta=beta)

    return SurrogateLoss(name, loss, needs_clean=True)
