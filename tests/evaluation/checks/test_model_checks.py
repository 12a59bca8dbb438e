"""Checks of the model and of its input images."""

from __future__ import annotations

import pytest
import torch
from check_reports import checked, flagged, natural, report_of
from masked_models import EPS, held_out, plain, robust
from torch import nn
from training_problems import images_and_labels as coloured
from training_problems import used

from deat_rb.evaluation.checks.registry import run_checks
from deat_rb.evaluation.evaluate import evaluate


def test_bf16_agrees_finds_predictions_that_depend_on_rounding() -> None:
    """To 1000 bfloat16 adds in steps of 4 or 8."""
    lifted = nn.Linear(10, 10)
    with torch.no_grad():
        lifted.weight.copy_(torch.eye(10))
        lifted.bias.fill_(1000)
    checks = checked(nn.Sequential(plain(), lifted))
    assert flagged(checks) == {"bf16 agrees with fp32"}


@pytest.mark.parametrize(
    ("eps", "status"),
    [(8 / 255, "pass"), (0.031, "warn"), (0.0157, "warn"), (0.03, "pass"), (0.1, "pass"), (0.3, "pass"), (0.5, "pass")],
)
def test_eps_in_255ths_finds_rounded_decimals(eps: float, status: str) -> None:
    images, labels = coloured(4)
    report = report_of(natural(used(), images, labels), eps=eps)
    checks = {c.name: c for c in run_checks(used(), images, labels, report, level="quick", eps=eps)}
    assert checks["eps in 255ths"].status == status
    assert checks["eps in 255ths"].figure == pytest.approx(255 * eps)
    assert ("8/255" in checks["eps in 255ths"].sentence) == (eps in (8 / 255, 0.031))


def test_unchanged_finds_a_report_of_other_weights() -> None:
    images, labels = held_out(10)
    mine = evaluate(plain(), images, labels, attacks="natural", eps=EPS)
    own = {c.name: c.status for c in run_checks(plain(), images, labels, mine, level="quick", eps=EPS)}
    other = {c.name: c.status for c in run_checks(robust(), images, labels, mine, level="quick", eps=EPS)}
    assert (own["model unchanged"], other["model unchanged"]) == ("pass", "fail")


def test_in_range_finds_images_divided_by_255_twice() -> None:
    images, labels = held_out(16)
    report = report_of(natural(plain(), images / 255, labels))
    checks = {c.name: c for c in run_checks(plain(), images / 255, labels, report, level="quick", eps=EPS)}
    assert checks["images in [0, 1]"].status == "warn"
    assert checks["images in [0, 1]"].figure == pytest.approx(1 / 255)
    assert checks["normalization inside"].status == "fail", "the model does better on what was not divided"
