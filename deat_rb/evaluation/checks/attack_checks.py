"""Checks of the attacks' results against the stored images, each other and theory."""

from __future__ import annotations

import itertools
import math

import torch

from deat_rb.evaluation.checks.context import (
    EXAMPLES,
    CheckContext,
    Outcome,
    at_least_one,
    graded,
    outcome,
    percent,
    size,
)
from deat_rb.evaluation.checks.probes import margins
from deat_rb.evaluation.frozen_model import select_images
from deat_rb.evaluation.report import Report

ROUNDING = 1e-6


def admissible(context: CheckContext) -> Outcome | None:
    """Check that the adversarial images are within the threat model."""
    if not context.report.adversarial:
        return None
    excess, outside, total = 0.0, 0, 0
    images = select_images(context.images, torch.arange(len(context.images)))
    for adv in context.report.adversarial.values():
        too_far = context.probe.distances(adv, images.to(adv)) - context.probe.eps
        out_of_range = (adv.flatten(1) - 0.5).abs().amax(dim=1) - 0.5
        over = torch.maximum(too_far, out_of_range).nan_to_num(nan=1.0, posinf=1.0).clamp(0, 1)
        excess = max(excess, float(over.max()))
        outside += int((over > ROUNDING).sum())
        total += len(adv)
    return outcome(
        "fail" if outside else "pass",
        excess,
        f"{outside} of {total} adversarial images are not finite, not in [0, 1] or farther away than eps + 1e-6 (the "
        f"largest excess is {excess:.1g})",
        "such images do not count as adversarial examples",
    )


def reproduced(context: CheckContext) -> Outcome | None:
    """Check that re-evaluating the stored adversarial images reproduces the reported verdicts."""
    differing = total = 0
    for name in context.report.adversarial.keys() & context.report.verdicts.keys():
        adv, correct = context.report.adversarial[name], context.report.verdicts[name]
        count = len(adv) if context.level == "full" else min(len(adv), EXAMPLES[context.level])
        logits = context.probe.logits(adv[:count].to(context.probe.images))
        ahead = margins(logits, context.labels[:count].to(logits.device))
        # Near the decision boundary, rounding in a different batch size may change the prediction.
        clear = ahead.abs() > 1e-4 * size(logits)
        differing += int((((ahead > 0) != correct[:count].to(ahead.device)) & clear).sum())
        total += count
    if not total:
        return None
    share = 100 * differing / total
    return outcome(
        graded(share, 0, 0.2),
        share,
        f"{differing} of {total} verdicts ({share:.1f} %) differ from the model's predictions on the stored images",
        "the reported accuracies cannot be reproduced",
    )


def no_change_at_zero(context: CheckContext) -> Outcome:
    """Check that an attack with eps = 0 does not change accuracy."""
    probe = context.probe
    everyone = torch.arange(len(probe.images), device=probe.labels.device)
    points = [percent(probe.clean_correct) - percent(~probe.pgd(everyone, eps=0.0, steps=1))]
    natural = context.report.results["natural"].accuracy
    points += [100 * (natural - point.worst_case) for point in context.report.curve if point.eps == 0]
    largest = max(points, key=abs)
    return outcome(
        "fail" if abs(largest) > at_least_one(0, len(everyone)) else "pass",
        largest,
        f"Accuracy under an attack with eps = 0 is {largest:.1f} points below the clean accuracy",
        "predictions change without a perturbation, for instance because they are random",
    )


def clean_highest(context: CheckContext) -> Outcome:
    """Check that no accuracy under attack exceeds the clean accuracy."""
    results = context.report.results
    gain = 100 * (max(result.accuracy for result in results.values()) - results["natural"].accuracy)
    return outcome(
        graded(gain, 0, 0),
        gain,
        f"The highest accuracy under an attack is {gain:.1f} points above the clean accuracy",
        "no attack should increase accuracy",
    )


def _compared(points: float) -> str:
    """Format a signed difference in percentage points, as in ``47.0 points below``."""
    return f"{abs(points):.1f} points {'above' if points > 0 else 'below'}"


def noise_below_fgsm(context: CheckContext) -> Outcome | None:
    """Check that FGSM is stronger than noise of the same size."""
    probe = context.probe
    if probe.gradient is None:
        return None
    kinds = ("uniform", "gaussian")
    lowest = min(percent(probe.clean_correct & probe.correct(probe.noisy(kind))) for kind in kinds)
    lead = percent(context.after_fgsm) - lowest
    return outcome(
        graded(lead, at_least_one(0.5, len(probe.images)), 5),
        lead,
        f"Accuracy under FGSM is {_compared(lead)} that under noise of the same size",
        "a step along the gradient should be stronger than a random one, so the gradients are of little use",
    )


def pgd_below_fgsm(context: CheckContext) -> Outcome | None:
    """Check that PGD is stronger than FGSM."""
    results, (name, steps) = context.report.results, context.pgd
    if name and "fgsm" in results:
        above, count = 100 * (results[name].accuracy - results["fgsm"].accuracy), context.report.n_examples
    elif context.attacks_allowed:
        name, count = f"pgd-{steps}", len(context.probe.images)
        above = context.accuracy_under_pgd(eps=context.probe.eps, steps=steps, count=count)
        above -= percent(context.after_fgsm)
    else:
        return None
    return outcome(
        graded(above, at_least_one(0.5, count), 2),
        above,
        f"Accuracy under {name} is {_compared(above)} that under FGSM",
        "many small steps should be stronger than one large step, so the gradients are probably misleading",
    )


def converged(context: CheckContext) -> Outcome | None:
    """Check that PGD with twice the steps and another random start finds few new adversarial examples.

    Thirty small networks trained with PGD (ten seeds, three instruction sets) lost 0 to 3 points, usually 1, on 200
    examples. The threshold of 4 points is six examples above the usual loss, more than rounding can change.
    """
    name, steps = context.pgd
    if not context.attacks_allowed:
        return None
    probe, left = context.probe, context.correct_indices
    for correct in context.white_box.values():
        left = left[correct.to(left.device)[left]]
    if name not in context.report.verdicts:
        left = left[~probe.pgd(left, eps=probe.eps, steps=steps)]
    misclassified = probe.pgd(left, eps=probe.eps, steps=2 * steps, start="second start")
    points = 100 * int(misclassified.sum()) / len(probe.images)
    return outcome(
        graded(points, at_least_one(4, len(probe.images)), at_least_one(8, len(probe.images))),
        points,
        f"PGD with {2 * steps} steps from another random start lowers accuracy by another {points:.1f} points",
        "the attack has not converged; use more steps or restarts",
    )


def falls_with_eps(context: CheckContext) -> Outcome | None:
    """Check that accuracy decreases with eps."""
    eps, count = context.probe.eps, context.few
    if len(context.report.curve) > 1:
        count = context.report.n_examples
        accuracies = {point.eps: 100 * point.worst_case for point in context.report.curve}
    elif context.attacks_allowed and eps > 0:
        radii = (eps / 4, eps / 2, eps, 2 * eps)
        accuracies = {radius: context.accuracy_under_pgd(eps=radius, steps=10, count=count) for radius in radii}
    else:
        return None
    ordered = [accuracies[radius] for radius in sorted(accuracies)]
    rise = max(later - earlier for earlier, later in itertools.pairwise(ordered))
    return outcome(
        graded(rise, at_least_one(0.5, count), 5),
        rise,
        f"The largest increase in accuracy from one eps to the next larger one is {rise:+z.1f} points",
        "a larger ball contains the smaller one, so the attack misses adversarial examples in it",
    )


def chance_at_half(context: CheckContext) -> Outcome | None:
    """Check that accuracy is at chance level at eps = 1/2, where any image can be turned grey."""
    probe, count = context.probe, context.few
    if probe.gradient is None:
        return None
    commonest = float(probe.labels[:count].bincount().max()) / count
    chance = max(1 / probe.clean.shape[1], commonest)
    bound = 100 * (chance + 2 * math.sqrt(chance * (1 - chance) / count))
    accuracy = context.accuracy_under_pgd(eps=context.half, steps=10, count=count)
    return outcome(
        graded(accuracy, bound, bound + 20),
        accuracy,
        f"At eps = 1/2, where any image can be turned grey, accuracy under PGD-10 is {accuracy:.1f} %; chance level is "
        f"{100 * chance:.1f} %",
        "the gradients do not lead to adversarial examples",
    )


def larger_eps(context: CheckContext) -> Outcome | None:
    """Check that projecting adversarial examples of a larger eps onto the eps-ball yields few additional ones."""
    probe, count = context.probe, context.few
    if probe.gradient is None or probe.eps == 0:
        return None
    left = context.correct_indices[context.correct_indices < count]
    for correct in context.white_box.values():
        left = left[correct.to(left.device)[left]]
    if not context.white_box:
        left = left[~probe.pgd(left, eps=probe.eps, steps=20)]
    images = probe.images[left]
    misclassified = torch.zeros_like(left, dtype=torch.bool)
    for radius in (2 * probe.eps, context.half):
        far, _ = probe.run_pgd(left, eps=radius, steps=10)
        for target in (far, images + probe.eps * probe.steepest(far - images)):
            if len(left):
                misclassified |= ~probe.correct(probe.projected(target, images, probe.eps), left)
    points = 100 * int(misclassified.sum()) / count
    return outcome(
        graded(points, at_least_one(2, count), at_least_one(8, count)),
        points,
        f"Adversarial examples of PGD-10 at 2 eps and at 1/2, projected onto the eps-ball, lower accuracy by another "
        f"{points:.1f} points",
        "gradients near the images do not lead to these examples, so gradients are masked",
    )


def square_no_better(context: CheckContext) -> Outcome | None:
    """Check that a black-box attack finds hardly any adversarial examples that white-box attacks miss."""
    verdicts, count = context.report.verdicts, context.report.n_examples
    if "square" in verdicts and context.white_box:
        left = torch.stack(list(context.white_box.values())).all(dim=0)
        points = 100 * int((left & ~verdicts["square"]).sum()) / count
    elif (n_square := _found_by_autoattacks_square(context.report)) is not None:
        points = 100 * n_square / count
    elif context.square_allowed:
        count = context.few
        points = 100 * context.square_finds / count
    else:
        return None
    return outcome(
        graded(points, at_least_one(0.2, count), at_least_one(2, count)),
        points,
        f"Square, which uses no gradients, lowers accuracy to {points:.1f} points below that under white-box attacks",
        "gradients are masked, and accuracies under white-box attacks are too high",
    )


def _found_by_autoattacks_square(report: Report) -> int | None:
    """Return the number of examples that Square found as AutoAttack's last stage; None if it was not the last."""
    for result in report.results.values():
        *before, last = result.parts or [""]
        if before and last == "square":
            return result.parts[before[-1]] - result.parts[last]
    return None


def autoattack_lowest(context: CheckContext) -> Outcome | None:
    """Check that no other attack is stronger than AutoAttack."""
    results = context.report.results
    suites = [result.accuracy for name, result in results.items() if name.startswith("autoattack")]
    others = {name: result.accuracy for name, result in results.items() if not name.startswith("autoattack")}
    if not suites or len(others) < 2:
        return None
    strongest = min(others, key=lambda name: others[name])
    above = 100 * (min(suites) - others[strongest])
    return outcome(
        graded(above, at_least_one(0.5, context.report.n_examples), 2),
        above,
        f"Accuracy under AutoAttack is {_compared(above)} that under {strongest}, the strongest other attack",
        "the ensemble is weaker than a single attack, so accuracy under AutoAttack is too high",
    )


def pgd_near_autoattack(context: CheckContext) -> Outcome | None:
    """Check that accuracy under PGD is close to that under AutoAttack, or else under PGD on the margin and Square."""
    results, (name, steps) = context.report.results, context.pgd
    suites = [result.accuracy for key, result in results.items() if key.startswith("autoattack")]
    if suites and name and steps >= 20:
        gap, rival = 100 * (results[name].accuracy - min(suites)), "AutoAttack"
    elif context.attacks_allowed and context.square_allowed:
        name, rival, count = "pgd-50", "PGD on the margin and Square", context.few
        strongest = 100 * (len(context.survivors) - context.square_finds) / count
        gap = context.accuracy_under_pgd(eps=context.probe.eps, steps=50, count=count) - strongest
    else:
        return None
    return outcome(
        graded(gap, 8, 16),
        gap,
        f"Accuracy under {name} is {_compared(gap)} that under {rival}",
        "up to 8 points are usual; more indicate masked gradients, so accuracy under PGD means little",
    )
