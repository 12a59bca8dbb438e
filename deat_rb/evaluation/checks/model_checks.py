"""Checks of the model and of the images it is given."""

from __future__ import annotations

import math

import torch

from deat_rb.evaluation.checks.context import (
    CheckContext,
    Outcome,
    at_least_one,
    deviation,
    graded,
    outcome,
    percent,
    size,
)
from deat_rb.evaluation.checks.probes import margins
from deat_rb.utils.safe_load import sha256_tensors

ROUNDING = 1e-6

LOST_TO_FLOAT32 = 24 * math.log(2)
"""A margin at which 1 - p rounds to 0 in float32, and the true class leaves the cross-entropy's gradient."""


def eval_mode(context: CheckContext) -> Outcome:
    """Every module heeds eval()."""
    training = [name or type(module).__name__ for name, module in context.model.named_modules() if module.training]
    return outcome(
        "fail" if training else "pass",
        float(len(training)),
        f"{len(training)} modules are in train mode after eval()",
        f"{', '.join(training[:1])} for one, so that dropout or BatchNorm is not what it is at test time, and no "
        "figure is the network's own",
    )


def unchanged(context: CheckContext) -> Outcome:
    """No weight or buffer is another than during the evaluation."""
    now = context.model.state_dict()
    changed = [name for name, old in context.before.items() if not torch.equal(old, now[name])]
    recorded = context.report.model_sha256
    if not changed and recorded and recorded != sha256_tensors(context.before):
        return "fail", None, "The weights and buffers are not those that the report was made with."
    return outcome(
        "fail" if changed else "pass",
        float(len(changed)),
        f"{len(changed)} weights or buffers change when the model is called",
        f"{', '.join(changed[:1])} for one, so that every attack met another network",
    )


def deterministic(context: CheckContext) -> Outcome:
    """The same images have the same logits, asked for a gradient or not."""
    differing = context.logit_variation
    return outcome(
        graded(differing, 0.1, 1),
        differing,
        f"Two passes over the same images, one of them for a gradient, differ by {differing:.2g} % of the logits' size",
        "the network draws at random or looks whether it is attacked, and attacks that do not average over its draws "
        "overstate its robustness",
    )


def independent(context: CheckContext) -> Outcome | None:
    """An image's logits do not depend on its batch."""
    probe = context.probe
    if context.logit_variation > 1:
        return None
    halves = probe.images.split(max(1, len(probe.images) // 2))
    differing = deviation(probe.clean, torch.cat([probe.logits(half.flip(0)).flip(0) for half in halves]))
    return outcome(
        graded(differing, 0.1, 1),
        differing,
        f"In other batches the logits differ by {differing:.2g} % of their size",
        "what an image is taken for depends on those beside it, as with BatchNorm on batch statistics, and the "
        "verdicts hold for these batches only",
    )


def in_range(context: CheckContext) -> Outcome:
    """The images are in [0, 1], and fill it."""
    low, high = (float(bound) for bound in context.images.aminmax())
    outside, span = max(0.0, -low, high - 1), high - low
    if outside <= ROUNDING and span < 0.1:
        return (
            "warn",
            span,
            (f"The images span {span:.3g} of [0, 1], as after a second division by 255: eps is large beside that."),
        )
    return outcome(
        graded(outside, ROUNDING, ROUNDING),
        outside,
        f"The images go from {low:.3g} to {high:.3g}, {outside:.1g} outside of [0, 1]",
        "eps, which is in units of [0, 1], means something else there",
    )


def normalised_inside(context: CheckContext) -> Outcome:
    """The model takes images in [0, 1], and not normalised ones."""
    probe, images = context.probe, context.probe.images
    values = images.transpose(0, 1).flatten(1)
    mean, std = values.mean(dim=1).view(1, -1, 1, 1), values.std(dim=1).clamp_min(1 / 255).view(1, -1, 1, 1)
    scaled = {"standardised": (images - mean) / std, "in [-1, 1]": 2 * images - 1, "in [0, 255]": 255 * images}
    accuracies = {name: percent(probe.correct(other)) for name, other in scaled.items()}
    best = max(accuracies, key=lambda name: accuracies[name])
    gain = accuracies[best] - percent(probe.clean_correct)
    return outcome(
        graded(gain, 5, 15),
        gain,
        f"The accuracy on images {best} is {gain:+z.1f} points compared with that on images in [0, 1]",
        "the model was made for those, so that eps is not what it sees; put the normalisation into the model, as its "
        "first layer",
    )


def eps_in_255ths(context: CheckContext) -> Outcome | None:
    """Eps is 8/255 and not 0.031."""
    exact = 255 * context.probe.eps
    near = round(exact)
    if context.probe.norm != "Linf":
        return None
    rounded = 1 <= near <= 16 and 1e-6 < abs(exact / near - 1) < 0.0125
    return outcome(
        "warn" if rounded else "pass",
        exact,
        f"eps is {exact:.6g}/255",
        f"it looks like {near}/255 rounded, and its figures do not belong beside those of {near}/255",
    )


def logits(context: CheckContext) -> Outcome:
    """The outputs are logits and not probabilities."""
    outputs = context.probe.clean
    sums = outputs.sum(dim=1)
    uniform = bool(((sums - sums.mean()).abs() <= 0.01 * size(outputs)).all())
    inside = percent(((outputs >= 0) & (outputs <= 1)).all(dim=1))
    if uniform and bool((outputs >= 0).all()):
        sentence = "The outputs are never negative and have the same sum for every image: these are probabilities, on "
        return "fail", inside, sentence + "which the losses of the attacks saturate; leave the softmax out."
    return outcome(
        graded(inside, 99),
        inside,
        f"{inside:.1f} % of the images have outputs in [0, 1] only",
        "if these are no logits but, say, a sigmoid's values, the losses of the attacks saturate on them",
    )


def logit_scale(context: CheckContext) -> Outcome:
    """The cross-entropy resolves the margins."""
    lost = percent(margins(context.probe.clean, context.probe.labels) > LOST_TO_FLOAT32)
    return outcome(
        graded(lost, 50, 90),
        lost,
        f"{lost:.1f} % of the margins are over {LOST_TO_FLOAT32:.1f}, where 1 - p rounds to 0 in float32",
        "the cross-entropy's gradient points elsewhere there or vanishes, FGSM and PGD overstate the network, and "
        "attacks on the margin are to be trusted",
    )


def gradients_present(context: CheckContext) -> Outcome:
    """The images' gradients are neither zero nor NaN."""
    gradient = context.probe.gradient
    if gradient is None:
        sentence = "100 % of the images have no gradient: the graph is cut between image and logits, so that white-box "
        return "fail", 100.0, sentence + "attacks cannot follow one, and only those that need none say something."
    values = gradient.flatten(1)
    useless = percent((values == 0).all(dim=1) | ~values.isfinite().all(dim=1))
    return outcome(
        graded(useless, 1, 10),
        useless,
        f"{useless:.1f} % of the images have a gradient of zeros or with NaN",
        "white-box attacks stand still there, and their figures say nothing of them",
    )


def no_blind_pixels(context: CheckContext) -> Outcome | None:
    """Pixels that have no gradient in any image do not move the logits either."""
    probe = context.probe
    if probe.gradient is None or probe.eps == 0:
        return None
    blind = (probe.gradient == 0).all(dim=0)
    steps = torch.where(probe.images > 0.5, -probe.eps, probe.eps) * blind
    moved = 100 * float((probe.logits(probe.images + steps) - probe.clean).abs().mean())
    moved /= max(size(probe.clean), 1e-30)
    return outcome(
        graded(moved, 0.2, 1),
        moved,
        f"{percent(blind.flatten()):.1f} % of the values have a gradient of 0 in all images, and moving them by eps "
        f"changes the logits by {moved:.2f} % of their spread",
        "what attacks cannot see there decides",
    )


def gradients_true(context: CheckContext) -> Outcome:
    """Gradients and finite differences agree."""
    agreement = float(context.probe.agreement(context.few).median())
    return outcome(
        graded(-agreement, -0.8, -0.4),
        agreement,
        f"Gradients and finite differences over eps / 4 agree to {agreement:.2f}, where 1 is equal and 0 unrelated",
        "honest networks have over 0.9, and here the gradient does not say how the logits move: white-box attacks are "
        "misled",
    )


def bf16_agrees(context: CheckContext) -> Outcome:
    """Rounding decides next to nothing."""
    probe = context.probe
    try:
        with torch.autocast(probe.images.device.type, dtype=torch.bfloat16):
            predicted = probe.logits(probe.images).argmax(dim=1)
    except RuntimeError:
        return "pass", None, "The model does not run in bf16, so that nothing is known of it there."
    differing = percent(predicted != probe.clean.argmax(dim=1))
    return outcome(
        graded(differing, at_least_one(2, len(predicted)), 20),
        differing,
        f"bf16 and fp32 predict differently for {differing:.1f} % of the images",
        "verdicts hang on rounding, and another device may give others",
    )
