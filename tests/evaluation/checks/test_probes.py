"""Independent measurements of the checks: finite differences, PGD, L2 steps."""

from __future__ import annotations

import masked_models as masked
import pytest
import torch
from small_problems import Plane, plane_images
from torch import nn
from training_problems import images_and_labels as coloured
from training_problems import used

from deat_rb.evaluation.checks.probes import Probe


def test_agreement_of_linear_networks() -> None:
    images, labels, _ = plane_images()

    def agreement(model: nn.Module) -> list[float]:
        probe = Probe(model, images, labels, eps=0.1, norm="Linf", batch_size=3, seed=0)
        return probe.agreement(8).tolist()

    assert agreement(Plane()) == pytest.approx([1] * 8, abs=1e-4)
    assert agreement(masked.Reversed(Plane())) == pytest.approx([-1] * 8, abs=1e-4)
    assert agreement(masked.Quantised(Plane(), 1000)) == [0] * 8


def test_probe_pgd_linear_model() -> None:
    images, labels, robust = plane_images()
    probe = Probe(Plane(), images, labels, eps=0.1, norm="Linf", batch_size=3, seed=0)
    assert torch.equal(~probe.pgd(torch.arange(8), eps=0.1, steps=8), robust)
    assert torch.equal(~probe.pgd(torch.tensor([6, 1, 4]), eps=0.1, steps=8, loss="margin"), robust[[6, 1, 4]])
    assert probe.pgd(torch.arange(0), eps=0.1, steps=8).tolist() == []


def test_probe_l2_steps_and_projection() -> None:
    images, labels = coloured(6)
    probe = Probe(used(), images, labels, eps=0.5, norm="L2", batch_size=4, seed=0)
    inside = 0.5 + 0.1 * (images - 0.5)
    steep = probe.steepest(torch.randn_like(images))
    assert probe.distances(inside + 0.3 * steep, inside).tolist() == pytest.approx([0.3] * 6, rel=1e-4)
    far = probe.projected(inside + 0.7 * steep, inside, 0.5)
    assert probe.distances(far, inside).tolist() == pytest.approx([0.5] * 6, rel=1e-4)
