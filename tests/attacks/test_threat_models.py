"""The Linf ball: starts, steps and projections on numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deat_rb.attacks.threat_models import Linf


def test_linf_ascend_steps_and_projects() -> None:
    # eps 0.25, alpha 0.125; all of these are exact in binary.
    images = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.0625, 0.9375]).view(1, 1, 2, 3)
    adv = torch.tensor([0.5, 0.625, 0.75, 0.25, 0.0, 1.0]).view(1, 1, 2, 3)
    gradient = torch.tensor([3.0, 1e-30, 2.0, -0.1, -5.0, 7.0]).view(1, 1, 2, 3)
    stepped = Linf(0.25).ascend(adv, images, gradient, alpha=0.125)
    #           0.5+a  0.625+a  held by +eps  by -eps  by 0  by 1
    expected = [0.625, 0.75, 0.75, 0.25, 0.0, 1.0]
    assert stepped.flatten().tolist() == expected


def test_linf_ascend_does_not_move_without_a_gradient() -> None:
    images = torch.full((1, 1, 1, 2), 0.5)
    assert torch.equal(Linf(0.25).ascend(images, images, torch.zeros_like(images), alpha=0.125), images)


def test_linf_project_clips_to_the_ball_and_to_0_to_1() -> None:
    images = torch.tensor([0.5, 0.5, 0.125, 1.0]).view(1, 1, 2, 2)
    adv = torch.tensor([0.75, 2.0, -1.0, 0.875]).view(1, 1, 2, 2)
    assert Linf(0.25).project(adv, images).flatten().tolist() == [0.75, 0.75, 0.0, 0.875]


def test_linf_training_noise_fills_the_ball() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = torch.full((40, 1, 16, 16), 0.5)
        delta = Linf.training_noise(images, 0.1)
        assert 0.099 < delta.abs().max() <= 0.1
        # U(-a, a) has variance a^2 / 3; over n = 10240 draws the mean's standard error is a / sqrt(3n) = 0.0006.
        assert abs(float(delta.mean())) < 0.003
        assert float(delta.var()) == pytest.approx(0.1**2 / 3, rel=0.05)


@given(st.floats(1 / 255, 0.5), st.floats(1 / 255, 1.0), st.integers(0, 2**31))
def test_linf_ascend_stays_in_the_ball_for_any_input(eps: float, alpha: float, seed: int) -> None:
    stream = torch.Generator().manual_seed(seed)
    images = torch.rand(2, 1, 3, 3, generator=stream)
    adv = 3 * torch.rand(2, 1, 3, 3, generator=stream) - 1
    stepped = Linf(eps).ascend(adv, images, torch.randn(2, 1, 3, 3, generator=stream), alpha)
    assert (stepped - images).abs().max() <= eps + 1e-6
    assert stepped.min() >= 0
    assert stepped.max() <= 1
