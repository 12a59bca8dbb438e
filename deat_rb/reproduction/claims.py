"""Tests of the orderings that the paper states, by paired comparison over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from deat_rb.reproduction.results import EPOCHS, PASSES, RunResult
from deat_rb.reproduction.tables import spelled

Outcome = Literal["holds", "does not hold", "undecided"]

FEWEST_SEEDS = 3
"""Fewest seeds that decide."""

COUNTS = (PASSES, EPOCHS)
"""Columns that many methods repeat exactly, so that an equal difference with every seed is no coincidence."""

EQUAL = 1e-9
"""Standard deviation below which differences are equal but for rounding."""

LEVEL = 0.05
"""Level of the two-sided tests."""

MOST_SEEDS = 1000
"""Largest reported number of seeds needed."""


@dataclass(frozen=True)
class Paired:
    """Paired differences of two rows in a column, over the seeds that both have.

    Attributes:
        differences: Value of the row that is claimed to be higher minus the other's, by seed.
        outcome: Whether the ordering holds, see `compare_paired`.
        needed: Number of seeds at which a test has power 0.8 for a difference of this size; None if the outcome is
            decided, if there are fewer than `FEWEST_SEEDS`, or if the differences are equal.
    """

    differences: tuple[float, ...]
    outcome: Outcome
    needed: int | None = None


@dataclass(frozen=True)
class Verdict:
    """Result of testing a claim.

    Attributes:
        text: The claim.
        outcome: ``holds`` if all its orderings do, ``does not hold`` if one is reversed, else ``undecided``.
        detail: The differences, in a sentence.
    """

    text: str
    outcome: Outcome
    detail: str


def compare_paired(differences: Sequence[float], *, counts: bool = False, pairs: int = 1) -> Paired:
    """Decide whether a mean difference is above 0.

    The two-sided 95 % confidence interval of the mean of paired differences decides, so three seeds suffice only for
    differences that are large compared to their standard deviation, and fewer never do. A claim of several pairs holds
    if each pair does, but one reversed pair refutes it: a pair is reversed at a level of 5 % / ``pairs`` (Bonferroni).

    Args:
        differences: Paired differences, one per seed.
        counts: Whether differences that are equal with every seed decide; those of accuracies, which come in steps of
            one image, are often equal by chance. A difference of 0 is then ``does not hold``.
        pairs: Number of pairs of the claim.
    """
    from scipy.stats import t

    values, count = tuple(differences), len(differences)
    if count < FEWEST_SEEDS:
        return Paired(values, "undecided")
    mean, deviation = fmean(values), stdev(values)
    if deviation < EQUAL:
        return Paired(values, "undecided" if not counts else "holds" if mean > EQUAL else "does not hold")
    level = LEVEL if mean > 0 else LEVEL / pairs
    if abs(mean) > float(t.ppf(1 - level / 2, count - 1)) * deviation / math.sqrt(count):
        return Paired(values, "holds" if mean > 0 else "does not hold")
    return Paired(values, "undecided", seeds_needed(abs(mean) / deviation, level=level, beyond=count))


def seeds_needed(effect: float, *, level: float = LEVEL, beyond: int = 1) -> int:
    """Return the number of seeds at which a two-sided paired t-test has power 0.8 for an effect.

    Args:
        effect: Mean difference divided by the standard deviation of the differences.
        level: Level of the test.
        beyond: A number of seeds known to be too few.

    Returns:
        The number, at most `MOST_SEEDS` + 1.
    """
    from scipy.stats import t

    for count in range(max(beyond + 1, 2), MOST_SEEDS + 1):
        quantiles = float(t.ppf(1 - level / 2, count - 1) + t.ppf(0.8, count - 1))
        if effect * math.sqrt(count) >= quantiles:
            return count
    return MOST_SEEDS + 1


def judge(
    text: str, column: str, more: Sequence[str], less: Sequence[str], rows: Mapping[str, Sequence[RunResult]]
) -> Verdict:
    """Test a claim with the paired differences of its rows.

    Args:
        text: The claim.
        column: The column.
        more: Labels of the rows that are claimed to have higher values.
        less: Labels of the rows that are claimed to have lower values.
        rows: Runs by label.
    """
    pairs = [(high, low) for high in more for low in less]
    compared = [
        compare_paired(
            _differences(rows.get(high, ()), rows.get(low, ()), column), counts=column in COUNTS, pairs=len(pairs)
        )
        for high, low in pairs
    ]
    outcomes = [each.outcome for each in compared]
    outcome: Outcome = "undecided"
    if all(each == "holds" for each in outcomes):
        outcome = "holds"
    elif "does not hold" in outcomes:
        outcome = "does not hold"
    if not any(each.differences for each in compared):
        return Verdict(text, "undecided", "no seed is done")
    shown = [
        f"{high} - {low}: {_described(each, column)}" for (high, low), each in zip(pairs, compared, strict=True)
        if len(pairs) <= 3 or each.outcome != "holds"
    ]  # fmt: skip
    held = outcomes.count("holds")
    if len(pairs) > 3 and held:
        shown.append(f"{held} of {len(pairs)} orderings hold")
    return Verdict(text, outcome, "; ".join(shown))


def _differences(high: Sequence[RunResult], low: Sequence[RunResult], column: str) -> list[float]:
    values = [
        {run.seed: run.values[column] for run in runs if run.status == "done" and column in run.values}
        for runs in (high, low)
    ]
    return [values[0][seed] - values[1][seed] for seed in values[0] if seed in values[1]]


def _described(paired: Paired, column: str) -> str:
    count = len(paired.differences)
    if not count:
        return "no seed is done"
    mean = fmean(paired.differences)
    sign = "+" if mean >= 0 else "-"
    text = f"{sign}{spelled(abs(mean), column)}"
    if count == 1:
        return f"{text} with one seed"
    text += f" ± {spelled(stdev(paired.differences), column)} over {count} seeds"
    if paired.needed is None:
        return text
    needed = f"more than {MOST_SEEDS:,}" if paired.needed > MOST_SEEDS else f"about {paired.needed}"
    return f"{text}, undecided; to decide a difference of this size {needed} seeds are needed"
