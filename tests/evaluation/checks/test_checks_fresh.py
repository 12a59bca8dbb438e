"""Networks that mask their gradients, each in its own way, and the checks that find them.

Every mask wraps the same network and (nearly) keeps its predictions: accuracies of that network are the true ones.
"""

from __future__ import annotations

import pytest
from fresh_masks import (
    MASKED,
    flagged,
    report_of,
)


def test_run_checks_unmasked_network_passes() -> None:
    report = report_of("none", "quick")
    assert report.results["natural"].accuracy > 0.9
    assert report.results["pgd-20"].accuracy < 0.3
    assert flagged(report) == {}


@pytest.mark.slow
@pytest.mark.parametrize(("mask", "level", "name", "hidden"), MASKED)
def test_run_checks_finds_masks_written_independently(mask: str, level: str, name: str, hidden: float) -> None:
    report, truth = report_of(mask, level), report_of("none", "quick")
    assert report.results["natural"].accuracy > 0.9
    assert report.results["pgd-20"].accuracy > truth.results["pgd-20"].accuracy + hidden
    assert flagged(report).get(name) == "fail", [(check.name, check.figure) for check in report.checks]
