"""Checks of predictions against labels: class order, collapse to one class, accuracy at chance level."""

from __future__ import annotations

from deat_rb.evaluation.checks.context import RELABELED_POINTS, CheckContext, Outcome, Status, outcome, percent
from deat_rb.evaluation.statistics import wilson


def labels_in_order(context: CheckContext) -> Outcome:
    """Check that the labels are in the network's class order.

    The check fails if a one-to-one relabeling of the predictions, fitted on one half of the examples, raises accuracy
    on the other half by more than 20 points, or if accuracy is below that of guessing among the label classes.
    """
    order, gain = context.label_order, context.label_order.gain
    hint = "the labels are not in the network's class order; use the class order of its training data"
    if context.out_of_order and gain > RELABELED_POINTS:
        measured = f"Relabeling the predictions raises natural accuracy from {order.accuracy:.1f} % to "
        return "fail", gain, f"{measured}{order.relabeled:.1f} %: {hint}."
    if context.out_of_order:
        measured = f"Natural accuracy is {order.accuracy:.1f} %, worse than guessing among the {order.n_classes} "
        return "fail", gain, f"{measured}classes of the labels ({100 / order.n_classes:.1f} %): {hint}."
    return "pass", gain, f"Relabeling the predictions changes natural accuracy by {gain:+z.1f} points."


def several_classes(context: CheckContext) -> Outcome | None:
    """Check that the network does not predict one class for (nearly) all images."""
    predicted, labels = context.probe.clean.argmax(dim=1), context.probe.labels
    commonest = int(predicted.bincount().argmax())
    share, true_share = percent(predicted == commonest), percent(labels == commonest)
    others = int((labels != commonest).sum())
    if others < 5:
        return None
    collapsed = (share >= 90 and share - true_share > 40) or (share >= 99 and others >= 10)
    status: Status = "fail" if collapsed else "warn" if share >= 75 and share - true_share > 40 else "pass"
    return outcome(
        status,
        share,
        f"{share:.1f} % of the images are predicted as one class, which is the label of {true_share:.1f} % of them",
        "the network has collapsed to (nearly) one class, and no attack can lower its accuracy further",
    )


def above_chance(context: CheckContext) -> Outcome | None:
    """Check that natural accuracy exceeds that of predictions independent of the images.

    The latter is the sum over classes of the product of the fractions of predictions and labels, as in Cohen's kappa.
    Sets of examples that are too small to exclude 15 points above chance pass.
    """
    from scipy.stats import binomtest

    if context.out_of_order:
        return None
    predicted, labels = context.predicted
    width = int(max(predicted.max(), labels.max())) + 1
    shares = [values.bincount(minlength=width).double() / len(values) for values in (predicted, labels)]
    chance = float((shares[0] * shares[1]).sum())
    n_correct, n_examples = int((predicted == labels).sum()), len(labels)
    if float(shares[1].max()) > 0.95:
        return None
    p_value = binomtest(n_correct, n_examples, min(chance, 1.0), alternative="greater").pvalue
    certain = wilson(n_correct, n_examples)[1] < chance + 0.15
    accuracy = 100 * n_correct / n_examples
    return outcome(
        "fail" if p_value > 0.05 and certain else "pass",
        accuracy - 100 * chance,
        f"Natural accuracy is {accuracy:.1f} %; predictions independent of the images have {100 * chance:.1f} %",
        "the network has not learned to distinguish the classes, so its robust accuracy is meaningless",
    )
