"""Accuracy and PGD accuracy on held-out training images."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deat_rb.attacks.functional import pgd
from deat_rb.attacks.losses import cross_entropy
from deat_rb.attacks.threat_models import check_norm, threat_model
from deat_rb.data.validation_images import ValidationImages
from deat_rb.training.dataloading import HeldOut
from deat_rb.training.metrics import EpochStats
from deat_rb.training.signals import StopRequests
from deat_rb.training.state import TrainingState
from deat_rb.utils import seeding
from deat_rb.utils.devices import default_batch_size
from deat_rb.utils.errors import DeatError
from deat_rb.utils.module_state import preserve_state
from deat_rb.utils.units import check_eps

STOP_BATCH = 128
"""Number of validation images that are attacked for a stopping rule."""

FEW = 10
"""Minimum number of validation images for detecting a collapse to one class."""


class Validation(NamedTuple):
    """Accuracies on the validation images and their cost.

    Attributes:
        natural: Accuracy, in [0, 1].
        robust: Accuracy under PGD, in [0, 1].
        forwards: Single-image forward passes.
        backwards: Single-image backward passes.
        top_prediction: The most frequently predicted class on clean images.
        top_predicted: Fraction of the images that are predicted as this class.
        top_labelled: Fraction of the images that have this label.
        class_natural: Accuracy per class, in the order of the labels; None for a class without images.
        class_robust: Accuracy under PGD per class.
        collapsed: Whether nearly all images are predicted as this class, although many have other labels.
    """

    natural: float
    robust: float
    forwards: int
    backwards: int
    top_prediction: int = 0
    top_predicted: float = 0.0
    top_labelled: float = 0.0
    collapsed: bool = False
    class_natural: tuple[float | None, ...] = ()
    class_robust: tuple[float | None, ...] = ()


def validate(
    model: nn.Module,
    images: Tensor | ValidationImages,
    labels: Tensor,
    *,
    eps: float,
    norm: str = "Linf",
    steps: int = 20,
    alpha: float | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> Validation:
    """Measure accuracy and PGD accuracy on held-out training images, with the same random starts in every call.

    Args:
        model: Model for images in [0, 1]; it is run in eval mode on its device and restored afterwards.
        images: In [0, 1], (N, C, H, W), or `ValidationImages`, which are read in parts.
        labels: (N,).
        eps: Radius, in [0, 1] pixel units.
        norm: ``Linf`` or ``L2``.
        steps: Steps of PGD.
        alpha: Step size; by default eps / 4.
        batch_size: Number of examples attacked together; by default 500 on a GPU, otherwise 128.
        seed: Seed of the random starts.
    """
    norm = check_norm(norm)
    threat, name = threat_model(norm, check_eps(eps, norm=norm)), f"pgd-{steps}"
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), images.device)
    size = default_batch_size(device) if batch_size is None else batch_size
    predictions: list[Tensor] = []
    resisted: list[Tensor] = []
    with preserve_state(model):
        model.eval()
        for parameter in model.parameters():  # ScriptModules have no requires_grad_()
            parameter.requires_grad_(False)
        forwards, backwards = len(images), 0
        for number, (clean, target) in enumerate(zip(images.split(size), labels.split(size), strict=True)):
            clean, target = clean.detach().to(device, copy=True), target.to(device)
            with torch.no_grad():
                logits = model(clean)
            if logits.isnan().any():
                raise DeatError(
                    "the model returns NaN, so its training probably diverged: use an earlier checkpoint, or a smaller "
                    "learning rate"
                )
            predictions.append(logits.argmax(dim=1))
            correct = predictions[-1] == target
            resisted.append(torch.zeros_like(correct))
            if not correct.any():
                continue
            start = threat.start(clean, seeding.generator(seed, "evaluate", name, number))[correct]
            with seeding.preserved():
                seeding.seed_global(seed, "evaluate", name, "", number)
                output = pgd(model, clean[correct], target[correct], start=start, threat=threat,
                             alpha=eps / 4 if alpha is None else alpha, steps=steps, loss=cross_entropy)  # fmt: skip
            resisted[-1][correct] = ~output.misclassified
            assert output.passes is not None
            forwards, backwards = forwards + output.passes[0], backwards + output.passes[1]
    on_device, classes = labels.to(device), logits.shape[1]
    correct, robust = torch.cat(predictions) == on_device, torch.cat(resisted)
    counts = torch.cat(predictions).bincount()
    top = int(counts.argmax())
    predicted, labelled = int(counts[top]), int((labels == top).sum())
    return Validation(
        natural=int(correct.sum()) / len(images),
        robust=int(robust.sum()) / len(images),
        forwards=forwards,
        backwards=backwards,
        top_prediction=top,
        top_predicted=predicted / len(images),
        top_labelled=labelled / len(images),
        collapsed=has_collapsed(predicted, labelled, len(images)),
        class_natural=_per_class(correct, on_device, classes),
        class_robust=_per_class(robust, on_device, classes),
    )


def _per_class(right: Tensor, labels: Tensor, classes: int) -> tuple[float | None, ...]:
    """Return the fraction of ``right`` (N,) that is True, for each class; None for a class without examples."""
    hits, counts = (torch.bincount(part, minlength=classes).tolist() for part in (labels[right], labels))
    return tuple(hit / count if count else None for hit, count in zip(hits, counts, strict=True))


def has_collapsed(predicted: int, labelled: int, count: int) -> bool:
    """Return whether a model has collapsed to (nearly) one class.

    Args:
        predicted: Number of images predicted as the most commonly predicted class.
        labelled: Number of images with that label.
        count: Number of images; with fewer than `FEW`, the result is False.
    """
    far_too_many = predicted >= 0.9 * count and predicted - labelled > 0.4 * count
    all_of_several = predicted >= 0.99 * count and count - labelled >= FEW
    return count >= FEW and (far_too_many or all_of_several)


def validate_epoch(
    state: TrainingState, row: EpochStats, batch: HeldOut, requests: StopRequests, *, only_rule: bool = False
) -> EpochStats:
    """Return the metrics of an epoch with the validation accuracies, or with ``only_rule`` those of the stopping rule.

    With ``ema``, both the averaged and the raw weights are validated. The stopping rule uses the raw ones, which
    collapse first.
    """
    began = time.perf_counter()
    images, labels = batch
    rule = state.trainer.stopping

    def attacked(count: int | None = None, steps: int = 20) -> Validation:
        # Autocast of its own, because it caches the weights that it has cast. Swapping weights is not interrupted.
        with state.engine.autocast(), requests.at_once():
            return validate(state.model, images if count is None else images[:count], labels[:count], steps=steps,
                            eps=state.trainer.eps, norm=state.trainer.norm, seed=state.seed)  # fmt: skip

    with state.engine.eager(state.model):
        if not only_rule:
            row = _with_accuracies(state, row, attacked)
        if rule is not None and rule.validation_steps:
            own = attacked(STOP_BATCH, rule.validation_steps)
            row = replace(
                row,
                stop_robust_acc=own.robust,
                val_forwards=row.val_forwards + own.forwards,
                val_backwards=row.val_backwards + own.backwards,
            )
    return replace(row, val_seconds=time.perf_counter() - began)


def _with_accuracies(state: TrainingState, row: EpochStats, attacked: Callable[[], Validation]) -> EpochStats:
    """Return the metrics with the accuracies of the model; with ``ema`` of the averaged and of the raw weights."""
    with state.averaged():
        full = attacked()
    row = replace(
        row,
        val_acc=full.natural,
        val_robust_acc=full.robust,
        val_top_predicted=full.top_predicted,
        val_class_acc=list(full.class_natural),
        val_class_robust_acc=list(full.class_robust),
        val_forwards=full.forwards,
        val_backwards=full.backwards,
    )
    if full.collapsed:
        model = "the model" if state.average is None else "the averaged model"
        state.warn(
            f"epoch {state.epoch}: {model} predicts class {full.top_prediction} for {full.top_predicted:.0%} of "
            f"the validation images, although only {full.top_labelled:.0%} have this label: it has collapsed to "
            "(nearly) one class"
        )
    if state.average is not None:
        raw = attacked()
        row = replace(
            row,
            raw_val_acc=raw.natural,
            raw_val_robust_acc=raw.robust,
            val_forwards=row.val_forwards + raw.forwards,
            val_backwards=row.val_backwards + raw.backwards,
        )
    return row
