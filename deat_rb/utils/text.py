"""Sanitization of untrusted text, text tables, and the Jinja environment of the HTML pages."""

from __future__ import annotations

import io
import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment
    from rich.table import Table


FORMULA = r"(^|[;\t\r\n])(\s*)(?=[=+\-@\uff1d\uff0b\uff0d\uff20])"
"""Start of a spreadsheet formula; full-width signs count, and many European locales separate cells with ``;``."""


def is_invisible(char: str) -> bool:
    """Return whether a character is a control, format, surrogate, private-use, unassigned or line-break character."""
    return not char.isprintable() and unicodedata.category(char) != "Zs"


def replace_invisible(text: str) -> str:
    """Replace every invisible character except tabs and line feeds by U+FFFD."""
    return "".join("\ufffd" if is_invisible(char) and char not in "\t\n" else char for char in text)


def printable(text: str, length: int = 400) -> str:
    r"""Escape invisible characters as in ``\x1b`` and truncate to ``length``, so that text is safe to print."""
    escaped = "".join(
        char.encode("unicode_escape", "replace").decode() if is_invisible(char) else char for char in text[: length + 1]
    )
    return escaped if len(text) <= length else f"{escaped[:length]}..."


def csv_text(text: str) -> str:
    """Return printable text with an apostrophe where a spreadsheet would read a cell of a CSV file as a formula."""
    return re.sub(FORMULA, r"\1\2'", printable(text, 2000))


def counted(count: float, noun: str, form: str = ",") -> str:
    """Return a count with its noun, such as ``1 epoch``, ``2 epochs``, ``3 batches`` or ``4 entries``.

    Args:
        count: The count.
        noun: The noun in the singular.
        form: Format specification of the count.
    """
    if count == 1:
        return f"{count:{form}} {noun}"
    if noun.endswith(("s", "tch")):
        return f"{count:{form}} {noun}es"
    plural = f"{noun[:-1]}ies" if noun.endswith("y") and noun[-2] not in "aeiou" else f"{noun}s"
    return f"{count:{form}} {plural}"


def duration(seconds: float) -> str:
    """Format a duration, such as ``45 s``, ``12 min`` or ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def new_table(title: str) -> Table:
    """Return an empty rich table without vertical lines, readable at a width of 80 columns and in files."""
    from rich import box
    from rich.table import Table

    return Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", collapse_padding=True)


def as_text(table: Table) -> str:
    """Return a rich table as plain text, as wide as the terminal or ``COLUMNS``."""
    from rich.console import Console

    console = Console(file=io.StringIO(), color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).rstrip("\n")


def new_environment(package: str) -> Environment:
    """Return the Jinja environment for the templates of a package such as ``deat_rb.evaluation``."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def clean(value: object) -> object:
        return replace_invisible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["counted"] = counted
    return environment
