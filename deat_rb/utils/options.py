"""Option groups: pydantic models that define command-line options, recorded settings and documentation."""

from __future__ import annotations

import contextlib
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core.core_schema import ValidationInfo

from deat_rb.utils.errors import DeatError, did_you_mean
from deat_rb.utils.units import exact_fraction, parse_fraction

Fraction = Annotated[float, BeforeValidator(parse_fraction)]
"""A number in units of the image range [0, 1]; a string such as 8/255 is accepted."""


def parse_size(text: str | int) -> int:
    """Return the number of bytes in a size such as ``8G`` (8e9), ``8GiB`` (8 * 2**30) or ``4096``.

    Raises:
        DeatError: ``text`` is not a size.
    """
    with contextlib.suppress(ValidationError):
        if re.fullmatch(r"\s*[0-9]*\.?[0-9]+\s*[A-Za-z]*\s*", str(text)):  # ByteSize ignores text after a number
            return _BYTES.validate_python(text)
    raise DeatError(
        f"'{text}' is not a size; give a number of bytes, or a number with a unit such as 500MB, 8G or 8GiB"
    )


_BYTES = TypeAdapter(ByteSize)

Size = Annotated[int, BeforeValidator(parse_size)]
"""A size in bytes; a string with a unit is accepted."""


def parse_numbers(text: str | Sequence[float]) -> tuple[float, ...]:
    """Return the numbers in a string such as ``0.485,0.456,0.406``.

    Raises:
        DeatError: There are none, or one is not a finite number.
    """
    try:
        numbers = tuple(float(part) for part in (text.split(",") if isinstance(text, str) else text))
    except (TypeError, ValueError):
        numbers = ()
    if not numbers or not all(math.isfinite(number) for number in numbers):
        raise DeatError(f"'{text}' is not a list of numbers; give numbers such as 0.485,0.456,0.406")
    return numbers


Numbers = Annotated[tuple[float, ...], BeforeValidator(parse_numbers)]
"""Numbers, for instance one per channel; a comma-separated string is accepted."""


def parse_names(text: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names in a comma-separated string such as ``norm,bias``.

    Raises:
        DeatError: ``text`` is neither a string nor a list of strings.
    """
    parts = text.split(",") if isinstance(text, str) else text
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise DeatError(f"'{text}' is not a list of names; give names such as norm,bias")
    return tuple(part.strip() for part in parts if part.strip())


Names = Annotated[tuple[str, ...], BeforeValidator(parse_names)]
"""Names; a comma-separated string is accepted."""


OPEN = 10**9
"""Number of epochs of an open-ended run."""


def parse_epochs(text: str | int) -> str | int:
    """Return `OPEN` for ``open``, an open-ended run, and anything else unchanged."""
    return OPEN if text == "open" else text


def format_epochs(epochs: int) -> str | int:
    """Return ``open`` for `OPEN` or more, and any other number unchanged."""
    return "open" if epochs >= OPEN else epochs


Epochs = Annotated[int, BeforeValidator(parse_epochs), PlainSerializer(format_epochs, when_used="json")]
"""A number of epochs; ``open`` stands for `OPEN`."""

Model = TypeVar("Model", bound=BaseModel)

METAVARS: dict[Any, str] = {
    int: "INTEGER",
    float: "NUMBER",
    str: "TEXT",
    parse_fraction: "FRACTION",
    parse_size: "SIZE",
    parse_numbers: "NUMBERS",
    parse_names: "NAMES",
    parse_epochs: "EPOCHS",
}
"""Placeholders for values in ``--help``, by the values' type or parser."""


def option(
    default: Any,
    help: str,
    *,
    choices: Iterable[str] = (),
    metavar: str = "",
    default_text: str = "",
    may_change: bool = False,
    **constraints: Any,
) -> Any:
    """Return a field of an option group.

    Args:
        default: Default value; ``...`` if the option is required.
        help: One sentence for ``--help`` and the documentation.
        choices: The allowed values, if there are only a few.
        metavar: Placeholder for the value in ``--help``; by default derived from the type.
        default_text: Description of the default, if it depends on other options.
        may_change: Whether ``--resume`` may change the option: true if it does not affect the result.
        **constraints: Bounds, as for `pydantic.Field`.
    """
    extra: dict[str, Any] = {
        "choices": list(choices), "metavar": metavar, "default_text": default_text, "may_change": may_change,
    }  # fmt: skip
    return Field(default, description=help, json_schema_extra=extra, **constraints)


@dataclass(frozen=True)
class Option:
    """Description of an option for the command line and the documentation.

    Attributes:
        name: The field's name, such as ``batch_size``.
        group: Title of the option group.
        help: Help text of one sentence.
        default: Description of the default; empty if there is none.
        metavar: Placeholder for the value.
        choices: The allowed values, if there are only a few.
        bounds: Bounds of the value, such as ``x>=1``.
        kind: ``value``, ``flag`` (false by default), ``off`` (true by default), ``switch`` (a pair of flags, if the
            default depends on other options) or ``many`` (may be repeated).
        may_change: Whether ``--resume`` may change the option.
    """

    name: str
    group: str
    help: str
    default: str
    metavar: str
    choices: tuple[str, ...]
    bounds: str
    kind: Literal["value", "flag", "off", "switch", "many"]
    may_change: bool

    @property
    def flag(self) -> str:
        """The command-line flag, such as ``--batch-size``; ``--no-...`` for options that are on by default."""
        if self.kind == "switch":
            return f"--{self.name}/--no-{self.name}".replace("_", "-")
        return f"--{'no-' if self.kind == 'off' else ''}{self.name.replace('_', '-')}"

    def words(self, value: Any) -> list[str]:
        """Return the words that set the option to a value on the command line; none for the default of a flag."""
        if self.kind in ("flag", "off"):
            return [self.flag] if value is (self.kind == "flag") else []
        if self.kind == "switch":
            return [self.flag.split("/")[not value]]
        spelled: Callable[[Any], Any] = {"FRACTION": exact_fraction, "EPOCHS": format_epochs}.get(self.metavar, str)
        texts = [str(spelled(each)) for each in (value if isinstance(value, tuple) else (value,))]
        if self.kind == "many":
            return [word for text in texts for word in (self.flag, text)]
        return [self.flag, ",".join(texts)]


class OptionGroup(BaseModel):
    """A group of options. Fields are declared with `option`; the class's docstring is the group's title."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*")
    @classmethod
    def _is_a_choice(cls, value: Any, info: ValidationInfo) -> Any:
        choices = _extra(cls.model_fields[info.field_name or ""])["choices"]
        if choices and value is not None and value not in choices:
            names = [f"'{choice}'" for choice in choices]
            raise ValueError(f"it should be {', '.join(names[:-1])} or {names[-1]}")
        return value

    @classmethod
    def options(cls) -> list[Option]:
        """Return the descriptions of the group's options."""
        title = (cls.__doc__ or "").partition("\n")[0].rstrip(".")
        return [_described(name, title, field) for name, field in cls.model_fields.items()]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Return a validated group from the entries of ``values`` that are fields of the group."""
        return cls.model_validate({name: value for name, value in values.items() if name in cls.model_fields})

    def explicit(self) -> dict[str, Any]:
        """Return the options that were set explicitly and are not None."""
        return {name: getattr(self, name) for name in self.model_fields_set if getattr(self, name) is not None}


def _extra(field: FieldInfo) -> dict[str, Any]:
    assert isinstance(field.json_schema_extra, dict)
    return field.json_schema_extra


def _described(name: str, title: str, field: FieldInfo) -> Option:
    kind, extra = _bare_type(field.annotation), _extra(field)
    choices = tuple(get_args(kind)) if get_origin(kind) is Literal else tuple(extra["choices"])
    bounds = [
        f"x{sign}{bound:g}"
        for each in field.metadata
        for attribute, sign in (("ge", ">="), ("gt", ">"), ("lt", "<"))
        if (bound := getattr(each, attribute, None)) is not None
    ]
    parsers = [each.func for each in (*field.metadata, *_annotations(field.annotation))
               if isinstance(each, BeforeValidator)]  # fmt: skip
    return Option(
        name=name,
        group=title,
        help=field.description or "",
        default=extra["default_text"] or _spelled(field.default),
        metavar=extra["metavar"] or METAVARS.get(next(iter(parsers), kind), "TEXT"),
        choices=choices,
        bounds=", ".join(bounds),
        kind="switch" if field.annotation == bool | None else _kind(kind, field.default, parsed=bool(parsers)),
        may_change=extra["may_change"],
    )


def _kind(kind: Any, default: Any, parsed: bool) -> Literal["value", "flag", "off", "many"]:
    if kind is bool:
        return "off" if default else "flag"
    return "many" if get_origin(kind) is tuple and not parsed else "value"


def _spelled(default: Any) -> str:
    return "" if default is None or isinstance(default, bool | tuple) else str(default)


def _annotations(annotation: Any) -> list[Any]:
    """Return the ``Annotated`` metadata of all members of a union."""
    return [each for part in get_args(annotation) if get_origin(part) is Annotated for each in part.__metadata__]


def _bare_type(annotation: Any) -> Any:
    """Return a type without ``None`` and ``Annotated``."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def validate(model: type[Model], values: Mapping[str, Any], prefix: str = "--") -> Model:
    """Return ``values`` as a validated model.

    Args:
        model: The pydantic model, such as an option group.
        values: The values of its fields.
        prefix: Prefix of option names in error messages: ``--`` as on the command line, or empty as in Python.

    Raises:
        DeatError: An option is invalid; the message names the first one and its value.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise DeatError(describe_first_error(error, prefix, option_names(model))) from None


def option_names(model: type[BaseModel]) -> list[str]:
    """Return the names of a model's fields, and of the options in its option groups."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        group = field.annotation
        names += group.model_fields if isinstance(group, type) and issubclass(group, OptionGroup) else [name]
    return names


EXPECTED = {
    "int_parsing": "a whole number", "int_type": "a whole number", "int_from_float": "a whole number",
    "float_parsing": "a number", "float_type": "a number", "finite_number": "a finite number",
    "bool_parsing": "true or false", "bool_type": "true or false", "string_type": "text",
    "list_type": "a list", "tuple_type": "a list", "dict_type": "a table of options",
    "model_type": "a table of options",
}  # fmt: skip
"""What a value should be, by pydantic's type of error."""


def describe_first_error(error: ValidationError, prefix: str = "--", known: Sequence[str] = ()) -> str:
    """Return one sentence about the first option that pydantic rejected.

    Args:
        error: The error.
        prefix: As for `validate`.
        known: The names of the options, for a hint if there is no such option.
    """

    def spelled(option: str) -> str:
        return option.replace("_", "-") if prefix else option

    first = error.errors()[0]
    path = [part for part in first["loc"] if isinstance(part, str)]
    option = spelled(path[-1]) if path else "options"  # no path if the table itself is rejected
    name = prefix + option if path else option
    if first["type"] == "extra_forbidden":
        hint = did_you_mean(option, map(spelled, known), "docs/options.md lists the options", prefix=prefix)
        return f"there is no option {name}: {hint}"
    if first["type"] == "missing":
        return f"{name} is missing"
    message = first["msg"].removeprefix("Value error, ").replace("Input", "it", 1)
    if first["type"] in EXPECTED:
        message = f"it should be {EXPECTED[first['type']]}"
    return f"{name} = {first['input']!r} cannot be used: {message[:1].lower() + message[1:]}"
