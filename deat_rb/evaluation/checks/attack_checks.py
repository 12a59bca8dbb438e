"""Checks of what the attacks found: against the stored images, against each other and against what must be."""

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
from deat_rb.evaluation.report import Report

ROUNDING = 1e-6


def admissible(context: CheckContext) -> Outcome | None:
    """The adversarial images are in the threat model."""
    if not context.report.adversarial:
        return None
    excess, outside, total = 0.0, 0, 0
    for adv in context.report.adversarial.values():
        too_far = context.probe.distances(adv, context.images.to(adv)) - context.probe.eps
        too_bright = (adv.flatten(1) - 0.5).abs().amax(dim=1) - 0.5
        over = torch.maximum(too_far, too_bright).nan_to_num(nan=1.0, posinf=1.0).clamp(0, 1)
        excess = max(excess, float(over.max()))
        outside += int((over > ROUNDING).sum())
        total += len(adv)
    return outcome(
        "fail" if outside else "pass",
        excess,
        f"{outside} of {total} adversarial images are not finite, not in [0, 1] or over eps + 1e-6 away (eps is "
        f"exceeded by {excess:.1g} at most)",
        "what they break does not count",
    )


def verified(context: CheckContext) -> Outcome | None:
    """The stored images have the verdicts that were counted."""
    differing = total = 0
    for name in context.report.adversarial.keys() & context.report.verdicts.keys():
        adv, correct = context.report.adversarial[name], context.report.verdicts[name]
        count = len(adv) if context.level == "full" else min(len(adv), EXAMPLES[context.level])
        logits = context.probe.logits(adv[:count].to(context.probe.images))
        ahead = margins(logits, context.labels[:count].to(logits.device))
        # At the boundary another batch, which rounds differently, may rightly give the other verdict.
        clear = ahead.abs() > 1e-4 * size(logits)
        differing += int((((ahead > 0) != correct[:count].to(ahead.device)) & clear).sum())
        total += count
    if not total:
        return None
    share = 100 * differing / total
    return outcome(
        graded(share, 0, 0.2),
        share,
        f"{differing} of {total} verdicts ({share:.1f} %) are not the model's on the stored images",
        "the predictions that were counted cannot be had again",
    )


def zero_is_clean(context: CheckContext) -> Outcome:
    """An attack with eps = 0 breaks nothing."""
    probe = context.probe
    everyone = torch.arange(len(probe.images), device=probe.labels.device)
    points = [percent(probe.clean_correct) - percent(~probe.pgd(everyone, eps=0.0, steps=1))]
    natural = context.report.results["natural"].accuracy
    points += [100 * (natural - point.worst_case) for point in context.report.curve if point.eps == 0]
    largest = max(points, key=abs)
    return outcome(
        "fail" if abs(largest) > at_least_one(0, len(everyone)) else "pass",
        largest,
        f"An attack with eps = 0 takes {largest:.1f} points off the clean accuracy",
        "where nothing is perturbed something else decides, such as chance",
    )


def clean_highest(context: CheckContext) -> Outcome:
    """No attack helps."""
    results = context.report.results
    gain = 100 * (max(result.accuracy for result in results.values()) - results["natural"].accuracy)
    return outcome(
        graded(gain, 0, 0),
        gain,
        f"The highest accuracy under an attack is {gain:.1f} points above that without",
        "an attack that makes more correct is none",
    )


def noise_below_fgsm(context: CheckContext) -> Outcome | None:
    """A step along the gradient does more than one at random."""
    probe = context.probe
    if probe.gradient is None:
        return None
    kinds = ("uniform", "gaussian")
    lowest = min(percent(probe.clean_correct & probe.correct(probe.noisy(kind))) for kind in kinds)
    lead = percent(context.after_fgsm) - lowest
    return outcome(
        graded(lead, at_least_one(0.5, len(probe.images)), 5),
        lead,
        f"FGSM leaves {lead:+z.1f} points compared with noise of the same size",
        "a step along the gradient ought to do more than one at random, so the gradient is of little use",
    )


def pgd_below_fgsm(context: CheckContext) -> Outcome | None:
    """Many steps do more than one."""
    results, (name, steps) = context.report.results, context.pgd
    if name and "fgsm" in results:
        above, count = 100 * (results[name].accuracy - results["fgsm"].accuracy), context.report.n_examples
    elif context.attacks_allowed:
        name, count = f"pgd-{steps}", len(context.probe.images)
        above = context.pgd_leaves(eps=context.probe.eps, steps=steps, count=count) - percent(context.after_fgsm)
    else:
        return None
    return outcome(
        graded(above, at_least_one(0.5, count), 2),
        above,
        f"{name} leaves {above:+z.1f} points compared with FGSM",
        "many small steps ought to do more than one large one, unless the gradient misleads",
    )


def converged(context: CheckContext) -> Outcome | None:
    """Twice the steps from another start break few of the examples that all white-box attacks left.

    Thirty small networks trained with PGD (ten seeds, three instruction sets) had 0 to 3 points at 200 examples, so
    that the bound of 4 is six examples above the usual 1: rounding does not cross it.
    """
    name, steps = context.pgd
    if not context.attacks_allowed:
        return None
    probe, left = context.probe, context.correct_indices
    for correct in context.white_box.values():
        left = left[correct.to(left.device)[left]]
    if name not in context.report.verdicts:
        left = left[~probe.pgd(left, eps=probe.eps, steps=steps)]
    broken = probe.pgd(left, eps=probe.eps, steps=2 * steps, start="second start")
    points = 100 * int(broken.sum()) / len(probe.images)
    return outcome(
        graded(points, at_least_one(4, len(probe.images)), at_least_one(8, len(probe.images))),
        points,
        f"PGD with {2 * steps} steps from another start breaks {points:.1f} points of what gradient attacks left",
        "the attack has not converged, so give it more steps and starts",
    )


def falls_with_eps(context: CheckContext) -> Outcome | None:
    """A larger eps leaves less."""
    eps, count = context.probe.eps, context.few
    if len(context.report.curve) > 1:
        count = context.report.n_examples
        accuracies = {point.eps: 100 * point.worst_case for point in context.report.curve}
    elif context.attacks_allowed and eps > 0:
        radii = (eps / 4, eps / 2, eps, 2 * eps)
        accuracies = {radius: context.pgd_leaves(eps=radius, steps=10, count=count) for radius in radii}
    else:
        return None
    ordered = [accuracies[radius] for radius in sorted(accuracies)]
    rise = max(later - earlier for earlier, later in itertools.pairwise(ordered))
    return outcome(
        graded(rise, at_least_one(0.5, count), 5),
        rise,
        f"From one eps to the next larger one accuracy changes by {rise:+z.1f} points at most",
        "the larger ball holds all images of the smaller one, so the attack gets lost in it",
    )


def chance_at_half(context: CheckContext) -> Outcome | None:
    """At eps = 1/2, where every image can be turned grey, nothing but chance is left."""
    probe, count = context.probe, context.few
    if probe.gradient is None:
        return None
    commonest = float(probe.labels[:count].bincount().max()) / count
    chance = max(1 / probe.clean.shape[1], commonest)
    bound = 100 * (chance + 2 * math.sqrt(chance * (1 - chance) / count))
    left = context.pgd_leaves(eps=context.half, steps=10, count=count)
    return outcome(
        graded(left, bound, bound + 20),
        left,
        f"At eps = 1/2, which turns every image grey, PGD-10 leaves {left:.1f} %, where chance is {100 * chance:.1f} %",
        "the gradients lead nowhere",
    )


def larger_balls(context: CheckContext) -> Outcome | None:
    """What PGD finds further away leads to nothing nearby that it missed there."""
    probe, count = context.probe, context.few
    if probe.gradient is None or probe.eps == 0:
        return None
    left = context.correct_indices[context.correct_indices < count]
    for correct in context.white_box.values():
        left = left[correct.to(left.device)[left]]
    if not context.white_box:
        left = left[~probe.pgd(left, eps=probe.eps, steps=20)]
    images = probe.images[left]
    broken = torch.zeros_like(left, dtype=torch.bool)
    for radius in (2 * probe.eps, context.half):
        far, _ = probe.run_pgd(left, eps=radius, steps=10)
        for aim in (far, images + probe.eps * probe.steepest(far - images)):
            broken |= ~probe.correct(probe.projected(aim, images, probe.eps), left) if len(left) else broken
    points = 100 * int(broken.sum()) / count
    return outcome(
        graded(points, at_least_one(2, count), at_least_one(8, count)),
        points,
        f"What PGD-10 finds at twice eps and at 1/2, brought back to eps, breaks {points:.1f} points more",
        "gradients near the images hide what is there",
    )


def square_no_better(context: CheckContext) -> Outcome | None:
    """An attack without gradients finds next to nothing that white-box attacks do not."""
    verdicts, count = context.report.verdicts, context.report.n_examples
    if "square" in verdicts and context.white_box:
        beaten = (
            100 * int((torch.stack(list(context.white_box.values())).all(dim=0) & ~verdicts["square"]).sum()) / count
        )
    elif (found := _found_by_autoattacks_square(context.report)) is not None:
        beaten = 100 * found / count
    elif context.square_allowed:
        count = context.few
        beaten = 100 * context.squared / count
    else:
        return None
    return outcome(
        graded(beaten, at_least_one(0.2, count), at_least_one(2, count)),
        beaten,
        f"Square, which sees no gradient, breaks {beaten:.1f} points that white-box attacks leave",
        "gradients are masked, and the white-box figures are too high",
    )


def _found_by_autoattacks_square(report: Report) -> int | None:
    """How many examples Square broke that AutoAttack's white-box parts had left; None where it was not their last."""
    for result in report.results.values():
        *before, last = result.parts or [""]
        if before and last == "square":
            return result.parts[before[-1]] - result.parts[last]
    return None


def autoattack_lowest(context: CheckContext) -> Outcome | None:
    """AutoAttack leaves no more than any other attack."""
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
        f"AutoAttack leaves {above:+z.1f} points compared with {strongest}, the strongest of the others",
        "the ensemble is weaker than one attack, so its figure is too high",
    )


def pgd_near_autoattack(context: CheckContext) -> Outcome | None:
    """PGD is not far above AutoAttack, or above what stands for it."""
    results, (name, steps) = context.report.results, context.pgd
    suites = [result.accuracy for key, result in results.items() if key.startswith("autoattack")]
    if suites and name and steps >= 20:
        gap, rival = 100 * (results[name].accuracy - min(suites)), "AutoAttack"
    elif context.attacks_allowed and context.square_allowed:
        name, rival, count = "pgd-50", "PGD on the margin and Square", context.few
        strongest = 100 * (len(context.survivors) - context.squared) / count
        gap = context.pgd_leaves(eps=context.probe.eps, steps=50, count=count) - strongest
    else:
        return None
    return outcome(
        graded(gap, 8, 16),
        gap,
        f"{name} leaves {gap:+z.1f} points compared with {rival}",
        "up to 8 are usual, more come of masked gradients, and PGD's figure then says little",
    )
