"""Reports of five examples whose verdicts are known."""

from __future__ import annotations

import torch

from deat_rb.evaluation.report import AttackResult, Report

NATURAL = torch.tensor([True, True, True, True, False])


FGSM = torch.tensor([True, True, True, False, False])


CW = torch.tensor([False, True, True, True, False])


def report_of(**verdicts: torch.Tensor) -> Report:
    """A report of examples whose verdicts are given, each attack having cost 2 s, 10 forwards and 5 backwards."""
    results = [
        AttackResult.of(
            name, correct, seconds=2.0, forwards=10, backwards=5, parameters={"steps": 3}, notes=("a note",)
        )
        for name, correct in verdicts.items()
    ]
    return Report.of(
        results, verdicts, eps=0.1, num_classes=2, seed=7, batch_size=4, device="cpu", versions={"python": "3.11"}
    )
