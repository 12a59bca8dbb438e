"""Validation within training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_problems import images_and_labels, loader, made

import deat_rb
import deat_rb.methods
from deat_rb.training.validation import Validation


def test_validate_runs_pgd_20_on_all_and_pgd_5_on_128_images(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def watched(model: nn.Module, images: Tensor, labels: Tensor, **options: Any) -> Validation:
        calls.append((images, options))
        return Validation(0.5, 0.4, len(images) * (1 + options["steps"]), len(images) * options["steps"])

    monkeypatch.setattr("deat_rb.training.loop.validate", watched)
    held = images_and_labels(150, seed=77)
    [row] = deat_rb.create("u-fgsm", made()).fit(loader(), [held], epochs=1).rows
    assert (row.val_forwards, row.val_backwards) == (150 * 21 + 128 * 6, 150 * 20 + 128 * 5)
    assert [(len(images), options["steps"]) for images, options in calls] == [(150, 20), (128, 5)]
    assert all(torch.equal(images, held[0][: len(images)]) for images, _ in calls)
