"""Sizes in bytes, as a user writes them."""

from __future__ import annotations

import re

from deat_rb.errors import DeatError

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
