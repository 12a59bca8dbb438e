"""Attack losses: pure functions of logits that return one value per example.

They are computed from log-softmax in float32 or wider, so that losses and gradients stay finite for saturated and
half-precision logits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def at_least_float32(logits: Tensor) -> Tensor:
    """Convert half-precision logits to float32; return others unchanged."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def label_mask(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the one-hot mask (N, K) of labels (N,); unlike torch's `one_hot` this does not sync with the device."""
    return labels[:, None] == torch.arange(logits.shape[1], device=labels.device)


def main_class(labels: Tensor) -> Tensor:
    """Return labels (N,) unchanged, and of class probabilities (N, K) the class with the largest, (N,)."""
    return labels if labels.ndim == 1 else labels.argmax(dim=1)


def cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of logits (N, K) and labels (N,) or class probabilities (N, K), per example (N,).

    With ``label_smoothing`` s the target t is replaced by (1 - s) t + s/K; t is 1 for the label and 0 otherwise.
    """
    logits = at_least_float32(logits)
    target = labels.to(logits.dtype) if labels.is_floating_point() else labels
    return F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)


def kl_divergence(logits: Tensor, target_logits: Tensor) -> Tensor:
    """Return KL(target || prediction) of logits (N, K), per example (N,); TRADES' boundary term.

    Args:
        logits: Logits of the adversarial examples.
        target_logits: Logits of the clean images.
    """
    prediction = F.log_softmax(at_least_float32(logits), dim=1)
    target = at_least_float32(target_logits)
    # As torchattacks' TPGD does, use softmax rather than exp(log_softmax), which differs in the last bits.
    return (F.softmax(target, dim=1) * (F.log_softmax(target, dim=1) - prediction)).sum(dim=1)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the CW margin max_{k != y} z_k - z_y, per example (N,): positive if misclassified."""
    logits = at_least_float32(logits)
    true = label_mask(logits, labels)
    return logits.masked_fill(true, -torch.inf).amax(dim=1) - logits.gather(1, labels[:, None]).squeeze(1)
