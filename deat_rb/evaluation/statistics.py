"""Mean and deviation, Wilson's interval and McNemar's test; scipy is imported on first use because that takes long."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation of one or more values; None instead of that of a single one."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def wilson(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the bounds of Wilson's score interval of a proportion (Wilson 1927), in [0, 1].

    Args:
        correct: Number of successes.
        total: Number of trials, at least 1.
        confidence: Coverage of the interval.
    """
    from scipy.stats import binomtest

    interval = binomtest(correct, total).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the p-value of McNemar's exact two-sided test: twice the smaller binomial tail at p = 1/2, at most 1.

    Args:
        only_first: Number of examples classified correctly only in the first evaluation.
        only_second: Number of examples classified correctly only in the second evaluation.
    """
    from scipy.stats import binomtest

    total = only_first + only_second
    return float(binomtest(only_first, total).pvalue) if total else 1.0
