"""Networks that hide from attacks, and the checks that have to name them."""

from __future__ import annotations

from collections.abc import Callable

import masked_models as masked
from masked_models import plain, robust
from torch import nn

HIDING: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "saturated": (lambda: masked.Saturated(plain()), {"logit scale", "gradients present"}),
    "quantised": (lambda: masked.Quantised(plain()), {"gradients present", "gradients match finite differences"}),
    "noisy": (lambda: masked.Noisy(plain()), {"deterministic"}),
    "probabilities": (lambda: masked.Probabilities(plain()), {"logits, not probabilities"}),
    "sharp probabilities": (
        lambda: masked.Probabilities(plain(), 50),
        {"logits, not probabilities", "gradients present"},
    ),
    "detached": (lambda: masked.Detached(plain()), {"gradients present"}),
    "decoy": (lambda: masked.Decoy(plain()), {"gradients match finite differences"}),
    "reversed": (lambda: masked.Reversed(plain()), {"gradients match finite differences", "chance at eps 1/2"}),
    "shattered": (lambda: masked.Shattered(plain()), {"gradients match finite differences"}),
    "not a number": (lambda: masked.NotANumber(plain()), {"gradients present"}),
    "stuck in training": (lambda: masked.StuckInTraining(plain()), {"eval mode", "model unchanged"}),
    "batch statistics": (lambda: masked.BatchStatistics(plain()), {"independent of the batch"}),
    "wants normalised": (lambda: masked.WantsNormalised(plain()), {"normalization inside"}),
    "learning": (lambda: masked.Learning(plain()), {"model unchanged"}),
    "two faces": (lambda: masked.LooksWhetherAttacked(plain(), robust()), {"deterministic"}),
}
