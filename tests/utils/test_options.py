"""Option groups: fields that describe themselves, and sentences about bad values."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from deat_rb.utils.errors import DeatError
from deat_rb.utils.options import Fraction, Numbers, Option, OptionGroup, Size, option, parse_numbers, validate


class Kitchen(OptionGroup):
    """Kitchen. More about it."""

    spoons: int = option(3, "Number of spoons.", ge=1)
    heat: Fraction | None = option(None, "Heat, such as 8/255.", default_text="the oven's", gt=0, lt=1)
    fuel: Literal["gas", "wood"] = option("gas", "Fuel.")
    dish: str = option("soup", "Dish.", choices={"soup": 1, "stew": 2}, metavar="NAME")
    room: Size | None = option(None, "Room in the pantry.", may_change=True)
    weights: Numbers | None = option(None, "Weights.")
    guests: tuple[str, ...] = option((), "Guests; may be repeated.")
    salt: bool = option(False, "Add salt.")
    wash_up: bool = option(True, "Leave the dishes.")


EXPECTED = [
    # name, default, metavar, choices, bounds, kind, flag
    ("spoons", "3", "INTEGER", (), "x>=1", "value", "--spoons"),
    ("heat", "the oven's", "FRACTION", (), "x>0, x<1", "value", "--heat"),
    ("fuel", "gas", "TEXT", ("gas", "wood"), "", "value", "--fuel"),
    ("dish", "soup", "NAME", ("soup", "stew"), "", "value", "--dish"),
    ("room", "", "SIZE", (), "", "value", "--room"),
    ("weights", "", "NUMBERS", (), "", "value", "--weights"),
    ("guests", "", "TEXT", (), "", "many", "--guests"),
    ("salt", "", "TEXT", (), "", "flag", "--salt"),
    ("wash_up", "", "TEXT", (), "", "off", "--no-wash-up"),
]


def test_options_describe_the_fields() -> None:
    def row(each: Option) -> tuple[Any, ...]:
        return each.name, each.default, each.metavar, each.choices, each.bounds, each.kind, each.flag

    described = Kitchen.options()
    assert [row(each) for each in described] == EXPECTED
    assert {each.group for each in described} == {"Kitchen. More about it"}
    assert [each.name for each in described if each.may_change] == ["room"]


def test_explicit_leaves_out_defaults_and_none() -> None:
    assert Kitchen.model_validate({"spoons": 3, "heat": None}).explicit() == {"spoons": 3}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"spoons": 0}, "--spoons = 0 cannot be used: it should be greater than or equal to 1"),
        ({"heat": "1/0"}, "--heat = '1/0' cannot be used: '1/0' divides by zero"),
        ({"fuel": "coal"}, "--fuel = 'coal' cannot be used: it should be 'gas' or 'wood'"),
        ({"dish": "pie"}, "--dish = 'pie' cannot be used: it should be 'soup' or 'stew'"),
        ({"room": "8X"}, "--room = '8X' cannot be used: '8X' is not a size"),
        ({"weights": "1,b"}, "--weights = '1,b' cannot be used: '1,b' is not a list of numbers"),
        ({"wash_up": "perhaps"}, "--wash-up = 'perhaps' cannot be used"),
        ({"forks": 1}, "there is no option --forks"),
    ],
)
def test_validate_names_the_option_and_its_value(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DeatError) as refusal:
        validate(Kitchen, values)
    assert str(refusal.value).startswith(message)
    with pytest.raises(DeatError, match=f"{next(iter(values))}"):
        validate(Kitchen, values, prefix="")


@pytest.mark.parametrize(("text", "numbers"), [("0.5", (0.5,)), ("1, 2,3e-1", (1, 2, 0.3)), ((1, 2), (1, 2))])
def test_parse_numbers(text: Any, numbers: tuple[float, ...]) -> None:
    assert parse_numbers(text) == numbers


@pytest.mark.parametrize("text", ["", ",", "1,,2", "nan", "inf,1", "a", 3])
def test_parse_numbers_refuses_other_texts(text: Any) -> None:
    with pytest.raises(DeatError, match="is not a list of numbers; give numbers such as"):
        parse_numbers(text)
