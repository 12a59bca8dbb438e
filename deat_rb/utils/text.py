"""Text that anybody may have written, made fit to be shown; and the pages' template environment."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment


_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Controls, what reverses the direction of text, and half characters, which UTF-8 cannot write."""


def replace_invisible(text: str) -> str:
    """Puts U+FFFD in the place of every character that would not be seen or not be written."""
    return _HIDDEN.sub("\ufffd", text)


def new_environment(package: str) -> Environment:
    """Jinja2 for the templates of a package of ours, such as ``deat_rb.evaluation``."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def shown(value: object) -> object:
        return replace_invisible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    return Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )


_UNSEEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}
"""Unicode's categories of controls, direction marks, unassigned and private characters, surrogates, line ends."""


def printable(text: str, length: int = 400) -> str:
    r"""Makes any text fit to be printed in a terminal: controls and the like as ``\x1b``, what is too long cut."""
    shown = "".join(
        char if unicodedata.category(char) not in _UNSEEN else char.encode("unicode_escape", "replace").decode()
        for char in text[: length + 1]
    )
    return shown if len(text) <= length else f"{shown[:length]}..."
