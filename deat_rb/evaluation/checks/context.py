"""Context passed to every sanity check, and helpers for their outcomes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor, nn

from deat_rb.attacks.names import SQUARE_TILES
from deat_rb.data.images import LabeledImages
from deat_rb.evaluation.checks.probes import Probe
from deat_rb.evaluation.report import Report

Status = Literal["pass", "warn", "fail"]

Outcome = tuple[Status, float | None, str]
"""Status, value and sentence of a check."""

EXAMPLES = {"quick": 100, "full": 200}
"""Number of examples that a level of checks looks at."""

FEW = {"quick": 32, "full": 100}
"""Number of examples for the expensive checks."""

SQUARE_QUERIES = 300

WITHOUT_GRADIENT = (
    "square", "autoattack", "torchattacks.Square", "torchattacks.SPSA", "torchattacks.OnePixel", "torchattacks.Pixle",
    "torchattacks.GN", "torchattacks.AutoAttack",
)  # fmt: skip

NO_ATTACK = ("natural", "noise")


@dataclass(eq=False)
class CheckContext:
    """The evaluation to be checked, and measurements that several checks share.

    Attributes:
        model: In eval mode, with its parameters frozen.
        probe: The model with the first few examples, for independent measurements.
        images: All images of the evaluation, (N, C, H, W).
        labels: (N,).
        report: The report of the evaluation.
        level: ``quick`` or ``full``.
        before: Copies of the model's parameters and buffers.
    """

    model: nn.Module
    probe: Probe
    images: Tensor | LabeledImages
    labels: Tensor
    report: Report
    level: str
    before: dict[str, Tensor]

    @property
    def attacks_allowed(self) -> bool:
        """Whether checks may run attacks for results that the report lacks: at level ``full``."""
        return self.level == "full" and self.probe.gradient is not None

    @property
    def square_allowed(self) -> bool:
        """Whether checks may run Square: at level ``full``, on images that are large enough for it."""
        images = self.probe.images
        return self.level == "full" and (self.probe.norm == "Linf" or min(images.shape[-2:]) >= SQUARE_TILES)

    @property
    def few(self) -> int:
        """Number of examples for the expensive checks."""
        return min(FEW[self.level], len(self.probe.images))

    @property
    def half(self) -> float:
        """The radius at which every image can be turned grey."""
        return 0.5 if self.probe.norm == "Linf" else 0.5 * math.sqrt(self.probe.images[0].numel())

    @cached_property
    def logit_variation(self) -> float:
        """Difference of the logits between passes over the same images, see `deviation`."""
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
        """Name and number of steps of the report's PGD nearest to 50 steps; an empty name and 20 if it has none."""
        steps = {
            name: int(result.parameters.get("steps", 20))
            for name, result in self.report.results.items()
            if name.startswith("pgd-")
        }
        name = min(steps, key=lambda each: abs(steps[each] - 50), default="")
        return name, steps.get(name, 20)

    @cached_property
    def white_box(self) -> dict[str, Tensor]:
        """The report's verdicts, each (N,) bool, under attacks that use gradients."""
        others = (*NO_ATTACK, *WITHOUT_GRADIENT)
        return {name: correct for name, correct in self.report.verdicts.items() if not name.startswith(others)}

    @cached_property
    def survivors(self) -> Tensor:
        """Indices of the few examples that stay correct under the report's white-box attacks and the probe's PGD."""
        left = self.correct_indices[self.correct_indices < self.few]
        for correct in self.white_box.values():
            left = left[correct.to(left.device)[left]]
        for loss in ("ce", "margin"):
            left = left[~self.probe.pgd(left, eps=self.probe.eps, steps=min(self.pgd[1], 50), loss=loss, start=loss)]
        return left

    @cached_property
    def square_finds(self) -> int:
        """Number of survivors that Square misclassifies."""
        return int(self.probe.square(self.survivors, SQUARE_QUERIES).sum())

    @cached_property
    def after_fgsm(self) -> Tensor:
        """Which of the probe's examples stay correct after one step of eps, (N,) bool."""
        probe = self.probe
        assert probe.gradient is not None
        stepped = probe.images + probe.eps * probe.steepest(probe.gradient)
        return probe.clean_correct & probe.correct(probe.projected(stepped, probe.images, probe.eps))

    def accuracy_under_pgd(self, *, eps: float, steps: int, count: int) -> float:
        """Return the probe's accuracy under PGD on its first ``count`` examples, in percent."""
        rows = self.correct_indices[self.correct_indices < count]
        return 100 * (len(rows) - int(self.probe.pgd(rows, eps=eps, steps=steps).sum())) / count


def graded(value: float, warn: float, fail: float = math.inf) -> Status:
    """Return pass up to and including ``warn``, fail above ``fail``, warn in between."""
    if value <= warn:
        return "pass"
    return "warn" if value <= fail else "fail"


def at_least_one(points: float, count: int) -> float:
    """Return a threshold in percentage points that a single example of ``count`` does not exceed."""
    return max(points, 100 / count) + 1e-9


def percent(chosen: Tensor) -> float:
    """Return the fraction of a mask (N,) that is true, in percent."""
    return 100 * float(chosen.float().mean())


def deviation(logits: Tensor, others: Tensor) -> float:
    """Return the largest difference of two sets of logits (N, K), in percent of their standard deviation."""
    return 100 * float((logits - others).abs().max()) / max(size(logits), 1e-30)


def size(logits: Tensor) -> float:
    """Return the standard deviation of logits (N, K) around their mean for each image."""
    return float((logits - logits.mean(dim=1, keepdim=True)).std())


def outcome(status: Status, value: float | None, measured: str, meaning: str) -> Outcome:
    """Return an outcome whose sentence says what was measured and, unless it passed, what that means."""
    return status, value, f"{measured}." if status == "pass" else f"{measured}: {meaning}."
