"""Fractions such as 8/255, radii and sizes in bytes, as a user writes them."""

from __future__ import annotations

import math
import re
from numbers import Real

from deat_rb.utils.errors import DeatError

UNITS = ("", "K", "M", "G", "T")


def parse_size(text: str, name: str = "--memory-limit") -> int:
    """Reads a size such as ``8G``, ``500M``, ``1.5GiB`` or ``4096``; a unit is 1,024 of the one before.

    Args:
        text: What the user wrote.
        name: What it was written for.

    Returns:
        Bytes.

    Raises:
        DeatError: It is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", text.strip().upper(), re.ASCII)
    if match is None:
        raise DeatError(f"{name} {text} is not a size: give a number of bytes with K, M, G or T, such as 8G or 500M")
    return int(float(match[1]) * 1024 ** UNITS.index(match[2]))


def parse_fraction(text: str | float) -> float:
    """Reads ``8/255``, ``0.03`` or a number.

    Args:
        text: What the user typed, in units of the image range [0, 1].

    Raises:
        DeatError: If it is neither a number nor a fraction of numbers.
    """
    if isinstance(text, bool) or not isinstance(text, Real | str):
        raise DeatError(f"{text!r} is not a number; write a fraction such as 8/255 or a number such as 0.03")
    if not isinstance(text, str):
        try:
            return float(text)
        except OverflowError:
            return math.inf
    top, slash, bottom = text.strip().partition("/")
    try:
        value = float(top)
        if slash:
            value /= float(bottom)
    except ZeroDivisionError:
        raise DeatError(f"'{text}' divides by zero; write a fraction such as 8/255 or a number such as 0.03") from None
    except ValueError:
        raise DeatError(f"'{text}' is not a number; write a fraction such as 8/255 or a number such as 0.03") from None
    return value


def format_fraction(value: float) -> str:
    """Writes a size as people do: ``8/255`` where it is a whole number of 255ths, else as a decimal."""
    parts = value * 255
    if round(parts) > 0 and abs(parts - round(parts)) < 1e-9:
        return f"{round(parts)}/255"
    return f"{value:.6g}"


def check_eps(eps: float, name: str = "eps") -> float:
    """Gives back an admissible eps.

    Args:
        eps: The radius, in [0, 1] pixel units.
        name: What to call it in the message.

    Raises:
        DeatError: If it is not in (0, 1].
    """
    if not (math.isfinite(eps) and 0 < eps <= 1):
        raise DeatError(
            f"{name} = {eps:g} is outside (0, 1]; images are in [0, 1], so give a size in that unit, such as 8/255"
        )
    return float(eps)
