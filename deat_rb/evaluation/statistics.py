"""Wilson's interval and McNemar's test."""

from __future__ import annotations

import math
from math import comb
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def wilson(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927).

    Args:
        correct: How many successes.
        total: Out of how many, at least 1.
        confidence: The interval's coverage.

    Returns:
        Its lower and its upper end, in [0, 1].
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = correct / total
    scale = 1 + z**2 / total
    centre = (share + z**2 / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact two-sided test: how likely so uneven a division is if either side is equally likely.

    Args:
        only_first: Examples that are correct in the first evaluation alone.
        only_second: Examples that are correct in the second alone.

    Returns:
        The p-value: twice the lower tail of the binomial distribution with p = 1/2, at most 1.
    """
    total = only_first + only_second
    tail = sum(comb(total, count) for count in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / (1 << total))
