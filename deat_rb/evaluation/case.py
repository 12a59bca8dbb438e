"""What a check looks at, and how it says what it found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor, nn

from deat_rb.evaluation.attacklist import SQUARE_TILES
from deat_rb.evaluation.report import Report
from deat_rb.evaluation.suspect import Suspect

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
class Case:
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
    suspect: Suspect
    images: Tensor
    labels: Tensor
    report: Report
    level: str
    before: dict[str, Tensor]

    @property
    def attacks_allowed(self) -> bool:
        """Whether what the report does not tell may be found out by attacks: at level ``full``."""
        return self.level == "full" and self.suspect.gradient is not None

    @property
    def square_allowed(self) -> bool:
        """Whether Square may be run: at level ``full``, on images that it takes."""
        images = self.suspect.images
        return self.level == "full" and (self.suspect.norm == "Linf" or min(images.shape[-2:]) >= SQUARE_TILES)

    @property
    def few(self) -> int:
        """Of how many examples the costlier figures are."""
        return min(FEW[self.level], len(self.suspect.images))

    @property
    def half(self) -> float:
        """The radius within which every image can be turned grey."""
        return 0.5 if self.suspect.norm == "Linf" else 0.5 * math.sqrt(self.suspect.images[0].numel())

    @cached_property
    def wavering(self) -> float:
        """By how much the logits differ between passes over the same images, see `deviation`."""
        suspect = self.suspect
        passes = [suspect.logits(suspect.images)]
        if suspect.differentiated is not None:
            passes.append(suspect.differentiated)
        return max(deviation(suspect.clean, logits) for logits in passes)

    @cached_property
    def standing(self) -> Tensor:
        """The numbers of the suspect's examples that are correct without an attack."""
        return self.suspect.clean_correct.nonzero().flatten()

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
        left = self.standing[self.standing < self.few]
        for correct in self.white_box.values():
            left = left[correct.to(left.device)[left]]
        for loss in ("ce", "margin"):
            left = left[
                ~self.suspect.pgd(left, eps=self.suspect.eps, steps=min(self.pgd[1], 50), loss=loss, start=loss)
            ]
        return left

    @cached_property
    def squared(self) -> int:
        """How many of the survivors Square breaks."""
        return int(self.suspect.square(self.survivors, SQUARE_QUERIES).sum())

    @cached_property
    def after_fgsm(self) -> Tensor:
        """Which of the suspect's examples one step of eps leaves correct, (N,) bool."""
        suspect = self.suspect
        assert suspect.gradient is not None
        stepped = suspect.images + suspect.eps * suspect.steepest(suspect.gradient)
        return suspect.clean_correct & suspect.correct(suspect.projected(stepped, suspect.images, suspect.eps))

    def pgd_leaves(self, *, eps: float, steps: int, count: int) -> float:
        """What PGD leaves of the suspect's first ``count`` examples, in percent."""
        rows = self.standing[self.standing < count]
        return 100 * (len(rows) - int(self.suspect.pgd(rows, eps=eps, steps=steps).sum())) / count


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


def concluded(status: Status, figure: float | None, measured: str, meaning: str) -> Outcome:
    """A sentence of what was measured, and of what it means where that is something bad."""
    return status, figure, f"{measured}." if status == "pass" else f"{measured}: {meaning}."
