"""The table of methods in words."""

from __future__ import annotations

import pytest
from paper_table import TABLE

from deat_rb.methods.describe import describe, explain
from deat_rb.methods.schedules import GradientMagnitude


def test_a_row_in_words() -> None:
    row = describe("M+TRADE")
    assert (row.name, row.loss, row.schedule, row.stop) == ("m+trades", "CE(clean) + 6 KL", "gradient magnitude", "-")
    assert row.attack == "steps of 2/255 on KL, start 0.001 N(0,1): guided, at most 10"
    assert row.cost == "sum of (r + 1), times M"
    assert "Algorithm 4" in row.paper
    assert describe("u-fgsm").stop == "PGD-5 drops by over 20 points"
    assert describe("m+u-fgsm").stop == "l_X surges (m = 2, gamma 1.5)"
    assert [describe(name).loss for name in ("pgd-7", "mart")] == ["CE", "MART, lambda 6"]
    schedules = [describe(name).schedule for name in ("pgd-7", "deat-3", "deat-40%", "m-deat")]
    assert schedules == ["constant", "every D epochs", "training accuracy", "gradient magnitude"]


@pytest.mark.parametrize(
    ("name", "cost"),
    [("standard", "MT"), ("free-4", "rMT"), ("pgd-7", "(i + 1)MT"), ("u-fgsm", "2MT"), ("deat-3", "sum of r, times M")],
)
def test_costs_are_law_sixs(name: str, cost: str) -> None:
    assert describe(name).cost == cost


@pytest.mark.parametrize("name", TABLE)
def test_an_explanation_is_about_ten_lines_and_says_where_the_paper_has_it(name: str) -> None:
    text = explain(name)
    lines = text.splitlines()
    assert 7 <= len(lines) <= 11
    assert lines[0].startswith(f"{name}: ")
    stop = [] if describe(name).stop == "-" else ["stop"]
    named = [line.split()[0] for line in lines[1:] if not line.startswith("  note")]
    assert named == ["attack", "loss", "schedule", *stop, "cost", "settings", "paper"]
    assert f"  paper      arXiv:2103.03076, {describe(name).paper}" in lines
    assert f"fast: {TABLE[name][-1]} epochs" in text
    assert ("alpha* = max(alpha, eps/r)" in text) == (TABLE[name][8] is GradientMagnitude)


@pytest.mark.parametrize(
    ("name", "family"), [("free-8", "free-R"), ("deat-3", "deat-D"), ("deat-40%", "deat-P%"), ("m+pgd", "m+pgd")]
)
def test_a_row_says_how_the_names_of_its_family_are_written(name: str, family: str) -> None:
    assert describe(name).family == family
