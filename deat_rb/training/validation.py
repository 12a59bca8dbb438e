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
    """Accuracies on the validation images and what they cost.

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
    """Measure accuracy and PGD accuracy on held-out training images, with the same random starts each time.

    Args:
        model: Takes images in [0, 1]; it is run in eval mode, on its device, and restored afterwards.
        images: In [0, 1], (N, C, H, W).
        labels: (N,).
        eps: Linf radius, in [0, 1] pixel units.
        steps: Steps of PGD.
        alpha: Step size; by default eps / 4.
        batch_size: How many examples are attacked together.
        seed: Fixes the random starts.
    """
    threat, name = Linf(check_eps(eps)), f"pgd-{steps}"
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), images.device)
    natural = robust = 0
    with preserve_state(model):
        counting = CountingModel(model.eval().requires_grad_(False))
        for number, (clean, target) in enumerate(zip(images.split(batch_size), labels.split(batch_size), strict=True)):
            clean, target = clean.detach().to(device), target.to(device)
            with torch.no_grad():
                logits = counting(clean)
            if logits.isnan().any():
                raise DeatError("the model outputs NaN: it has diverged and cannot be evaluated")
            correct = logits.argmax(dim=1) == target
            natural += int(correct.sum())
            if not correct.any():
                continue
            start = threat.start(clean, seeding.generator(seed, "evaluate", name, number))[correct]
            with seeding.preserved():
                seeding.seed_global(seed, "evaluate", name, "", number)
                output = pgd(counting, clean[correct], target[correct], start=start, eps=eps,
                              alpha=eps / 4 if alpha is None else alpha, steps=steps, loss=cross_entropy,
                              threat=threat)  # fmt: skip
            robust += int((~output.misclassified).sum())
    return Validation(natural / len(images), robust / len(images), counting.forwards, counting.backwards)
