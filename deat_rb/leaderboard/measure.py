"""What a leaderboard measures itself, and how it holds claims against that."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from torch import Tensor, nn

from deat_rb.evaluation.evaluate import evaluate
from deat_rb.evaluation.report import Check, Report
from deat_rb.evaluation.runner import Progress
from deat_rb.evaluation.statistics import wilson
from deat_rb.leaderboard.entry import ATTACKS, Accuracy
from deat_rb.leaderboard.submission import Submission
from deat_rb.utils.errors import DeatError
from deat_rb.utils.safe_load import sha256_tensors
from deat_rb.utils.units import format_fraction

CONFIDENCE = 0.99999
"""Of the interval that a claim has to lie in: of a hundred thousand honest figures, one is refused."""

SAMPLE = 100

LEAST_SAMPLE = 50
"""With fewer examples almost any claim lies within the interval."""

SURE = 0.999
"""That verdicts differ, before a claim is refused for it."""

MOST_DIFFERING = 0.03
"""Of the examples, how many an honest evaluation may judge otherwise than the next, whose random starts are others."""


class Measurable(Protocol):
    """A network and its test images."""

    @property
    def model(self) -> nn.Module:
        """Takes images in [0, 1]."""

    def examples(self, count: int | None = None) -> tuple[Tensor, Tensor]:
        """The first test images, (N, C, H, W), and labels (N,)."""


def claimed_by(claim: Report, submission: Submission) -> dict[str, Accuracy]:
    """The figures of an evaluation that came with a run, if it is an evaluation of this very run.

    Raises:
        DeatError: It is of other weights, data or images, under other terms, lacks attacks, or does not add up.
    """
    evaluation = f"the eval.json of {submission.source}"
    again = f"evaluate again by deat-rb eval --attacks {','.join(ATTACKS[1:])}, or submit with --evaluate"
    if claim.precision != "fp32" or claim.norm != "Linf":
        raise DeatError(f"{evaluation} is in {claim.precision} and {claim.norm}, where fp32 and Linf count: {again}")
    missing = [attack for attack in ATTACKS if attack not in claim.results]
    if missing:
        raise DeatError(f"{evaluation} has no {', '.join(missing)}: {again}")
    images, labels = submission.examples(min(claim.n_examples, len(submission.data.test)))
    found = {
        "weights": (claim.provenance.get("weights_sha256"), submission.weights_sha256),
        "data": (claim.provenance.get("data_sha256"), submission.data.fingerprint),
        "model": (claim.model_sha256, sha256_tensors(submission.model.state_dict())),
        "test images": (claim.examples_sha256, sha256_tensors({"images": images, "labels": labels})),
    }
    for what, (stated, actual) in found.items():
        if stated != actual:
            raise DeatError(f"{evaluation} is of other {what} (SHA-256 {str(stated)[:12]!r}, handed in is "
                            f"{actual[:12]!r}): {again}")  # fmt: skip
    refuse_failed(claim.checks, evaluation)
    figures = {}
    for attack in ATTACKS:
        result = claim.results[attack]
        if not 0 <= result.n_correct <= result.n_examples == claim.n_examples or not (
            abs(result.accuracy - result.n_correct / result.n_examples) < 1e-6
        ):
            raise DeatError(f"{evaluation} claims {100 * result.accuracy:.2f} % under {attack} with {result.n_correct} "
                            f"of {result.n_examples} correct, which does not add up: {again}")  # fmt: skip
        figures[attack] = Accuracy.of(result.n_correct, result.n_examples)
    if not claim.verdicts:
        raise DeatError(f"{evaluation} has no eval-verdicts.safetensors beside it, which says of which examples it "
                        f"speaks: {again}")  # fmt: skip
    return figures


def refuse_failed(checks: Sequence[Check], source: str) -> None:
    """Refuses figures that a check has found wrong.

    Raises:
        DeatError: One has.
    """
    failed = next((check for check in checks if check.status == "fail"), None)
    if failed is not None:
        raise DeatError(f"{source} fails the check '{failed.name}': {failed.sentence}")


def compare_claim(stated: Mapping[str, float], found: Report, source: str) -> None:
    """Holds what is claimed against what was measured.

    Args:
        stated: By attack, in percent.
        found: The measurement, on examples that the board chose.
        source: Who claims it.

    Raises:
        DeatError: A claim lies outside of the measurement's interval of `CONFIDENCE`.
    """
    for attack, claim in stated.items():
        result = found.results[attack]
        low, high = (100 * end for end in wilson(result.n_correct, result.n_examples, CONFIDENCE))
        if not low - 0.005 <= claim <= high + 0.005:
            raise DeatError(
                f"{source} claims {claim:.2f} % under {attack}, and {100 * result.accuracy:.2f} % ({low:.2f} to "
                f"{high:.2f}) of {result.n_examples} examples were measured here: it is refused"
            )


def compare_verdicts(claim: Report, found: Report, rows: Sequence[int], source: str) -> None:
    """Holds what is claimed of each example against what was measured of it.

    Args:
        claim: The whole evaluation.
        found: The measurement of some of its examples.
        rows: Which examples those are.
        source: Who claims it.

    Raises:
        DeatError: They differ in more examples than random starts explain. Luck in drawing the examples has no part in
            it.
    """
    for attack in ATTACKS:
        differing = int((claim.verdicts[attack][list(rows)] != found.verdicts[attack]).sum())
        if wilson(differing, len(rows), SURE)[0] > MOST_DIFFERING:
            raise DeatError(f"{source} says something else of {differing} of {len(rows)} examples under {attack} than "
                            "was measured here: it is refused")  # fmt: skip


def check_sample(sample: int) -> int:
    """Gives back a number of examples that is worth measuring.

    Raises:
        DeatError: It is too small.
    """
    if sample < LEAST_SAMPLE:
        raise DeatError(f"--sample {sample} would let claims pass that are wrong by half of all examples: give at "
                        f"least {LEAST_SAMPLE}, such as {SAMPLE}")  # fmt: skip
    return sample


class Measure:
    """How the board measures a submission."""

    def __init__(
        self,
        submission: Submission,
        n_examples: int | None,
        sample: int,
        batch_size: int,
        device: str | None,
        progress: Progress | None,
    ) -> None:
        check_sample(sample)
        self.submission = submission
        self.n_examples = n_examples
        self.sample = sample
        self.options: dict[str, Any] = {"batch_size": batch_size, "device": device, "progress": progress}

    def measure_all(self) -> dict[str, Any]:
        """Evaluates on all examples that are asked for."""
        submission = self.submission
        images, labels = submission.examples(self.n_examples)
        report = evaluate(submission.model, images, labels, attacks=ATTACKS[1:], eps=submission.eps, checks="quick",
                          keep_adversarial=False, **self.options)  # fmt: skip
        refuse_failed(report.checks, str(submission.source))
        compare_claim(submission.stated, report, f"the model_info of {submission.source}")
        figures = {name: Accuracy.of(result.n_correct, result.n_examples) for name, result in report.results.items()}
        return _figure_fields(figures, submission.eps, report.checks, report)

    def verify_claim(self) -> dict[str, Any]:
        """Takes the evaluation that came with the run, having measured some of its examples again."""
        submission = self.submission
        claim = cast(Report, submission.claim)
        figures = claimed_by(claim, submission)
        if self.n_examples not in (None, claim.n_examples):
            raise DeatError(f"--n-examples {self.n_examples} is not what the eval.json of {submission.source} is of "
                            f"({claim.n_examples}): leave it out, or submit with --evaluate")  # fmt: skip
        rows, report = sampled(submission, claim.n_examples, self.sample, claim.eps, **self.options)
        stated = {attack: 100 * figure.accuracy for attack, figure in figures.items()}
        compare_claim(stated, report, f"the eval.json of {submission.source}")
        compare_verdicts(claim, report, rows, f"the eval.json of {submission.source}")
        refuse_failed(report.checks, str(submission.source))
        remeasured = {name: Accuracy.of(result.n_correct, result.n_examples) for name, result in report.results.items()}
        return {**_figure_fields(figures, claim.eps, report.checks, claim), "remeasured": remeasured}


def sampled(
    submission: Measurable, n_examples: int, sample: int, eps: float, **options: Any
) -> tuple[list[int], Report]:
    """Evaluates on examples that nobody can have known: drawn by the operating system from the first ``n_examples``.

    Args:
        submission: Has a ``model``, and ``examples`` that give images and labels.
        n_examples: Of these it is drawn.
        sample: How many are drawn, if there are as many.
        eps: The radius.
        options: Of `deat_rb.evaluation.evaluate.evaluate`.

    Returns:
        Which examples they are, and the evaluation.
    """
    draw = random.SystemRandom()
    rows = sorted(draw.sample(range(n_examples), min(sample, n_examples)))
    images, labels = submission.examples(n_examples)
    report = evaluate(submission.model, images[rows], labels[rows], attacks=ATTACKS[1:], eps=eps, checks="quick",
                      seed=draw.randrange(2**31), keep_adversarial=False, **options)  # fmt: skip
    return rows, report


def _figure_fields(
    figures: Mapping[str, Accuracy], eps: float, checks: tuple[Check, ...], measured: Report
) -> dict[str, Any]:
    attacked = [figure for name, figure in figures.items() if name != "natural"]
    return {
        "figures": figures,
        "n_examples": figures["natural"].n_examples,
        "eps": format_fraction(eps),
        "clean_acc": figures["natural"].percent,
        "autoattack_acc": figures["autoattack"].percent,
        "reported": min(attacked, key=lambda figure: figure.n_correct).percent,
        "checks": checks,
        "evaluated_on": measured.device,
        "evaluated_with": measured.versions,
    }
