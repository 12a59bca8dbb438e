"""Sizes as people write them, and the Linf ball: starts, steps and projections on numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deat_rb.attacks.threat_models import Linf
from deat_rb.utils.errors import DeatError
from deat_rb.utils.units import check_eps, format_fraction, parse_fraction


@pytest.mark.parametrize(
    ("text", "value"),
    [("8/255", 8 / 255), (" 8 / 255 ", 8 / 255), ("2.5/255", 2.5 / 255), ("0.03", 0.03), ("1e-2", 0.01), (1, 1.0)],
)
def test_sizes_are_read(text: str | float, value: float) -> None:
    assert parse_fraction(text) == value


@pytest.mark.parametrize("text", ["", "eight", "8/", "/255", "8/255/2", "8:255", "8/255px"])
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(DeatError, match="is not a number; write a fraction such as 8/255") as error:
        parse_fraction(text)
    assert f"'{text}'" in str(error.value)


def test_a_division_by_zero_is_named() -> None:
    with pytest.raises(DeatError, match="'8/0' divides by zero"):
        parse_fraction("8/0")


@pytest.mark.parametrize(
    ("value", "text"),
    [(8 / 255, "8/255"), (10 / 255, "10/255"), (1.0, "255/255"), (0.03, "0.03"), (0.0, "0"), (8.5 / 255, "0.0333333")],
)
def test_sizes_are_written_as_people_do(value: float, text: str) -> None:
    assert format_fraction(value) == text


@given(st.integers(1, 255))
def test_a_whole_255th_survives_writing_and_reading(parts: int) -> None:
    assert parse_fraction(format_fraction(parts / 255)) == parts / 255


@pytest.mark.parametrize("eps", [0.0, -8 / 255, 8.0, 1.0001, math.inf, math.nan])
def test_an_eps_outside_the_images_unit_is_refused(eps: float) -> None:
    with pytest.raises(DeatError, match=r"eps = .* is outside \(0, 1\].*such as 8/255"):
        check_eps(eps)


def test_the_message_names_the_option() -> None:
    assert check_eps(1) == 1.0
    with pytest.raises(DeatError, match=r"^--eps = 8 is outside"):
        check_eps(8, "--eps")


def test_a_step_and_its_projection() -> None:
    # eps 0.25, alpha 0.125; all of these are exact in binary.
    images = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.0625, 0.9375]).view(1, 1, 2, 3)
    adv = torch.tensor([0.5, 0.625, 0.75, 0.25, 0.0, 1.0]).view(1, 1, 2, 3)
    gradient = torch.tensor([3.0, 1e-30, 2.0, -0.1, -5.0, 7.0]).view(1, 1, 2, 3)
    stepped = Linf(0.25).ascend(adv, images, gradient, alpha=0.125)
    #           0.5+a  0.625+a  held by +eps  by -eps  by 0  by 1
    expected = [0.625, 0.75, 0.75, 0.25, 0.0, 1.0]
    assert stepped.flatten().tolist() == expected


def test_no_gradient_is_no_step() -> None:
    images = torch.full((1, 1, 1, 2), 0.5)
    assert torch.equal(Linf(0.25).ascend(images, images, torch.zeros_like(images), alpha=0.125), images)


def test_the_projection_keeps_what_is_inside_and_cuts_the_rest() -> None:
    images = torch.tensor([0.5, 0.5, 0.125, 1.0]).view(1, 1, 2, 2)
    adv = torch.tensor([0.75, 2.0, -1.0, 0.875]).view(1, 1, 2, 2)
    assert Linf(0.25).project(adv, images).flatten().tolist() == [0.75, 0.75, 0.0, 0.875]


def test_the_uniform_start_fills_the_ball_and_no_more() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = torch.full((40, 1, 16, 16), 0.5)
        delta = Linf(0.1).uniform_start(images) - images
        assert delta.abs().max() <= 0.1 + 1e-6
        # U(-a, a) has variance a^2 / 3; over n = 10240 draws the mean's standard error is a / sqrt(3n) = 0.0006.
        assert abs(float(delta.mean())) < 0.003
        assert float(delta.var()) == pytest.approx(0.1**2 / 3, rel=0.05)
        dark = Linf(0.1).uniform_start(torch.zeros(40, 1, 16, 16))
        assert dark.min() == 0
        assert 0.45 < float((dark == 0).float().mean()) < 0.55


@given(st.floats(1 / 255, 0.5), st.floats(1 / 255, 1.0), st.integers(0, 2**31))
def test_ball_and_bounds_hold_whatever_comes(eps: float, alpha: float, seed: int) -> None:
    stream = torch.Generator().manual_seed(seed)
    images = torch.rand(2, 1, 3, 3, generator=stream)
    adv = 3 * torch.rand(2, 1, 3, 3, generator=stream) - 1
    stepped = Linf(eps).ascend(adv, images, torch.randn(2, 1, 3, 3, generator=stream), alpha)
    assert (stepped - images).abs().max() <= eps + 1e-6
    assert stepped.min() >= 0
    assert stepped.max() <= 1
