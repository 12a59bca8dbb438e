"""Surrogate losses, per example, and weights of classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deat_rb.attacks.losses import at_least_float32, cross_entropy, kl_divergence, label_mask
from deat_rb.training.surrogate_loss import ClassWeights, SurrogateLoss, WeightedLoss
from deat_rb.utils import seeding
from deat_rb.utils.errors import DeatError, did_you_mean
from deat_rb.utils.units import check_weight


def boosted_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return MART's BCE (Wang et al. 2020, Equation 8), per example (N,): CE - log(1 - max_{k != y} p_k).

    As in MART's public code the 1 is 1.0001, which bounds the second term by 9.2.
    """
    logits = at_least_float32(logits)
    true = label_mask(logits, labels)
    strongest_wrong = F.softmax(logits, dim=1).masked_fill(true, 0).amax(dim=1)
    return cross_entropy(logits, labels) - torch.log(1.0001 - strongest_wrong + 1e-12)


def trades(
    adv_logits: Tensor, labels: Tensor, clean_logits: Tensor, *, beta: float = 6.0, label_smoothing: float = 0.0
) -> Tensor:
    """Return TRADES' loss, per example (N,): CE(clean) + beta * KL(clean || adversarial) (Zhang 2019, Equation 5).

    ``label_smoothing`` applies to CE, as in the TRADES of Gowal et al. 2021 and Wang et al. 2023, and so do labels that
    are class probabilities (N, K), as in Rebuffi et al. 2021.
    """
    natural = cross_entropy(clean_logits, labels, label_smoothing=label_smoothing)
    return natural + beta * kl_divergence(adv_logits, clean_logits)


def mart(adv_logits: Tensor, labels: Tensor, clean_logits: Tensor, *, beta: float = 6.0) -> Tensor:
    """Return MART's loss (Wang et al. 2020, Equation 11), per example (N,).

    It is BCE(adversarial) + beta * KL(clean || adversarial) * (1 - p_clean(y)).

    ``beta`` is the paper's lambda, named as in MART's public code.
    """
    missed = 1 - F.softmax(at_least_float32(clean_logits), dim=1).gather(1, labels[:, None]).squeeze(1)
    return boosted_cross_entropy(adv_logits, labels) + beta * kl_divergence(adv_logits, clean_logits) * missed


def nonuniform_cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy with non-uniform label smoothing (Pan et al. 2025, Equation 15), per example (N,).

    With ``label_smoothing`` s the target is 1 - s for the label; the other classes share s at random.

    Raises:
        DeatError: Another class would on average have a target of at least 1 - s.
    """
    classes = logits.shape[1]
    if label_smoothing >= (classes - 1) / classes:
        raise DeatError(
            f"--label-smoothing {label_smoothing:g} with {classes} classes leaves the label a target of "
            f"{1 - label_smoothing:g}, no more than the other classes: give less than {(classes - 1) / classes:.3g}"
        )
    logits = at_least_float32(logits)
    true = label_mask(logits, labels)
    others = (seeding.uniform_like(logits, 0.5) + 0.5).masked_fill(true, 0)
    others = others / others.sum(dim=1, keepdim=True).clamp_min(torch.finfo(others.dtype).tiny)
    target = torch.where(true, 1 - label_smoothing, label_smoothing * others)
    return -(target * F.log_softmax(logits, dim=1)).sum(dim=1)


def weighted(loss: SurrogateLoss, weights: Tensor | Sequence[float]) -> SurrogateLoss:
    """Return a surrogate loss with each example's loss multiplied by the weight of its class.

    Args:
        loss: The loss.
        weights: Weights of the classes, (K,), all positive.

    Raises:
        DeatError: ``weights`` is not such a list.
    """
    try:
        checked = torch.as_tensor(weights).detach().float()
        valid = checked.ndim == 1 and bool((checked > 0).all() & checked.isfinite().all())
    except (TypeError, ValueError, RuntimeError):
        valid = False
    if not valid:
        raise DeatError(f"class_weights = {weights!r} is not a list of positive numbers: give one for each class")
    by_class = ClassWeights(checked)
    return replace(loss, function=WeightedLoss(loss.function, by_class), class_weights=by_class)


def balanced_weights(counts: Tensor) -> Tensor:
    """Return class weights (K,) that give all classes the same total weight, with a mean weight per example of 1.

    These are scikit-learn's ``balanced`` weights, N / (K * n_k); a class without examples has weight 1.

    Args:
        counts: Number of examples of each class, or their shares, (K,).
    """
    present = counts > 0
    weights = counts.sum() / (present.sum() * counts.clamp(min=torch.finfo(torch.float64).tiny).double())
    return torch.where(present, weights, 1.0).float()


def surrogate(name: str | SurrogateLoss, *, beta: float = 6.0, label_smoothing: float = 0.0) -> SurrogateLoss:
    """Return the surrogate loss ``ce``, ``nls``, ``trades`` or ``mart``; a custom loss is returned unchanged.

    ``nls`` is cross-entropy with non-uniform label smoothing.

    Raises:
        DeatError: If no loss has that name, beta is negative, or ``label_smoothing`` is outside [0, 1), or above 0 for
            ``mart`` or a custom loss.
    """
    if not 0 <= label_smoothing < 1:
        raise DeatError(f"label_smoothing = {label_smoothing:g} is not in [0, 1); 0.1 to 0.4 are usual")
    smoothed: dict[str, Any] = {"label_smoothing": label_smoothing} if label_smoothing else {}
    if smoothed and name not in ("ce", "nls", "trades"):
        what = name.name if isinstance(name, SurrogateLoss) else name
        raise DeatError(
            f"label_smoothing = {label_smoothing:g} is defined for cross-entropy and TRADES, not for the loss {what}; "
            "omit it"
        )
    if isinstance(name, SurrogateLoss):
        return name
    if not isinstance(name, str):
        raise DeatError(
            f"loss = {name!r} is neither a name nor a SurrogateLoss: give deat_rb.training.SurrogateLoss(name, "
            "function), whose function returns one value per image"
        )
    check_weight("beta", beta, "TRADES and MART use 6")
    if name == "ce":
        function = partial(cross_entropy, **smoothed) if smoothed else cross_entropy
        return SurrogateLoss("ce", function, soft_labels=True)
    if name == "nls":
        function = partial(nonuniform_cross_entropy, **smoothed) if smoothed else cross_entropy
        return SurrogateLoss("nls", function)
    regularized = {"trades": trades, "mart": mart}
    if name not in regularized:
        raise DeatError(f"there is no surrogate loss '{name}': {did_you_mean(name, ('ce', 'nls', *regularized))}")
    function = partial(regularized[name], beta=beta, **smoothed)
    return SurrogateLoss(name, function, needs_clean=True, soft_labels=name == "trades")
