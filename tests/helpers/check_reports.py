"""Reports with given verdicts, and the sanity checks of them by name."""

from __future__ import annotations

from typing import Any

import torch
from masked_models import EPS, held_out
from torch import Tensor, nn

from deat_rb.evaluation.checks.registry import run_checks
from deat_rb.evaluation.report import AttackResult, Check, Report


def report_of(verdicts: dict[str, Tensor], *, eps: float = EPS, **fields: Any) -> Report:
    results = [
        AttackResult.of(name, correct, seconds=1.0, forwards=1, backwards=1, parameters=_parameters(name))
        for name, correct in verdicts.items()
    ]
    known: dict[str, Any] = {"num_classes": 10, "seed": 0, "batch_size": 64, "device": "cpu", "versions": {}}
    return Report.of(results, verdicts, eps=eps, **{**known, **fields})


def _parameters(name: str) -> dict[str, bool | int | float | str]:
    return {"steps": int(name.removeprefix("pgd-"))} if name.startswith("pgd-") else {}


def natural(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"natural": model(images).argmax(dim=1) == labels}


def checked(model: nn.Module, *, level: str = "quick", count: int = 64, **options: Any) -> dict[str, Check]:
    """The checks by name, of an evaluation that only measured the natural accuracy."""
    images, labels = held_out(count)
    report = report_of(natural(model, images, labels))
    checks = run_checks(model, images, labels, report, **{"level": level, "eps": EPS, **options})
    return {check.name: check for check in checks}


def flagged(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if check.status != "pass"}
