"""The pages' templates, all rendered alike: escaped, strict about names, and without characters that cannot be seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deat_rb.board_text import visible

if TYPE_CHECKING:
    from jinja2 import Environment


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
