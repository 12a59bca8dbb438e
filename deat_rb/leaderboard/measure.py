"""The board's own measurements, and the comparison of submitted claims with them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from torch import nn

from deat_rb.data.datasets import Dataset
from deat_rb.data.images import first_test_examples, images_and_logits
from deat_rb.evaluation.evaluate import evaluate
from deat_rb.evaluation.frozen_model import sha256_examples
from deat_rb.evaluation.report import Check, Report
from deat_rb.evaluation.resume import resume_or_restart
from deat_rb.evaluation.statistics import wilson
from deat_rb.leaderboard.entry import ATTACKS, Accuracy
from deat_rb.leaderboard.submission import Submission
from deat_rb.utils.errors import DeatError
from deat_rb.utils.files import cache_folder
from deat_rb.utils.safe_load import sha256_tensors
from deat_rb.utils.text import counted
from deat_rb.utils.units import format_fraction

CONFIDENCE = 0.99999
"""Confidence of the interval that must contain a claim: one in 100,000 honest claims is refused."""

SAMPLE = 100

MIN_SAMPLE = 50
"""Smallest sample; with fewer examples almost any claim lies within the interval."""

VERDICT_CONFIDENCE = 0.999

MAX_DIFFERING = 0.03
"""Fraction of examples on which two honest evaluations with different random starts may differ."""


def check_sample(sample: int) -> int:
    """Return the sample size if it is large enough.

    Raises:
        DeatError: The sample is too small.
    """
    if sample < MIN_SAMPLE:
        raise DeatError(f"--sample {sample} is too small to detect wrong claims: give at least {MIN_SAMPLE}, such as "
                        f"{SAMPLE}")  # fmt: skip
    return sample


def check_claim(claim: Report, submission: Submission) -> None:
    """Check that the evaluation submitted with a run belongs to that run, is complete and has no failed checks.

    Raises:
        DeatError: The evaluation was computed for different weights, data or images, or with a different precision or
            norm, lacks attacks or verdicts, or has a failed check.
    """
    evaluation = f"the eval.json of {submission.source}"
    again = f"run deat-rb eval --attacks {','.join(ATTACKS[1:])} again, or submit with --evaluate"
    if (claim.precision, claim.norm) != ("fp32", submission.norm):
        raise DeatError(
            f"{evaluation} uses {claim.precision} and {claim.norm}, not fp32 and {submission.norm}: {again}"
        )
    missing = [attack for attack in ATTACKS if attack not in claim.results]
    if missing:
        raise DeatError(f"{evaluation} has no results for {', '.join(missing)}: {again}")
    examples = first_test_examples(submission.data.test, min(claim.n_examples, len(submission.data.test)))
    hashes = {
        "weights": (claim.provenance.get("weights_sha256"), submission.weights_sha256),
        "data": (claim.provenance.get("data_sha256"), submission.data.fingerprint),
        "model": (claim.model_sha256, sha256_tensors(submission.model.state_dict())),
        "test images": (claim.examples_sha256, sha256_examples(*examples)),
    }
    for name, (claimed, actual) in hashes.items():
        if claimed != actual:
            raise DeatError(f"{evaluation} was computed for different {name} (SHA-256 {str(claimed)[:12]!r}, "
                            f"submitted {actual[:12]!r}): {again}")  # fmt: skip
    refuse_failed(claim.checks, evaluation)
    if not claim.verdicts:
        raise DeatError(f"{evaluation} has no eval-verdicts.safetensors (results on each example) next to it: {again}")


def refuse_failed(checks: Sequence[Check], source: str) -> None:
    """Raise if a sanity check failed.

    Raises:
        DeatError: A check failed; the message includes its sentence.
    """
    failed = next((check for check in checks if check.status == "fail"), None)
    if failed is not None:
        raise DeatError(f"{source} fails the check '{failed.name}': {failed.sentence}")


def compare_claim(claimed: Mapping[str, float], measured: Report, source: str) -> None:
    """Compare claimed accuracies with measured ones.

    Args:
        claimed: Accuracy in percent, by attack.
        measured: The evaluation on the board's random sample.
        source: Origin of the claim, for error messages.

    Raises:
        DeatError: A claim lies outside the measurement's `CONFIDENCE` interval.
    """
    for attack, claim in claimed.items():
        result = measured.results[attack]
        low, high = (100 * end for end in wilson(result.n_correct, result.n_examples, CONFIDENCE))
        if not low - 0.005 <= claim <= high + 0.005:
            raise DeatError(
                f"{source} claims {claim:.2f} % under {attack}, but the board measured {100 * result.accuracy:.2f} % "
                f"({low:.2f} to {high:.2f}) on {counted(result.n_examples, 'example', '')}"
            )


def compare_verdicts(claim: Report, measured: Report, rows: Sequence[int], source: str) -> None:
    """Compare claimed and measured results example by example, which is stricter than comparing accuracies.

    Args:
        claim: The full evaluation, as submitted.
        measured: The evaluation on a sample of its examples.
        rows: Indices of the sampled examples.
        source: Origin of the claim, for error messages.

    Raises:
        DeatError: The results differ on significantly more than `MAX_DIFFERING` of the examples.
    """
    for attack in ATTACKS:
        differing = int((claim.verdicts[attack][list(rows)] != measured.verdicts[attack]).sum())
        if wilson(differing, len(rows), VERDICT_CONFIDENCE)[0] > MAX_DIFFERING:
            raise DeatError(
                f"{source} differs from the board's measurement on {differing} of {counted(len(rows), 'example', '')} "
                f"under {attack}: evaluate the submitted weights again with deat-rb eval and resubmit"
            )


def evaluate_fully(
    submission: Submission, n_examples: int | None, accept: Callable[[dict[str, Any]], None], **options: Any
) -> None:
    """Evaluate a submission on the first ``n_examples`` test images, by default on all.

    Checks that need no attack and the claimed natural accuracy come first, so that a network that is not what its
    submission says is refused before the attacks, which take hours. The attacks' results are kept in the user's cache
    folder until ``accept`` has returned: after an interruption or a full disk, the same submission continues.

    Args:
        submission: The submission.
        n_examples: Number of test images.
        accept: Called with the measured fields of the entry, unless the submission is refused.
        options: Further arguments of `deat_rb.evaluation.evaluate.evaluate`.

    Raises:
        DeatError: A check fails, the measurement contradicts the submission's ``model_info``, or ``accept`` fails.
    """
    images, labels = first_test_examples(submission.data.test, n_examples, submission.logit_of_class)
    measure = partial(evaluate, submission.model, images, labels, eps=submission.eps, norm=submission.norm,
                      checks="quick", keep_adversarial=False, **options)  # fmt: skip

    def judge(report: Report) -> None:
        claimed = {attack: claim for attack, claim in submission.claimed.items() if attack in report.results}
        refuse_failed(report.checks, str(submission.source))
        compare_claim(claimed, report, f"the model_info of {submission.source}")

    refusals: list[DeatError] = []

    def finish(report: Report) -> None:
        try:
            judge(report)
        except DeatError as error:  # raised below, when the stored results, of no further use, have been removed
            refusals.append(error)
        else:
            accept(_entry_fields(report, report.checks))

    judge(measure(attacks=ATTACKS[:1]))
    state = _state(submission, n_examples, options.get("batch_size"), options.get("device"))
    resume_or_restart(partial(measure, attacks=ATTACKS[1:], state=state, finish=finish))
    if refusals:
        raise refusals[0]


def _state(submission: Submission, *options: object) -> Path | None:
    """Return the folder for an unfinished evaluation with these options; None if it cannot be written."""
    identity = (submission.weights_sha256, submission.spec, submission.data.fingerprint, submission.logit_of_class,
                submission.norm, submission.eps, *options)  # fmt: skip
    folder = cache_folder("submissions") / sha256(repr(identity).encode()).hexdigest()[:16]
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    return folder if os.access(existing, os.W_OK) else None


def verify_claim(submission: Submission, n_examples: int | None, sample: int, **options: Any) -> dict[str, Any]:
    """Re-measure a sample of a run's own evaluation; return fields of its entry, with the run's accuracies.

    Raises:
        DeatError: The evaluation does not belong to this run, a check fails, or the sample contradicts the evaluation.
    """
    claim = cast(Report, submission.claim)
    source = f"the eval.json of {submission.source}"
    check_claim(claim, submission)
    if n_examples not in (None, claim.n_examples):
        of_claim = counted(claim.n_examples, "example", "")
        raise DeatError(f"--n-examples {n_examples} differs from {source} ({of_claim}): omit it, or submit with "
                        "--evaluate")  # fmt: skip
    rows, report = evaluate_sample(submission.model, submission.data, claim.n_examples, sample, claim.eps,
                                   norm=submission.norm, **options)  # fmt: skip
    claimed = {str(attack): 100 * claim.results[attack].accuracy for attack in ATTACKS}
    compare_claim(claimed, report, source)
    compare_verdicts(claim, report, rows, source)
    refuse_failed(report.checks, str(submission.source))
    return {**_entry_fields(claim, report.checks), "remeasured": _accuracies(report)}


def evaluate_sample(
    model: nn.Module,
    data: Dataset,
    n_examples: int,
    sample: int,
    eps: float,
    *,
    logit_of_class: Sequence[int] = (),
    **options: Any,
) -> tuple[list[int], Report]:
    """Evaluate on random examples that a submitter cannot predict.

    Args:
        model: Classifier of images in [0, 1].
        data: Its dataset.
        n_examples: Number of test images to sample from, from the first one on; the operating system draws the sample.
        sample: Number of examples.
        eps: Radius of the attacks.
        logit_of_class: See `deat_rb.models.class_names.match_classes`.
        options: Further arguments of `deat_rb.evaluation.evaluate.evaluate`.

    Returns:
        The examples' indices, and the evaluation.
    """
    draw = random.SystemRandom()
    rows = sorted(draw.sample(range(n_examples), min(sample, n_examples)))
    images, labels = images_and_logits(data.test.select(rows), logit_of_class)
    report = evaluate(model, images, labels, attacks=ATTACKS[1:], eps=eps, checks="quick",
                      seed=draw.randrange(2**31), keep_adversarial=False, **options)  # fmt: skip
    return rows, report


def _accuracies(report: Report) -> dict[str, Accuracy]:
    results = {attack: report.results[attack] for attack in ATTACKS}
    return {attack: Accuracy(n_correct=each.n_correct, n_examples=each.n_examples) for attack, each in results.items()}


def _entry_fields(report: Report, checks: tuple[Check, ...]) -> dict[str, Any]:
    figures = _accuracies(report)
    return {
        "figures": figures,
        "n_examples": report.n_examples,
        "eps": format_fraction(report.eps),
        "reported": min((figures[attack] for attack in ATTACKS[1:]), key=lambda each: each.n_correct).percent,
        "checks": checks,
        "evaluated_on": report.device,
        "evaluated_with": report.versions,
    }
