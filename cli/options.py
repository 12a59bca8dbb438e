"""Types of options that several commands share; each reads what the user typed."""

from __future__ import annotations

import re
from pathlib import Path

import click

from deat_rb.utils.errors import DeatError


def fraction(text: str) -> float:
    """Reads a size such as ``8/255`` or ``0.03``, in units of the image range [0, 1]."""
    from deat_rb.utils.units import parse_fraction

    try:
        return parse_fraction(text)
    except DeatError as error:
        raise click.BadParameter(str(error)) from None


def fraction_list(text: str) -> tuple[float, ...]:
    """Reads sizes such as ``0,2/255,4/255``."""
    return tuple(fraction(part) for part in text.split(","))


def attack_names(text: str) -> tuple[str, ...]:
    """Reads a list such as ``fgsm,torchattacks.PGD(steps=5,alpha=0.01)``, commas in parentheses left alone."""
    from deat_rb.attacks.names import split_names

    found = tuple(name for name in split_names(text) if name)
    if not found:
        raise click.BadParameter("the list is empty; give names with commas between them")
    return found


def seed_list(text: str) -> tuple[int, ...]:
    """Reads a list of seeds such as ``0,1,2``."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise click.BadParameter(f"'{text}' is not a list of different whole numbers such as 0,1,2")
    return tuple(int(part) for part in parts)


def size(text: str) -> int:
    """Return the bytes of a size such as ``8G`` (8e9), ``8GiB`` (8 * 2**30) or ``4096``."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        if re.fullmatch(r"\s*[0-9]*\.?[0-9]+\s*[A-Za-z]*\s*", text):  # ByteSize ignores what follows a number
            return TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        pass
    raise click.BadParameter(f"'{text}' is not a size; give bytes, or a number with a unit such as 500MB, 8G or 8GiB")


def json_file(text: str) -> Path:
    """Reads the name of a JSON file to be written later, which had better be possible then."""
    path = Path(text)
    if path.suffix != ".json":
        raise click.BadParameter(f"'{text}' does not end in .json")
    if path.is_dir():
        raise click.BadParameter(f"'{text}' is a folder")
    if not path.parent.is_dir():
        raise click.BadParameter(f"there is no folder '{path.parent}' to write '{path.name}' into")
    return path
