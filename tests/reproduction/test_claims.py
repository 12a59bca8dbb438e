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
        ([0, 0, 0], "undecided", None),
        ([99.4 - 99.2, 99.6 - 99.4, 99.2 - 99.0], "undecided", None),  # one of 500 images each, but for rounding
        ([0.9, 0.9], "undecided", None),
    ],
)
def test_compare_paired(differences: list[float], outcome: str, needed: int | None) -> None:
    paired = compare_paired(differences)
    assert (paired.outcome, paired.needed) == (outcome, needed)


@pytest.mark.parametrize(("differences", "outcome"), [([2, 2, 2], "holds"), ([0, 0, 0], "does not hold")])
def test_compare_paired_decides_equal_counts(differences: list[float], outcome: str) -> None:
    assert compare_paired(differences, counts=True).outcome == outcome


@pytest.mark.parametrize(("pairs", "outcome"), [(1, "does not hold"), (2, "does not hold"), (3, "undecided")])
def test_compare_paired_divides_the_level_of_a_reversal_by_the_pairs(pairs: int, outcome: str) -> None:
    # mean -4, deviation 1: quantiles of t with 2 degrees of freedom at 5 %, 2.5 % and 1.67 %: 4.303, 6.205, 7.649;
    # 4 sqrt 3 = 6.93
    assert compare_paired([-3, -4, -5], pairs=pairs).outcome == outcome
    assert compare_paired([3, 4, 5], pairs=pairs).outcome == "holds"


def test_seeds_needed_is_near_the_normal_approximation() -> None:
    assert seeds_needed(0.2) == pytest.approx((1.960 + 0.842) ** 2 / 0.2**2, abs=3)
    # z squared / 2 is what Student's distribution adds to it
    assert seeds_needed(0.2, level=0.05 / 12) == pytest.approx((2.865 + 0.842) ** 2 / 0.2**2 + 2.865**2 / 2, abs=1)
    assert seeds_needed(0.001) == 1001


def runs(label: str, *values: float) -> list[RunResult]:
    return [RunResult(f"{label}-{seed}", label, seed, "done", values={"pgd-100": value})
            for seed, value in enumerate(values)]  # fmt: skip


def test_judge() -> None:
    rows = {"a": runs("a", 50, 51, 52), "b": runs("b", 40, 41, 42.5), "c": runs("c", 60, 61, 62.5)}
    assert judge("", "pgd-100", ["a"], ["b"], rows).outcome == "holds"
    assert judge("", "pgd-100", ["a"], ["b", "c"], rows).outcome == "does not hold"
    equal = {"d": runs("d", 99.4, 99.6, 99.2), "e": runs("e", 99.2, 99.4, 99.0)}
    assert judge("", "pgd-100", ["d"], ["e"], equal).outcome == "undecided"
    close = {**rows, "d": runs("d", 54, 56, 55)}  # 4, 5 and 3 points above a: 6.93 standard errors, of 7.65 for 3 pairs
    assert judge("", "pgd-100", ["a"], ["d"], close).outcome == "does not hold"
    assert judge("", "pgd-100", ["a"], ["b", "b", "d"], close).outcome == "undecided"
    failed = [RunResult("b-0", "b", 0, "failed", values={"pgd-100": 40.0})]
    undecided = judge("", "pgd-100", ["a"], ["b"], {**rows, "b": failed})
    assert undecided.outcome == "undecided"
    assert "no seed is done" in undecided.detail
