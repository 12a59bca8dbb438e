"""Accuracy and PGD accuracy on held-out training images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from deat_rb.attacks.functional import CountingModel, pgd
from deat_rb.attacks.losses import cross_entropy
from deat_rb.attacks.threat_models import Linf
from deat_rb.utils import seeding
from deat_rb.utils.errors import DeatError
from deat_rb.utils.module_state import preserve_state
from deat_rb.utils.units import check_eps


class Validation(NamedTuple):
    """What `validate` measured.

    Attributes:
        natural: Accuracy, in [0, 1].
        robust: Accuracy under PGD, in [0, 1].
        forwards: Images forwarded.
        backwards: Images for which a gradient was computed.
    """

    natural: float
    robust: float
    forwards: int
    backwards: int


def validate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 20,
    alpha: float | None = None,
    batch_size: int = 128,
    seed: int = 0,
) -> Validation:
    """Measures what training selects its model by, on held-out training images and with the same start each time.

    Args:
        model: Takes images in [0, 1]; it is run in eval mode, where it is, and is afterwards as it was.
        images: In [0, 1], (N, C, H, W).
        labels: (N,).
        eps: Linf radius, in [0, 1] pixel units.
        steps: Of PGD.
        alpha: Step size; by default eps / 4.
        batch_size: How many examples are attacked together.
        seed: Fixes the random starts.
    """
    threat, name = Linf(check_eps(eps)), f"pgd-{steps}"
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), images.device)
    natural = robust = 0
    with preserve_state(model):
        counted = CountingModel(model.eval().requires_grad_(False))
        for number, (clean, truth) in enumerate(zip(images.split(batch_size), labels.split(batch_size), strict=True)):
            clean, truth = clean.detach().to(device), truth.to(device)
            with torch.no_grad():
                logits = counted(clean)
            if logits.isnan().any():
                raise DeatError("the model gives NaN; a model that has diverged cannot be evaluated")
            right = logits.argmax(dim=1) == truth
            natural += int(right.sum())
            if not right.any():
                continue
            start = threat.start(clean, seeding.generator(seed, "evaluate", name, number))[right]
            with seeding.preserved():
                seeding.seed_global(seed, "evaluate", name, "", number)
                crafted = pgd(counted, clean[right], truth[right], start=start, eps=eps,
                              alpha=eps / 4 if alpha is None else alpha, steps=steps, loss=cross_entropy,
                              threat=threat)  # fmt: skip
            robust += int((~crafted.broken).sum())
    return Validation(natural / len(images), robust / len(images), counted.forwards, counted.backwards)
