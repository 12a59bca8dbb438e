"""How the board's pages write numbers, links and text that anybody may have submitted."""

from __future__ import annotations

import re
from urllib.parse import quote, urlsplit

from deat_rb.utils.text import replace_invisible

MISSING = "\N{EN DASH}"
"""Where nothing is known."""


def web_link(address: str | None) -> str | None:
    """Gives back an address that a page may link to: of http or https, to a host in ASCII without a user; else None."""
    if not address or address != replace_invisible(address) or re.search(r"[\s\\]", address):
        return None
    try:
        parts = urlsplit(address)
        plain = parts.hostname and parts.netloc.isascii() and "@" not in parts.netloc and parts.port != 0
        return address if parts.scheme in ("http", "https") and plain else None
    except ValueError:
        return None


def local_link(*names: str) -> str:
    """A relative address of a file below the page's own folder."""
    return "/".join(quote(name, safe="") for name in names)


def name_parts(name: str) -> list[str]:
    """A model's name, in parts between which a narrow page may break it."""
    return re.split(r"(?<=_)|(?<=[a-z])(?=[0-9]{4})|(?<=[0-9]{4})(?=[A-Z])", name)


def percent(value: str | float | None) -> str:
    """An accuracy in percent, with two decimals."""
    return MISSING if value is None else f"{float(value):.2f}"


def count(value: float | None) -> str:
    """A number of passes."""
    return MISSING if value is None else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """A time in the largest unit of which there are at least two."""
    if seconds is None:
        return MISSING
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def memory(size: float | None) -> str:
    """Bytes in MiB or GiB."""
    if size is None:
        return MISSING
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
