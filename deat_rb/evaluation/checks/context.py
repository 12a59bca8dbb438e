"""Context passed to every sanity check, and helpers for their outcomes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from deat_rb.attacks.names import SQUARE_TILES
from deat_rb.data.images import LabeledImages
from deat_rb.evaluation.checks.probes import Probe
from deat_rb.evaluation.frozen_model import PreparedModel
from deat_rb.evaluation.report import Report
from deat_rb.evaluation.statistics import mcnemar

Status = Literal["pass", "warn", "fail"]

Outcome = tuple[Status, float | None, str]
"""Status, measured value and sentence of a check."""

EXAMPLES = {"quick": 100, "full": 200}
"""Number of examples that are checked, by level."""

FEW = {"quick": 32, "full": 100}
"""Number of examples for the expensive checks, by level."""

SQUARE_QUERIES = 300

WITHOUT_GRADIENT = (
    "square", "autoattack", "torchattacks.Square", "torchattacks.SPSA", "torchattacks.OnePixel", "torchattacks.Pixle",
    "torchattacks.GN", "torchattacks.AutoAttack",
)  # fmt: skip

NO_ATTACK = ("natural", "noise")


RELABELED_POINTS = 20.0
"""Gain in accuracy by relabeling, in percentage points, above which the labels count as permuted."""


@dataclass(frozen=True)
class LabelOrder:
    """Natural accuracy before and after a one-to-one relabeling of the predictions.

    Attributes:
        accuracy: Accuracy with the given labels, in percent.
        relabeled: Accuracy after relabeling, in percent: fitted on one half of the examples, measured on the other.
        is_significant: Whether the difference is significant (McNemar's test, p < 0.001).
        below_chance: Whether accuracy is below random guessing among the label classes (binomial test, p < 0.001).
        n_classes: Number of different labels.
    """

    accuracy: float
    relabeled: float
    is_significant: bool
    below_chance: bool
    n_classes: int

    @property
    def gain(self) -> float:
        """Gain in accuracy by relabeling, in percentage points."""
        return self.relabeled - self.accuracy

    @classmethod
    def of(cls, predicted: Tensor, labels: Tensor) -> LabelOrder:
        """Return the result for predicted classes and labels, both (N,) int64 on the CPU."""
        from scipy.stats import binomtest

        classes, index = labels.unique(return_inverse=True)
        order = index.argsort(stable=True)
        counts = index.bincount()
        rank = torch.empty_like(index)
        rank[order] = torch.arange(len(index)) - (counts.cumsum(0) - counts)[index[order]]
        correct, relabeled = predicted == labels, torch.zeros(len(labels), dtype=torch.bool)
        for half in (0, 1):
            fit, test = rank % 2 == half, rank % 2 != half
            relabeled[test] = predicted[test] == _relabeling(predicted[fit], index[fit], classes)[index[test]]
        p_value = mcnemar(int((correct & ~relabeled).sum()), int((relabeled & ~correct).sum()))
        below = binomtest(int(correct.sum()), len(labels), 1 / len(classes), alternative="less").pvalue
        return cls(percent(correct), percent(relabeled), p_value < 0.001, below < 0.001, len(classes))


def _relabeling(predicted: Tensor, index: Tensor, classes: Tensor) -> Tensor:
    """Return the one-to-one mapping from label classes to predicted classes, (C,), that maximizes agreement."""
    from scipy.optimize import linear_sum_assignment

    columns = torch.cat((predicted, classes)).unique()
    counts = torch.zeros(len(classes), len(columns), dtype=torch.float64)
    counts.index_put_((index, torch.searchsorted(columns, predicted)), torch.ones(len(index)).double(), accumulate=True)
    counts[torch.arange(len(classes)), torch.searchsorted(columns, classes)] += (
        0.5  # break ties in favour of the given labels
    )
    rows, chosen = linear_sum_assignment(counts.numpy(), maximize=True)
    assigned = torch.empty(len(classes), dtype=torch.int64)
    assigned[torch.as_tensor(rows)] = columns[torch.as_tensor(chosen)]
    return assigned


@dataclass(eq=False)
class CheckContext:
    """The evaluation to check, and measurements shared by several checks.

    Attributes:
        prepared: The model and all examples of the evaluation.
        probe: The model and the first few examples, for independent measurements.
        report: The report of the evaluation.
        level: Level of checks: ``quick`` or ``full``.
        before: Copies of the model's parameters and buffers before the checks.
    """

    prepared: PreparedModel
    probe: Probe
    report: Report
    level: str
    before: dict[str, Tensor]

    @property
    def model(self) -> nn.Module:
        """The model, in eval mode with its parameters frozen."""
        return self.prepared.model

    @property
    def images(self) -> Tensor | LabeledImages:
        """All images of the evaluation, (N, C, H, W)."""
        return self.prepared.images

    @property
    def labels(self) -> Tensor:
        """All labels of the evaluation, (N,)."""
        return self.prepared.labels

    @cached_property
    def predicted(self) -> tuple[Tensor, Tensor]:
        """Predicted classes and labels, on the CPU, of the first 1000 examples, or 10 per class if that is more."""
        labels = self.prepared.labels.cpu()
        count = min(len(labels), max(1000, 10 * len(labels.unique())))
        return self.prepared.predict(count=count), labels[:count]

    @cached_property
    def label_order(self) -> LabelOrder:
        """Accuracy with the given labels and after relabeling the predictions."""
        return LabelOrder.of(*self.predicted)

    @cached_property
    def scaled_accuracies(self) -> dict[str, float]:
        """Accuracy on the probe's examples, in percent, after scaling the images in different ways, by description."""
        images = self.probe.images
        values = images.transpose(0, 1).flatten(1)
        mean, std = values.mean(dim=1).view(1, -1, 1, 1), values.std(dim=1).clamp_min(1 / 255).view(1, -1, 1, 1)
        scalings: dict[str, tuple[Tensor | float, Tensor | float]] = {
            "standardized images": (mean, std),
            "images in [-1, 1]": (0.5, 0.5),
            "images in [0, 255]": (0, 1 / 255),
        }
        return {name: percent(self.probe.correct((images - shift) / scale))
                for name, (shift, scale) in scalings.items()}  # fmt: skip

    @cached_property
    def out_of_order(self) -> bool:
        """Whether the labels are not in the network's class order, and this explains more than a wrong scaling."""
        order, (predicted, labels) = self.label_order, self.predicted
        share, true_share = (percent(values == values.mode().values) for values in (predicted, labels))
        if order.n_classes < 2 or (share >= 90 and share - true_share > 40):
            return False  # the order cannot be inferred from a network that has collapsed to one class
        gain = max(self.scaled_accuracies.values()) - percent(self.probe.clean_correct)
        if order.gain > max(RELABELED_POINTS, gain) and order.is_significant:
            return True
        learned = order.relabeled > 100 / order.n_classes
        return order.below_chance and learned and gain <= RELABELED_POINTS

    @property
    def attacks_allowed(self) -> bool:
        """Whether checks may run attacks for results missing from the report: only at level ``full``."""
        return self.level == "full" and self.probe.gradient is not None

    @property
    def square_allowed(self) -> bool:
        """Whether checks may run Square: only at level ``full``, on images that are large enough for it."""
        images = self.probe.images
        return self.level == "full" and (self.probe.norm == "Linf" or min(images.shape[-2:]) >= SQUARE_TILES)

    @property
    def few(self) -> int:
        """Number of examples for the expensive checks."""
        return min(FEW[self.level], len(self.probe.images))

    @property
    def half(self) -> float:
        """The radius at which any image can be turned grey."""
        return 0.5 if self.probe.norm == "Linf" else 0.5 * math.sqrt(self.probe.images[0].numel())

    @cached_property
    def logit_variation(self) -> float:
        """Difference between logits of several forward passes over the same images, see `deviation`."""
        probe = self.probe
        passes = [probe.logits(probe.images)]
        if probe.differentiated is not None:
            passes.append(probe.differentiated)
        return max(deviation(probe.clean, logits) for logits in passes)

    @cached_property
    def correct_indices(self) -> Tensor:
        """Indices of the probe's examples that are classified correctly without an attack."""
        return self.probe.clean_correct.nonzero().flatten()

    @cached_property
    def pgd(self) -> tuple[str, int]:
        """Name and steps of the PGD attack in the report closest to 50 steps; an empty name and 20 if there is none."""
        steps = {
            name: int(result.parameters.get("steps", 20))
            for name, result in self.report.results.items()
            if name.startswith("pgd-")
        }
        name = min(steps, key=lambda each: abs(steps[each] - 50), default="")
        return name, steps.get(name, 20)

    @cached_property
    def white_box(self) -> dict[str, Tensor]:
        """The report's verdicts under attacks that use gradients, each (N,) bool."""
        others = (*NO_ATTACK, *WITHOUT_GRADIENT)
        return {name: correct for name, correct in self.report.verdicts.items() if not name.startswith(others)}

    @cached_property
    def survivors(self) -> Tensor:
        """Indices of the first `few` examples that stay correct under the report's white-box attacks and PGD."""
        left = self.correct_indices[self.correct_indices < self.few]
        for correct in self.white_box.values():
            left = left[correct.to(left.device)[left]]
        for loss in ("ce", "margin"):
            left = left[~self.probe.pgd(left, eps=self.probe.eps, steps=min(self.pgd[1], 50), loss=loss, start=loss)]
        return left

    @cached_property
    def square_finds(self) -> int:
        """Number of `survivors` misclassified under Square."""
        return int(self.probe.square(self.survivors, SQUARE_QUERIES).sum())

    @cached_property
    def after_fgsm(self) -> Tensor:
        """Which of the probe's examples stay correct under FGSM, (N,) bool."""
        probe = self.probe
        assert probe.gradient is not None
        stepped = probe.images + probe.eps * probe.steepest(probe.gradient)
        return probe.clean_correct & probe.correct(probe.projected(stepped, probe.images, probe.eps))

    def accuracy_under_pgd(self, *, eps: float, steps: int, count: int) -> float:
        """Return the probe's accuracy under PGD on its first ``count`` examples, in percent."""
        rows = self.correct_indices[self.correct_indices < count]
        return 100 * (len(rows) - int(self.probe.pgd(rows, eps=eps, steps=steps).sum())) / count


def graded(value: float, warn: float, fail: float = math.inf) -> Status:
    """Return the status of a value: pass up to ``warn`` inclusive, warn up to ``fail`` inclusive, fail above."""
    if value <= warn:
        return "pass"
    return "warn" if value <= fail else "fail"


def at_least_one(points: float, count: int) -> float:
    """Return ``points``, raised where necessary so that one example in ``count`` does not exceed the threshold."""
    return max(points, 100 / count) + 1e-9


def percent(chosen: Tensor) -> float:
    """Return the fraction of a mask (N,) that is true, in percent."""
    return 100 * float(chosen.float().mean())


def deviation(logits: Tensor, others: Tensor) -> float:
    """Return the largest difference between two sets of logits (N, K), in percent of their standard deviation."""
    return 100 * float((logits - others).abs().max()) / max(size(logits), 1e-30)


def size(logits: Tensor) -> float:
    """Return the standard deviation of logits (N, K) around the mean logit of each image."""
    return float((logits - logits.mean(dim=1, keepdim=True)).std())


def outcome(status: Status, value: float | None, measured: str, meaning: str) -> Outcome:
    """Return an outcome; its sentence consists of ``measured`` and, unless the check passed, ``meaning``."""
    return status, value, f"{measured}." if status == "pass" else f"{measured}: {meaning}."
