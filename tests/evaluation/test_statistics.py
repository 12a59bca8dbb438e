"""Mean and deviation and McNemar's test by hand, Wilson's interval against published values."""

from __future__ import annotations

import pytest

from deat_rb.evaluation.statistics import mcnemar, mean_and_deviation, wilson


def test_mean_and_deviation_by_hand() -> None:
    assert mean_and_deviation([1, 2, 6]) == pytest.approx((3, 7**0.5))  # (4 + 1 + 9) / 2
    assert mean_and_deviation([4.5]) == (4.5, None)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # By hand: z^2 = 3.841459; centre (0.5 + 0.0192073) / 1.0384146 = 0.5;
        # half 1.959964 * sqrt(0.0025 + 0.0000960365) / 1.0384146 = 0.0961684.
        (50, 100, 0.4038316, 0.5961684),
        (0, 10, 0.0, 0.2775328),  # z^2 / (n + z^2) = 3.841459 / 13.841459
        (10, 10, 0.7224672, 1.0),
    ],
)
def test_wilson_interval(correct: int, total: int, low: float, high: float) -> None:
    assert wilson(correct, total) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value"),
    [(0, 0, 1), (1, 0, 1), (5, 5, 1), (0, 5, 2 / 2**5), (1, 4, 2 * (1 + 5) / 2**5), (3, 1, 2 * (1 + 4) / 2**4),
     (0, 6, 2 / 2**6), (2, 8, 2 * (1 + 10 + 45) / 2**10)],
)  # fmt: skip
def test_mcnemar_is_twice_the_smaller_binomial_tail(only_first: int, only_second: int, p_value: float) -> None:
    assert mcnemar(only_first, only_second) == pytest.approx(p_value)
