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
"""Margin above which 1 - p rounds to 0 in float32, so that the cross-entropy's gradient loses the true class."""


def eval_mode(context: CheckContext) -> Outcome:
    """Check that every module is in eval mode after eval()."""
    training = [name or type(module).__name__ for name, module in context.model.named_modules() if module.training]
    return outcome(
        "fail" if training else "pass",
        float(len(training)),
        f"{len(training)} modules are in train mode after eval()",
        f"for instance {', '.join(training[:1])}, so dropout or BatchNorm do not behave as at test time",
    )


def unchanged(context: CheckContext) -> Outcome:
    """Check that weights and buffers did not change since the evaluation."""
    now = context.model.state_dict()
    changed = [name for name, old in context.before.items() if not torch.equal(old, now[name])]
    recorded = context.report.model_sha256
    if not changed and recorded and recorded != sha256_tensors(context.before):
        return "fail", None, "The weights and buffers differ from those of the evaluation in the report."
    return outcome(
        "fail" if changed else "pass",
        float(len(changed)),
        f"{len(changed)} weights or buffers change when the model is called",
        f"for instance {', '.join(changed[:1])}, so each attack saw a different network",
    )


def deterministic(context: CheckContext) -> Outcome:
    """Check that the same images give the same logits, with and without gradients."""
    differing = context.logit_variation
    return outcome(
        graded(differing, 0.1, 1),
        differing,
        f"Logits of two passes over the same images, one of them with gradients, differ by {differing:.2g} % of their "
        "standard deviation",
        "the network is random or detects attacks, so attacks that do not average over its randomness overestimate "
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
        f"In different batches the logits differ by {differing:.2g} % of their standard deviation",
        "predictions depend on the other images in the batch, as with BatchNorm in train mode, and hold only for "
        "these batches",
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
            f"The images span only {span:.3g} of [0, 1], as if divided by 255 twice: eps is too large in comparison.",
        )
    return outcome(
        graded(outside, ROUNDING, ROUNDING),
        outside,
        f"The images range from {low:.3g} to {high:.3g}, {outside:.1g} beyond [0, 1]",
        "eps, which is in units of [0, 1], does not apply to them",
    )


def normalized_inside(context: CheckContext) -> Outcome | None:
    """Check that the model takes images in [0, 1], not normalized ones.

    The check is skipped if the labels are not in the network's class order, because accuracies then mean nothing.
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
        "the model was trained on such images, so eps has a different meaning; make the normalization the first layer "
        "of the model",
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
        f"this looks like {near}/255 rounded, so the results are not comparable with those at {near}/255",
    )


def logits(context: CheckContext) -> Outcome:
    """Check that the outputs are logits, not probabilities."""
    outputs = context.probe.clean
    sums = outputs.sum(dim=1)
    uniform = bool(((sums - sums.mean()).abs() <= 0.01 * size(outputs)).all())
    inside = percent(((outputs >= 0) & (outputs <= 1)).all(dim=1))
    if uniform and bool((outputs >= 0).all()):
        sentence = (
            "The outputs are never negative and have the same sum for all images, so they are probabilities, with "
        )
        return "fail", inside, sentence + "which the losses of the attacks saturate; remove the softmax."
    return outcome(
        graded(inside, 99),
        inside,
        f"{inside:.1f} % of the images have all outputs in [0, 1]",
        "if these are, for instance, sigmoid outputs instead of logits, the losses of the attacks saturate",
    )


def logit_scale(context: CheckContext) -> Outcome:
    """Check that the margins are not too large for the cross-entropy in float32."""
    lost = percent(margins(context.probe.clean, context.probe.labels) > LOST_TO_FLOAT32)
    return outcome(
        graded(lost, 50, 90),
        lost,
        f"{lost:.1f} % of the margins are over {LOST_TO_FLOAT32:.1f}, where 1 - p rounds to 0 in float32",
        "the cross-entropy's gradient is wrong or zero there, so FGSM and PGD overestimate robustness; use attacks on "
        "the margin, such as cw-20",
    )


def gradients_present(context: CheckContext) -> Outcome:
    """Check that the input gradients are neither zero nor NaN."""
    gradient = context.probe.gradient
    if gradient is None:
        sentence = (
            "100 % of the images have no gradient: the logits are detached from the images, so white-box attacks "
        )
        return "fail", 100.0, sentence + "cannot work, and only attacks without gradients are meaningful."
    values = gradient.flatten(1)
    useless = percent((values == 0).all(dim=1) | ~values.isfinite().all(dim=1))
    return outcome(
        graded(useless, 1, 10),
        useless,
        f"{useless:.1f} % of the images have a gradient that is zero or contains NaN",
        "white-box attacks cannot move these images, so accuracies under them mean little",
    )


def no_blind_pixels(context: CheckContext) -> Outcome | None:
    """Check that pixels whose gradient is zero in all images do not affect the logits."""
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
        f"{percent(blind.flatten()):.1f} % of the input values have zero gradient in all images, and changing them "
        f"by eps changes the logits by {moved:.2f} % of their standard deviation",
        "the network uses pixels whose gradients are hidden from attacks",
    )


def gradients_true(context: CheckContext) -> Outcome:
    """Check that gradients and finite differences agree."""
    agreement = float(context.probe.agreement(context.few).median())
    return outcome(
        graded(-agreement, -0.8, -0.4),
        agreement,
        f"The agreement of gradients and finite differences over eps / 4 is {agreement:.2f} (1: equal, 0: unrelated)",
        "ordinary networks have over 0.9; here the gradients do not predict how the logits change, so they mislead "
        "white-box attacks",
    )


def bf16_agrees(context: CheckContext) -> Outcome:
    """Check that rounding to bf16 hardly changes predictions."""
    probe = context.probe
    try:
        with torch.autocast(probe.images.device.type, dtype=torch.bfloat16):
            predicted = probe.logits(probe.images).argmax(dim=1)
    except RuntimeError:
        return "pass", None, "The model does not run in bf16, so this cannot be measured."
    differing = percent(predicted != probe.clean.argmax(dim=1))
    return outcome(
        graded(differing, at_least_one(2, len(predicted)), 20),
        differing,
        f"Predictions in bf16 and fp32 differ for {differing:.1f} % of the images",
        "predictions depend on rounding and may differ on another device",
    )
