"""What a check looks at, and how it says what it found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor, nn

from deat_rb.attacks.names import SQUARE_TILES
from deat_rb.evaluation.checks.probes import Probe
from deat_rb.evaluation.report import Report

Status = Literal["pass", "warn", "fail"]

Outcome = tuple[Status, float | None, str]
"""Status, figure and sentence of a check."""

EXAMPLES = {"quick": 100, "full": 200}

FEW = {"quick": 32, "full": 100}

SQUARE_QUERIES = 300

WITHOUT_GRADIENT = (
    "square", "autoattack", "torchattacks.Square", "torchattacks.SPSA", "torchattacks.OnePixel", "torchattacks.Pixle",
    "torchattacks.GN", "torchattacks.AutoAttack",
)  # fmt: skip

NO_ATTACK = ("natural", "noise")


@dataclass(eq=False)
class CheckContext:
    """An evaluation under suspicion.

    Attributes:
        model: In eval mode and with its parameters frozen.
        suspect: It and the first few examples, for what is measured anew.
        images: All of the evaluation, (N, C, H, W).
        labels: (N,).
        report: What the evaluation found.
        level: ``quick`` or ``full``.
        before: The model's parameters and buffers as they were.
    """

    model: nn.Module
    probe: Probe
    images: Tensor
    labels: Tensor
    report: Report
    level: str
    before: dict[str, Tensor]

    @property
    def attacks_allowed(self) -> bool:
        """Whether what the report does not tell may be found out by attacks: at level ``full``."""
        return self.level == "full" and self.probe.gradient is not None

    @property
    def square_allowed(self) -> bool:
        """Whether Square may be run: at level ``full``, on images that it takes."""
        images = self.probe.images
        return self.level == "full" and (self.probe.norm == "Linf" or min(images.shape[-2:]) >= SQUARE_TILES)

    @property
    def few(self) -> int:
        """Of how many examples the costlier figures are."""
        return min(FEW[self.level], len(self.probe.images))

    @property
    def half(self) -> float:
        """The radius within which every image can be turned grey."""
        return 0.5 if self.probe.norm == "Linf" else 0.5 * math.sqrt(self.probe.images[0].numel())

    @cached_property
    def logit_variation(self) -> float:
        """By how much the logits differ between passes over the same images, see `deviation`."""
        probe = self.probe
        passes = [probe.logits(probe.images)]
        if probe.differentiated is not None:
            passes.append(probe.differentiated)
        return max(deviation(probe.clean, logits) for logits in passes)

    @cached_property
    def correct_indices(self) -> Tensor:
        """The numbers of the suspect's examples that are correct without an attack."""
        return self.probe.clean_correct.nonzero().flatten()

    @cached_property
    def pgd(self) -> tuple[str, int]:
        """The report's PGD nearest to 50 steps, and its steps; no name and 20 steps where it has none."""
        found = {
            name: int(result.parameters.get("steps", 20))
            for name, result in self.report.results.items()
            if name.startswith("pgd-")
        }
        name = min(found, key=lambda each: abs(found[each] - 50), default="")
        return name, found.get(name, 20)

    @cached_property
    def white_box(self) -> dict[str, Tensor]:
        """The report's verdicts, each (N,) bool, under attacks that follow gradients."""
        others = (*NO_ATTACK, *WITHOUT_GRADIENT)
        return {name: correct for name, correct in self.report.verdicts.items() if not name.startswith(others)}

    @cached_property
    def survivors(self) -> Tensor:
        """The numbers of the few examples that neither the report's white-box attacks nor PGD here breaks."""
        left = self.correct_indices[self.correct_indices < self.few]
        for correct in self.white_box.values():
            left = left[correct.to(left.device)[left]]
        for loss in ("ce", "margin"):
            left = left[~self.probe.pgd(left, eps=self.probe.eps, steps=min(self.pgd[1], 50), loss=loss, start=loss)]
        return left

    @cached_property
    def squared(self) -> int:
        """How many of the survivors Square breaks."""
        return int(self.probe.square(self.survivors, SQUARE_QUERIES).sum())

    @cached_property
    def after_fgsm(self) -> Tensor:
        """Which of the suspect's examples one step of eps leaves correct, (N,) bool."""
        probe = self.probe
        assert probe.gradient is not None
        stepped = probe.images + probe.eps * probe.steepest(probe.gradient)
        return probe.clean_correct & probe.correct(probe.projected(stepped, probe.images, probe.eps))

    def pgd_leaves(self, *, eps: float, steps: int, count: int) -> float:
        """What PGD leaves of the suspect's first ``count`` examples, in percent."""
        rows = self.correct_indices[self.correct_indices < count]
        return 100 * (len(rows) - int(self.probe.pgd(rows, eps=eps, steps=steps).sum())) / count


def graded(figure: float, warn: float, fail: float = math.inf) -> Status:
    """Pass up to and including ``warn``, fail above ``fail``."""
    if figure <= warn:
        return "pass"
    return "warn" if figure <= fail else "fail"


def at_least_one(points: float, count: int) -> float:
    """So many percentage points, but what one example of ``count`` is at least: a single one proves nothing."""
    return max(points, 100 / count) + 1e-9


def percent(chosen: Tensor) -> float:
    """The share of (N,) bool, in percent."""
    return 100 * float(chosen.float().mean())


def deviation(logits: Tensor, others: Tensor) -> float:
    """The largest difference of two sets of logits (N, K), in percent of their standard deviation."""
    return 100 * float((logits - others).abs().max()) / max(size(logits), 1e-30)


def size(logits: Tensor) -> float:
    """The standard deviation of logits (N, K) around their mean for each image."""
    return float((logits - logits.mean(dim=1, keepdim=True)).std())


def outcome(status: Status, figure: float | None, measured: str, meaning: str) -> Outcome:
    """A sentence of what was measured, and of what it means where that is something bad."""
    return status, figure, f"{measured}." if status == "pass" else f"{measured}: {meaning}."
