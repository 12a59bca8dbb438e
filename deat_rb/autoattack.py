"""AutoAttack's standard version (Croce and Hein 2020), driven part by part and batch by batch.

The attacks are pyautoattack's. Which examples share a batch and how it is seeded are those of its
``run_standard_evaluation``, on which the verdicts of its random parts depend; only the loop around them is ours, so
that it can say how far it is and runs on problems of fewer than ten classes, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deat_rb import randomness
from deat_rb.whitebox import Counted, admissible

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")


@dataclass(frozen=True)
class Outcome:
    """What AutoAttack left of the examples.

    Attributes:
        correct: (N,) bool: still classified correctly after every part.
        parts: The parts that exist for this number of classes, in their order.
        targets: The number of target classes of the targeted parts.
        notes: What a reader of the figure should know.
    """

    correct: Tensor
    parts: tuple[str, ...]
    targets: int
    notes: tuple[str, ...]


def parts_for(num_classes: int) -> tuple[tuple[str, ...], int]:
    """Says which parts of the standard version exist for so many classes, and with how many targets.

    The targeted DLR loss divides by a difference that involves the fourth largest logit: with 2 or 3 classes it does
    not exist. FAB-T needs no more than another class.
    """
    parts = STANDARD if num_classes >= 4 else tuple(part for part in STANDARD if part != "apgd-t")
    return parts, min(9, num_classes - 1)


def run(
    model: Counted,
    images: Tensor,
    labels: Tensor,
    *,
    correct: Tensor,
    num_classes: int,
    eps: float,
    batch_size: int,
    seed: int,
    device: torch.device,
    progress: Callable[[str, int, int, int], None] | None = None,
) -> Outcome:
    """Runs the standard version.

    Args:
        model: In eval mode, on ``device``, its parameters frozen (FAB calls ``backward()``).
        images: In [0, 1], (N, C, H, W), wherever they are.
        labels: (N,).
        correct: (N,) bool, on the CPU: which are classified correctly without any attack.
        num_classes: K, at least 2.
        eps: Linf radius, in [0, 1] pixel units.
        batch_size: How many examples are attacked together.
        seed: Every batch of every part starts from it, as in pyautoattack.
        device: Where the attacks run.
        progress: Told ``(part, done, total, robust)`` after every batch.
    """
    parts, targets = parts_for(num_classes)
    notes = []
    if len(parts) < len(STANDARD):
        notes.append(f"{num_classes} classes: there is no targeted DLR loss, so {', '.join(parts)} ran without apgd-t")
    elif targets < 9:
        notes.append(f"{num_classes} classes: the targeted parts ran with {targets} targets where the standard has 9")
    correct = correct.clone()
    outside = 0
    with randomness.preserved(), torch.no_grad(), _warnings() as warnings:
        attack_of = _attacks(model, eps=eps, seed=seed, device=device, targets=targets)
        for part in parts:
            left = correct.nonzero().flatten()
            for begin in range(0, len(left), batch_size):
                rows = left[begin : begin + batch_size]
                clean, target = images[rows.to(images.device)].to(device), labels[rows.to(labels.device)].to(device)
                adv = attack_of[part](clean.clone(), target.clone())
                wrong = model(adv).argmax(dim=1) != target
                allowed = admissible(adv, clean, eps)
                outside += int((~allowed).sum())
                correct[rows] = ~(wrong & allowed).cpu()
                if progress is not None:
                    progress(f"autoattack/{part}", begin + len(rows), len(left), int(correct.sum()))
            notes.append(f"{int(correct.sum())} of {len(correct)} correct after {part}")
    if outside:
        notes.append(f"{outside} adversarial images were not finite, in [0, 1] and within eps, and do not count")
    return Outcome(correct, parts, targets, (*notes, *warnings))


def _attacks(
    model: Counted, *, eps: float, seed: int, device: torch.device, targets: int
) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Makes the parts, each of which seeds torch's global generators anew whenever it is called."""
    import pyautoattack

    suite: Any = pyautoattack.AutoAttack(model, norm="Linf", eps=eps, seed=seed, device=device, version="standard")
    suite.apgd.loss = "ce"
    suite.apgd_targeted.n_target_classes = targets
    suite.fab.targeted = True
    suite.fab.n_target_classes = targets
    return {
        "apgd-ce": suite.apgd.perturb,
        "apgd-t": suite.apgd_targeted.perturb,
        "fab-t": suite.fab.perturb,
        "square": suite.square.perturb,
    }


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collects what AutoAttack warns of, each sentence once, in place of printing it."""
    collected: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if (message := record.getMessage()) not in collected:
                collected.append(message)

    logger = logging.getLogger("auto-attack")
    handler, propagate = Collect(level=logging.WARNING), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield collected
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
