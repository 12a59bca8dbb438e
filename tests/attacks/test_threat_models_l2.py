"""Projection, steps and random starts of the L2 ball; radii and norms."""

from __future__ import annotations

import pytest
import torch

from deat_rb.attacks.threat_models import L2, check_norm, check_radius, threat_model
from deat_rb.utils.errors import DeatError

GREY = torch.full((200, 3, 8, 8), 0.5)


def test_l2_projection_and_step() -> None:
    images = torch.full((3, 1, 1, 2), 0.5)
    adv = images + torch.tensor([[0.3, 0.4], [0.03, 0.04], [0.0, 0.0]]).view(3, 1, 1, 2)
    projected = L2(0.1).project(adv, images) - images
    assert projected.flatten(1).tolist() == [pytest.approx([0.06, 0.08]), pytest.approx([0.03, 0.04]), [0, 0]]
    assert L2(1.0).project(adv + 2, images).flatten().tolist() == [1.0] * 6
    # Gradients whose squares are 0 in float32, and one that is 0.
    step = L2(0.1).step(torch.tensor([[3e-30, 4e-30], [0.0, 0.0], [0.0, -7.0]]).view(3, 1, 1, 2), 0.5)
    assert step.flatten(1).tolist() == [pytest.approx([0.3, 0.4]), [0, 0], [0, -0.5]]


def test_l2_contains() -> None:
    images = torch.full((5, 1, 2, 2), 0.5)
    adv = images.clone()
    adv[0] += 0.1  # length 0.2
    adv[1] += 0.1 + 1e-5
    adv[2, 0, 0, 0] = float("nan")
    adv[3] = 0.6
    images[4], adv[4] = 1.0, 1.0 + 1e-4
    assert L2(0.2).contains(adv, images).tolist() == [True, False, False, True, False]


def test_l2_start_is_inside_and_of_all_lengths() -> None:
    start = L2(0.5).start(GREY, torch.Generator().manual_seed(0))
    lengths = (start - GREY).flatten(1).norm(dim=1)
    # U(0, 0.5): mean 0.25, standard deviation 0.144, of 200 draws 0.0102
    assert lengths.max() <= 0.5 + 1e-6
    assert float(lengths.mean()) == pytest.approx(0.25, abs=0.04)
    assert lengths.min() < 0.05


@pytest.mark.parametrize("value", [0, "0", 3.5, "1/2", 1])
def test_check_radius(value: float | str) -> None:
    assert check_radius(value, norm="L2") == {0: 0, "0": 0, 3.5: 3.5, "1/2": 0.5, 1: 1}[value]


def test_check_norm() -> None:
    assert threat_model("L2", 0.5) == L2(0.5)
    assert (check_norm("linf"), check_norm("l2"), check_norm("Linf")) == ("Linf", "L2", "Linf")
    with pytest.raises(DeatError, match="unknown norm 'L1': choose one of Linf, L2"):
        check_norm("L1")
    with pytest.raises(DeatError, match=r"--eps = -1 is not a finite, non-negative radius"):
        check_radius(-1, "--eps", norm="L2")
