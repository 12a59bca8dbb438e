"""The pages' templates, all rendered alike: escaped, strict about names, and without characters that cannot be seen."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment

_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Controls, what reverses the direction of text, and half characters, which UTF-8 cannot write."""


def visible(text: str) -> str:
    """Puts U+FFFD in the place of every character that would not be seen or not be written."""
    return _UNSEEN.sub("\ufffd", text)


def new_environment() -> Environment:
    """Jinja2 for the templates of this package."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def shown(value: object) -> object:
        return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    return Environment(
        loader=PackageLoader("deat_rb"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
