"""Formatting of numbers, links and names for the board's pages."""

from __future__ import annotations

import re
from urllib.parse import quote, urlsplit

from deat_rb.robustbench.format import SPELLED
from deat_rb.utils.text import replace_invisible

MISSING = "\N{EN DASH}"
"""Placeholder for an unknown value."""


def web_link(address: str | None) -> str | None:
    """Return an http(s) URL if it has an ASCII host and no user name, or else None."""
    if not address or address != replace_invisible(address) or re.search(r"[\s\\]", address):
        return None
    try:
        parts = urlsplit(address)
        plain = parts.hostname and parts.netloc.isascii() and "@" not in parts.netloc and parts.port != 0
        return address if parts.scheme in ("http", "https") and plain else None
    except ValueError:
        return None


def dataset_title(dataset: str) -> str:
    """Return a dataset's name for a heading, such as CIFAR-10."""
    return {"digits": "Digits"}.get(dataset, SPELLED.get(dataset, dataset))


def local_link(*names: str) -> str:
    """Return the relative URL of a file below the page's folder."""
    return "/".join(quote(name, safe="") for name in names)


def name_parts(name: str) -> list[str]:
    """Split a model's name at its possible line breaks."""
    return re.split(r"(?<=_)|(?<=[a-z])(?=[0-9]{4})|(?<=[0-9]{4})(?=[A-Z])", name)


def percent(value: str | float | None) -> str:
    """Format an accuracy in percent with two decimals."""
    return MISSING if value is None else f"{float(value):.2f}"


def count(value: float | None) -> str:
    """Format a count."""
    return MISSING if value is None else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """Format a duration in the largest unit in which it is at least 2."""
    if seconds is None:
        return MISSING
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def memory(size: float | None) -> str:
    """Format bytes as MiB or GiB."""
    if size is None:
        return MISSING
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
