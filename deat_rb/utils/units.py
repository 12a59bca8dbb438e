"""Parsing, formatting and checks of numbers, such as radii in pixel space."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from deat_rb.utils.errors import DeatError


def parse_fraction(text: str | float) -> float:
    """Return the value of ``8/255``, ``0.03`` or a number.

    Raises:
        DeatError: ``text`` is neither a number nor a fraction of two numbers.
    """
    if isinstance(text, bool) or not isinstance(text, Real | str):
        raise DeatError(f"{text!r} is not a number; give a fraction such as 8/255 or a number such as 0.03")
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
        raise DeatError(f"'{text}' divides by zero; give a fraction such as 8/255 or a number such as 0.03") from None
    except ValueError:
        raise DeatError(f"'{text}' is not a number; give a fraction such as 8/255 or a number such as 0.03") from None
    return value


def parse_scalar(value: Any) -> float:
    """Return a number, a string as for `parse_fraction`, or a tensor or array with one value as a float.

    Raises:
        DeatError: ``value`` is none of these.
    """
    if getattr(value, "ndim", None) == 0 or getattr(value, "shape", None) == (1,):
        value = value.item()
    return parse_fraction(value)


def check_weight(name: str, value: Any, usual: str = "") -> None:
    """Check that the value of the parameter ``name`` is a finite number of at least 0; ``usual`` is a hint.

    Raises:
        DeatError: It is not.
    """
    if not (isinstance(value, Real) and math.isfinite(value) and float(value) >= 0):
        raise DeatError(f"{name} = {value} is not a finite, non-negative number{'; ' * bool(usual)}{usual}")


def is_whole_number(value: object) -> bool:
    """Return whether a value is a Python or NumPy integer; a bool is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def format_fraction(value: float) -> str:
    """Return a radius as a string: ``8/255`` for a multiple of 1/255 below 1, otherwise a decimal number."""
    parts = value * 255
    if 0 < round(parts) < 255 and abs(parts - round(parts)) < 1e-9:
        return f"{round(parts)}/255"
    return f"{value:.6g}"


def exact_fraction(value: float) -> str:
    """Return a radius as `format_fraction` does if `parse_fraction` reads the same number from it, else all digits."""
    short = format_fraction(value)
    return short if parse_fraction(short) == value else repr(value)


def check_eps(eps: float, name: str = "eps", *, norm: str = "Linf") -> float:
    """Return eps after checking that it is in (0, 1] or, in L2, positive.

    Args:
        eps: The radius, in [0, 1] pixel units.
        name: The parameter's name in the error message.
        norm: ``Linf`` or ``L2``.

    Raises:
        DeatError: eps is out of range, infinite or NaN.
    """
    if norm == "L2":
        if not (math.isfinite(eps) and eps > 0):
            raise DeatError(f"{name} = {eps:.10g} is not a positive L2 distance; give one such as 0.5")
        return float(eps)
    if not (math.isfinite(eps) and 0 < eps <= 1):
        raise DeatError(
            f"{name} = {eps:.10g} is outside (0, 1]; give it in units of the image range [0, 1], such as 8/255"
        )
    return float(eps)
