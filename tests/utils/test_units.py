from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deat_rb.utils.errors import DeatError
from deat_rb.utils.units import check_eps, exact_fraction, format_fraction, parse_fraction


@pytest.mark.parametrize(
    ("text", "value"),
    [("8/255", 8 / 255), (" 8 / 255 ", 8 / 255), ("2.5/255", 2.5 / 255), ("0.03", 0.03), ("1e-2", 0.01), (1, 1.0)],
)
def test_parse_fraction_reads_fractions_and_numbers(text: str | float, value: float) -> None:
    assert parse_fraction(text) == value


@pytest.mark.parametrize("text", ["", "eight", "8/", "/255", "8/255/2", "8:255", "8/255px"])
def test_parse_fraction_names_what_is_not_a_number(text: str) -> None:
    with pytest.raises(DeatError, match="is not a number; give a fraction such as 8/255") as error:
        parse_fraction(text)
    assert f"'{text}'" in str(error.value)


def test_parse_fraction_names_a_division_by_zero() -> None:
    with pytest.raises(DeatError, match="'8/0' divides by zero"):
        parse_fraction("8/0")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (8 / 255, "8/255"),
        (10 / 255, "10/255"),
        (1.0, "1"),
        (3.0, "3"),
        (0.03, "0.03"),
        (0.0, "0"),
        (8.5 / 255, "0.0333333"),
    ],
)  # fmt: skip
def test_format_fraction_writes_whole_255ths_as_fractions(value: float, text: str) -> None:
    assert format_fraction(value) == text


@given(st.integers(1, 255))
def test_format_fraction_round_trips_whole_255ths(parts: int) -> None:
    assert parse_fraction(format_fraction(parts / 255)) == parts / 255


@pytest.mark.parametrize("eps", [0.0, -8 / 255, 8.0, 1.0001, math.inf, math.nan])
def test_check_eps_refuses_values_outside_0_and_1(eps: float) -> None:
    with pytest.raises(DeatError, match=r"eps = .* is outside \(0, 1\].*such as 8/255"):
        check_eps(eps)


def test_check_eps_names_the_option_and_shows_the_excess() -> None:
    assert check_eps(1) == 1.0
    with pytest.raises(DeatError, match=r"^--eps = 8 is outside"):
        check_eps(8, "--eps")
    with pytest.raises(DeatError, match=r"^eps = 1\.0000001 is outside"):
        check_eps(1.0000001)


@pytest.mark.parametrize(
    ("value", "text"), [(8 / 255, "8/255"), (0.1, "0.1"), (1.0, "1"), (0.12345678, "0.12345678"),
                        (0.03137254902, "0.03137254902")],
)  # fmt: skip
def test_exact_fraction_is_read_as_the_same_number(value: float, text: str) -> None:
    assert exact_fraction(value) == text
    assert parse_fraction(text) == value
