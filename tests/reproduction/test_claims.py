"""Paired comparisons over seeds."""

from __future__ import annotations

import pytest

from deat_rb.reproduction.claims import compare_paired, judge, seeds_needed
from deat_rb.reproduction.results import RunResult


@pytest.mark.parametrize(
    ("differences", "outcome", "needed"),
    [
        ([3, 4, 5], "holds", None),  # mean 4, deviation 1: the interval is 4 +- 4.303 / sqrt 3 = 4 +- 2.48
        ([-3, -4, -5], "does not hold", None),
        ([1, 2, 3], "undecided", 5),  # 2 sqrt 5 = 4.47 >= 2.776 + 0.941, but 2 sqrt 4 = 4 < 3.182 + 0.978
        ([0.5], "undecided", None),
        ([], "undecided", None),
        ([2, 2, 2], "holds", None),
        ([0, 0, 0], "does not hold", None),
        ([0.9, 0.9], "undecided", None),
    ],
)
def test_compare_paired(differences: list[float], outcome: str, needed: int | None) -> None:
    paired = compare_paired(differences)
    assert (paired.outcome, paired.needed) == (outcome, needed)


def test_seeds_needed_is_near_the_normal_approximation() -> None:
    assert seeds_needed(0.2) == pytest.approx((1.960 + 0.842) ** 2 / 0.2**2, abs=3)
    assert seeds_needed(0.001) == 1001


def runs(label: str, *values: float) -> list[RunResult]:
    return [RunResult(f"{label}-{seed}", label, seed, "done", values={"pgd-100": value})
            for seed, value in enumerate(values)]  # fmt: skip


def test_judge() -> None:
    rows = {"a": runs("a", 50, 51, 52), "b": runs("b", 40, 41, 42.5), "c": runs("c", 60, 61, 62.5)}
    assert judge("", "pgd-100", ["a"], ["b"], rows).outcome == "holds"
    assert judge("", "pgd-100", ["a"], ["b", "c"], rows).outcome == "does not hold"
    failed = [RunResult("b-0", "b", 0, "failed", values={"pgd-100": 40.0})]
    undecided = judge("", "pgd-100", ["a"], ["b"], {**rows, "b": failed})
    assert undecided.outcome == "undecided"
    assert "no seed is done" in undecided.detail
