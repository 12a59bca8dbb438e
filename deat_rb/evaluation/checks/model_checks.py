"""Checks of the model and of its input images."""

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
"""Margin at which 1 - p rounds to 0 in float32, so that the true class drops out of the cross-entropy's gradient."""


def eval_mode(context: CheckContext) -> Outcome:
    """Check that every module is in eval mode after eval()."""
    training = [name or type(module).__name__ for name, module in context.model.named_modules() if module.training]
    return outcome(
        "fail" if training else "pass",
        float(len(training)),
        f"{len(training)} modules are in train mode after eval()",
        f"for instance {', '.join(training[:1])}, so that dropout or BatchNorm does not behave as at test time",
    )


def unchanged(context: CheckContext) -> Outcome:
    """Check that weights and buffers did not change since the evaluation."""
    now = context.model.state_dict()
    changed = [name for name, old in context.before.items() if not torch.equal(old, now[name])]
    recorded = context.report.model_sha256
    if not changed and recorded and recorded != sha256_tensors(context.before):
        return "fail", None, "The weights and buffers differ from those that the report was made with."
    return outcome(
        "fail" if changed else "pass",
        float(len(changed)),
        f"{len(changed)} weights or buffers change when the model is called",
        f"for instance {', '.join(changed[:1])}, so that every attack saw a different network",
    )


def deterministic(context: CheckContext) -> Outcome:
    """Check that the same images have the same logits, with and without a gradient."""
    differing = context.logit_variation
    return outcome(
        graded(differing, 0.1, 1),
        differing,
        f"Two passes over the same images, one of them with gradients, differ by {differing:.2g} % of the logits' size",
        "the network is random or detects attacks, and attacks that do not average over its randomness overestimate "
        "its robustness",
    )


def independent(context: CheckContext) -> Outcome | None:
    """Check that an image's logits do not depend on its batch."""
    probe = context.probe
    if context.logit_variation > 1:
        return None
    halves = probe.images.split(max(1, len(probe.images) // 2))
    differing = deviation(probe.clean, torch.cat([probe.logits(half.flip(0)).flip(0) for half in halves]))
    return outcome(
        graded(differing, 0.1, 1),
        differing,
        f"In other batches the logits differ by {differing:.2g} % of their size",
        "predictions depend on the other images of the batch, as with BatchNorm on batch statistics, and hold for "
        "these batches only",
    )


def in_range(context: CheckContext) -> Outcome:
    """Check that the images are in [0, 1] and use that range."""
    images = context.images if isinstance(context.images, torch.Tensor) else context.probe.images
    low, high = (float(bound) for bound in images.aminmax())
    outside, span = max(0.0, -low, high - 1), high - low
    if outside <= ROUNDING and span < 0.1:
        return (
            "warn",
            span,
            f"The images span only {span:.3g} of [0, 1], as if divided by 255 twice: eps is large in comparison.",
        )
    return outcome(
        graded(outside, ROUNDING, ROUNDING),
        outside,
        f"The images range from {low:.3g} to {high:.3g}, {outside:.1g} outside [0, 1]",
        "eps, which is in units of [0, 1], has a different meaning there",
    )


def normalized_inside(context: CheckContext) -> Outcome | None:
    """Check that the model takes images in [0, 1], not normalized ones.

    Where the labels are in another order, accuracies do not tell.
    """
    if context.out_of_order:
        return None
    accuracies = context.scaled_accuracies
    best = max(accuracies, key=lambda name: accuracies[name])
    gain = accuracies[best] - percent(context.probe.clean_correct)
    return outcome(
        graded(gain, 5, 15),
        gain,
        f"Accuracy on {best} is {abs(gain):.1f} points {'above' if gain > 0 else 'below'} that on images in [0, 1]",
        "the model was trained on such images, so that eps has a different meaning; put the normalization into the "
        "model as its first layer",
    )


def eps_in_255ths(context: CheckContext) -> Outcome | None:
    """Check that eps is a multiple of 1/255, not a rounded decimal such as 0.031."""
    exact = 255 * context.probe.eps
    near = round(exact)
    if context.probe.norm != "Linf":
        return None
    rounded = 1 <= near <= 16 and 1e-6 < abs(exact / near - 1) < 0.0125
    return outcome(
        "warn" if rounded else "pass",
        exact,
        f"eps is {exact:.6g}/255",
        f"this looks like {near}/255 rounded, and its results are not comparable with those at {near}/255",
    )


def logits(context: CheckContext) -> Outcome:
    """Check that the outputs are logits, not probabilities."""
    outputs = context.probe.clean
    sums = outputs.sum(dim=1)
    uniform = bool(((sums - sums.mean()).abs() <= 0.01 * size(outputs)).all())
    inside = percent(((outputs >= 0) & (outputs <= 1)).all(dim=1))
    if uniform and bool((outputs >= 0).all()):
        sentence = "The outputs are never negative and have the same sum for every image: these are probabilities, for "
        return "fail", inside, sentence + "which the losses of the attacks saturate; remove the softmax."
    return outcome(
        graded(inside, 99),
        inside,
        f"{inside:.1f} % of the images have outputs in [0, 1] only",
        "if these are not logits but, for instance, sigmoid outputs, the losses of the attacks saturate",
    )


def logit_scale(context: CheckContext) -> Outcome:
    """Check that float32 resolves the cross-entropy at the margins."""
    lost = percent(margins(context.probe.clean, context.probe.labels) > LOST_TO_FLOAT32)
    return outcome(
        graded(lost, 50, 90),
        lost,
        f"{lost:.1f} % of the margins are over {LOST_TO_FLOAT32:.1f}, where 1 - p rounds to 0 in float32",
        "the cross-entropy's gradient is wrong or zero there, so FGSM and PGD overestimate robustness; use attacks on "
        "the margin",
    )


def gradients_present(context: CheckContext) -> Outcome:
    """Check that the images' gradients are neither zero nor NaN."""
    gradient = context.probe.gradient
    if gradient is None:
        sentence = "100 % of the images have no gradient: the logits are detached from the images, so that white-box "
        return "fail", 100.0, sentence + "attacks cannot work, and only attacks without gradients are meaningful."
    values = gradient.flatten(1)
    useless = percent((values == 0).all(dim=1) | ~values.isfinite().all(dim=1))
    return outcome(
        graded(useless, 1, 10),
        useless,
        f"{useless:.1f} % of the images have a zero gradient or one with NaN",
        "white-box attacks cannot move there, and accuracies under them mean little",
    )


def no_blind_pixels(context: CheckContext) -> Outcome | None:
    """Check that pixels without a gradient in any image do not change the logits."""
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
        f"{percent(blind.flatten()):.1f} % of the input values have zero gradient in all images, and moving them by "
        f"eps changes the logits by {moved:.2f} % of their spread",
        "the network uses pixels whose gradient is hidden from attacks",
    )


def gradients_true(context: CheckContext) -> Outcome:
    """Check that gradients and finite differences agree."""
    agreement = float(context.probe.agreement(context.few).median())
    return outcome(
        graded(-agreement, -0.8, -0.4),
        agreement,
        f"Gradients and finite differences over eps / 4 agree to {agreement:.2f}, where 1 is equal and 0 unrelated",
        "ordinary networks have over 0.9; here gradients do not predict how the logits change, and mislead white-box "
        "attacks",
    )


def bf16_agrees(context: CheckContext) -> Outcome:
    """Check that rounding hardly changes predictions."""
    probe = context.probe
    try:
        with torch.autocast(probe.images.device.type, dtype=torch.bfloat16):
            predicted = probe.logits(probe.images).argmax(dim=1)
    except RuntimeError:
        return "pass", None, "The model does not run in bf16, so that this cannot be measured."
    differing = percent(predicted != probe.clean.argmax(dim=1))
    return outcome(
        graded(differing, at_least_one(2, len(predicted)), 20),
        differing,
        f"Predictions in bf16 and fp32 differ for {differing:.1f} % of the images",
        "predictions depend on rounding, and may differ on another device",
    )
