"""Losses as pure functions of logits, one number per example.

Everything is computed in float32 at least, from log-softmax, so that saturated and half-precision logits give finite
losses and gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's own name for it


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
